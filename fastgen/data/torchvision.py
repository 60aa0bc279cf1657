"""torchvision's data sets, read from the files that torchvision once downloaded; torchvision itself is not needed.

``torchvision:NAME@ROOT``, where ROOT is the ``root`` that torchvision was given. Nothing is downloaded and nothing is
unpickled: CIFAR is read in its binary version.
"""

from __future__ import annotations

import dataclasses
import gzip
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastgen.data.source import ArraySource, check_split

__all__ = ["load_torchvision", "torchvision_names"]

Arrays = tuple[NDArray[Any], NDArray[Any]]

_IDX_IMAGES, _IDX_LABELS = 0x803, 0x801


def _find(path: Path) -> Path:
    """``path``, or the same with ``.gz``."""
    for candidate in (path, path.with_name(path.name + ".gz")):
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(f"no such file: {path} (nor {path.name}.gz)")


def _read(path: Path) -> bytes:
    if path.suffix != ".gz":
        return path.read_bytes()
    try:
        return gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"cannot read {path}: {error}") from error


def _read_idx(path: Path, magic: int) -> NDArray[np.uint8]:
    """An IDX file of bytes: magic number, sizes as big-endian int32, values."""
    path = _find(path)
    raw = _read(path)
    dims = magic & 0xFF
    header = np.frombuffer(raw[: 4 * (dims + 1)], dtype=">i4")
    if len(header) != dims + 1 or header[0] != magic:
        raise ValueError(f"{path} is not an IDX file of {dims} axes of bytes")
    shape = tuple(int(n) for n in header[1:])
    values = np.frombuffer(raw, dtype=np.uint8, offset=4 * (dims + 1))
    if min(shape) < 0 or values.size != np.prod(shape):
        expected = " x ".join(map(str, shape))
        raise ValueError(f"{path} should hold {expected} bytes after its header, it holds {values.size}")
    return values.reshape(shape)


def _read_rows(path: Path, row: int) -> NDArray[np.uint8]:
    """A binary file of equal rows."""
    path = _find(path)
    values = np.frombuffer(_read(path), dtype=np.uint8)
    if values.size == 0 or values.size % row:
        raise ValueError(f"{path} should hold rows of {row} bytes, it holds {values.size} bytes")
    return values.reshape(-1, row)


def _mnist(folder: str) -> Callable[[Path, str], Arrays]:
    def read(root: Path, split: str) -> Arrays:
        stem = root / folder / "raw" / ("train" if split == "train" else "t10k")
        images = _read_idx(stem.with_name(f"{stem.name}-images-idx3-ubyte"), _IDX_IMAGES)
        return images, _read_idx(stem.with_name(f"{stem.name}-labels-idx1-ubyte"), _IDX_LABELS)

    return read


def _cifar(binary: str, pickled: str, files: dict[str, list[str]], label_bytes: int) -> Callable[[Path, str], Arrays]:
    def read(root: Path, split: str) -> Arrays:
        folder = root / binary
        if not folder.is_dir() and (root / pickled).is_dir():
            raise ValueError(
                f"{root / pickled} is the pickled Python version, which is never loaded: "
                f"unpack the binary version of the data set as {folder}"
            )
        rows = np.concatenate([_read_rows(folder / file, label_bytes + 3072) for file in files[split]])
        return rows[:, label_bytes:].reshape(-1, 3, 32, 32), rows[:, label_bytes - 1]

    return read


def _stl10(root: Path, split: str) -> Arrays:
    folder = root / "stl10_binary"
    images = _read_rows(folder / f"{split}_X.bin", 3 * 96 * 96).reshape(-1, 3, 96, 96).transpose(0, 1, 3, 2)
    return images, _read_rows(folder / f"{split}_y.bin", 1)[:, 0] - 1


@dataclasses.dataclass(frozen=True)
class _Set:
    read: Callable[[Path, str], Arrays]
    num_classes: int


_SETS = {
    "MNIST": _Set(_mnist("MNIST"), 10),
    "FashionMNIST": _Set(_mnist("FashionMNIST"), 10),
    "KMNIST": _Set(_mnist("KMNIST"), 10),
    "CIFAR10": _Set(
        _cifar(
            "cifar-10-batches-bin",
            "cifar-10-batches-py",
            {"train": [f"data_batch_{i}.bin" for i in range(1, 6)], "test": ["test_batch.bin"]},
            label_bytes=1,
        ),
        10,
    ),
    "CIFAR100": _Set(
        _cifar(
            "cifar-100-binary",
            "cifar-100-python",
            {"train": ["train.bin"], "test": ["test.bin"]},
            label_bytes=2,
        ),
        100,
    ),
    "STL10": _Set(_stl10, 10),
}


def torchvision_names() -> tuple[str, ...]:
    """The torchvision sets that can be read."""
    return tuple(_SETS)


def load_torchvision(
    spec: str, *, split: str = "train", image_size: int | None = None, channels: int | None = None
) -> ArraySource:
    """The set that ``torchvision:NAME@ROOT`` names, with torchvision's own split.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: not of this form, a set that cannot be read, or a damaged or pickled file.
    """
    check_split(split)
    name, at, root = spec.removeprefix("torchvision:").partition("@")
    if not at or not root:
        raise ValueError(f"expected torchvision:NAME@ROOT, got {spec!r}")
    if name not in _SETS:
        raise ValueError(f"cannot read torchvision's {name!r}; it can be one of: {', '.join(_SETS)}")
    folder = Path(root).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"no such folder: {folder}")
    images, labels = _SETS[name].read(folder, split)
    return ArraySource(name, images, labels, image_size=image_size, channels=channels, num_classes=_SETS[name].num_classes)
