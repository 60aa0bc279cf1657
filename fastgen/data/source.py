"""Sources: what training and evaluation read data from, and the splits that all of them share.

A :class:`Source` is a map-style data set of samples ``x``, or of pairs ``(x, y)`` with integer labels. Images are
float32 in [0, 1], shape (C, H, W); everything else is a float32 vector.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from fastgen.data.arrays import check_samples, check_targets, fit_images, shape_text

__all__ = [
    "ArraySource",
    "DatasetSource",
    "Source",
    "Split",
    "StreamSource",
    "check_split",
    "digest",
    "mixed_order",
    "ranked_split",
    "stratified_split",
]

Split = Literal["train", "test"]


def check_split(split: str) -> None:
    """``ValueError`` unless ``split`` is "train" or "test"."""
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")


def mixed_order(keys: Iterable[str]) -> NDArray[np.int64]:
    """Indices of the keys in the order of their SHA-256: fixed, and unrelated to the order of the keys."""
    order = sorted((hashlib.sha256(key.encode()).digest(), i) for i, key in enumerate(keys))
    return np.array([i for _, i in order], dtype=np.int64)


def ranked_split(keys: Iterable[str], split: str, name: str) -> NDArray[np.int64]:
    """Indices of a fixed 90/10 split, in a fixed mixed order so that the first n are a fair sample.

    Samples are ordered by the SHA-256 of their keys and the first tenth is the test split. That depends on the keys
    alone, so new samples move only those at the border between the splits.

    Raises:
        ValueError: a test split of fewer than 2 samples is asked for.
    """
    check_split(split)
    order = mixed_order(keys)
    held_out = 0 if len(order) < 2 else max(1, len(order) // 10)
    if split == "test" and held_out == 0:
        raise ValueError(f"{name}: a test split needs at least 2 samples, there are {len(order)}")
    return order[:held_out] if split == "test" else order[held_out:]


def stratified_split(labels: NDArray[Any], split: str) -> NDArray[np.int64]:
    """Indices of a fixed split with equal shares of every class: in each class, every tenth sample is a test sample.

    The classes take turns in the order of the indices, so that the first n have equal shares too.
    """
    check_split(split)
    rank = np.empty(len(labels), dtype=np.int64)
    for label in np.unique(labels):
        of_class = np.flatnonzero(labels == label)
        rank[of_class] = np.arange(len(of_class))
    chosen = np.flatnonzero((rank % 10 == 9) == (split == "test"))
    return chosen[np.lexsort((labels[chosen], rank[chosen]))]


def digest(*parts: object) -> str:
    """SHA-256 (hex) of text and of the bytes of tensors."""
    sha = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            sha.update(f"{part.dtype}{tuple(part.shape)}".encode())
            sha.update(part.detach().cpu().contiguous().numpy().data)
        else:
            sha.update(str(part).encode())
        sha.update(b"\0")
    return sha.hexdigest()


class Source(Dataset[Any]):
    """A named data set; a map-style :class:`torch.utils.data.Dataset` of ``x`` or ``(x, y)``.

    Attributes:
        name: for logs and errors.
        event_shape: shape of one sample: (C, H, W) for images, (D,) for vectors.
        num_classes: labels run from 0 to ``num_classes - 1``; None where there are no labels.
        classes: names of the classes where they have names, else ().
        spec: what :func:`fastgen.data.load` was given, paths made absolute; None for data from Python.
    """

    name: str
    event_shape: tuple[int, ...]
    num_classes: int | None = None
    classes: tuple[str, ...] = ()
    spec: str | None = None

    @property
    def kind(self) -> Literal["image", "vector"]:
        """What the samples are: "image" if they are (C, H, W), else "vector"."""
        return "image" if len(self.event_shape) == 3 else "vector"

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of what the source holds: equal fingerprints mean the same samples in the same order."""
        raise NotImplementedError

    def __len__(self) -> int:
        raise NotImplementedError

    def batch(self, indices: Tensor) -> tuple[Tensor, ...]:
        """Samples by number.

        Args:
            indices: int64 [B], each in 0 .. len(self) - 1, on the CPU.

        Returns:
            ``(x,)`` or ``(x, y)``: x float32 [B, *event_shape], y int64 [B] (or float32 like x), on the CPU.
        """
        raise NotImplementedError

    def __getitem__(self, index: int) -> Tensor | tuple[Tensor, ...]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self.name} has {len(self)} samples, there is no sample {index}")
        sample = tuple(part[0] for part in self.batch(torch.tensor([index % len(self)])))
        return sample if len(sample) > 1 else sample[0]

    def __repr__(self) -> str:
        classes = "" if self.num_classes is None else f", {self.num_classes} classes"
        return f"{type(self).__name__}({self.name!r}, {len(self):,} x {shape_text(self.event_shape)}{classes})"


