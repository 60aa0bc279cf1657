"""A folder of images, decoded by Pillow when they are used.

    folder/*.png                          no labels
    folder/<class>/**/*.png               labels: the sub-folders, sorted by name
    folder/train/..., folder/test/...     either of these in each; else a fixed 90/10 split by file name

Grey images (1, L, LA, 16-bit) have one channel, all others three; transparency is laid on white; EXIF orientation is
applied. Every header is read at the start, so that a file that is no image is named before training begins. Samples come in
a fixed mixed order.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from fastgen._extras import require
from fastgen.data.arrays import shape_text
from fastgen.data.source import Source, check_split, digest, mixed_order, ranked_split

__all__ = ["SUFFIXES", "FolderSource", "ImageFiles"]

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")

_SIXTEEN_BIT = ("I;16", "I;16B", "I;16L", "I;16N", "I")
_GREY = ("1", "L", "LA", "La", *_SIXTEEN_BIT)

_ORIENTATION = 0x0112  # EXIF tag; 5 to 8 swap width and height

T = TypeVar("T")
R = TypeVar("R")


def _pillow() -> Any:
    return require("PIL.Image", package="pillow", extra="cli", purpose="reading images")


def _threaded(function: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """``map`` with threads: Pillow releases the GIL while it decodes."""
    workers = min(len(items), torch.get_num_threads())
    if workers <= 1:
        return [function(item) for item in items]
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(function, items, chunksize=1))


def _damage() -> tuple[type[Exception], ...]:
    """What Pillow raises for files that are not, or not wholly, images."""
    too_large = _pillow().DecompressionBombError
    return (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, struct.error, too_large)


def _read_header(path: Path) -> tuple[int, int, bool]:
    """Width, height (both after EXIF rotation) and whether the image is grey."""
    try:
        with _pillow().open(path) as image:
            width, height = image.size
            if image.mode == "F":
                raise ValueError("images of floats are not supported")
            # Pillow looks for the EXIF data of a PNG behind the pixels too, and decodes it all to get there.
            known = image.format != "PNG" or "exif" in image.info
            if known and image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8):
                width, height = height, width
            return width, height, image.mode in _GREY
    except _damage() as error:
        raise ValueError(f"cannot read image {path}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    text = str(error)
    return "not an image" if "cannot identify image file" in text else text or type(error).__name__


def _decode(path: Path, size: tuple[int, int] | None, channels: int) -> Tensor:
    """uint8 [C, H, W], fitted to ``size`` (H, W)."""
    from PIL import ImageOps

    pillow = _pillow()
    try:
        with pillow.open(path) as opened:
            image = ImageOps.exif_transpose(opened)
            if image.mode in _SIXTEEN_BIT:
                levels = np.asarray(image).astype(np.float64) / 257
                image = pillow.fromarray(levels.round().clip(0, 255).astype(np.uint8))
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = pillow.alpha_composite(pillow.new("RGBA", image.size, "white"), image)
            image = image.convert("L" if channels == 1 else "RGB")
            if size is not None and image.size != size[::-1]:
                image = ImageOps.fit(image, size[::-1], method=pillow.Resampling.BICUBIC)
            return torch.from_numpy(np.array(image)).reshape(image.height, image.width, channels).permute(2, 0, 1)
    except _damage() as error:
        raise ValueError(f"cannot read image {path}: {_reason(error)}") from error


def _images_below(root: Path) -> list[Path]:
    """Image files below ``root``, sorted; hidden files and folders are left out."""
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        found += [Path(folder, f) for f in files if f.lower().endswith(SUFFIXES) and not f.startswith(".")]
    return sorted(found)


def _class_folders(root: Path) -> dict[str, list[Path]]:
    """Sub-folder name -> images in it, for the sub-folders that hold any."""
    folders = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    return {p.name: images for p in folders if (images := _images_below(p))}


class FolderSource(Source):
    """The images of a folder.

    Args:
        folder: laid out as in the module's docstring.
        split: "train" or "test".
        image_size: side of the square that images are resized to (antialiased, centre crop). None keeps them, and they
            must all have one size.
        channels: 1 or 3; None takes 1 if all images are grey, else 3.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no images, an unreadable one, or sizes that differ.
    """

    def __init__(
        self, folder: Path | str, *, split: str = "train", image_size: int | None = None, channels: int | None = None
    ) -> None:
        check_split(split)
        if image_size is not None and image_size < 1:
            raise ValueError(f"image_size must be at least 1, got {image_size}")
        if channels not in (None, 1, 3):
            raise ValueError(f"channels must be 1 or 3, got {channels}")
        top = Path(folder)
        if not top.is_dir():
            raise FileNotFoundError(f"no such folder: {top}")
        self.name = top.name or str(top)
        self.root = top / split if (top / "train").is_dir() and (top / "test").is_dir() else top
        loose = [p for p in self.root.iterdir() if p.is_file() and p.suffix.lower() in SUFFIXES and p.name[0] != "."]
        classes = _class_folders(self.root)
        if not loose and not classes:
            raise ValueError(f"no images in {self.root}; known formats: {' '.join(s[1:] for s in SUFFIXES)}")
        if loose and classes:
            raise ValueError(
                f"{self.root} has images both directly ({loose[0].name}) and in sub-folders ({next(iter(classes))}/): "
                "sub-folders are classes, so either all images are in them or none"
            )
        self.classes = self._known_classes(top, classes)
        labels = [self.classes.index(name) for name, images in classes.items() for _ in images]
        paths = [path for images in classes.values() for path in images] or sorted(loose)
        keys = [p.relative_to(self.root).as_posix() for p in paths]
        keep = mixed_order(keys) if self.root != top else ranked_split(keys, split, str(top))
        self.paths = [paths[i] for i in keep]
        self.y = torch.tensor(labels)[torch.from_numpy(keep)] if self.classes else None
        self.num_classes = len(self.classes) or None
        headers = _threaded(_read_header, self.paths)
        self.image_size = image_size
        self.channels = channels or (1 if all(grey for _, _, grey in headers) else 3)
        width, height, _ = headers[0]
        self.event_shape = (self.channels, image_size or height, image_size or width)
        if image_size is None:
            for path, header in zip(self.paths, headers, strict=True):
                self._check_size(path, header[1], header[0])
        self._sizes = [path.stat().st_size for path in self.paths]

    def _known_classes(self, top: Path, here: dict[str, list[Path]]) -> tuple[str, ...]:
        """Names of the classes, the same for both splits."""
        names = set(here)
        if names and self.root != top:
            names.update(*(_class_folders(top / part) for part in ("train", "test")))
        return tuple(sorted(names))

    def _check_size(self, path: Path, height: int, width: int) -> None:
        if (height, width) != self.event_shape[1:]:
            raise ValueError(
                f"{path} is {shape_text((height, width))} pixels (height x width), {self.paths[0].name} is "
                f"{shape_text(self.event_shape[1:])}: set image_size to resize them"
            )

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the files' names and sizes and of the sample shape; the pixels are not read."""
        files = (f"{p.relative_to(self.root).as_posix()}:{n}" for p, n in zip(self.paths, self._sizes, strict=True))
        return digest(*files, self.event_shape)

    def __len__(self) -> int:
        return len(self.paths)

    def _image(self, index: int) -> Tensor:
        size = None if self.image_size is None else (self.image_size, self.image_size)
        image = _decode(self.paths[index], size, self.channels)
        self._check_size(self.paths[index], *image.shape[1:])
        return image

    def batch(self, indices: Tensor) -> tuple[Tensor, ...]:
        """``(x,)`` or ``(x, y)`` of the given samples; see :meth:`fastgen.data.Source.batch`."""
        images = _threaded(self._image, indices.tolist())
        x = torch.stack(images) if images else torch.empty(0, *self.event_shape)
        x = x.float().div_(255)
        return (x,) if self.y is None else (x, self.y[indices])


