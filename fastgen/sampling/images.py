"""Pictures: float images to 8 bits, many to one grid, grids to PNG.

Images are [N, C, H, W] with values in [0, 1] and C = 1 (grey), 3 (RGB) or 4 (RGBA).
"""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastgen._extras import require
from fastgen.training.checkpoint import write_atomic

__all__ = ["encode_png", "grid", "save_png", "to_uint8"]

_BACKGROUND = 255
_LEGIBLE = 480  # pixels along the longer side that a grid may be enlarged to


def _check(images: Tensor) -> None:
    if images.dim() != 4 or images.shape[1] not in (1, 3, 4):
        raise ValueError(f"images must be [N, C, H, W] with C = 1, 3 or 4, got {list(images.shape)}")


def to_uint8(images: Tensor) -> Tensor:
    """Images in [0, 1] to 0 .. 255, rounded to nearest; values outside are clipped, NaN becomes 0.

    Args:
        images: any shape; uint8 passes as it is.

    Returns:
        uint8, same shape and device.
    """
    if images.dtype == torch.uint8:
        return images
    return images.float().nan_to_num(0.0).clamp(0, 1).mul(255).round().to(torch.uint8)


def grid(images: Tensor, *, columns: int | None = None, padding: int = 2) -> NDArray[np.uint8]:
    """Images side by side on white, row by row.

    Args:
        images: [N, C, H, W] in [0, 1], or uint8.
        columns: images in a row; None for about as many as rows.
        padding: pixels between images and around them.

    Returns:
        uint8 [height, width] for C = 1, else [height, width, C].
    """
    _check(images)
    n, channels, height, width = images.shape
    if n == 0:
        raise ValueError("a grid needs at least one image")
    if columns is not None and columns < 1:
        raise ValueError(f"columns must be at least 1, got {columns}")
    columns = min(n, math.ceil(math.sqrt(n)) if columns is None else columns)
    rows = -(-n // columns)
    cells = to_uint8(images).cpu().permute(0, 2, 3, 1).numpy()
    canvas = np.full(
        (rows * (height + padding) + padding, columns * (width + padding) + padding, channels), _BACKGROUND, np.uint8
    )
    for i, cell in enumerate(cells):
        top, left = padding + i // columns * (height + padding), padding + i % columns * (width + padding)
        canvas[top : top + height, left : left + width] = cell
    return canvas[..., 0] if channels == 1 else canvas


def encode_png(pixels: NDArray[np.uint8], note: str | None = None) -> bytes:
    """A PNG file of ``pixels``, uint8 [H, W] or [H, W, 3 or 4]; ``note`` goes into its text field "fastgen".

    Raises:
        ModuleNotFoundError: Pillow is not installed.
    """
    image = require("PIL.Image", package="pillow", extra="cli", purpose="PNG pictures")
    file, text = io.BytesIO(), None
    if note is not None:
        from PIL.PngImagePlugin import PngInfo

        text = PngInfo()
        text.add_text("fastgen", note)
    image.fromarray(pixels).save(file, "PNG", pnginfo=text)
    return file.getvalue()


def save_png(
    images: Tensor, path: str | Path, *, columns: int | None = None, padding: int = 2, scale: int | None = None
) -> Path:
    """Write a :func:`grid` of images as a PNG.

    Args:
        images: [N, C, H, W] in [0, 1], or uint8.
        path: the file; its folder is made.
        columns, padding: as in :func:`grid`.
        scale: each pixel becomes a square of this side. None: 1 for a single image, and for several what makes a grid of tiny
            ones large enough to see.

    Returns:
        the path.
    """
    path = Path(path)
    canvas = grid(images, columns=columns, padding=padding)
    if scale is None:
        scale = 1 if len(images) == 1 else max(1, _LEGIBLE // max(canvas.shape[:2]))
    pixels = encode_png(canvas.repeat(scale, 0).repeat(scale, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, pixels)
    return path
