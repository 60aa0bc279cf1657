"""Input that cannot be used: one line that names the culprit, exit code 2, no traceback. Defects keep theirs."""

from __future__ import annotations

import builtins
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fastgen
from fastgen import cli
from fastgen.cli import main


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with unusable data of each kind."""
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("corrupt/a").mkdir(parents=True)
    Path("corrupt/a/broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnot really")
    np.save("cube.npy", np.zeros((2, 3, 4, 5, 6), np.float32))
    np.save("nan.npy", np.full((8, 4), np.nan, np.float32))
    np.save("fine.npy", np.random.default_rng(0).random((40, 4), np.float32))
    Path("text.npy").write_text("hello")
    Path("notrun").mkdir()
    Path("badrun").mkdir()
    Path("otherrun").mkdir()
    Path("otherrun/config.json").write_text("{}")
    Path("badrun/config.json").write_text("{")
    np.save("thin.npy", np.random.default_rng(0).random((40, 1), np.float32))
    Path("nopicture").mkdir()
    Path("nopicture/a.png").write_text("hello")
    Path("sizes").mkdir()
    Image.fromarray(np.zeros((8, 8), np.uint8)).save("grey.png")
    for i in range(6):
        Image.fromarray(np.zeros((8 + i, 8), np.uint8)).save(f"sizes/{i}.png")
    Path("shards").mkdir()
    np.savez("shards/00000000-00000003.npz", x=np.zeros((4, 2)), ids=np.arange(4), run="r")
    Path("shards/00000004-00000007.npz").write_bytes(Path("shards/00000000-00000003.npz").read_bytes()[:200])
    return tmp_path


TRAIN = ["--steps", "2", "--batch-size", "4", "--out", "run"]

CASES = {
    "unknown command": (["trian"], ["trian", "train"]),
    "unknown option": (["train", "vae", "--stpes", "3"], ["--stpes"]),
    "option of the wrong type": (["train", "vae", "--steps", "many"], ["--steps"]),
    "option out of range": (["train", "vae", "--steps", "0"], ["--steps", "1"]),
    "no model": (["train"], ["MODEL", "--resume"]),
    "unknown model": (["train", "vea", *TRAIN], ["'vea'", "vae"]),
    "unknown data": (["train", "vae", "--data", "mnist5kk", *TRAIN], ["mnist5kk", "mnist5k"]),
    "missing path": (["train", "vae", "--data", "no/such/folder", *TRAIN], ["no/such/folder"]),
    "empty folder": (["train", "vae", "--data", "empty", *TRAIN], ["empty"]),
    "corrupt image": (["train", "vae", "--data", "corrupt", *TRAIN], ["broken.png"]),
    "array of a wrong shape": (["train", "vae", "--data", "cube.npy", *TRAIN], ["cube.npy", "5"]),
    "array with NaN": (["train", "vae", "--data", "nan.npy", *TRAIN], ["nan.npy"]),
    "no array": (["train", "vae", "--data", "text.npy", *TRAIN], ["text.npy"]),
    "unknown config field": (["train", "vae", "--data", "fine.npy", "--set", "latnet=2", *TRAIN], ["'latnet'", "'latent'"]),
    "config value of a wrong type": (["train", "vae", "--data", "fine.npy", "--set", "latent=two", *TRAIN], ["latent", "two"]),
    "setting without a value": (["train", "vae", "--data", "fine.npy", "--set", "latent", *TRAIN], ["key=value", "'latent'"]),
    "unknown precision": (["train", "vae", "--data", "fine.npy", "--precision", "float8", *TRAIN], ["precision", "float8"]),
    "ema out of range": (["train", "vae", "--data", "fine.npy", "--ema", "2", *TRAIN], ["ema", "2"]),
    "unknown device": (["train", "vae", "--data", "fine.npy", "--device", "gpu", *TRAIN], ["device", "gpu"]),
    "resume of nothing": (["train", "--resume", "nowhere"], ["nowhere"]),
    "resume of no run": (["train", "--resume", "notrun"], ["notrun", "config.json"]),
    "resume and a model": (["train", "vae", "--resume", "notrun"], ["--resume", "MODEL"]),
    "resume and new settings": (["train", "--resume", "notrun", "--set", "latent=3"], ["--resume", "--set"]),
    "sample of nothing": (["sample", "nowhere"], ["nowhere"]),
    "sample of a corrupt run": (["sample", "badrun"], ["badrun", "corrupt"]),
    "sample ids": (["sample", "notrun", "--ids", "7:3"], ["--ids", "'7:3'"]),
    "sample ids and count": (["sample", "notrun", "-n", "3", "--ids", "0:3"], ["-n", "--ids"]),
    "evaluate nothing": (["evaluate", "nowhere"], ["nowhere"]),
    "list of an unknown kind": (["list", "colours"], ["colours"]),
    "steps below one": (["train", "vae", "--data", "fine.npy", "--steps", "-1"], ["--steps", "1"]),
    "one bin": (["train", "nsf", "--data", "fine.npy", "--set", "bins=1", *TRAIN], ["bins", "2", "got 1"]),
    "a flow of one feature": (["train", "nsf", "--data", "thin.npy", *TRAIN], ["2 features", "got 1"]),
    "a device without numbers": (["train", "vae", "--data", "fine.npy", "--device", "meta", *TRAIN], ["--device", "meta"]),
    "a learning rate below zero": (
        ["train", "vae", "--data", "fine.npy", "--set", "learning_rate=-1", *TRAIN],
        ["learning_rate", "-1"],
    ),
    "a run within a file": (["train", "vae", "--data", "fine.npy", "--steps", "1", "--out", "fine.npy/run"], ["fine.npy"]),
    "a picture as data": (["train", "vae", "--data", "grey.png", *TRAIN], ["grey.png", ".npz"]),
    "a picture that is none": (["train", "vae", "--data", "nopicture", *TRAIN], ["nopicture/a.png", "not an image"]),
    "pictures of two sizes": (["train", "vae", "--data", "sizes", *TRAIN], ["sizes/", "set image_size"]),
    "parity with nothing": (["parity"], ["fastgen parity diffusers PATH"]),
    "parity of a run": (["parity", "diffusers", "otherrun"], ["otherrun", "no model of diffusers", "UNet2DModel"]),
    "bench of no number": (["bench", "--seconds", "abc"], ["--seconds must be a number of at least 0, got 'abc'"]),
    "bench of no rounds": (["bench", "--rounds", "0"], ["--rounds must be a whole number of at least 1, got '0'"]),
    "bench of an unknown option": (["bench", "--ops", "x", "--opp"], ["--opp"]),
    "bench of an unknown op": (["bench", "--op", "nromal"], ["--op", "normal", "'nromal'"]),
    "bench into a folder": (["bench", "--json", "empty"], ["--json must be a file, got 'empty', where there is a folder"]),
    "bench within a file": (["bench", "--json", "fine.npy/x.json"], ["--json must be a file", "fine.npy"]),
    "a broken shard": (["train", "vae", "--data", "shards", *TRAIN], ["shards/00000004-00000007.npz"]),
}


@pytest.mark.parametrize("case", CASES)
def test_one_line_that_names_the_culprit(case: str, places: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _refused(*CASES[case], capsys)


def _refused(argv: list[str], culprits: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert err.startswith("fastgen: error: ")
    assert err.count("\n") == 1
    for culprit in culprits:
        assert culprit in err


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a flow of the plane and one of a diffusion model without classes, and what may become of a run."""
    folder = tmp_path_factory.mktemp("runs")
    for name, model in (("flow", "nsf"), ("diffusion", "ddpm")):
        torch.manual_seed(0)
        made = fastgen.create(model, event_shape=(2,))
        fastgen.fit(made, "moons", steps=1, batch_size=8, out=folder / name, sample_every=0, progress=False)
    for name, file in (("half", "model.safetensors"), ("halfstate", "state.safetensors"), ("halfconfig", "config.json")):
        shutil.copytree(folder / "flow", folder / name)
        content = (folder / name / file).read_bytes()
        (folder / name / file).write_bytes(content[: len(content) // 2])
    shutil.copytree(folder / "flow", folder / "bare")
    (folder / "bare" / "model.safetensors").unlink()
    (folder / "file").write_text("in the way")
    np.save(folder / "wide.npy", np.zeros((9, 3), np.float32))
    return folder


OF_RUNS = {
    "weights cut in half": (["sample", "half"], ["half/model.safetensors", "corrupt"]),
    "config cut in half": (["sample", "halfconfig"], ["halfconfig/config.json", "corrupt"]),
    "state cut in half": (["train", "--resume", "halfstate", "--steps", "9"], ["halfstate/state.safetensors", "corrupt"]),
    "no weights": (["evaluate", "bare"], ["bare/model.safetensors", "missing"]),
    "a negative number": (["sample", "flow", "-n", "-3"], ["-n"]),
    "negative ids": (["sample", "flow", "--ids=-1:3"], ["--ids", "'-1:3'"]),
    "an unknown suffix": (["sample", "flow", "--out", "x.jpg"], ["x.jpg", ".png"]),
    "a file in a file": (["sample", "flow", "--out", "file/x.npz"], ["Not a directory: file"]),
    "a folder in a file": (["sample", "flow", "--out", "file/x/"], ["file"]),
    "a folder that is a file": (["sample", "flow", "--out", "file"], ["file"]),
    "labels of a flow": (["sample", "flow", "--set", "labels=3"], ["'labels'", "context"]),
    "labels without classes": (["sample", "diffusion", "-n", "2", "--set", "labels=3"], ["labels", "num_classes"]),
    "guidance without classes": (["sample", "diffusion", "-n", "2", "--set", "guidance=2"], ["guidance", "num_classes"]),
    "a threshold above 1": (["sample", "diffusion", "-n", "2", "--set", "threshold=3"], ["threshold", "(0, 1]", "3.0"]),
    "no steps": (["sample", "diffusion", "-n", "2", "--set", "steps=0"], ["steps", "0"]),
    "an unknown sampler": (["sample", "diffusion", "-n", "2", "--set", "sampler=dimm"], ["'dimm'", "ddim"]),
    "a picture for a flow": (["sample", "flow", "--from", "file"], ["--from", "NSF"]),
    "samples of another shape": (["evaluate", "flow", "--data", "wide.npy"], ["wide.npy", "(3,)", "(2,)"]),
    "an unknown split": (["evaluate", "flow", "--split", "all"], ["split", "'all'"]),
}


@pytest.mark.parametrize("case", OF_RUNS)
def test_one_line_about_runs(
    case: str, runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(runs)
    _refused(*OF_RUNS[case], capsys)


def test_what_cannot_be_written_is_said_before_sampling(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(runs)
    model = fastgen.load("flow")
    monkeypatch.setattr(model, "sample", lambda *args, **kwargs: pytest.fail("sampled first"))
    for out in ("file/x.npz", "file/x/y.safetensors"):
        with pytest.raises(OSError, match="Not a directory"):
            fastgen.sample(model, 4, out=out)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(PermissionError, match=r"Permission denied: 'new'"):
        fastgen.sample(model, 4, out="new/x.npz")


def test_no_run_directory_is_left_behind(places: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "vae", "--data", "fine.npy", "--set", "latnet=2", *TRAIN]) == 2
    assert not Path("run").exists()


def test_debug_shows_the_traceback(places: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTGEN_DEBUG", "1")
    assert main(["sample", "nowhere"]) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.splitlines()[-1].startswith("fastgen: error: ")


def test_a_defect_keeps_its_traceback(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ValueError that no check of fastgen raised is a defect, not bad input."""
    monkeypatch.setattr(fastgen, "load", lambda *args, **kwargs: int("defect"), raising=False)
    with pytest.raises(ValueError, match="defect"):
        main(["sample", "nowhere"])


def test_interrupt(places: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(fastgen, "load", interrupt, raising=False)
    assert main(["sample", "nowhere"]) == 130
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_missing_packages_are_named(missing: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: object, **kwargs: object) -> object:
        if name.partition(".")[0] == missing:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", without)
    assert main(["info"]) == 2
    assert capsys.readouterr().err == f"fastgen: error: the command line needs {missing}: pip install 'fastgen-torch[cli]'\n"


def test_bench_without_a_checkout(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from fastgen.cli import bench

    monkeypatch.setattr(bench, "__file__", str(tmp_path / "site-packages/fastgen/cli/bench.py"))
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    assert main(["bench", "--op", "normal"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "source checkout" in err


def test_the_module_runs_as_a_program(places: Path) -> None:
    root = Path(cli.__file__).parents[2]
    command = [sys.executable, "-m", "fastgen", "train", "vea"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env={"PYTHONPATH": str(root)})
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "did you mean vae" in done.stderr