class ImageFiles:
    """An image, or those of a folder by name, that samples go through by their index: a function from indices to images.

    They are decoded when they are asked for, resized (antialiased, centre crop) to the size that is wanted.

    Args:
        path: a file, or a folder whose images are taken with those of its sub-folders.
        shape: (C, H, W) of the images that are wanted.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: no images there, one that cannot be read, or 2 channels or more than 3.
    """

    def __init__(self, path: Path | str, shape: tuple[int, ...]) -> None:
        root = Path(path).expanduser()
        if len(shape) != 3 or shape[0] not in (1, 3):
            raise ValueError(f"{root}: image files can stand for samples of 1 or 3 channels, not for those of shape {shape}")
        if not root.exists():
            raise FileNotFoundError(f"no such file or folder: {root}")
        self.paths = _images_below(root) if root.is_dir() else [root]
        if not self.paths:
            raise ValueError(f"no images in {root}; known formats: {' '.join(s[1:] for s in SUFFIXES)}")
        self.shape = tuple(shape)
        _threaded(_read_header, self.paths)

    def __len__(self) -> int:
        return len(self.paths)

    def __call__(self, indices: Tensor) -> Tensor:
        """Images in [0, 1] of samples, [n, C, H, W] on the device of ``indices``: that of sample i is number i mod length."""
        chosen = (indices % len(self.paths)).tolist()
        once = sorted(set(chosen))
        images = _threaded(lambda i: _decode(self.paths[i], (self.shape[1], self.shape[2]), self.shape[0]), once)
        place = {i: k for k, i in enumerate(once)}
        x = torch.stack(images)[[place[i] for i in chosen]]
        return x.to(indices.device, torch.float32).div_(255)
