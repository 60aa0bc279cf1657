"""Arrays as data: what shapes, dtypes and values mean, and `.npy`, `.npz` and `.safetensors` files.

==================  =====================================================================
shape               meaning
==================  =====================================================================
[N], [N, D]         vectors of 1 or D numbers
[N, H, W]           images of one channel
[N, C, H, W]        images, channels first; a torch tensor is always read so
[N, H, W, C]        images, channels last: an array from NumPy or a file whose axis 1 is
                    not 1, 3 or 4 long while axis 3 is
==================  =====================================================================

Images are uint8 (divided by 255 when used), bool, or floats in [0, 1]. Vectors may be any real numbers; uint8 is
divided by 255 there too.
"""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn import functional

__all__ = [
    "check_labels",
    "check_samples",
    "check_targets",
    "convert_channels",
    "fit_images",
    "load_arrays",
    "read_arrays",
    "shape_text",
]

_CHANNELS = (1, 3, 4)
_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as in Pillow's "L"
_SLACK = 1e-4  # images may leave [0, 1] by the rounding of an earlier resize


def shape_text(shape: tuple[int, ...] | torch.Size) -> str:
    """``3x32x32``, for messages."""
    return "x".join(map(str, shape)) or "scalar"


def _to_tensor(x: Tensor | NDArray[Any], name: str) -> Tensor:
    if isinstance(x, Tensor):
        return x.detach()
    x = np.asarray(x)
    if x.dtype.kind not in "biuf":
        raise ValueError(f"{name} must hold numbers, got dtype {x.dtype}")
    if not x.dtype.isnative:
        x = x.astype(x.dtype.newbyteorder("="))
    if x.dtype in (np.uint16, np.uint32, np.uint64):  # torch knows them by name only
        x = x.astype(np.float64)
    if x.ndim == 4 and x.shape[1] not in _CHANNELS and x.shape[3] in _CHANNELS:
        x = x.transpose(0, 3, 1, 2)
    return torch.from_numpy(np.require(x, requirements=["C", "W"]))


def check_samples(x: Tensor | NDArray[Any], name: str) -> Tensor:
    """Samples in the form that sources hold: uint8 or float32, [N, C, H, W] or [N, D], contiguous, checked.

    Args:
        x: as in the table above.
        name: what the error calls it.

    Raises:
        ValueError: no samples, a shape or dtype that means nothing here, values that are not finite, or images outside
            [0, 1].
    """
    x = _to_tensor(x, name)
    if x.is_complex() or x.is_quantized:
        raise ValueError(f"{name} must hold real numbers, got dtype {x.dtype}")
    if not 1 <= x.dim() <= 4:
        raise ValueError(f"{name} must be [N, D], [N, H, W], [N, C, H, W] or [N, H, W, C], got {list(x.shape)}")
    if x.numel() == 0:
        raise ValueError(f"{name} is empty: {list(x.shape)}")
    x = x[:, None] if x.dim() in (1, 3) else x
    if x.dtype == torch.uint8:
        return x.contiguous()
    integers = x.dtype != torch.bool and not x.is_floating_point()
    x = x.float().contiguous()
    low, high = (v.item() for v in torch.aminmax(x))
    if not np.isfinite([low, high]).all():
        culprit = int((~x.flatten(1).isfinite()).any(1).int().argmax())
        raise ValueError(f"{name} has values that are not finite, first in sample {culprit}")
    if x.dim() == 4:
        if low < -_SLACK or high > 1 + _SLACK:
            hint = "; 0 .. 255 must be uint8" if integers or high > 2 else ""
            raise ValueError(f"{name} must hold images in [0, 1], its values run from {low:.4g} to {high:.4g}{hint}")
        if low < 0 or high > 1:
            x = x.clamp(0, 1)
    return x


def check_labels(y: Any, n: int, name: str) -> Tensor:
    """Labels as int64 [n].

    Raises:
        ValueError: they are not n integers from 0 upward.
    """
    if not isinstance(y, Tensor):
        y = np.asarray(y)
    if y.dtype.kind not in "biu" if isinstance(y, np.ndarray) else y.is_floating_point() or y.is_complex():
        raise ValueError(f"the labels of {name} must be integers, got dtype {y.dtype}")
    labels = y.detach().long() if isinstance(y, Tensor) else torch.from_numpy(y.astype(np.int64))
    if labels.dim() == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if tuple(labels.shape) != (n,):
        raise ValueError(f"{name} has {n} samples and labels of shape {list(labels.shape)}, expected [{n}]")
    if n and int(labels.min()) < 0:
        raise ValueError(f"the labels of {name} must not be negative, got {int(labels.min())}")
    return labels


def check_targets(y: Any, x: Tensor, name: str) -> Tensor:
    """What belongs to the samples ``x``: floats of their shape, such as noise, as float32, or labels as int64 [N].

    Raises:
        ValueError: neither.
    """
    values = y if isinstance(y, Tensor) else np.asarray(y)
    if tuple(values.shape) == tuple(x.shape) and (
        values.is_floating_point() if isinstance(values, Tensor) else values.dtype.kind == "f"
    ):
        return torch.as_tensor(values).detach().float()
    return check_labels(values, len(x), name)


