from __future__ import annotations

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import fastgen
from fastgen.nn.model import Model, Phase
from fastgen.training import NonFiniteLoss, RunDir, checkpoint, fit, load, resume
from fastgen.training.log import read_metrics
from tests.training import worker as worker_module
from tests.training.tiny_models import Adversarial, TinyConfig, labelled_data, make_duel, make_tiny

OPTIONS = {"batch_size": 8, "ema": 0.9, "checkpoint_every": 10, "log_every": 7, "sample_every": 0, "device": "cpu"}


def tensors_of(folder):
    return checkpoint.read(RunDir(Path(folder)).state)[0]


def losses_of(folder):
    timings = ("seconds", "samples_per_second")
    return [{k: v for k, v in line.items() if k not in timings} for line in read_metrics(Path(folder) / "metrics.jsonl")]


def assert_same_run(a, b):
    left, right = tensors_of(a), tensors_of(b)
    assert left.keys() == right.keys()
    assert any(name.startswith("ema/") for name in left)
    assert any(name.endswith("exp_avg_sq") for name in left)
    for name in left:
        assert torch.equal(left[name], right[name]), name
    assert losses_of(a) == losses_of(b)


def worker(*arguments, **environment):
    return subprocess.Popen(
        [sys.executable, "-m", "tests.training.worker", *map(str, arguments)],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """60 steps without a break."""
    folder = tmp_path_factory.mktemp("straight")
    fit(make_tiny(), labelled_data(), steps=60, out=folder, **OPTIONS)
    return folder


def test_training_lowers_the_loss_and_writes_a_run(straight):
    lines = read_metrics(straight / "metrics.jsonl")
    assert [line["step"] for line in lines] == [7, 14, 21, 28, 35, 42, 49, 56, 60]
    assert lines[-1]["train/loss"] < lines[0]["train/loss"]
    assert lines[-1].keys() == {"step", "train/loss", "train/kl", "seconds", "samples_per_second"}
    config = json.loads((straight / "config.json").read_text())
    assert config["model"] == "tiny"
    assert config["config"]["event_shape"] == [5]
    assert config["fit"]["batch_size"] == 8
    assert (straight / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert not list(straight.glob(".*"))


@pytest.mark.parametrize("cut", [30, 33])
def test_resume_reaches_the_same_bits(straight, tmp_path, cut):
    out = tmp_path / "run"
    fit(make_tiny(), labelled_data(), steps=cut, out=out, **OPTIONS)
    torch.manual_seed(99)  # nothing outside the run may matter
    model = make_tiny()
    for p in model.parameters():
        p.data.fill_(7.0)
    result = fit(model, labelled_data(), steps=60, out=out, resume=True, **OPTIONS)
    assert result.steps == 60
    assert_same_run(straight, out)
    assert result.metrics["train/loss"] == losses_of(straight)[-1]["train/loss"]


def test_resume_needs_the_last_checkpoint_alone(straight, tmp_path):
    """A run that died at step 37 goes on from step 30, and forgets what it logged later."""
    out = tmp_path / "run"

    def die(state):
        if state.step == 37:
            raise KeyError("dead")

    with pytest.raises(KeyError, match="dead"):
        fit(make_tiny(), labelled_data(), steps=60, out=out, hooks=[die], **OPTIONS)
    assert losses_of(out)[-1]["step"] == 35
    (out / "metrics.jsonl").open("a").write('{"step": 36, "tr')  # a line cut short
    fit(make_tiny(), labelled_data(), steps=60, out=out, resume=True, **OPTIONS)
    assert_same_run(straight, out)


def test_batches_and_noise_are_those_of_the_seed(tmp_path):
    def weights(seed):
        model = make_tiny()
        fit(model, labelled_data(), steps=5, seed=seed, device="cpu")
        return torch.cat([p.flatten() for p in model.parameters()])

    assert torch.equal(weights(3), weights(3))
    assert not torch.equal(weights(3), weights(4))


def test_the_callers_generator_is_left_alone():
    model = make_tiny()
    before = torch.get_rng_state()
    fit(model, labelled_data(), steps=3, device="cpu")
    assert torch.equal(torch.get_rng_state(), before)


def test_shuffled_loader_resumes(tmp_path):
    def loader():
        return DataLoader(TensorDataset(*labelled_data()), batch_size=8, shuffle=True)

    class Wrapped:  # without __len__ and __getitem__: a plain iterable of batches
        def __iter__(self):
            return iter(loader())

    for out, cuts in (("a", [20]), ("b", [9, 20])):
        for steps in cuts:
            fit(make_tiny(), Wrapped(), steps=steps, out=tmp_path / out, resume=True, **OPTIONS)
    assert_same_run(tmp_path / "a", tmp_path / "b")


def test_a_stream_that_ends_for_good_is_named():
    x, _ = labelled_data()
    with pytest.raises(ValueError, match="no more batches"):
        fit(make_tiny(), (x[i : i + 5] for i in (0, 5)), steps=3, device="cpu")


def test_an_old_run_is_not_overwritten(straight):
    with pytest.raises(ValueError, match="holds a run at step 60"):
        fit(make_tiny(), labelled_data(), steps=70, out=straight, **OPTIONS)


def test_nothing_to_do(straight):
    before = (straight / "metrics.jsonl").read_bytes()
    model = make_tiny()
    result = fit(model, labelled_data(), steps=60, out=straight, resume=True, **OPTIONS)
    assert result.steps == 60
    assert "nothing to do" in result.notes[0]
    assert result.metrics["train/loss"] == losses_of(straight)[-1]["train/loss"]
    assert (straight / "metrics.jsonl").read_bytes() == before
    for a, b in zip(model.parameters(), load(straight, device="cpu").parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 9}, "batch_size was 8, now it is 9"),
        ({"seed": 1}, "seed was 0"),
        ({"ema": None}, "ema was 0.9"),
        ({"precision": "bfloat16"}, "precision was 'float32'"),
    ],
)
def test_resume_of_another_run_is_refused(straight, change, message):
    with pytest.raises(ValueError, match=message):
        fit(make_tiny(), labelled_data(), steps=70, out=straight, resume=True, **{**OPTIONS, **change})


