"""Where samples go: a tensor, one file, or a folder. All files appear whole or not at all."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastgen._extras import require
from fastgen.sampling import images, planes
from fastgen.training import checkpoint

__all__ = ["Writer", "open_writer"]

_SHARD_ELEMENTS = 1 << 24
_FILES = (".png", ".npz", ".safetensors")


class Writer(Protocol):
    """Takes batches of samples in order, then hands out the result."""

    def add(self, ids: Sequence[int], x: Tensor) -> None:
        """Take samples ``x`` [B, *event_shape] with the indices ``ids``."""

    def finish(self) -> Tensor | Path:
        """The tensor, or the path of what was written."""


class _Memory:
    """All samples in one tensor on their device; ``save`` may write it to a file at the end."""

    def __init__(self, n: int, path: Path | None = None, save: Callable[[Tensor, Path], object] | None = None) -> None:
        self._n = n
        self._path = path
        self._save = save
        self._done = 0
        self._x = torch.empty(0)

    def add(self, ids: Sequence[int], x: Tensor) -> None:
        if self._done == 0:
            self._x = x.new_empty(self._n, *x.shape[1:], device="cpu" if self._save else None)
        self._x[self._done : self._done + len(x)] = x
        self._done += len(x)

    def finish(self) -> Tensor | Path:
        if self._save is None or self._path is None:
            return self._x
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._save(self._x, self._path)
        return self._path


class _ImageFolder:
    """One PNG per image, named by its id; encoded by threads, since compression takes longer than small networks."""

    def __init__(self, path: Path, pool: ThreadPoolExecutor) -> None:
        self._path = path
        self._pool = pool
        path.mkdir(parents=True, exist_ok=True)

    def _write(self, i: int, image: Tensor) -> None:
        content = images.encode_png(images.grid(image[None], padding=0))
        checkpoint.write_atomic(self._path / f"{i:08d}.png", content, durable=False)

    def add(self, ids: Sequence[int], x: Tensor) -> None:
        for _ in self._pool.map(self._write, ids, images.to_uint8(x).cpu()):
            pass  # raises what a thread raised

    def finish(self) -> Path:
        return self._path


class _VectorFolder:
    """``.npz`` shards named by their first and last id, with arrays ``x`` and ``ids``."""

    def __init__(self, path: Path, event_shape: tuple[int, ...]) -> None:
        self._path = path
        self._size = max(1, _SHARD_ELEMENTS // math.prod(event_shape))
        self._ids: list[int] = []
        self._x: list[NDArray[np.float32]] = []
        path.mkdir(parents=True, exist_ok=True)

    def add(self, ids: Sequence[int], x: Tensor) -> None:
        self._ids += ids
        self._x.append(x.float().cpu().numpy())
        if len(self._ids) >= self._size:
            self._flush()

    def _flush(self) -> None:
        if self._ids:
            name = f"{self._ids[0]:08d}-{self._ids[-1]:08d}.npz"
            _save_npz(self._path / name, x=np.concatenate(self._x), ids=np.array(self._ids))
        self._ids, self._x = [], []

    def finish(self) -> Path:
        self._flush()
        return self._path


def _save_npz(path: Path, **arrays: NDArray[np.float32] | NDArray[np.int64]) -> None:
    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:  # given a name, NumPy would add to it
            np.savez(file, **arrays)  # type: ignore[arg-type]

    checkpoint.write_atomic(path, write)


_SAVE: dict[str, Callable[[Tensor, Path], object]] = {
    ".npz": lambda x, path: _save_npz(path, x=x.float().numpy()),
    ".safetensors": lambda x, path: checkpoint.write(path, {"x": x}, {}),
}


@contextmanager
def open_writer(out: str | Path | None, event_shape: tuple[int, ...], n: int) -> Iterator[Writer]:
    """The writer for ``out``; see :func:`fastgen.sampling.sample` for what it may be.

    Raises:
        ValueError: a file type that is not known, or that cannot hold such samples.
        ModuleNotFoundError: PNG is asked for and the package for it is not installed.
    """
    if out is None:
        yield _Memory(n)
        return
    path, suffix = Path(out), Path(out).suffix.lower()
    folder = not suffix or path.is_dir() or str(out).endswith(os.sep)
    if not folder and suffix not in _FILES:
        raise ValueError(
            f"cannot write samples to {path}: expected a name in {', '.join(_FILES)}, or a folder (end its name with {os.sep})"
        )
    if folder and path.exists() and not path.is_dir():
        raise ValueError(f"cannot write samples to the folder {path}: it is a file")
    is_image = len(event_shape) == 3
    if is_image and (folder or suffix == ".png"):
        if event_shape[0] not in (1, 3, 4):
            raise ValueError(f"{path}: PNG holds images of 1, 3 or 4 channels, the samples have shape {event_shape}")
        require("PIL.Image", package="pillow", extra="cli", purpose="PNG pictures")
    if folder:
        if is_image:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                yield _ImageFolder(path, pool)
        else:
            yield _VectorFolder(path, event_shape)
    elif suffix != ".png":
        yield _Memory(n, path, _SAVE[suffix])
    elif is_image:
        yield _Memory(n, path, images.save_png)
    elif event_shape == (2,):
        require("matplotlib.figure", package="matplotlib", extra="cli", purpose="a scatter plot")
        yield _Memory(n, path, planes.save_scatter)
    else:
        raise ValueError(f"{path}: PNG holds images or 2-D points, the samples have shape {event_shape}")
