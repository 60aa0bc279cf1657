"""group_norm_silu: normalise groups of channels, scale and shift every channel, apply SiLU, in one pass.

    xhat = (x - mean) / sqrt(variance + eps)   over the channels of a group and all pixels of a sample
    z = (xhat * weight + bias) * (1 + scale) + shift,    y = z * sigmoid(z)

with ``weight`` and ``bias`` per channel and ``scale`` and ``shift`` per sample and channel; each of the four may be missing.
``activation=None`` gives y = z. Gradients flow to ``x``, ``weight``, ``bias``, ``scale`` and ``shift``: with
dz = dy * sigmoid(z) * (1 + z * sigmoid(-z)) and dxhat = dz * weight * (1 + scale)

    dx = (dxhat - mean(dxhat) - xhat * mean(dxhat * xhat)) / sqrt(variance + eps)   means over the group
    dshift = sum(dz),    dscale = sum(dz * (xhat * weight + bias))                  over the pixels
    dbias = sum(dz * (1 + scale)),    dweight = sum(dz * (1 + scale) * xhat)        over samples and pixels

Statistics are of differences from a value near the mean, which is kept to twice the precision of float32, so that inputs far
from zero lose nothing. Any finite x is fine up to differences of about 1e18, whose squares overflow float32. Where a sample
holds a NaN, that sample's outputs are NaN and no other's.

Source: Wu and He (2018), "Group normalization", equations 1 to 7; scale and shift as in Dhariwal and Nichol (2021), "Diffusion
models beat GANs on image synthesis", section 3.1; Elfwing, Uchibe and Doya (2018), "Sigmoid-weighted linear units", for SiLU.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fastgen.ops import _checks, _dispatch, _native
from fastgen.ops._spec import OpSpec

__all__ = ["group_norm_coefficients", "group_norm_silu", "group_norm_silu_reference"]


def _is_silu(activation: str | None) -> bool:
    if activation is not None and activation != "silu":
        raise ValueError(f"activation must be 'silu' or None, got {activation!r}")
    return activation is not None


def _check(x: Tensor, groups: int) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"x must be a floating-point tensor, got {getattr(x, 'dtype', type(x).__name__)}")
    if x.dim() < 2:
        raise ValueError(f"x must have shape [N, C, ...], got {list(x.shape)}")
    if not isinstance(groups, int):
        raise TypeError(f"groups must be an int, got {type(groups).__name__}")
    if groups < 1 or x.shape[1] % groups or not x.shape[1]:
        raise ValueError(f"groups must divide the channels of x, got {groups} for {x.shape[1]} channels")


def _pair(
    names: tuple[str, str], first: Tensor | None, second: Tensor | None, shape: tuple[int, ...], x: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Two parameters of one shape, checked, contiguous and in one storage type."""
    if first is None and second is None:
        return None, None
    for name, value in zip(names, (first, second), strict=True):
        if value is None:
            continue
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor, got {getattr(value, 'dtype', type(value).__name__)}")
        if (value.shape != shape and value.shape != (1, *shape[1:])) or value.device != x.device:
            raise ValueError(f"{name} must have shape {list(shape)} on {x.device}, got {list(value.shape)} on {value.device}")
    known = [v.dtype for v in (first, second) if v is not None]
    if x.dtype not in _native.DTYPES:
        return first, second
    dtype = known[0]
    if dtype is not known[-1] or dtype not in _native.DTYPES:
        dtype = torch.float32
    return _stored(first, shape, dtype), _stored(second, shape, dtype)


