"""Checks and preparation of arguments, shared by all ops: done once, in Python, so that kernels need none."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastgen.random import fresh_key

__all__ = [
    "as_rows",
    "coefficient_rows",
    "common",
    "constant",
    "dense",
    "device_of",
    "is_channels_last",
    "noise_like",
    "per_sample",
    "prepare_key",
    "sample_shape",
]

_ONE_KEY = torch.Size((4,))


def floating(dtype: torch.dtype | None) -> torch.dtype:
    """The dtype, or PyTorch's default; TypeError for one that holds no fractions."""
    if dtype is None:
        return torch.get_default_dtype()
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating-point dtype, got {dtype!r}")
    return dtype


def common(**tensors: Tensor) -> list[Tensor]:
    """The tensors in one shape and dtype: broadcast, promoted and checked to be floating and on one device.

    Raises:
        TypeError: for something else than a floating-point tensor.
        ValueError: for shapes that do not broadcast, no sample dimension, or several devices.
    """
    values = list(tensors.values())
    first = values[0]
    if type(first) is Tensor:  # the usual case at the least cost: nothing to change
        dtype, shape, device = first.dtype, first.shape, first.device
        for v in values[1:]:
            if type(v) is not Tensor or v.dtype is not dtype or v.shape != shape or v.device != device:
                break
        else:
            if shape and dtype.is_floating_point:
                return values
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
        if not value.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor, got {value.dtype}")
        if value.device != first.device:
            raise ValueError(f"{name} is on {value.device}, expected {first.device} like {next(iter(tensors))}")
    dtype = first.dtype
    for value in values[1:]:
        dtype = torch.promote_types(dtype, value.dtype)
    try:
        values = list(torch.broadcast_tensors(*values))
    except RuntimeError as error:
        shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in tensors.items())
        raise ValueError(f"shapes do not broadcast: {shapes}") from error
    if values[0].dim() == 0:
        raise ValueError(f"{', '.join(tensors)} must have a sample dimension, got scalars")
    return [value.to(dtype) for value in values]


def prepare_key(key: Tensor | None, samples: int, device: torch.device | None) -> Tensor:
    """A contiguous key on ``device`` for ``samples`` samples; None draws a fresh one.

    Raises:
        TypeError: if it is not an int64 tensor.
        ValueError: for a shape other than [4] or [samples, 4], or another device.
    """
    if key is None:
        return fresh_key(device)
    if not isinstance(key, Tensor) or key.dtype is not torch.int64:
        what = key.dtype if isinstance(key, Tensor) else type(key).__name__
        raise TypeError(f"key must be an int64 tensor made by fastgen.random.key, got {what}")
    shape = key.shape
    if shape != _ONE_KEY and shape != (samples, 4):
        raise ValueError(f"key must have shape [4] or [{samples}, 4], got {list(shape)}")
    if device is not None and key.device != device:
        raise ValueError(f"key is on {key.device}, expected {device}")
    return key.contiguous()


def noise_like(noise: Tensor, like: Tensor, name: str = "noise", *, channels_last: bool = False) -> Tensor:
    """Given noise as dense float32 (float64 stays), checked against the shape and device of ``like``."""
    if not isinstance(noise, Tensor) or not noise.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {getattr(noise, 'dtype', type(noise).__name__)}")
    if noise.shape != like.shape or noise.device != like.device:
        raise ValueError(
            f"{name} must have shape {tuple(like.shape)} on {like.device}, got {tuple(noise.shape)} on {noise.device}"
        )
    return dense(constant(noise, like), channels_last)


def constant(x: Tensor, like: Tensor) -> Tensor:
    """``x`` in float32, or float64 if ``like`` is, cut off from autograd; itself where it is so already."""
    dtype = torch.float64 if like.dtype is torch.float64 else torch.float32
    if x.dtype is not dtype:
        x = x.to(dtype)
    return x.detach() if x.requires_grad else x


def coefficient_rows(coefficients: Tensor, columns: int, like: Tensor, name: str = "coefficients") -> Tensor:
    """A coefficient table [columns] or [samples of ``like``, columns] as contiguous float32, constant for autograd.

    Where ``like`` is float64 the table is too.

    Raises:
        TypeError: if it is not a floating-point tensor.
        ValueError: for another shape, or another device than that of ``like``.
    """
    if not isinstance(coefficients, Tensor) or not coefficients.is_floating_point():
        raise TypeError(
            f"{name} must be a floating-point tensor, got {getattr(coefficients, 'dtype', type(coefficients).__name__)}"
        )
    shape, samples = coefficients.shape, like.shape[0]
    if shape != (columns,) and shape != (samples, columns):
        raise ValueError(f"{name} must have shape [{columns}] or [{samples}, {columns}], got {list(shape)}")
    if coefficients.device != like.device:
        raise ValueError(f"{name} is on {coefficients.device}, expected {like.device}")
    return constant(coefficients, like).contiguous()


def is_channels_last(x: Tensor) -> bool:
    """Whether the images of ``x`` [N, C, H, W] lie in memory channels last, and not in logical order as well."""
    return x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def dense(x: Tensor, channels_last: bool = False) -> Tensor:
    """``x`` in one of the two layouts that kernels read: itself where it has it, else a copy."""
    return x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def sample_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """``shape`` as a tuple, checked: samples first, nothing negative."""
    size = tuple(shape) if isinstance(shape, Sequence) else ()
    if not size or any(n < 0 for n in size):
        raise ValueError(f"shape must be (samples, ...) without negative sizes, got {shape!r}")
    return size


def device_of(key: Tensor | None, device: torch.device | str | None) -> torch.device | None:
    """The device of a draw: the key's, or else ``device``; None is PyTorch's default."""
    if isinstance(key, Tensor):
        if device is not None and torch.device(device).type != key.device.type:
            raise ValueError(f"key is on {key.device}, device says {device}")
        return key.device
    return torch.device(device) if device is not None else None


def as_rows(x: Tensor) -> tuple[int, int]:
    """(samples, elements of one sample) of a tensor whose first dimension counts samples."""
    shape = x.shape
    rows = shape[0]
    return rows, x.numel() // rows if rows else math.prod(shape[1:])


def per_sample(x: Tensor) -> Tensor:
    """Room for a float32 number per sample of ``x``."""
    return x.new_empty(x.shape[0]) if x.dtype is torch.float32 else x.new_empty(x.shape[0], dtype=torch.float32)