def test_resume_with_another_model_or_data_is_refused(straight):
    with pytest.raises(ValueError, match="model option hidden was 16, now it is 8"):
        fit(make_tiny(hidden=8), labelled_data(), steps=70, out=straight, resume=True, **OPTIONS)
    with pytest.raises(ValueError, match="fingerprint"):
        fit(make_tiny(), labelled_data(51), steps=70, out=straight, resume=True, **OPTIONS)


def test_resume_from_the_directory_alone(tmp_path, straight):
    out = tmp_path / "run"
    x, _ = labelled_data()
    (tmp_path / "data").mkdir()
    file = tmp_path / "data" / "x.npy"
    np.save(file, x.numpy())
    fit(make_tiny(), str(file), steps=12, out=out, **OPTIONS)
    assert resume(out, steps=20, device="cpu").steps == 20
    assert checkpoint.read_meta(out / "state.safetensors")["step"] == 20
    with pytest.raises(ValueError, match="came from Python"):
        resume(straight)
    (out / "state.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"state\.safetensors is missing"):
        resume(out)


def test_name_of_a_preset(tmp_path):
    fit(make_tiny(hidden=32), labelled_data(), steps=1, out=tmp_path, device="cpu", sample_every=0)
    assert json.loads((tmp_path / "config.json").read_text())["model"] == "tiny-wide"


def test_the_model_ends_with_the_weights_to_use(tmp_path):
    model = make_tiny()
    fit(model, labelled_data(), steps=12, out=tmp_path, **OPTIONS)
    assert not model.training
    stored = tensors_of(tmp_path)
    for name, p in model.named_parameters():
        assert torch.equal(p, stored[f"ema/module.{name}"])
        assert p.grad is None
    assert not torch.equal(stored["model/decoder.weight"], stored["ema/module.decoder.weight"])


def test_non_finite_loss_keeps_the_last_good_state(tmp_path):
    with pytest.raises(NonFiniteLoss, match="step 15, phase 'train': the loss part 'loss' is nan") as caught:
        fit(make_tiny(poison_at=14), labelled_data(), steps=60, out=tmp_path, **OPTIONS)
    assert "\n" not in str(caught.value)
    tensors, meta = checkpoint.read(tmp_path / "state.safetensors")
    assert meta["step"] == 10
    assert all(t.isfinite().all() for name, t in tensors.items() if t.is_floating_point())
    load(tmp_path, device="cpu")


def test_non_finite_weights_are_never_saved(tmp_path):
    """The loss of the step before a checkpoint is fine, its gradient is not."""

    def poison(state):
        if state.step == 20:
            state.model.mean.weight.data[0, 0] = torch.inf

    with pytest.raises(NonFiniteLoss, match=r"step 20, phase 'train': the weights 'mean\.weight'"):
        fit(make_tiny(), labelled_data(), steps=60, out=tmp_path, hooks=[poison], **OPTIONS)
    assert checkpoint.read_meta(tmp_path / "state.safetensors")["step"] == 10


def test_phases_alternate_with_their_own_parameters(tmp_path):
    model = make_duel()
    seen = []

    def look(state):
        seen.append((state.step, sorted(state.metrics), model.generator.weight.detach().clone()))

    fit(model, labelled_data(), steps=7, out=tmp_path / "a", **{**OPTIONS, "log_every": 3}, hooks=[look])
    round_ = ["critic", "clip", "critic", "clip"]
    assert model.calls == [*round_, *round_, *round_, "generator"] * 2 + round_
    assert [s for s, names, _ in seen if "generator/loss" in names] == [3, 6]
    for (step, _, before), (_, _, after) in itertools.pairwise(seen):
        assert torch.equal(before, after) == ((step + 1) % 3 != 0)
    assert all(p.requires_grad for p in model.parameters())

    for steps in (4, 7):
        fit(make_duel(), labelled_data(), steps=steps, out=tmp_path / "b", resume=True, **{**OPTIONS, "log_every": 3})
    a, b = tensors_of(tmp_path / "a"), tensors_of(tmp_path / "b")
    assert a.keys() == b.keys()
    assert "optimizer/critic/critic.weight/momentum_buffer" in a
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert losses_of(tmp_path / "a") == losses_of(tmp_path / "b")


class _Odd(Model):
    def __init__(self, result):
        super().__init__(TinyConfig(event_shape=(5,)))
        self.w = torch.nn.Parameter(torch.zeros(()))
        self.result = result

    def phases(self):
        return [Phase("only", self.parameters(), lambda batch, key: self.result, torch.optim.SGD)]


def test_a_loss_must_be_a_named_tuple_of_scalars():
    with pytest.raises(TypeError, match="phase 'only' must be a named tuple of scalars, got Tensor"):
        fit(_Odd(torch.zeros(())), labelled_data(), steps=1, device="cpu")
    with pytest.raises(TypeError, match=r"loss part 'loss' of phase 'only' must be a scalar tensor, got \(3,\)"):
        fit(_Odd(Adversarial(torch.zeros(3))), labelled_data(), steps=1, device="cpu")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"ema": 1.0}, "ema must be in"),
        ({"precision": "float16"}, "precision must be 'float32' or 'bfloat16', got 'float16'"),
        ({"resume": True}, "resume=True needs out"),
        ({"tensorboard": True}, "tensorboard=True needs out"),
    ],
)
def test_bad_options(option, message):
    with pytest.raises(ValueError, match=message):
        fit(make_tiny(), labelled_data(), **{"steps": 1, "device": "cpu", **option})