def _stored(value: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
    if value is None:
        return None
    if value.dtype is not dtype:
        value = value.to(dtype)
    if value.shape != shape:
        value = value.expand(shape)
    return value.contiguous()


def group_norm_silu_reference(
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    eps: float = 1e-5,
    activation: str | None = "silu",
) -> Tensor:
    """:func:`group_norm_silu` in plain PyTorch."""
    silu = _is_silu(activation)
    _check(x, groups)
    wide = torch.promote_types(x.dtype, torch.float32)
    samples, channels, pixels = x.shape[0], x.shape[1], math.prod(x.shape[2:])
    grouped = x.to(wide).reshape(samples, groups, channels // groups * pixels)
    centred = grouped - grouped.mean(2, keepdim=True)
    z = centred * torch.rsqrt(centred.square().mean(2, keepdim=True) + eps)
    z = z.reshape(samples, channels, pixels)
    if weight is not None:
        z = z * weight.to(wide)[:, None]
    if bias is not None:
        z = z + bias.to(wide)[:, None]
    if scale is not None:
        z = z * (1 + scale.to(wide)[:, :, None])
    if shift is not None:
        z = z + shift.to(wide)[:, :, None]
    return (functional.silu(z) if silu else z).reshape(x.shape).to(x.dtype)


_GIVEN = "dtype rows channels pixels last like pair1 pair2 groups"
_forward_cpp = _native.Launch("group_norm_silu_fwd", f"{_GIVEN} number flag >like null threads")
_forward_cpp_keeping = _native.Launch("group_norm_silu_fwd", f"{_GIVEN} number flag >like >grouped threads")
_backward_cpp = _native.Launch("group_norm_silu_bwd", f"{_GIVEN} flag grouped like >like >pair1 >pair2 threads")


def _sizes(x: Tensor, groups: int) -> tuple[int, int, int, int, bool]:
    """(samples, channels, groups, pixels, channels last)."""
    return x.shape[0], x.shape[1], groups, math.prod(x.shape[2:]), not x.is_contiguous()


def _forward(
    keep: bool,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    groups: int,
    eps: float,
    silu: bool,
    backend: str,
) -> tuple[Tensor, ...]:
    if backend == "cpp":
        return (_forward_cpp_keeping if keep else _forward_cpp)(x, weight, bias, scale, shift, groups, eps, silu)
    y, stats = torch.empty_like(x), _statistics(x, groups) if keep else None
    _dispatch.triton_module("group_norm_silu").group_norm_silu_fwd(
        *_sizes(x, groups), x, weight, bias, scale, shift, eps, silu, y, stats
    )
    return (y,) if stats is None else (y, stats)


def _backward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    groups: int,
    silu: bool,
    stats: Tensor,
    grad_y: Tensor,
    backend: str,
) -> tuple[Tensor, ...]:
    parameters = weight, bias, scale, shift
    if backend == "cpp":
        found = _backward_cpp(x, *parameters, groups, silu, stats, grad_y)
        return tuple(x.new_empty(0) if grad is None else grad for grad in found)
    grads = _gradients(x, *parameters)
    wanted = [None if value is None else grad for value, grad in zip(parameters, grads[1:], strict=True)]
    _dispatch.triton_module("group_norm_silu").group_norm_silu_bwd(
        *_sizes(x, groups), x, *parameters, silu, stats, grad_y, grads[0], *wanted
    )
    return grads


def _statistics(x: Tensor, groups: int) -> Tensor:
    """Room for those of each group: mean, what float32 rounds off it, 1 / deviation."""
    return x.new_empty(x.shape[0], groups, 3, dtype=torch.float32)


def _gradients(x: Tensor, *parameters: Tensor | None) -> tuple[Tensor, ...]:
    """Empty gradients of x and the four parameters; of no elements for those that are missing."""
    return torch.empty_like(x), *(x.new_empty(0) if p is None else torch.empty_like(p) for p in parameters)


_ARGUMENTS = "Tensor x, Tensor? weight, Tensor? bias, Tensor? scale, Tensor? shift, int groups"

_normalise = _dispatch.raw_op(
    "group_norm_silu",
    f"({_ARGUMENTS}, float eps, bool silu, str backend) -> Tensor",
    lambda *args: _forward(False, *args)[0],
    lambda x, *_: torch.empty_like(x),
)
_normalise_keeping_statistics = _dispatch.raw_op(
    "group_norm_silu_fwd",
    f"({_ARGUMENTS}, float eps, bool silu, str backend) -> (Tensor, Tensor)",
    functools.partial(_forward, True),
    lambda x, weight, bias, scale, shift, groups, *_: (torch.empty_like(x), _statistics(x, groups)),
)
_differentiate = _dispatch.raw_op(
    "group_norm_silu_bwd",
    f"({_ARGUMENTS}, bool silu, Tensor stats, Tensor grad_y, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    lambda x, weight, bias, scale, shift, *_: _gradients(x, weight, bias, scale, shift),
)


class _GroupNormSilu(torch.autograd.Function):
    """Saves the inputs and the statistics of each group."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        scale: Tensor | None,
        shift: Tensor | None,
        groups: int,
        eps: float,
        silu: bool,
        backend: str,
    ) -> Tensor:
        y, stats = _normalise_keeping_statistics(x, weight, bias, scale, shift, groups, eps, silu, backend)
        ctx.save_for_backward(x, weight, bias, scale, shift, stats)
        ctx.groups, ctx.silu, ctx.backend = groups, silu, backend
        return y

    @staticmethod
    @_dispatch.differentiable_once
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, *parameters, stats = ctx.saved_tensors
        if grad_y.stride() != x.stride():
            grad_y = torch.empty_like(x).copy_(grad_y)
        by_x, *by_parameters = _differentiate(x, *parameters, ctx.groups, ctx.silu, stats, grad_y, ctx.backend)
        wanted = (None if value is None else grad for value, grad in zip(parameters, by_parameters, strict=True))
        return by_x, *wanted, None, None, None, None


def _longer(ctx: Any, grad_y: Tensor | None) -> tuple[Tensor | None, ...]:
    """The backward pass of the record where a launch cannot do it."""
    ctx.groups, ctx.silu = ctx.remembered[:2]
    ctx.backend = "cpp"
    if grad_y is None:
        grad_y = torch.zeros_like(ctx.saved_tensors[0])
    return _GroupNormSilu.backward(ctx, grad_y)[:8]


_record = _native.Record(
    _forward_cpp,
    _forward_cpp_keeping,
    _backward_cpp,
    takes="i0 i1 i2 i3 i4 n5 n7 o1 g0",
    gives="o0 o1 o2 o3 o4",
    returns=1,
    longer=_longer,
)


def group_norm_silu(
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    eps: float = 1e-5,
    activation: str | None = "silu",
    backend: str | None = None,
) -> Tensor:
    """Group normalisation with scale and shift, then SiLU: silu((xhat * weight + bias) * (1 + scale) + shift).

    Args:
        x: [N, C, ...], floating point, with any number of dimensions after the channels. float64 is served by the reference.
            Channels-last images stay so, without a copy; so does any other tensor whose channels lie last in memory.
        groups: how many groups the channels are cut into; divides C.
        weight: [C], of any floating-point type; None: ones.
        bias: [C]; None: zeros.
        scale: [N, C], or [1, C] for all samples; None: zeros.
        shift: [N, C] or [1, C]; None: zeros.
        eps: added to the variance, which is that of the population.
        activation: "silu", or None to leave it out.
        backend: None, "reference", "cpp" or "triton".

    Returns:
        y in the shape, dtype and layout of ``x``; the arithmetic is float32 (float64 for float64).

    Raises:
        TypeError, ValueError: for arguments of the wrong type, shape or device.

    >>> group_norm_silu(torch.randn(8, 64, 16, 16), 32, torch.ones(64), torch.zeros(64)).shape
    torch.Size([8, 64, 16, 16])
    """
    silu = _is_silu(activation)
    if _dispatch.launch_mode(backend, None) is not None:
        made = _record.attempt(x, weight, bias, scale, shift, groups, eps, silu)
        if made:
            return made[0]
    _check(x, groups)
    channels = x.shape[1]
    weight, bias = _pair(("weight", "bias"), weight, bias, (channels,), x)
    scale, shift = _pair(("scale", "shift"), scale, shift, (x.shape[0], channels), x)
    chosen = _dispatch.choose(SPEC, backend, x)
    if chosen == "reference":
        return group_norm_silu_reference(x, groups, weight, bias, scale=scale, shift=shift, eps=eps, activation=activation)
    if not x.is_contiguous() and not _checks.is_channels_last(x) and not x.movedim(1, -1).is_contiguous():
        x = x.contiguous()
    if torch.is_grad_enabled():
        for value in (x, weight, bias, scale, shift):
            if value is not None and value.requires_grad:
                return _GroupNormSilu.apply(x, weight, bias, scale, shift, groups, eps, silu, chosen)
    return _normalise(x, weight, bias, scale, shift, groups, eps, silu, chosen)


COEFFICIENTS = _native.Launch(
    "group_norm_coefficients", "rows channels pixels own like beside parts1 parts2 pair1 pair2 groups number >norm threads"
)


def note_parts(image: Tensor, parts: Tensor) -> None:
    """Notes on an image what was put aside of it while it was written: [N, P, 3, C], mean, squared differences from it and
    number of pixels of each of P parts. Inference tensors, which do not tell whether they are written to, take none.
    """
    if not image.is_inference():
        image._parts = parts, image._version  # type: ignore[attr-defined]


def parts_of(image: Tensor | None) -> Tensor | None:
    """What :func:`note_parts` noted; None if there is nothing, or if somebody wrote to the image since."""
    parts, version = getattr(image, "_parts", (None, 0))
    return None if image is None or parts is None or image._version != version else parts


_coefficients = _dispatch.raw_op(
    "group_norm_coefficients",
    "(Tensor x, Tensor? skip, Tensor? weight, Tensor? bias, Tensor? scale, Tensor? shift, int groups, float eps) -> Tensor",
    lambda x, skip, *rest: COEFFICIENTS(x, skip, None, None, *rest)[0],
    lambda x, skip, *_: x.new_empty(x.shape[0], 3, x.shape[1] + (0 if skip is None else skip.shape[1])),
)


def group_norm_coefficients(
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    skip: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """What group normalisation is of every channel: z = (x - center) * slope + level.

    For those who read the image once more themselves: :func:`fastgen.ops.winograd_conv2d` convolves z and never stores it.

    Args:
        x, groups, weight, bias, scale, shift, eps: as in :func:`group_norm_silu`.
        skip: [N, C', ...], like x but for the number of channels: the channels that follow those of x, which are normalised
            together with them. The parameters are of all.

    Returns:
        center, slope and level [N, 3, C + C'] in the dtype of x, at least float32.

    Raises:
        TypeError, ValueError: as :func:`group_norm_silu`.

    >>> group_norm_coefficients(torch.randn(8, 64, 16, 16), 32, skip=torch.randn(8, 32, 16, 16)).shape
    torch.Size([8, 3, 96])
    """
    if _dispatch.launch_mode(None, None) is not None:
        made = COEFFICIENTS.attempt(x, skip, parts_of(x), parts_of(skip), weight, bias, scale, shift, groups, eps)
        if made:
            return made[0]
    if skip is not None and (skip.shape[:1] != x.shape[:1] or skip.shape[2:] != x.shape[2:] or skip.dtype is not x.dtype):
        raise ValueError(
            f"skip must be like x, {list(x.shape)} in {x.dtype}, but for its channels, got {list(skip.shape)} in {skip.dtype}"
        )
    whole = x if skip is None else x.new_empty(x.shape[0], x.shape[1] + skip.shape[1], 0)
    _check(whole, groups)
    channels = whole.shape[1]
    weight, bias = _pair(("weight", "bias"), weight, bias, (channels,), x)
    scale, shift = _pair(("scale", "shift"), scale, shift, (x.shape[0], channels), x)
    given = (x, skip, weight, bias, scale, shift)
    recorded = torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in given)
    if x.dtype is not torch.float32 or recorded or _dispatch.choose(SPEC, None, x) != "cpp":
        return _group_norm_coefficients_reference(*given, groups, eps)
    skip = None if skip is None else _channels_last(skip)
    return _coefficients(_channels_last(x), skip, weight, bias, scale, shift, groups, eps)


def _channels_last(x: Tensor) -> Tensor:
    moved = x.movedim(1, -1)
    return x if moved.is_contiguous() else moved.contiguous().movedim(-1, 1)


def _group_norm_coefficients_reference(
    x: Tensor,
    skip: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    groups: int,
    eps: float,
) -> Tensor:
    x = x if skip is None else torch.cat([x, skip], 1)
    wide = torch.promote_types(x.dtype, torch.float32)
    grouped = x.to(wide).reshape(x.shape[0], groups, -1)
    variance, mean = torch.var_mean(grouped, 2, correction=0)
    per = x.shape[1] // groups
    center, slope = mean.repeat_interleave(per, 1), torch.rsqrt(variance + eps).repeat_interleave(per, 1)
    slope = slope if weight is None else slope * weight.to(wide)
    level = torch.zeros_like(slope) if bias is None else bias.to(wide).expand_as(slope)
    if scale is not None:
        slope, level = slope * (1 + scale.to(wide)), level * (1 + scale.to(wide))
    return torch.stack([center, slope, level if shift is None else level + shift.to(wide)], 1)


def _example_inputs(
    rows: int,
    event: tuple[int, ...],
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    generator: torch.Generator | None = None,
    groups: int = 32,
    times: int = 1,
    channels_last: bool = False,
    affine: bool = True,
    modulated: bool = False,
    mixed: bool = False,
    activation: str | None = "silu",
) -> dict[str, Any]:
    # an event of fewer than three dimensions counts the pixels of each channel
    shape = (times * event[0], *event[1:]) if len(event) > 2 else (4 * times, *event)
    channels = shape[0]
    groups = math.gcd(groups, channels)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator).to(device)

    # parameters first: x should not be the very draw that tests take for dy, whose dx vanishes but for eps
    weight, bias, scale, shift = draw(channels), draw(channels), draw(rows, channels), draw(rows, channels)
    x = draw(rows, *shape).to(dtype)
    if channels_last:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    other = dtype if not mixed else torch.bfloat16 if dtype is torch.float32 else torch.float32
    inputs: dict[str, Any] = {"x": x, "groups": groups, "activation": activation}
    if affine:
        inputs |= {"weight": (1 + 0.5 * weight).to(other), "bias": bias.to(other)}
    if modulated:
        inputs |= {"scale": scale.to(dtype), "shift": shift.to(dtype)}
    # a few elements may lie arbitrarily close together, where a small eps amplifies every rounding
    return {**inputs, "eps": 1e-5 if math.prod(shape) // groups >= 32 else 0.1}


def _bytes_moved(inputs: dict[str, Any], mode: str) -> int:
    # forward: x -> y; backward: x, dy -> dx; parameters and their gradients once
    parameters = sum(inputs[name].nbytes for name in ("weight", "bias", "scale", "shift") if inputs.get(name) is not None)
    return inputs["x"].nbytes * (2 if mode == "fwd" else 5) + parameters * (1 if mode == "fwd" else 3)


SPEC = OpSpec(
    name="group_norm_silu",
    function=group_norm_silu,
    reference=group_norm_silu_reference,
    outputs={"y": "elementwise"},
    gradients=("x", "weight", "bias", "scale", "shift"),
    example_inputs=_example_inputs,
    flags={
        "groups": (32, 4, 1),
        "times": (1, 3, 12),
        "channels_last": (False, True),
        "affine": (True, False),
        "modulated": (False, True),
        "mixed": (False, True),
        "activation": ("silu", None),
    },
    sizes=(0, 1, 2, 3, 4, 5, 15, 16, 17, 31, 33, 64, 65, 127, 300, 2049),
    shapes=((1, (64, 8, 8)), (8, (256, 16, 16)), (8, (256, 32, 32))),
    bytes_moved=_bytes_moved,
    gradient_precision="reduction",
)
