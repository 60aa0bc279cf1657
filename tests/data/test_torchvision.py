from __future__ import annotations

import gzip
import struct

import numpy as np
import pytest
import torch

from fastgen import data
from fastgen.data.torchvision import torchvision_names

RNG = np.random.default_rng(0)


def _idx(values):
    return struct.pack(f">{values.ndim + 1}i", 0x800 + values.ndim, *values.shape) + values.tobytes()


@pytest.mark.parametrize("name", ["MNIST", "FashionMNIST", "KMNIST"])
@pytest.mark.parametrize("packed", [False, True])
def test_idx_sets(tmp_path, name, packed):
    raw = tmp_path / name / "raw"
    raw.mkdir(parents=True)
    written = {}
    for split, stem, n in (("train", "train", 7), ("test", "t10k", 3)):
        x, y = RNG.integers(0, 256, (n, 28, 28), dtype=np.uint8), RNG.integers(0, 10, n, dtype=np.uint8)
        written[split] = x, y
        for kind, values in (("images-idx3-ubyte", x), ("labels-idx1-ubyte", y)):
            content = _idx(values)
            path = raw / f"{stem}-{kind}{'.gz' if packed else ''}"
            path.write_bytes(gzip.compress(content) if packed else content)
    for split, (x, y) in written.items():
        source = data.load(f"torchvision:{name}@{tmp_path}", split=split)
        assert (source.event_shape, source.num_classes, len(source)) == ((1, 28, 28), 10, len(x))
        got = source.batch(torch.arange(len(x)))
        torch.testing.assert_close(got[0][:, 0], torch.from_numpy(x) / 255)
        assert got[1].tolist() == y.tolist()
        assert source.spec == f"torchvision:{name}@{tmp_path}"


def _cifar(folder, files, label_bytes):
    folder.mkdir(parents=True)
    written = []
    for file in files:
        rows = RNG.integers(0, 10, (4, label_bytes + 3072), dtype=np.uint8)
        (folder / file).write_bytes(rows.tobytes())
        written.append(rows)
    return np.concatenate(written)


def test_cifar10(tmp_path):
    rows = _cifar(tmp_path / "cifar-10-batches-bin", [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"], 1)
    train, test = (data.load(f"torchvision:CIFAR10@{tmp_path}", split=s) for s in ("train", "test"))
    assert (len(train), len(test), train.event_shape) == (20, 4, (3, 32, 32))
    x, y = test.batch(torch.arange(4))
    assert y.tolist() == rows[20:, 0].tolist()
    assert x[2, 1, 0, 5] == pytest.approx(rows[22, 1 + 1024 + 5] / 255)


def test_cifar100_takes_the_fine_label(tmp_path):
    rows = _cifar(tmp_path / "cifar-100-binary", ["train.bin", "test.bin"], 2)
    source = data.load(f"torchvision:CIFAR100@{tmp_path}", image_size=16)
    assert source.num_classes == 100
    assert source.event_shape == (3, 16, 16)
    assert source.y.tolist() == rows[:4, 1].tolist()


def test_pickled_cifar_is_refused(tmp_path):
    (tmp_path / "cifar-10-batches-py").mkdir()
    with pytest.raises(ValueError, match=r"pickled Python version.*never loaded.*cifar-10-batches-bin"):
        data.load(f"torchvision:CIFAR10@{tmp_path}")


def test_stl10_is_stored_by_columns(tmp_path):
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    x = RNG.integers(0, 256, (2, 3, 96, 96), dtype=np.uint8)
    (folder / "train_X.bin").write_bytes(x.transpose(0, 1, 3, 2).tobytes())
    (folder / "train_y.bin").write_bytes(bytes([1, 10]))
    source = data.load(f"torchvision:STL10@{tmp_path}")
    assert source.y.tolist() == [0, 9]
    assert torch.equal(source.x, torch.from_numpy(x))


def test_damage_is_named(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    spec = f"torchvision:MNIST@{tmp_path}"
    with pytest.raises(FileNotFoundError, match="train-images-idx3-ubyte"):
        data.load(spec)
    whole = _idx(np.zeros((3, 28, 28), np.uint8))
    images = raw / "train-images-idx3-ubyte"
    for content, message in (
        (whole[:-1], "should hold 3 x 28 x 28 bytes after its header, it holds 2351"),
        (b"", "is not an IDX file"),
        (b"\0" * 40, "is not an IDX file"),
    ):
        images.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            data.load(spec)
    images.unlink()
    images.with_suffix(".gz").write_bytes(gzip.compress(whole)[:-12])
    with pytest.raises(ValueError, match=r"cannot read .*images-idx3-ubyte.gz"):
        data.load(spec)
    (tmp_path / "stl10_binary").mkdir()
    (tmp_path / "stl10_binary" / "train_X.bin").write_bytes(b"123")
    with pytest.raises(ValueError, match="should hold rows of 27648 bytes, it holds 3 bytes"):
        data.load(f"torchvision:STL10@{tmp_path}")


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("torchvision:MNIST", ValueError, "expected torchvision:NAME@ROOT"),
        ("torchvision:SVHN@.", ValueError, "cannot read torchvision's 'SVHN'"),
        ("torchvision:MNIST@/no/such/folder", FileNotFoundError, "no such folder: /no/such/folder"),
        ("CIFAR10", ValueError, "did you mean 'torchvision:CIFAR10@FOLDER'"),
    ],
)
def test_wrong_specs(spec, error, message):
    with pytest.raises(error, match=message):
        data.load(spec)


def test_names():
    assert set(torchvision_names()) == {"MNIST", "FashionMNIST", "KMNIST", "CIFAR10", "CIFAR100", "STL10"}