def convert_channels(x: Tensor, channels: int | None, name: str) -> Tensor:
    """Images [N, C, H, W], uint8 or float, with 1 channel (luma, ITU-R BT.601) or 3.

    Raises:
        ValueError: any other count, or no rule for this conversion.
    """
    have = x.shape[1]
    if channels is None or channels == have:
        return x
    if channels == 3 and have == 1:
        return x.expand(-1, 3, -1, -1).contiguous()
    if channels == 1 and have == 3:
        grey = (x.float() * torch.tensor(_LUMA).view(1, 3, 1, 1)).sum(1, keepdim=True)
        return grey.round().to(torch.uint8) if x.dtype == torch.uint8 else grey.clamp(0, 1)
    raise ValueError(f"{name} has {have} channels, which cannot become {channels}; channels must be 1 or 3")


def _resize(x: Tensor, size: int) -> Tensor:
    """Antialiased bicubic resize of the short side to ``size``, then a centre crop."""
    h, w = x.shape[2:]
    short = min(h, w)
    target = (max(size, round(h * size / short)), max(size, round(w * size / short)))
    y = functional.interpolate(x.float(), target, mode="bicubic", antialias=True, align_corners=False)
    top, left = (target[0] - size) // 2, (target[1] - size) // 2
    y = y[:, :, top : top + size, left : left + size]
    return y.round().clamp(0, 255).to(torch.uint8) if x.dtype == torch.uint8 else y.clamp(0, 1)


def fit_images(x: Tensor, image_size: int | None, channels: int | None, name: str) -> Tensor:
    """Images with ``channels`` channels, resized (antialiased) and centre-cropped to a square; None keeps them.

    Raises:
        ValueError: the samples are no images, or image_size or channels is out of range.
    """
    if image_size is None and channels is None:
        return x
    if x.dim() != 4:
        raise ValueError(f"{name} holds vectors: image_size and channels do not apply")
    if image_size is not None and image_size < 1:
        raise ValueError(f"image_size must be at least 1, got {image_size}")
    x = convert_channels(x, channels, name)
    if image_size is None or tuple(x.shape[2:]) == (image_size, image_size):
        return x
    return torch.cat([_resize(part, image_size) for part in torch.split(x, 1024)]).contiguous()


def _read_npy(path: Path) -> dict[str, NDArray[Any]]:
    with path.open("rb") as file:
        magic = file.read(6)
    if magic == b"\x93NUMPY":
        return {"x": np.load(path, allow_pickle=False)}
    if magic[:2] == b"PK":
        with np.load(path, allow_pickle=False) as archive:
            return {key: archive[key] for key in archive.files}
    raise ValueError("it is neither an .npy nor an .npz file")


def _read_safetensors(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        return {**(file.metadata() or {}), **{key: file.get_tensor(key) for key in file.keys()}}  # noqa: SIM118


def read_arrays(path: Path) -> dict[str, Any]:
    """What a ``.npy`` (as ``x``), ``.npz`` or ``.safetensors`` file holds, by name, all in memory; of the last also the texts
    in its header.

    Raises:
        ValueError: the file is damaged, or holds Python objects (never unpickled).
    """
    try:
        return _read_safetensors(path) if path.suffix.lower() == ".safetensors" else _read_npy(path)
    except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile, zlib.error, MemoryError, SafetensorError) as error:
        reason = "it holds Python objects, which are never unpickled" if "pickle" in str(error) else str(error)
        raise ValueError(f"cannot read {path}: {reason}") from error


def load_arrays(path: Path) -> dict[str, tuple[NDArray[Any] | Tensor, NDArray[Any] | Tensor | None]]:
    """The arrays of a ``.npy``, ``.npz`` or ``.safetensors`` file, all in memory.

    One of many holds samples as ``x`` (or ``arr_0``, or as its only array) and labels, if any, as ``y``; or the arrays
    ``x_train``, ``x_test`` and, if there are labels, ``y_train`` and ``y_test``.

    Returns:
        ``{"all": (x, y or None)}``, or entries "train" and "test".

    Raises:
        ValueError: the file is damaged, holds Python objects (never unpickled) or none of these names.
    """
    arrays = {key: value for key, value in read_arrays(path).items() if not isinstance(value, str)}
    if "x_train" in arrays and "x_test" in arrays:
        return {part: (arrays[f"x_{part}"], arrays.get(f"y_{part}")) for part in ("train", "test")}
    for key in ("x", "arr_0"):
        if key in arrays:
            return {"all": (arrays[key], arrays.get("y"))}
    if len(arrays) == 1:
        return {"all": (next(iter(arrays.values())), None)}
    raise ValueError(f"{path} has no array named x; it has: {', '.join(arrays) or 'none'}")
