"""winograd_residual: a residual block of image networks for evaluation, its launches in one chain.

    h = conv(silu(norm(x)), first),    y = conv(silu(norm(h) * (1 + scale) + shift), second) + x, or + conv1x1(x, carry)

This is what :func:`fastgen.ops.group_norm_coefficients` and :func:`fastgen.ops.winograd_conv2d` compute, called one after the
other, but that the sums of a normalisation are taken while the image is written, and not by reading it once more. A network
of a hundred layers works through more memory between two calls than the caches hold, and so meets Python's own code and data
in slow memory every time: here there is none in between. It has no kernel of its own, on any device.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from torch.nn import functional

from fastgen.ops import _dispatch, _native
from fastgen.ops.group_norm_silu import COEFFICIENTS, group_norm_coefficients, note_parts, parts_of
from fastgen.ops.winograd_conv2d import (
    CONVOLUTION,
    CONVOLUTION_IN_PARTS,
    WinogradWeight,
    in_parts,
    winograd_conv2d,
)

__all__ = ["NormedConvolution", "winograd_residual"]


class NormedConvolution(NamedTuple):
    """A convolution of silu(norm(x))."""

    weight: WinogradWeight
    bias: Tensor | None
    groups: int
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    eps: float


_NAMES = """
    x skip x_parts skip_parts double scale shift
    weight1 norm_bias1 groups1 eps1 side1 outputs1 packed1 unit1 bias1
    weight2 norm_bias2 groups2 eps2 side2 outputs2 packed2 unit2 bias2
    side3 outputs3 packed3 unit3 bias3
"""


def _chain(carried: bool, parts: bool) -> _native.Chain:
    """The block as launches; with ``parts`` what normalisations need is put aside while images are written."""
    convolve = CONVOLUTION_IN_PARTS if parts else CONVOLUTION
    steps = [
        (COEFFICIENTS, "x skip x_parts skip_parts weight1 norm_bias1 none none groups1 eps1"),
        (convolve, "x skip r0 true side1 outputs1 double packed1 unit1 bias1 none"),
        (COEFFICIENTS, f"r1 none {'s1' if parts else 'none'} none weight2 norm_bias2 scale shift groups2 eps2"),
    ]
    if carried:
        steps.append((CONVOLUTION, "x skip none false side3 outputs3 double packed3 unit3 bias3 none"))
    steps.append((convolve, f"r1 none r2 true side2 outputs2 false packed2 unit2 bias2 {'r3' if carried else 'x'}"))
    places = {name: f"a{place}" for place, name in enumerate(_NAMES.split())}
    return _native.Chain(*((launch, " ".join(places.get(word, word) for word in words.split())) for launch, words in steps))


_chains = {(carried, parts): _chain(carried, parts) for carried in (False, True) for parts in (False, True)}


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
    if 1 in (first.weight.tile, second.weight.tile) or (carry is not None and carry[0].tile != 1):
        raise ValueError("first and second must be of 3x3 filters, what carries of 1x1")
    bias = first.bias if bias is None else bias
    channels = x.shape[1] + (0 if skip is None else skip.shape[1])
    weights = (first.weight, second.weight) if carry is None else (first.weight, second.weight, carry[0])
    expected = (channels, first.weight.outputs, channels)
    fits = all(weight.inputs == inputs for weight, inputs in zip(weights, expected, strict=False))
    if fits and not (double and carry is None) and x.numel() and _dispatch.launch_mode(None, None) is not None:
        carried = () if carry is None else (*_told(carry[0]), carry[1])
        given = *_flat(first), bias, *_flat(second), second.bias, *carried
        width = (2 if double else 1) * x.shape[3]
        aside = in_parts(first.weight.tile, width) and in_parts(second.weight.tile, width)
        chain = _chains[carry is not None, aside]
        made = chain.attempt(x, skip, parts_of(x), parts_of(skip), double, scale, shift, *given)
        if made is not None:
            if aside:
                note_parts(*made)
            return made[0]
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
