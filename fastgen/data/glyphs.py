"""Glyphs: the characters 0-9 and A-Z in the fonts that matplotlib ships, each a little turned, moved, scaled, sheared.

Labelled images of any size and number that need no download. Sample i of a split is a function of (split, i) alone.
The pixels depend on the versions of Pillow and matplotlib, so the fingerprint does too.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastgen._extras import bundled_file, require
from fastgen.data.source import ArraySource, check_split

__all__ = ["CHARACTERS", "FONTS", "load_glyphs"]

CHARACTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"

FONTS = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSans-Oblique",
    "DejaVuSansMono",
    "DejaVuSansMono-Bold",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "DejaVuSerif-Italic",
    "STIXGeneral",
    "STIXGeneralBol",
    "STIXGeneralItalic",
    "cmb10",
    "cmr10",
    "cmss10",
    "cmti10",
    "cmtt10",
)

_COUNT = {"train": 10_000, "test": 1_000}
_PHILOX_KEY = {"train": 0x676C797068, "test": 0x676C797069}
_BASE = 128  # side of the canvas on which a glyph is drawn once
_EM = 100  # font size on it, in pixels
_OVERSAMPLING = 2  # glyphs are warped at this multiple of the size asked for, then averaged down

_ROTATION = 15.0  # degrees, either way
_SHIFT = 0.06  # share of the image, either way
_SCALE = (0.8, 1.1)
_SHEAR = 0.15  # either way


@functools.lru_cache(maxsize=len(FONTS) * len(CHARACTERS))
def _glyph(font: str, character: str) -> Any:
    """The character in white on a black canvas, its ink centred."""
    image = require("PIL.Image", package="pillow", extra="cli", purpose="the data set glyphs")
    from PIL import ImageDraw, ImageFont

    file = bundled_file(
        "matplotlib",
        "mpl-data",
        "fonts",
        "ttf",
        f"{font}.ttf",
        package="matplotlib",
        extra="cli",
        purpose="the data set glyphs",
    )
    canvas = image.new("L", (_BASE, _BASE))
    draw = ImageDraw.Draw(canvas)
    face = ImageFont.truetype(str(file), _EM, layout_engine=ImageFont.Layout.BASIC)
    left, top, right, bottom = face.getbbox(character)
    draw.text(((_BASE - left - right) / 2, (_BASE - top - bottom) / 2), character, fill=255, font=face)
    return canvas


def _inverse_affine(u: NDArray[np.float64], size: int) -> tuple[float, ...]:
    """Coefficients (a, b, c, d, e, f) that map output pixels to canvas pixels, for uniform numbers u in [0, 1)."""
    angle = math.radians(_ROTATION * (2 * u[1] - 1))
    scale = _SCALE[0] + (_SCALE[1] - _SCALE[0]) * u[2]
    shear = _SHEAR * (2 * u[3] - 1)
    dx, dy = _SHIFT * (2 * u[4:6] - 1) * size
    k = _BASE / (size * scale)
    cos, sin = math.cos(angle), math.sin(angle)
    a, b, d, e = k * (cos + shear * sin), k * (sin - shear * cos), -k * sin, k * cos
    centre = size / 2
    x, y = centre + dx, centre + dy
    return a, b, _BASE / 2 - a * x - b * y, d, e, _BASE / 2 - d * x - e * y


def _render(n: int, split: str, size: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    from PIL import Image

    labels = np.arange(n) % len(CHARACTERS)
    uniform = np.random.Generator(np.random.Philox(key=_PHILOX_KEY[split])).random((n, 6))
    images = np.empty((n, size, size), dtype=np.uint8)
    large = size * _OVERSAMPLING
    for i, u in enumerate(uniform):
        glyph = _glyph(FONTS[int(u[0] * len(FONTS))], CHARACTERS[labels[i]])
        shrunk = max(1, round(_BASE / large))  # bilinear sampling alone would alias below half the canvas's size
        if shrunk > 1:
            glyph = glyph.reduce(shrunk)
        matrix = [c / shrunk for c in _inverse_affine(u, large)]
        warped = glyph.transform((large, large), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
        images[i] = np.asarray(warped.reduce(_OVERSAMPLING))
    return images, labels


def load_glyphs(
    *, split: str = "train", n: int | None = None, image_size: int | None = None, channels: int | None = None
) -> ArraySource:
    """Characters 0-9, A-Z in 16 fonts: 36 classes in turn, uint8 behind the scenes, 1 channel.

    Args:
        split: "train" or "test"; they never share an image.
        n: how many; 10,000 to train on and 1,000 to test on if None. The first n are the same for any n.
        image_size: side of the images, 28 if None.
        channels: 1 or 3.

    Raises:
        ModuleNotFoundError: pillow or matplotlib is not installed.
        ValueError: an argument is out of range.
    """
    check_split(split)
    n = _COUNT[split] if n is None else n
    size = 28 if image_size is None else image_size
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    if size < 1:
        raise ValueError(f"image_size must be at least 1, got {size}")
    require("PIL.Image", package="pillow", extra="cli", purpose="the data set glyphs")
    images, labels = _render(n, split, size)
    return ArraySource("glyphs", images, labels, channels=channels, classes=tuple(CHARACTERS))