def test_wrong_data_shape():
    with pytest.raises(ValueError, match=r"shape \(4,\), the model takes \(5,\)"):
        fit(make_tiny(), torch.zeros(3, 4), steps=1, device="cpu")


def test_bfloat16_and_compile_reach_the_loss(monkeypatch):
    seen = []
    compiled = []
    model = make_tiny()
    model.decoder.register_forward_hook(lambda module, args, y: seen.append(y.dtype))
    monkeypatch.setattr(torch, "compile", lambda f: compiled.append(f) or f)
    fit(model, labelled_data(), steps=1, precision="bfloat16", compile=True, device="cpu")
    assert seen == [torch.bfloat16]
    assert compiled == [model.loss]
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_pictures_and_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    model = make_tiny(event_shape=(2,), num_classes=None)
    x = labelled_data(d=2)[0]
    result = fit(model, x, steps=20, out=tmp_path / "a", **{**OPTIONS, "sample_every": None}, tensorboard=True)
    names = [p.name for p in sorted((tmp_path / "a" / "samples").iterdir())]
    assert names == ["step-000010.png", "step-000020.png"]
    assert result.notes == ()
    assert list((tmp_path / "a" / "tensorboard").iterdir())
    fit(make_tiny(event_shape=(2,), num_classes=None), x, steps=20, out=tmp_path / "b", **OPTIONS)
    assert_same_run(tmp_path / "a", tmp_path / "b")  # drawing changes nothing


