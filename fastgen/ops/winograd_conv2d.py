"""winograd_conv2d: a 3x3 convolution of stride 1 and padding 1 in a quarter of the multiplications.

    y = conv(x, weight) + bias + residual, where x may first be doubled to [2H, 2W] by its nearest neighbours

and, before that, joined by the channels of another image, normalised and sent through SiLU: none of these is stored.

A tile of m x m outputs is read from a patch d of (m + 2) x (m + 2) inputs. Minimal filtering takes one product per element of
the patch, instead of 9 per output,

    Y = A' [ sum over channels of (G w G') * (B' d B) ] A,

with B, G and A that evaluate polynomials at m + 1 points and infinity: 0, +-1 for m = 2 (2.25 times fewer products), and
0, +-5/8, +-3/2 for m = 4 (4 times fewer). These points halve the rounding error of the usual 0, +-1, +-2. In float32 the
error of m = 4, relative to the largest output, is below 1e-6 + 2e-7 sqrt(C) over C channels, near that of a plain float32
sum; that of m = 2 is below it. Sums are in a fixed order: nothing depends on the number of threads.

A weight that is transformed once, by :func:`winograd_weight`, may also ask for products of 16-bit integers, two to a word,
and may be 1x1. Transformed patches V of a tile then share a unit s, up to a constant for each frequency, and the filters U of
a frequency and output channel another, t:

    sum V U = s t sum round(V / s) round(U / t).

The units make the product of the integers' norms over the channels less than 2^31. So no sum overflows, by Cauchy and Schwarz,
whatever the number of channels, and all are exact. Before V is known, its norm is bounded by that of the patch.

Gradients flow to ``x``, ``weight``, ``bias`` and ``residual``: that of x is a convolution of the same kind, that of the weight
takes as few products,

    dw = G' [ sum over tiles of (B' d B) * (A dY A') ] G,

and second derivatives are right. float32 on CPUs has kernels. Elsewhere the reference serves: cuDNN chooses minimal filtering
by itself.

Source: Winograd (1980), "Arithmetic complexity of computations"; Lavin and Gray (2016), "Fast algorithms for convolutional
neural networks" (arXiv:1509.09308); Barabasz et al. (2020), arXiv:1803.10986, for the choice of points.
"""

from __future__ import annotations

import functools
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen.ops import _dispatch, _native
from fastgen.ops._spec import OpSpec
from fastgen.ops.group_norm_silu import note_parts

__all__ = [
    "WinogradWeight",
    "winograd_conv2d",
    "winograd_conv2d_reference",
    "winograd_pairs",
    "winograd_serves",
    "winograd_tile",
    "winograd_weight",
]

_BLOCK = 32
"""Output channels that are packed together."""

Tile = Literal[2, 4]


class WinogradWeight(NamedTuple):
    """A weight that :func:`winograd_weight` has transformed."""

    packed: Tensor
    """float32 [F, blocks of 32 output channels, input channels, 32], or int16 [F, blocks, pairs of input channels, 32, 2];
    F = (tile + 2)^2, or 1 of a 1x1 filter."""
    scale: Tensor | None
    """What the integers count: float32 [F, blocks, 32]. None where there are none."""
    outputs: int
    inputs: int
    tile: int


def winograd_conv2d_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    double: bool = False,
    skip: Tensor | None = None,
    norm: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """:func:`winograd_conv2d` in plain PyTorch."""
    x = _made(x, skip, norm, activation)
    if double:
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
    y = F.conv2d(x, weight, padding=1)
    if bias is not None:
        y = y + bias.reshape(-1, bias.shape[-1], 1, 1)
    return y if residual is None else y + residual


def _made(x: Tensor, skip: Tensor | None, norm: Tensor | None, activation: str | None) -> Tensor:
    """The image that is convolved."""
    if skip is not None:
        x = torch.cat([x, skip], 1)
    if norm is not None:
        center, slope, level = norm[..., None, None].unbind(1)
        x = (x - center) * slope + level
    return x if activation is None else F.silu(x)