class ArraySource(Source):
    """Samples held in memory: uint8 or float32, with optional labels or paired samples.

    Args:
        name: for logs and errors.
        x: samples as :func:`fastgen.data.arrays.check_samples` takes them.
        y: integer labels [N], floats of the shape of ``x`` that belong to its samples, or None.
        image_size: side of the square that images are resized to (short side, then centre crop); None keeps them.
        channels: 1 or 3, to convert images to; None keeps them.
        num_classes: where the labels present do not tell.

    Raises:
        ValueError: no samples, a shape or dtype that is no data set, values that are not finite, images outside [0, 1],
            labels that are no integers from 0 or not one per sample.
    """

    def __init__(
        self,
        name: str,
        x: Tensor | NDArray[Any],
        y: Tensor | NDArray[Any] | None = None,
        *,
        image_size: int | None = None,
        channels: int | None = None,
        num_classes: int | None = None,
        classes: tuple[str, ...] = (),
    ) -> None:
        self.name = name
        self.x = fit_images(check_samples(x, name), image_size, channels, name)
        self.y = None if y is None else check_targets(y, self.x, name)
        self.event_shape = tuple(self.x.shape[1:])
        self.classes = classes
        if self.y is not None and not self.y.is_floating_point():
            self.num_classes = num_classes or len(classes) or int(self.y.max()) + 1
            if int(self.y.max()) >= self.num_classes:
                raise ValueError(f"{name}: label {int(self.y.max())} with {self.num_classes} classes")
        self._fingerprint: str | None = None

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the samples and labels."""
        if self._fingerprint is None:
            self._fingerprint = digest(self.x) if self.y is None else digest(self.x, self.y)
        return self._fingerprint

    def __len__(self) -> int:
        return len(self.x)

    def batch(self, indices: Tensor) -> tuple[Tensor, ...]:
        """``(x,)`` or ``(x, y)`` of the given samples; see :meth:`Source.batch`."""
        x = self.x[indices]
        if x.dtype == torch.uint8:
            x = x.float().div_(255)
        return (x,) if self.y is None else (x, self.y[indices])


def _to_batch(x: Any, y: Any, name: str, event_shape: tuple[int, ...] | None = None) -> tuple[Tensor, ...]:
    """A batch in fastgen's form from whatever a data set gave; ``name`` says where it came from."""
    samples = check_samples(x, name)
    if samples.dtype == torch.uint8:
        samples = samples.float().div_(255)
    if event_shape is not None and tuple(samples.shape[1:]) != event_shape:
        raise ValueError(f"{name} has shape {shape_text(samples.shape[1:])}, the others {shape_text(event_shape)}")
    return (samples,) if y is None else (samples, check_targets(y, samples, name))


def _split_item(item: Any, name: str) -> tuple[Any, Any]:
    """``x`` and ``y`` of what a data set or loader yields: ``x``, ``(x,)`` or ``(x, y)``."""
    if not isinstance(item, (tuple, list)):
        return item, None
    if len(item) not in (1, 2):
        raise ValueError(f"{name} must be x or (x, y), got {len(item)} parts")
    return item[0], (item[1] if len(item) == 2 else None)


