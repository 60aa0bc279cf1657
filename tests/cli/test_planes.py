"""Models of the plane from the command line: samples beside the data, the density."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fastgen.cli import main

Image = pytest.importorskip("PIL.Image")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("planes") / "run"
    tiny = ["--set", "layers=2", "--set", "hidden=8", "--steps", "2", "--batch-size", "16"]
    assert main(["train", "nsf", "--data", "moons", "--out", str(path), *tiny]) == 0
    return path


def test_samples_beside_data(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", str(run), "--out", str(tmp_path / "points.png")]) == 0
    assert "2,000 samples" in capsys.readouterr().out
    assert Image.open(tmp_path / "points.png").size == (1200, 636)
    assert main(["sample", str(run), "-n", "30", "--out", str(tmp_path / "x.npz")]) == 0
    assert np.load(tmp_path / "x.npz")["x"].shape == (30, 2)


def test_data_that_are_gone_are_left_out(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(60, 2)).astype(np.float32))
    out = str(tmp_path / "run")
    assert main(["train", "nice", "--data", str(tmp_path / "x.npy"), "--out", out, "--steps", "1"]) == 0
    (tmp_path / "x.npy").unlink()
    assert main(["sample", out, "-n", "9", "--out", str(tmp_path / "points.png")]) == 0
    assert Image.open(tmp_path / "points.png").size == (600, 636)


def test_density_plot(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(run), "-n", "50", "--plot", str(tmp_path / "p.png")]) == 0
    out = capsys.readouterr().out
    assert "log-likelihood" in out
    assert "p.png" in out
    assert Image.open(tmp_path / "p.png").size == (2520, 636)


def test_density_plot_of_anything_else_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "x.npy", np.zeros((40, 3), np.float32))
    out = str(tmp_path / "run")
    assert main(["train", "nice", "--data", str(tmp_path / "x.npy"), "--out", out, "--steps", "1"]) == 0
    capsys.readouterr()
    assert main(["evaluate", out, "--plot", str(tmp_path / "p.png")]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "model of the plane" in err
    assert not (tmp_path / "p.png").exists()