def _checked(
    x: Tensor,
    outputs: int,
    inputs: int,
    bias: Tensor | None,
    residual: Tensor | None,
    double: bool,
    skip: Tensor | None,
    norm: Tensor | None,
    activation: str | None,
) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"x must be a floating-point tensor, got {getattr(x, 'dtype', type(x).__name__)}")
    if activation is not None and activation != "silu":
        raise ValueError(f"activation must be 'silu' or None, got {activation!r}")
    own = inputs if skip is None or skip.dim() != 4 else inputs - skip.shape[1]
    if x.dim() != 4 or x.shape[1] != own or not x.shape[2] or not x.shape[3]:
        rest = "" if own == inputs else f" beside the {inputs - own} channels of skip"
        raise ValueError(f"x must have shape [N, {own}, H, W]{rest} like the weight, and pixels, got {list(x.shape)}")
    n, factor = x.shape[0], 2 if double else 1
    shapes = {
        "bias": (bias, ((outputs,), (1, outputs), (n, outputs))),
        "residual": (residual, ((n, outputs, factor * x.shape[2], factor * x.shape[3]),)),
        "skip": (skip, ((n, inputs - own, *x.shape[2:]),)),
        "norm": (norm, ((n, 3, inputs),)),
    }
    for name, (value, allowed) in shapes.items():
        if value is None:
            continue
        if tuple(value.shape) not in allowed:
            wanted = " or ".join(str(list(shape)) for shape in dict.fromkeys(allowed))
            raise ValueError(f"{name} must have shape {wanted}, got {list(value.shape)}")
        if value.dtype is not x.dtype or value.device != x.device:
            raise TypeError(f"{name} must be {x.dtype} on {x.device} like x, got {value.dtype} on {value.device}")


def _checked_weight(weight: Tensor, tile: int, sides: tuple[int, ...] = (3,)) -> None:
    shape = tuple(weight.shape) if isinstance(weight, Tensor) else ()
    if len(shape) != 4 or not shape[0] or shape[2:] not in {(k, k) for k in sides}:
        wanted = " or ".join(f"[O, C, {k}, {k}]" for k in sides)
        raise ValueError(f"weight must have shape {wanted}, got {list(shape)}")
    if tile not in (2, 4):
        raise ValueError(f"tile must be 2 or 4, got {tile}")


