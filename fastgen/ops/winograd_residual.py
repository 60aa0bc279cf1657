"""winograd_residual: a residual block of image networks for evaluation, its launches in one chain.

    h = conv(silu(norm(x)), first),    y = conv(silu(norm(h) * (1 + scale) + shift), second) + x, or + conv1x1(x, carry)

Nothing here is computed otherwise than by :func:`fastgen.ops.group_norm_coefficients` and :func:`fastgen.ops.winograd_conv2d`,
called one after the other. A network of a hundred layers works through more memory between two calls than the caches hold,
and so meets Python's own code and data in slow memory every time: without it in between, a block takes a twentieth less.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from torch.nn import functional

from fastgen.ops import _dispatch, _native
from fastgen.ops.group_norm_silu import COEFFICIENTS, group_norm_coefficients
from fastgen.ops.winograd_conv2d import CONVOLUTION, WinogradWeight, winograd_conv2d

__all__ = ["NormedConvolution", "winograd_residual"]


class NormedConvolution(NamedTuple):
    """A convolution of silu(norm(x))."""

    weight: WinogradWeight
    bias: Tensor | None
    groups: int
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    eps: float


def _chain(carried: bool) -> _native.Chain:
    # x skip double scale shift; then six and four of each normed convolution; then four of the carry
    first = (COEFFICIENTS, "a0 a1 a5 a6 none none a7 a8"), (CONVOLUTION, "a0 a1 r0 true a9 a10 a2 a11 a12 a13 none")
    norm = COEFFICIENTS, "r1 none a14 a15 a3 a4 a16 a17"
    second = "r1 none r2 true a18 a19 false a20 a21 a22"
    if not carried:
        return _native.Chain(*first, norm, (CONVOLUTION, f"{second} a0"))
    carry = CONVOLUTION, "a0 a1 none false a23 a24 a2 a25 a26 a27 none"
    return _native.Chain(*first, norm, carry, (CONVOLUTION, f"{second} r3"))


_chains = {carried: _chain(carried) for carried in (False, True)}


def winograd_residual(
    x: Tensor,
    first: NormedConvolution,
    second: NormedConvolution,
    carry: tuple[WinogradWeight, Tensor | None] | None = None,
    *,
    skip: Tensor | None = None,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    double: bool = False,
) -> Tensor:
    """A residual block on channels-last images, by minimal filtering; no gradients.

    Args:
        x: [N, C, H, W].
        first: from all channels of x and skip to O.
        second: from O to O.
        carry: 1x1 weight and bias [O] of what is carried from all channels to O; None: x itself, which then has O of them.
        skip: [N, C', H, W], further channels of the image; needs a carry.
        bias: [N, O] or [1, O], takes the place of that of the first convolution.
        scale, shift: [N, O], of the second normalisation; None: zeros.
        double: of the first convolution and of what is carried: see :func:`fastgen.ops.winograd_conv2d`.

    Returns:
        [N, O, H, W], or [N, O, 2H, 2W].

    Raises:
        TypeError, ValueError: for arguments of the wrong type, shape, device or value.
    """
    if skip is not None and carry is None:
        raise ValueError("what is carried needs a 1x1 convolution where there is a skip")
    bias = first.bias if bias is None else bias
    channels = x.shape[1] + (0 if skip is None else skip.shape[1])
    weights = (first.weight, second.weight) if carry is None else (first.weight, second.weight, carry[0])
    expected = (channels, first.weight.outputs, channels)
    fits = all(weight.inputs == inputs for weight, inputs in zip(weights, expected, strict=False))
    if fits and not (double and carry is None) and x.numel() and _dispatch.launch_mode(None, None) is not None:
        carried = () if carry is None else (*_told(carry[0]), carry[1])
        parts = *_flat(first), bias, *_flat(second), second.bias
        made = _chains[carry is not None].attempt(x, skip, double, scale, shift, *parts, *carried)
        if made is not None:
            return made
    norm = group_norm_coefficients(x, first.groups, first.norm_weight, first.norm_bias, skip=skip, eps=first.eps)
    h = winograd_conv2d(x, first.weight, bias, skip=skip, norm=norm, activation="silu", double=double)
    norm = group_norm_coefficients(
        h, second.groups, second.norm_weight, second.norm_bias, scale=scale, shift=shift, eps=second.eps
    )
    if carry is not None:
        x = winograd_conv2d(x, *carry, skip=skip, double=double)
    elif double:
        x = functional.interpolate(x, scale_factor=2.0, mode="nearest")
    return winograd_conv2d(h, second.weight, second.bias, x, norm=norm, activation="silu")


def _told(weight: WinogradWeight) -> tuple[int, int, Tensor, Tensor | None]:
    return weight.tile, weight.outputs, weight.packed, weight.scale


def _flat(part: NormedConvolution) -> tuple[object, ...]:
    return part.norm_weight, part.norm_bias, part.groups, part.eps, *_told(part.weight)
