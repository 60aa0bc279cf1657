"""Folders of shards as data: what sampling wrote comes back, and what is broken is named."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fastgen import data
from fastgen.data.shards import find_shards, load_shards

X = np.random.default_rng(0).random((12, 3), dtype=np.float32)


def write(folder, ids, kind="npz", run="r", name=None, **change):
    """A shard by hand."""
    ids = np.asarray(ids)
    path = folder / f"{name or f'{ids[0]:08d}-{ids[-1]:08d}'}.{kind}"
    folder.mkdir(exist_ok=True)
    arrays = {"x": X[ids], "ids": ids, **change}
    if kind == "npz":
        np.savez(path, run=np.array(run), **arrays)
    else:
        save_file({k: torch.tensor(v) for k, v in arrays.items()}, path, {"fastgen": json.dumps({"run": run})})
    return path


@pytest.mark.parametrize("kind", ["npz", "safetensors"])
@pytest.mark.parametrize("parts", [[range(12)], [range(7), range(7, 12)], [range(0, 12, 2), range(1, 12, 2)]])
def test_samples_come_in_the_order_of_their_ids(tmp_path, kind, parts):
    for part in parts:
        write(tmp_path / "run", part, kind)
    assert np.array_equal(load_shards(tmp_path / "run"), X)
    source = data.load(tmp_path / "run")
    assert source.event_shape == (3,)
    assert len(source) + len(data.load(tmp_path / "run", split="test")) == 12
    # the same split as of a file with all of them
    np.save(tmp_path / "all.npy", X)
    assert torch.equal(source.batch(torch.arange(5))[0], data.load(tmp_path / "all.npy").batch(torch.arange(5))[0])


def test_one_file_of_tensors(tmp_path):
    save_file({"x": torch.tensor(X), "y": torch.arange(12) % 2}, tmp_path / "x.safetensors", {"note": "a text is no array"})
    source = data.load(tmp_path / "x.safetensors")
    assert source.num_classes == 2
    np.savez(tmp_path / "x.npz", x=X, y=np.arange(12) % 2)
    for a, b in zip(source.batch(torch.arange(9)), data.load(tmp_path / "x.npz").batch(torch.arange(9)), strict=True):
        assert torch.equal(a, b)


def test_other_folders_are_left_alone(tmp_path):
    (tmp_path / "stats.npz").write_bytes(b"")
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert find_shards(tmp_path) == {}
    with pytest.raises(ValueError, match="has no shards"):
        load_shards(tmp_path)


@pytest.mark.parametrize("kind", ["npz", "safetensors"])
@pytest.mark.parametrize(
    ("ids", "change", "message"),
    [
        (
            range(4, 8),
            {"x": X[4:8, :2]},
            r"00000004-00000007\.\w+ has samples of shape 2, 00000000-00000003\.\w+ beside it has 3",
        ),
        (range(4, 8), {"x": X[4:8].astype(np.float64)}, r"00000004-00000007\.\w+ has dtype torch.float64"),
        (range(4, 8), {"run": "s"}, r"00000004-00000007\.\w+ has run s, 00000000-00000003\.\w+ beside it has r"),
        (range(4, 8), {"x": X[:3]}, r"00000004-00000007\.\w+ has x \[3, 3\] and ids \[4\]"),
        (range(4, 8), {"name": "00000004-00000009"}, r"00000004-00000009\.\w+ holds ids 4 .. 7, not those of its name"),
        (range(3, 8), {}, r"has sample 3 more than once, in 00000000-00000003\.\w+ and 00000003-00000007"),
    ],
)
def test_inconsistent_shards_are_named(tmp_path, kind, ids, change, message):
    write(tmp_path, range(4), kind)
    write(tmp_path, ids, kind, **change)
    with pytest.raises(ValueError, match=message):
        data.load(tmp_path)


@pytest.mark.parametrize("kind", ["npz", "safetensors"])
@pytest.mark.parametrize("kept", [0, 3, 40, 0.5, 0.95])
def test_broken_shards_are_named(tmp_path, kind, kept):
    write(tmp_path, range(4), kind)
    path = write(tmp_path, range(4, 8), kind)
    content = path.read_bytes()
    path.write_bytes(content[: kept if isinstance(kept, int) else int(kept * len(content))])
    with pytest.raises(ValueError, match=rf"cannot read .*{path.name}: \S") as failure:
        data.load(tmp_path)
    assert "\n" not in str(failure.value)


def test_shards_of_two_kinds_or_of_others(tmp_path):
    write(tmp_path, range(4), "npz")
    write(tmp_path, range(4, 8), "safetensors")
    with pytest.raises(ValueError, match=r"00000004-00000007\.safetensors has kind \.safetensors"):
        data.load(tmp_path)
    (tmp_path / "00000004-00000007.safetensors").unlink()
    np.savez(tmp_path / "00000004-00000007.npz", x=X[4:8])
    with pytest.raises(ValueError, match=r"00000004-00000007\.npz has no ids; it has: x"):
        data.load(tmp_path)
