"""Checks and preparation of arguments, shared by all ops: done once, in Python, so that kernels need none."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastgen.random import fresh_key

__all__ = ["as_rows", "coefficient_rows", "common", "device_of", "noise_like", "prepare_key", "sample_shape"]


def common(**tensors: Tensor) -> list[Tensor]:
    """The tensors in one shape and dtype: broadcast, promoted and checked to be floating and on one device.

    Raises:
        TypeError: for something else than a floating-point tensor.
        ValueError: for shapes that do not broadcast, no sample dimension, or several devices.
    """
    values = list(tensors.values())
    first = values[0]
    if type(first) is Tensor:  # the usual case at the least cost: nothing to change
        dtype, shape, cpu, index = first.dtype, first.shape, first.is_cpu, first.get_device()
        for v in values:
            if type(v) is not Tensor or v.dtype is not dtype or v.shape != shape:
                break
            if v.is_cpu is not cpu or v.get_device() != index:
                break
        else:
            if dtype.is_floating_point and shape:
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
    if shape != (4,) and shape != (samples, 4):
        raise ValueError(f"key must have shape [4] or [{samples}, 4], got {list(shape)}")
    if device is not None and key.device != device:
        raise ValueError(f"key is on {key.device}, expected {device}")
    return key.contiguous()


def noise_like(noise: Tensor, like: Tensor, name: str = "noise") -> Tensor:
    """Given noise as contiguous float32 (float64 stays), checked against the shape and device of ``like``."""
    if not isinstance(noise, Tensor) or not noise.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {getattr(noise, 'dtype', type(noise).__name__)}")
    if noise.shape != like.shape or noise.device != like.device:
        raise ValueError(
            f"{name} must have shape {tuple(like.shape)} on {like.device}, got {tuple(noise.shape)} on {noise.device}"
        )
    dtype = torch.float64 if like.dtype is torch.float64 else torch.float32
    return noise.detach().to(dtype).contiguous()


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
    dtype = torch.float64 if like.dtype is torch.float64 else torch.float32
    if coefficients.dtype is dtype and not coefficients.requires_grad and coefficients.is_contiguous():
        return coefficients
    return coefficients.detach().to(dtype).contiguous()


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
    rows = x.shape[0]
    return rows, x.numel() // rows if rows else math.prod(x.shape[1:])