def test_missing_picture_packages_are_noted(tmp_path, monkeypatch):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else real(name))
    result = fit(make_tiny(), labelled_data(), steps=1, out=tmp_path, device="cpu")
    assert result.notes == ("loss.png was not drawn: matplotlib is missing (pip install 'fastgen-torch[cli]')",)
    assert not (tmp_path / "loss.png").exists()


def test_progress_bar(capsys):
    fit(make_tiny(), labelled_data(), steps=5, device="cpu", progress=True)
    shown = capsys.readouterr().err
    assert "5/5" in shown
    assert "loss " in shown
    assert "step/s" in shown
    fit(make_tiny(), labelled_data(), steps=5, device="cpu")
    assert capsys.readouterr().err == ""  # no terminal


def test_survives_sigkill_at_any_instant(tmp_path):
    process = worker("kill", tmp_path / "run", 40)
    output, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    last = int(output)
    assert last > 20
    for folder in ("run", "straight"):  # with the threads of the killed processes: sums round by their number
        finish = worker("finish", tmp_path / folder, last + 3)
        _, errors = finish.communicate(timeout=600)
        assert finish.returncode == 0, errors
    assert_same_run(tmp_path / "run", tmp_path / "straight")
    assert not list((tmp_path / "run").glob(".*"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_save_and_end_cleanly(tmp_path, number):
    out = tmp_path / "run"
    process = worker("train", out, 1000, 0.02)
    for line in process.stdout:
        if int(line) == 4:
            process.send_signal(number)
            break
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    word, steps = output.split()[-2:]
    assert word == "interrupted"
    assert 4 <= int(steps) < 1000
    assert checkpoint.read_meta(out / "state.safetensors")["step"] == int(steps)
    load(out, device="cpu")


def test_two_processes_train_as_one(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [worker("distributed", tmp_path / "two", 20, **group, RANK=r, LOCAL_RANK=r) for r in "01"]
    worker_module.distributed(tmp_path / "one", 20)
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    for model in ("tiny", "duel"):
        one, two = tensors_of(tmp_path / "one" / model), tensors_of(tmp_path / "two" / model)
        assert {"generator/cpu/0", "generator/cpu/1"} <= two.keys()
        for name, value in one.items():
            if not name.startswith("generator/"):
                torch.testing.assert_close(two[name], value, rtol=0, atol=1e-5, msg=name)
        for a, b in zip(losses_of(tmp_path / "one" / model), losses_of(tmp_path / "two" / model), strict=True):
            assert a == pytest.approx(b, abs=1e-4)


def test_public_names():
    assert fastgen.fit is fit
    assert fastgen.load is load


def test_a_phase_trains_parameters_of_the_model_only():
    model = make_tiny()
    stray = [torch.nn.Parameter(torch.zeros(1))]
    model.phases = lambda: [Phase("stray", stray, model.loss, torch.optim.SGD)]
    with pytest.raises(ValueError, match="phase 'stray' trains a tensor that is not among the model's parameters"):
        fit(model, labelled_data(), steps=1, device="cpu")
