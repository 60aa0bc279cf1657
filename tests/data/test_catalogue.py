from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fastgen import data
from fastgen.data.toy import toy_names


def test_names_and_descriptions():
    names = data.names()
    assert {"mnist5k", "digits", "glyphs", *toy_names()} == set(names)
    for name, summary in names.items():
        assert summary
        assert "\n" not in summary
        assert data.describe(name).origin


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("mnist", ValueError, "unknown data set 'mnist'; did you mean mnist5k"),
        ("qqqq", ValueError, "unknown data set 'qqqq'; known: mnist5k, "),
        ("no/such", FileNotFoundError, "no such file or folder: no/such"),
        ("nosuch.npz", FileNotFoundError, "no such file or folder: nosuch.npz"),
        (Path("nosuch"), FileNotFoundError, "no such file or folder: nosuch"),
    ],
)
def test_wrong_specs(spec, error, message):
    with pytest.raises(error, match=message):
        data.load(spec)


@pytest.mark.parametrize("name", ["checkerboard", "nosuch"])
def test_wrong_split(name):
    with pytest.raises(ValueError, match="split must be 'train' or 'test', got 'valid'"):
        data.load(name, split="valid")


def test_a_name_wins_over_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("moons", np.zeros((20, 3)))
    Path("moons.npy").rename("moons")
    assert data.load("moons").event_shape == (2,)
    with pytest.raises(ValueError, match="expected a folder of images"):
        data.load("./moons")


def test_spec_leads_back_to_the_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("a.npy", np.arange(40.0).reshape(20, 2))
    source = data.load("a.npy")
    assert source.spec == str(tmp_path / "a.npy")
    monkeypatch.chdir("/")
    assert data.load(source.spec).fingerprint == source.fingerprint
    assert data.load("moons").spec == "moons"
    assert data.as_source(np.zeros((3, 2))).spec is None