class DatasetSource(Source):
    """A map-style data set from Python: any object with ``len()`` and indexing that gives ``x`` or ``(x, y)``.

    Samples may be tensors, arrays or Pillow images. They are fetched one by one whenever they are asked for, so random
    transforms keep working; shapes and values are checked then. The number of classes comes from the data set's
    ``classes`` or ``targets``, as torchvision names them, where it has either. The fingerprint covers type, length and
    shape alone.
    """

    def __init__(self, dataset: Any, name: str | None = None) -> None:
        self.name = name or type(dataset).__name__
        self.dataset = dataset
        if len(dataset) == 0:
            raise ValueError(f"{self.name} is empty")
        x, y = self._item(0)
        self.labelled = y is not None
        self.event_shape = tuple(_to_batch(x[None], None, f"{self.name}[0]")[0].shape[1:])
        if self.labelled:
            classes, targets = getattr(dataset, "classes", None), getattr(dataset, "targets", None)
            self.classes = tuple(str(c) for c in classes) if isinstance(classes, Sequence) else ()
            self.num_classes = len(self.classes) or (None if targets is None else int(np.max(targets)) + 1)

    def _item(self, index: int) -> tuple[Any, Any]:
        name = f"{self.name}[{index}]"
        x, y = _split_item(self.dataset[index], name)
        if hasattr(x, "getbands"):  # a Pillow image: height, width, bands
            pixels = np.atleast_3d(np.asarray(x if x.mode in ("L", "RGB") else x.convert("RGB")))
            x = torch.from_numpy(pixels.transpose(2, 0, 1).copy())
        return (x if isinstance(x, Tensor) else np.asarray(x)), y

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the type, length and shape; the samples themselves are not read."""
        return digest(self.name, len(self), self.event_shape)

    def __len__(self) -> int:
        return len(self.dataset)

    def batch(self, indices: Tensor) -> tuple[Tensor, ...]:
        """``(x,)`` or ``(x, y)`` of the given samples; see :meth:`Source.batch`."""
        xs: list[Tensor] = []
        ys: list[Tensor] = []
        for index in indices.tolist():
            x, y = self._item(index)
            name = f"{self.name}[{index}]"
            if (y is not None) != self.labelled:
                words = ("labelled", "unlabelled") if y is not None else ("unlabelled", "labelled")
                raise ValueError(f"{name} is {words[0]}, the first sample is {words[1]}")
            label = None if y is None else torch.as_tensor(y).reshape(1)
            parts = _to_batch(x[None], label, name, self.event_shape)
            xs.append(parts[0])
            ys.extend(parts[1:])
        x = torch.cat(xs) if xs else torch.empty(0, *self.event_shape)
        if not self.labelled:
            return (x,)
        return (x, torch.cat(ys) if ys else torch.empty(0, dtype=torch.int64))


class StreamSource(Source):
    """Batches from Python: a DataLoader or any iterable of ``x`` or ``(x, y)``, in the order in which it gives them.

    It has no length and no random access; :meth:`batches` goes through it. A one-shot iterator is used up by the first
    pass. The fingerprint covers type and shape alone.
    """

    def __init__(self, loader: Iterable[Any], name: str | None = None) -> None:
        self.name = name or type(loader).__name__
        self._loader = loader
        iterator = iter(loader)
        first = next(iterator, None)
        if first is None:
            raise ValueError(f"{self.name} gives no batches")
        x, y = _split_item(first, f"{self.name}, batch 0")
        self.event_shape = tuple(_to_batch(x, y, f"{self.name}, batch 0")[0].shape[1:])
        self._rest: Iterator[Any] | None = iterator if iterator is loader else None
        self._first = first

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the type and shape; the batches themselves are not read."""
        return digest(self.name, self.event_shape)

    def __len__(self) -> int:
        raise TypeError(f"{self.name} is a stream of batches: it has no length")

    def batch(self, indices: Tensor) -> tuple[Tensor, ...]:
        """``TypeError``: a stream has no random access."""
        raise TypeError(f"{self.name} is a stream of batches: it cannot be indexed")

    def batches(self) -> Iterator[tuple[Tensor, ...]]:
        """One pass: ``(x,)`` or ``(x, y)`` as in :meth:`Source.batch`, on the device on which they came."""
        if self._rest is None:
            iterator: Iterator[Any] = iter(self._loader)
        else:
            iterator = itertools.chain([] if self._first is None else [self._first], self._rest)
            self._first = None
        for number, item in enumerate(iterator):
            name = f"{self.name}, batch {number}"
            yield _to_batch(*_split_item(item, name), name, self.event_shape)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, {shape_text(self.event_shape)})"