def _packed_like(weight: Tensor, tile: int) -> Tensor:
    outputs, inputs = weight.shape[:2]
    frequencies = 1 if tile == 1 else (tile + 2) ** 2
    return weight.new_empty(frequencies, -(-outputs // _BLOCK), inputs, _BLOCK)


def _transform(weight: Tensor, tile: int) -> Tensor:
    packed = _packed_like(weight, tile)
    _native.kernel("winograd_conv2d_weight")(tile, *weight.shape[:2], weight, packed, torch.get_num_threads())
    return packed


def _pairs_like(packed: Tensor, tile: int, outputs: int) -> tuple[Tensor, Tensor]:
    frequencies, blocks, inputs, _ = packed.shape
    pairs = packed.new_empty(frequencies, blocks, -(-inputs // 2), _BLOCK, 2, dtype=torch.int16)
    return pairs, packed.new_empty(frequencies, blocks, _BLOCK)


def _pair(packed: Tensor, tile: int, outputs: int) -> tuple[Tensor, Tensor]:
    pairs, scale = _pairs_like(packed, tile, outputs)
    _native.kernel("winograd_conv2d_pairs")(tile, outputs, packed.shape[2], packed, pairs, scale, torch.get_num_threads())
    return pairs, scale


def _result_like(x: Tensor, outputs: int, double: bool) -> Tensor:
    factor = 2 if double else 1
    shape = (x.shape[0], outputs, factor * x.shape[2], factor * x.shape[3])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


_GIVEN = "rows height width channels own like beside norm flag side outputs doubled memory memory bias image"
CONVOLUTION = _native.Launch("winograd_conv2d", f"{_GIVEN} >image null threads")
CONVOLUTION_IN_PARTS = _native.Launch("winograd_conv2d", f"{_GIVEN} >image >parts threads")
"""The same, and, for the normalisation that follows, mean, squared differences from it and number of pixels of each row of
tiles and output channel: [N, rows, 3, O]. See :func:`in_parts`."""


def in_parts(tile: int, width: int) -> bool:
    """Whether an image so wide can be made in parts: a row of tiles must be one task of the kernel."""
    return -(-width // tile) <= 56


_transformed = _dispatch.raw_op("winograd_conv2d_weight", "(Tensor weight, int tile) -> Tensor", _transform, _packed_like)
_convolve = _dispatch.raw_op(
    "winograd_conv2d",
    "(Tensor x, Tensor? skip, Tensor? norm, bool silu, int tile, int outputs, bool double, Tensor packed, Tensor? scale, "
    "Tensor? bias, Tensor? residual) -> Tensor",
    lambda *args: CONVOLUTION(*args)[0],
    lambda x, skip, norm, silu, tile, outputs, double, *_: _result_like(x, outputs, double),
)


def _sum_over_tiles(x: Tensor, grad_y: Tensor, tile: int, double: bool) -> Tensor:
    grad = _weight_gradient_like(x, grad_y, tile, double)
    n, outputs, height, width = grad_y.shape
    _native.kernel("winograd_conv2d_weight_gradient")(
        tile, n, height, width, x.shape[1], outputs, double, x, grad_y, grad, torch.get_num_threads()
    )
    return grad


def _weight_gradient_like(x: Tensor, grad_y: Tensor, tile: int, double: bool) -> Tensor:
    return x.new_empty(grad_y.shape[1], x.shape[1], 3, 3)


_weight_gradient = _dispatch.raw_op(
    "winograd_conv2d_weight_gradient",
    "(Tensor x, Tensor grad_y, int tile, bool double) -> Tensor",
    _sum_over_tiles,
    _weight_gradient_like,
)


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _plain(
    x: Tensor, packed: Tensor, bias: Tensor | None, residual: Tensor | None, outputs: int, tile: int, double: bool
) -> Tensor:
    return _convolve(x, None, None, False, tile, outputs, double, packed, None, bias, residual)


class _WinogradConv2d(torch.autograd.Function):
    """Saves x and the weight."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, tile: int, double: bool
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.bias_shape, ctx.tile, ctx.double = None if bias is None else bias.shape, tile, double
        return _plain(x, _transformed(weight, tile), bias, residual, weight.shape[0], tile, double)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad_x = grad_weight = grad_bias = None
        wanted, own, tile = ctx.needs_input_grad, _channels_last(grad_y), ctx.tile
        # torch.compile has no second derivatives
        again = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if wanted[0]:
            turned = weight.flip(2, 3).transpose(0, 1).contiguous()
            if again:
                grad_x = winograd_conv2d(own, turned, tile=tile, backend="cpp")
            else:
                grad_x = _plain(own, _transformed(turned, tile), None, None, weight.shape[1], tile, False)
            if ctx.double:
                grad_x = 4 * F.avg_pool2d(grad_x, 2)
        if wanted[1]:
            grad_weight = (_differentiable_weight_gradient if again else _weight_gradient)(x, own, tile, ctx.double)
        if wanted[2]:
            shared = len(ctx.bias_shape) == 1 or ctx.bias_shape[0] == 1
            grad_bias = own.sum((0, 2, 3) if shared else (2, 3)).reshape(ctx.bias_shape)
        return grad_x, grad_weight, grad_bias, grad_y if wanted[3] else None, None, None


def _differentiable_weight_gradient(x: Tensor, grad_y: Tensor, tile: int, double: bool) -> Tensor:
    """:func:`_weight_gradient` by plain PyTorch, which knows its derivatives."""
    x = F.interpolate(x, scale_factor=2.0, mode="nearest") if double else x
    like, one = x.new_empty(grad_y.shape[1], x.shape[1], 3, 3), [1, 1]
    return torch.ops.aten.convolution_backward(
        grad_y, x, like, None, one, one, one, False, [0, 0], 1, [False, True, False]
    )[1]  # fmt: skip


def winograd_pairs() -> bool:
    """Whether this CPU multiplies pairs of 16-bit integers faster than floats, which transformed weights in int16 are for."""
    if not _native.ready():
        return False
    answer = torch.zeros(1, dtype=torch.int64)
    _native.kernel("winograd_conv2d_pairs_pay")(answer)
    return bool(answer)


def winograd_serves(x: Tensor) -> bool:
    """Whether there are kernels for images like x, without gradients or with."""
    return _dispatch.choose(SPEC, None, x) == "cpp"


def winograd_tile(
    x: Tensor, outputs: int, inputs: int | None = None, *, double: bool = False, training: bool = False
) -> Tile | None:
    """The tile with which this convolution is fastest; None where a plain convolution is, or where there are no kernels.

    A model of the cost per pair of channels, in products of a plain convolution, fitted to measurements with 8 to 512 channels:
    products, transformations (which few channels make up for badly), and reading the weights, in training with their
    transformation (which small images make up for badly).

    Args:
        x: [N, C, H, W].
        outputs: channels of the result.
        inputs: channels of the image, where x has not all of them.
        double: as in :func:`winograd_conv2d`.
        training: whether the weight is transformed at every call, and gradients are taken.
    """
    n, own, height, width = x.shape
    inputs = own if inputs is None else inputs
    if min(inputs, outputs) < 16 or not winograd_serves(x):
        return None
    if double:
        height, width = 2 * height, 2 * width
    return _tile(n, height, width, inputs, outputs, training)


@functools.lru_cache(4096)
def _tile(n: int, height: int, width: int, inputs: int, outputs: int, training: bool) -> Tile | None:
    filled = -(-outputs // _BLOCK) * _BLOCK / outputs
    weights = 75 if training else 25

    def cost(tile: Tile) -> float:
        tiles = n * -(-height // tile) * -(-width // tile)
        return (tile + 2) ** 2 * (tiles * (1.3 * filled + 11 / inputs + 11 / outputs) + weights)

    costs: dict[Tile | None, float] = {None: 9.0 * (n * height * width + 25), 2: cost(2), 4: cost(4)}
    return min(costs, key=lambda tile: costs[tile])


def winograd_weight(weight: Tensor, tile: Tile = 4, *, dtype: torch.dtype = torch.float32) -> WinogradWeight:
    """Transforms a weight once for many calls of :func:`winograd_conv2d` that need no gradients.

    Args:
        weight: [O, C, 3, 3], or [O, C, 1, 1], which has no tiles and pads nothing; float32 on a CPU with kernels.
        tile: outputs per side of a tile. 4 multiplies least; 2 rounds less, and reads 16 numbers a filter instead of 36.
        dtype: of the products. torch.int16 rounds patches and transformed weights to 16 bits, each tile and each frequency of
            an output channel in its own unit, and sums the products exactly; images and results stay float32. A layer errs by
            about 1e-3 of its result's norm, less than with bfloat16 (4e-3), in half the memory, and where CPUs multiply pairs
            of such integers (AVX-512 VNNI, AVX2) in much less time.

    Raises:
        ValueError: where there are no kernels for it; for another dtype; of int16 for a weight that is not finite.
    """
    _checked_weight(weight, tile, (3, 1))
    if dtype not in (torch.float32, torch.int16):
        raise ValueError(f"dtype must be torch.float32 or torch.int16, got {dtype}")
    _dispatch.choose(SPEC, "cpp", weight)
    size = tile if weight.shape[-1] == 3 else 1
    packed, scale = _transformed(weight.detach().contiguous(), size), None
    if dtype is torch.int16:
        if not packed.isfinite().all():
            raise ValueError("weight must be finite for torch.int16")
        packed, scale = _pair(packed, size, weight.shape[0])
    return WinogradWeight(packed, scale, weight.shape[0], weight.shape[1], size)


def winograd_conv2d(
    x: Tensor,
    weight: Tensor | WinogradWeight,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    tile: Tile = 4,
    double: bool = False,
    skip: Tensor | None = None,
    norm: Tensor | None = None,
    activation: str | None = None,
    aside: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Convolve images with 3x3 filters, stride 1, padding 1, by minimal filtering; add a bias and a residual in the same pass.

    Args:
        x: [N, C, H, W], at least one pixel; channels-last is read as it is. float32 has kernels, the rest the reference.
        weight: [O, C, 3, 3] in the dtype of x, or what :func:`winograd_weight` made of it.
        bias: [O], or [N, O] or [1, O] for one a sample.
        residual: added to the result, in its shape.
        tile: 2 or 4, see :func:`winograd_weight`; a transformed weight brings its own.
        double: convolve the image doubled to [2H, 2W] by its nearest neighbours, which is never stored.
        skip: [N, C', H, W], further channels of the image: x has C - C'. Not stored together; nor is what follows, but where
            there are gradients.
        norm: [N, 3, C] of :func:`fastgen.ops.group_norm_coefficients`: convolve (x - center) * slope + level.
        activation: "silu": convolve SiLU of that.
        aside: put aside, while the result is written, what a normalisation of it needs, where a transformed weight's kernel
            can: :func:`fastgen.ops.group_norm_coefficients` will find it and not read the result.
        backend: None, "reference" or "cpp".

    Returns:
        [N, O, H, W], or [N, O, 2H, 2W], channels-last from the kernels.

    Raises:
        TypeError, ValueError: for arguments of the wrong type, shape, device or value.

    >>> winograd_conv2d(torch.randn(2, 16, 9, 7), torch.randn(8, 16, 3, 3), torch.zeros(8)).shape
    torch.Size([2, 8, 9, 7])
    """
    if isinstance(weight, WinogradWeight):
        packed, scale, outputs, inputs, tile = weight  # type: ignore[assignment]
        how = activation == "silu", tile, outputs, double, packed, scale
        if _dispatch.launch_mode(backend, None) is not None and _fits(x, skip, inputs) and activation in (None, "silu"):
            aside = aside and in_parts(tile, (2 if double else 1) * x.shape[3])
            made = (CONVOLUTION_IN_PARTS if aside else CONVOLUTION).attempt(x, skip, norm, *how, bias, residual)
            if made:
                if aside:
                    note_parts(*made)
                return made[0]
        _checked(x, outputs, inputs, bias, residual, double, skip, norm, activation)
        _dispatch.choose(SPEC, "cpp", x)
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, bias, residual, skip, norm)):
            raise ValueError("a transformed weight serves no gradients: give the weight itself")
        return _convolve(_channels_last(x), _images(skip), _flat(norm), *how, _flat(bias), _images(residual))
    _checked_weight(weight, tile)
    _checked(x, weight.shape[0], weight.shape[1], bias, residual, double, skip, norm, activation)
    if weight.dtype is not x.dtype or weight.device != x.device:
        raise TypeError(f"weight must be {x.dtype} on {x.device} like x, got {weight.dtype} on {weight.device}")
    if _dispatch.choose(SPEC, backend, x) == "reference":
        made_of = {"skip": skip, "norm": norm, "activation": activation}
        return winograd_conv2d_reference(x, weight, bias, residual, double=double, **made_of)  # type: ignore[arg-type]
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias, residual, skip, norm)):
        x = _made(x, skip, norm, activation)
        own = _channels_last(x), weight.contiguous(), _flat(bias), _images(residual)
        return _WinogradConv2d.apply(*own, tile, double)
    how = activation is not None, tile, weight.shape[0], double, _transformed(weight.contiguous(), tile), None
    return _convolve(_channels_last(x), _images(skip), _flat(norm), *how, _flat(bias), _images(residual))


def _fits(x: Tensor, skip: Tensor | None, inputs: int) -> bool:
    """Whether there are pixels, and channels as the weight has them, which a launch does not know."""
    if not isinstance(x, Tensor) or x.dim() != 4 or not x.numel() or (skip is not None and skip.dim() != 4):
        return False
    return x.shape[1] + (0 if skip is None else skip.shape[1]) == inputs


def _flat(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.contiguous()


def _images(residual: Tensor | None) -> Tensor | None:
    return None if residual is None else _channels_last(residual)


def _example_inputs(
    rows: int,
    event: tuple[int, ...],
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    generator: torch.Generator | None = None,
    outputs: int = 7,
    bias: Literal["shared", "sample", "none"] = "shared",
    residual: bool = False,
    tile: Tile = 4,
    double: bool = False,
    channels_last: bool = False,
    made: bool = False,
) -> dict[str, Any]:
    # an event of one dimension is a row of pixels
    channels, height, width = (1, 1, *event) if len(event) == 1 else event
    others = min(5, channels) if made else 0
    factor = 2 if double else 1

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    x = draw(rows, channels, height, width)
    inputs: dict[str, Any] = {}
    if made:
        norm = torch.stack(
            [draw(rows, channels + others), 0.5 + draw(rows, channels + others).abs(), draw(rows, channels + others)], 1
        )
        inputs = {"skip": draw(rows, others, height, width), "norm": norm, "activation": "silu"}
    return {
        **inputs,
        "x": x.contiguous(memory_format=torch.channels_last) if channels_last else x,
        "weight": draw(outputs, channels + others, 3, 3) / (9 * (channels + others)) ** 0.5,
        "bias": {"shared": draw(outputs), "sample": draw(rows, outputs), "none": None}[bias],
        "residual": draw(rows, outputs, factor * height, factor * width) if residual else None,
        "tile": tile,
        "double": double,
    }


def _outputs_of(inputs: dict[str, Any]) -> int:
    x, weight = inputs["x"], inputs["weight"]
    return x.shape[0] * x.shape[2] * x.shape[3] * weight.shape[0] * (4 if inputs["double"] else 1)


def _bytes_moved(inputs: dict[str, Any], mode: str) -> int:
    # forward: x, weight -> y; backward: x, weight, dy -> dx, dweight
    x, weight = inputs["x"], inputs["weight"]
    moved = x.nbytes + weight.nbytes + _outputs_of(inputs) * x.element_size()
    return moved * (1 if mode == "fwd" else 3)


def _operations(inputs: dict[str, Any], mode: str) -> int:
    # products of the plain sum: minimal filtering takes fewer, and may reach more than the machine's own rate
    return 18 * _outputs_of(inputs) * inputs["weight"].shape[1] * (1 if mode == "fwd" else 3)


SPEC = OpSpec(
    name="winograd_conv2d",
    function=winograd_conv2d,
    reference=winograd_conv2d_reference,
    outputs={"y": "filtering"},
    gradients=("x", "weight", "bias", "residual", "skip", "norm"),
    example_inputs=_example_inputs,
    flags={
        "outputs": (7, 1, 33, 65),
        "bias": ("shared", "sample", "none"),
        "residual": (False, True),
        "tile": (4, 2),
        "double": (False, True),
        "channels_last": (False, True),
        "made": (False, True),
    },
    event_ranks=(1, 3),
    sizes=(1, 2, 3, 4, 5, 15, 16, 17, 31, 33, 63, 64, 65, 127, 300),
    backends=("cpp",),
    shapes=((64, (32, 28, 28)), (8, (256, 16, 16)), (8, (128, 32, 32))),
    bytes_moved=_bytes_moved,
    operations=_operations,
    dtypes=(torch.float32,),
    gradient_precision="filtering",
    double_backward=True,
)
