"""Where samples go: a tensor, one file, or a folder. All files appear whole or not at all.

Files in a folder carry the name of the run that they are of: a resumed run leaves out what is there, and is refused where it
is of another run.
"""

from __future__ import annotations

import errno
import math
import os
import zipfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastgen._extras import require
from fastgen.data.arrays import read_arrays
from fastgen.data.shards import find_shards, shard_name
from fastgen.sampling import images, planes
from fastgen.training import checkpoint

__all__ = ["Format", "Writer", "open_writer"]

Format = Literal["png", "npz", "safetensors"]

_SHARD_ELEMENTS = 1 << 24
_FILES = (".png", ".npz", ".safetensors")


def _make_folder(path: Path) -> None:
    """Make the folder, if it is not there, for files of ours.

    Raises:
        OSError: it cannot be made or written to; names it.
    """
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
    path.mkdir(parents=True, exist_ok=True)
    if not os.access(path, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


class Writer(Protocol):
    """Takes batches of samples in order, then hands out the result."""

    pending: Sequence[int]
    """The samples that are still to be drawn, in order."""

    def add(self, ids: Sequence[int], x: Tensor) -> None:
        """Take samples ``x`` [B, *event_shape] with the indices ``ids``."""

    def finish(self) -> Tensor | Path:
        """The tensor, or the path of what was written."""


class _Memory:
    """All samples in one tensor on their device; ``save`` may write it to a file at the end."""

    def __init__(
        self, ids: Sequence[int], path: Path | None = None, save: Callable[[Tensor, Path], object] | None = None
    ) -> None:
        self.pending = ids
        self._n = len(ids)
        self._path = path
        if path is not None:  # what cannot be written is said before anything is drawn
            _make_folder(path.parent)
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
        self._save(self._x, self._path)
        return self._path


def _of_png(path: Path) -> str | None:
    image = require("PIL.Image", package="pillow", extra="cli", purpose="PNG pictures")
    with image.open(path) as opened:
        return opened.info.get("fastgen")


def _of_npz(path: Path) -> str | None:
    with np.load(path, allow_pickle=False) as archive:
        return str(archive["run"]) if "run" in archive.files else None


_RUN_OF: dict[str, Callable[[Path], str | None]] = {
    "png": _of_png,
    "npz": _of_npz,
    "safetensors": lambda path: checkpoint.read_meta(path).get("run"),
}


def _is_done(path: Path, kind: Format, run: str) -> bool:
    """Whether the file is there, of this run.

    Raises:
        ValueError: it is there, of another.
    """
    if not path.is_file():
        return False
    try:
        found = _RUN_OF[kind](path)
    except (OSError, ValueError, zipfile.BadZipFile):
        found = None
    if found != run:
        raise ValueError(f"{path} is not of this run (weights, seed, options): resume into the run's folder, or start another")
    return True


class _ImageFolder:
    """One PNG per image, named by its id; encoded by threads, since compression takes longer than small networks."""

    def __init__(self, path: Path, ids: Sequence[int], run: str, resume: bool, pool: ThreadPoolExecutor) -> None:
        self._path, self._run, self._pool = path, run, pool
        _make_folder(path)
        self.pending = [i for i in ids if not _is_done(self._file(i), "png", run)] if resume else ids

    def _file(self, i: int) -> Path:
        return self._path / f"{i:08d}.png"

    def _write(self, i: int, image: Tensor) -> None:
        content = images.encode_png(images.grid(image[None], padding=0), self._run)
        checkpoint.write_atomic(self._file(i), content, durable=False)

    def add(self, ids: Sequence[int], x: Tensor) -> None:
        for _ in self._pool.map(self._write, ids, images.to_uint8(x).cpu()):
            pass  # raises what a thread raised

    def finish(self) -> Path:
        return self._path


class _ShardFolder:
    """Shards of ``size`` samples named by their first and last id, with tensors ``x`` and ``ids``."""

    def __init__(self, path: Path, kind: Format, size: int, ids: Sequence[int], run: str, resume: bool) -> None:
        self._path, self._kind, self._run = path, kind, run
        _make_folder(path)
        shards = [ids[first : first + size] for first in range(0, len(ids), size)]
        self._replaced = self._partial(shards) if resume else {}
        left = [shard for shard in shards if not (resume and _is_done(self._file(shard), kind, run))]
        self.pending = ids if len(left) == len(shards) else [i for shard in left for i in shard]
        self._shards = deque(left)
        self._x: list[Tensor] = []
        self._filled = 0

    def _file(self, shard: Sequence[int]) -> Path:
        return self._path / shard_name(shard, self._kind)

    def _partial(self, shards: list[Sequence[int]]) -> dict[Path, list[Path]]:
        """Files that hold the first samples of a shard alone, the last of a shorter run, by the file that takes their place.

        Raises:
            ValueError: a file that shares samples with the shards in any other way.
        """
        files = {self._file(shard) for shard in shards}
        found: dict[Path, list[Path]] = {}
        for path, (low, high) in find_shards(self._path).items():
            if path in files or path.suffix != f".{self._kind}":
                continue
            for shard in shards:
                if max(shard) < low or min(shard) > high or not _is_done(path, self._kind, self._run):
                    continue
                ids = torch.as_tensor(read_arrays(path)["ids"]).tolist()
                if ids == list(shard[: len(ids)]):
                    found.setdefault(self._file(shard), []).append(path)
                elif set(ids) & set(shard):
                    raise ValueError(f"{path} is no shard of this n and shard_size: resume with those it was written with")
        return found

    def add(self, ids: Sequence[int], x: Tensor) -> None:
        x = x.detach().float().cpu()
        while len(x):
            part = x[: len(self._shards[0]) - self._filled]
            self._x.append(part)
            self._filled += len(part)
            x = x[len(part) :]
            if self._filled == len(self._shards[0]):
                self._flush()

    def _flush(self) -> None:
        shard = self._shards.popleft()
        x, ids, path = torch.cat(self._x), torch.tensor(list(shard)), self._file(shard)
        if self._kind == "npz":
            _save_npz(path, x=x.numpy(), ids=ids.numpy(), run=np.array(self._run))
        else:
            checkpoint.write(path, {"x": x, "ids": ids}, {"run": self._run})
        for partial in self._replaced.get(path, ()):
            partial.unlink()
        self._x, self._filled = [], 0

    def finish(self) -> Path:
        return self._path


def _save_npz(path: Path, **arrays: NDArray[Any]) -> None:
    def write(temporary: Path) -> None:
        # np.savez writes the time of day too, so that no two files are the same
        with zipfile.ZipFile(temporary, "w") as archive:
            for name, array in arrays.items():
                with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as entry:
                    np.lib.format.write_array(entry, np.asanyarray(array), allow_pickle=False)

    checkpoint.write_atomic(path, write)


_SAVE: dict[str, Callable[[Tensor, Path], object]] = {
    ".npz": lambda x, path: _save_npz(path, x=x.float().numpy()),
    ".safetensors": lambda x, path: checkpoint.write(path, {"x": x}, {}),
}


def _check_format(
    path: Path, folder: bool, event_shape: tuple[int, ...], kind: Format | None, shard_size: int | None, resume: bool
) -> Format:
    """What is written, said or by the name and the samples."""
    suffix, is_image = path.suffix.lower(), len(event_shape) == 3
    if kind not in (None, "png", "npz", "safetensors"):
        raise ValueError(f"format must be png, npz or safetensors, got {kind!r}")
    if not folder:
        if suffix not in _FILES:
            raise ValueError(
                f"cannot write samples to {path}: expected a name in {', '.join(_FILES)}, "
                f"or a folder (end its name with {os.sep})"
            )
        if kind is not None and suffix != f".{kind}":
            raise ValueError(f"format {kind!r} does not go with the file {path}: leave it out, or name a folder")
        if shard_size is not None or resume:
            what = "shard_size" if shard_size is not None else "resume"
            raise ValueError(f"{what} is for folders, {path} is a file")
        return {".png": "png", ".npz": "npz"}.get(suffix, "safetensors")  # type: ignore[return-value]
    if path.exists() and not path.is_dir():
        raise ValueError(f"cannot write samples to the folder {path}: it is a file")
    kind = kind or ("png" if is_image else "npz")
    if kind == "png" and not is_image:
        raise ValueError(f"{path}: a folder of PNG holds images, the samples have shape {event_shape}")
    if kind == "png" and shard_size is not None:
        raise ValueError("shard_size is for npz and safetensors, in a folder of PNG each image has its file")
    if shard_size is not None and shard_size < 1:
        raise ValueError(f"shard_size must be at least 1, got {shard_size}")
    return kind


@contextmanager
def open_writer(
    out: str | Path | None,
    event_shape: tuple[int, ...],
    ids: Sequence[int],
    *,
    format: Format | None = None,
    shard_size: int | None = None,
    resume: bool = False,
    run: Callable[[], str] = str,
) -> Iterator[Writer]:
    """The writer for ``out``; see :func:`fastgen.sampling.sample` for what it may be.

    Args:
        out, format, shard_size, resume: of :func:`fastgen.sampling.sample`.
        event_shape, ids: of the samples.
        run: makes the name of the run, which files in folders carry.

    Raises:
        ValueError: a file type that is not known, or that cannot hold such samples; a file of another run to resume.
        ModuleNotFoundError: PNG is asked for and the package for it is not installed.
    """
    if out is None:
        if format is not None or shard_size is not None or resume:
            raise ValueError("format, shard_size and resume need out, a folder")
        yield _Memory(ids)
        return
    path, is_image = Path(out), len(event_shape) == 3
    folder = not path.suffix or path.is_dir() or str(out).endswith(os.sep)
    kind = _check_format(path, folder, event_shape, format, shard_size, resume)
    if is_image and kind == "png":
        if event_shape[0] not in (1, 3, 4):
            raise ValueError(f"{path}: PNG holds images of 1, 3 or 4 channels, the samples have shape {event_shape}")
        require("PIL.Image", package="pillow", extra="cli", purpose="PNG pictures")
    if folder and kind == "png":
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            yield _ImageFolder(path, ids, run(), resume, pool)
    elif folder:
        size = shard_size or max(1, _SHARD_ELEMENTS // math.prod(event_shape))
        yield _ShardFolder(path, kind, size, ids, run(), resume)
    elif kind != "png":
        yield _Memory(ids, path, _SAVE[path.suffix.lower()])
    elif is_image:
        yield _Memory(ids, path, images.save_png)
    elif event_shape == (2,):
        require("matplotlib.figure", package="matplotlib", extra="cli", purpose="a scatter plot")
        yield _Memory(ids, path, planes.save_scatter)
    else:
        raise ValueError(f"{path}: PNG holds images or 2-D points, the samples have shape {event_shape}")
