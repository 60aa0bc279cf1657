"""rq_spline: an elementwise monotonic rational-quadratic spline with identity tails, and its log-Jacobian, in one pass.

K bins cut [-B, B] at knots (x_k, y_k) with derivatives d_k; both ends lie on the diagonal with derivative 1. Within bin k, of
width w, height h and slope s = h / w, with theta = (x - x_k) / w and phi = 1 - theta,

    y = y_k + h (s theta^2 + d_k theta phi) / D,      D = s + (d_k + d_{k+1} - 2 s) theta phi
    dy/dx = s^2 (d_{k+1} theta^2 + 2 s theta phi + d_k phi^2) / D^2

and outside y = x. log_det sums log dy/dx over the event. The parameters are unnormalised, by one of two conventions:

    nflows   w = 2B (m + (1 - m K) softmax(widths)), h likewise, d = m + softplus(derivatives),   m = 1e-3
    zuko     w = 2B softmax(c(widths, 1/2)), h likewise, d = exp(c(derivatives, 1)),   c(v, l) = v / (1 + |v| / (l log 1e3))

The inverse solves the quadratic for theta. With zeta = (y - y_k) / h, e = d_k (1 - zeta) - d_{k+1} zeta and
r = |e| + sqrt(e^2 + 4 s^2 zeta (1 - zeta)), where nothing cancels and nothing can be negative,

    theta = 2 s zeta / (r + 2 s zeta) if e >= 0,   1 - theta = 2 s (1 - zeta) / (r + 2 s (1 - zeta)) otherwise.

Gradients flow to x and to all parameters, through the inverse by the implicit function theorem. At a knot, where the gradient
of log_det jumps, it is that of the bin above (nflows) or below (zuko). Infinite inputs lie in the tails; a NaN in x, or in a
parameter that the element's bin depends on, makes that sample NaN and no other.

Sources: Durkan, Bekasov, Murray and Papamakarios (2019), "Neural spline flows"; Gregory and Delbourgo (1982).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad, softplus

from fastgen.ops import _checks, _dispatch, _native
from fastgen.ops._spec import OpSpec

__all__ = ["Splined", "rational_quadratic", "rq_spline", "rq_spline_reference"]

CONVENTIONS = ("nflows", "zuko")
LEAST = 1e-3
UNIT_SLOPE = math.log(math.exp(1 - LEAST) - 1)


class Splined(NamedTuple):
    """What a bijection gives."""

    y: Tensor
    """The transformed input, in its shape and dtype."""
    log_det: Tensor
    """log |det dy/dx| per sample in nats, summed over the event: [N], float32 or wider."""


def _knots(widths: Tensor, bound: float, convention: str) -> tuple[Tensor, Tensor]:
    """Knots [..., K + 1] from -bound to bound, and the lengths [..., K] of the bins between them."""
    bins = widths.shape[-1]
    if convention == "zuko":
        shares = torch.softmax(widths / (1 + (2 * widths / math.log(LEAST)).abs()), -1)
    else:
        shares = LEAST + (1 - LEAST * bins) * torch.softmax(widths, -1)
    inner = bound * (2 * shares.cumsum(-1)[..., :-1] - 1)
    return pad(pad(inner, (1, 0), value=-bound), (0, 1), value=bound), 2 * bound * shares


def rational_quadratic(
    point: Tensor,
    k: Tensor,
    knots_x: Tensor,
    widths: Tensor,
    knots_y: Tensor,
    heights: Tensor,
    slopes: Tensor,
    *,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    """The map of every point in its bin, or the inverse, and the logarithm of the derivative of what was applied.

    Args:
        point: [...], inside the spline.
        k: [..., 1], the bin that each point lies in.
        knots_x, knots_y, slopes: knots and derivatives there, [..., K + 1].
        widths, heights: of the bins, [..., K].
    """
    x0, w, y0, h, d0 = (t.gather(-1, k).squeeze(-1) for t in (knots_x, widths, knots_y, heights, slopes))
    d1 = slopes.gather(-1, k + 1).squeeze(-1)
    s = h / w
    if inverse:
        zeta = ((point - y0) / h).clamp(0, 1)
        rising = d0 * (1 - zeta) < d1 * zeta
        e = torch.where(rising, d1 * zeta - d0 * (1 - zeta), d0 * (1 - zeta) - d1 * zeta)
        root = e + torch.sqrt(e.square() + 4 * s.square() * zeta * (1 - zeta))
        small = 2 * s * torch.where(rising, 1 - zeta, zeta)
        theta = torch.where(rising, root, small) / (root + small)
    else:
        theta = (point - x0) / w
    phi = 1 - theta
    numerator, rest = theta * (s * theta + d0 * phi), phi * (s * phi + d1 * theta)
    curve = d1 * theta.square() + 2 * s * theta * phi + d0 * phi.square()
    log_slope = torch.log(curve) + 2 * torch.log(s / (numerator + rest))
    return (x0 + w * theta, -log_slope) if inverse else (y0 + h * numerator / (numerator + rest), log_slope)


def rq_spline_reference(
    x: Tensor,
    widths: Tensor,
    heights: Tensor,
    derivatives: Tensor,
    *,
    bound: float,
    inverse: bool = False,
    convention: str = "nflows",
) -> Splined:
    """:func:`rq_spline` in plain PyTorch."""
    x, widths, heights, derivatives = prepare(x, widths, heights, derivatives, bound, convention)
    wide = torch.promote_types(x.dtype, torch.float32)
    given, widths, heights, derivatives = (t.to(wide) for t in (x, widths, heights, derivatives))
    knots_x, widths = _knots(widths, bound, convention)
    knots_y, heights = _knots(heights, bound, convention)
    if convention == "zuko":
        slopes = torch.exp(pad(derivatives / (1 + (derivatives / math.log(LEAST)).abs()), (1, 1)))
        tail = (given <= -bound) | (given > bound)
    else:
        slopes = LEAST + softplus(pad(derivatives, (1, 1), value=UNIT_SLOPE))
        tail = (given < -bound) | (given > bound)

    point = torch.where(tail, 0.0, given)
    searched = (knots_y if inverse else knots_x)[..., 1:-1]
    reached = searched < point[..., None] if convention == "zuko" else searched <= point[..., None]
    out, log_slope = rational_quadratic(
        point, reached.sum(-1, keepdim=True), knots_x, widths, knots_y, heights, slopes, inverse=inverse
    )
    y = torch.where(tail, given, out)
    log_det = torch.where(tail, 0.0, log_slope)
    return Splined(y.to(x.dtype), log_det.reshape(len(x), math.prod(x.shape[1:])).sum(1))


def prepare(
    x: Tensor, widths: Tensor, heights: Tensor, derivatives: Tensor, bound: float, convention: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The tensors in one dtype, the parameters expanded to the shape of x; everything checked."""
    _check_options(widths, bound, convention)
    values = (x, widths, heights, derivatives)
    if type(x) is not Tensor or not _alike(values):
        values = _unify(*values)
    return values


def _check_options(widths: Tensor, bound: float, convention: str) -> None:
    if convention not in CONVENTIONS:
        raise ValueError(f"convention must be one of {', '.join(CONVENTIONS)}, got {convention!r}")
    if not 0 < bound < math.inf:
        raise ValueError(f"bound must be positive and finite, got {bound!r}")
    if convention == "nflows" and isinstance(widths, Tensor) and widths.dim() and widths.shape[-1] * LEAST > 1:
        raise ValueError(f"widths: the nflows convention takes {1 / LEAST:.0f} bins at most, got {widths.shape[-1]}")


def _alike(values: tuple[Tensor, Tensor, Tensor, Tensor]) -> bool:
    """Whether nothing is to be changed: one floating dtype and device, and parameters of the shape of x."""
    x, widths, heights, derivatives = values
    shape, size = x.shape, widths.shape
    if not shape or not x.is_floating_point() or len(size) != len(shape) + 1 or size[:-1] != shape or not size[-1]:
        return False
    if heights.shape != size or derivatives.shape != (*shape, size[-1] - 1):
        return False
    return all(type(v) is Tensor and v.dtype is x.dtype and v.get_device() == x.get_device() for v in values[1:])


def _unify(x: Tensor, widths: Tensor, heights: Tensor, derivatives: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The general case of :func:`prepare`: promotion, and parameters that are broadcast."""
    parameters = {"widths": widths, "heights": heights, "derivatives": derivatives}
    leading = {name: v[..., :0].sum(-1) if isinstance(v, Tensor) and v.dim() else v for name, v in parameters.items()}
    dtype = _checks.common(x=x, **leading)[0].dtype
    bins = widths.shape[-1] if widths.dim() else 0
    if not bins:
        raise ValueError(f"widths must be [..., K] with at least one bin, got shape {tuple(widths.shape)}")
    expanded = [x.to(dtype)]
    for (name, value), size in zip(parameters.items(), (bins, bins, bins - 1), strict=True):
        if not value.dim() or value.shape[-1] != size:
            raise ValueError(f"{name} must be [..., {size}] for {bins} bins, got shape {tuple(value.shape)}")
        try:
            expanded.append(value.expand(*x.shape, size).to(dtype))
        except RuntimeError as error:
            shapes = f"{tuple(value.shape)} for x of shape {tuple(x.shape)}"
            raise ValueError(f"{name} must be [..., {size}] and broadcast to the shape of x, got {shapes}") from error
    x, widths, heights, derivatives = expanded
    return x, widths, heights, derivatives


class _Kernels(NamedTuple):
    """The C++ kernels of one direction and convention."""

    forward: _native.Launch
    backward: _native.Launch
    record: _native.Record


def _kernels(inverse: bool, zuko: bool) -> _Kernels:
    given, options = "dtype rows event bins like binned binned knots", f"number {int(inverse)} {int(zuko)} threads"
    forward = _native.Launch("rq_spline_fwd", f"{given} >like >row {options}")
    backward = _native.Launch("rq_spline_bwd", f"{given} like? row >like >binned >binned >knots {options}")

    def longer(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.options = ctx.remembered[0], inverse, zuko, "cpp"
        return _RQSpline.backward(ctx, *grads)[:5]

    takes, gives = "i0 i1 i2 i3 g0 g1 n4", "o0 o1 o2 o3"
    record = _native.Record(forward, forward, backward, takes=takes, gives=gives, returns=2, longer=longer)
    return _Kernels(forward, backward, record)


_cpp = {(inverse, zuko): _kernels(inverse, zuko) for inverse in (False, True) for zuko in (False, True)}


def _forward(
    x: Tensor,
    widths: Tensor,
    heights: Tensor,
    derivatives: Tensor,
    bound: float,
    inverse: bool,
    zuko: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    if backend == "cpp":
        y, log_det = _cpp[inverse, zuko].forward(x, widths, heights, derivatives, bound)
        return y, log_det
    y, log_det = torch.empty_like(x), _checks.per_sample(x)
    rows, event = _checks.as_rows(x)
    _dispatch.triton_module("rq_spline").rq_spline_fwd(
        rows, event, widths.shape[-1], x, widths, heights, derivatives, y, log_det, bound, inverse, zuko
    )
    return y, log_det


def _backward(
    x: Tensor,
    widths: Tensor,
    heights: Tensor,
    derivatives: Tensor,
    grad_y: Tensor | None,
    grad_log_det: Tensor | None,
    bound: float,
    inverse: bool,
    zuko: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if backend == "cpp":
        by_x, by_widths, by_heights, by_derivatives = _cpp[inverse, zuko].backward(
            x, widths, heights, derivatives, grad_y, grad_log_det, bound
        )
        return by_x, by_widths, by_heights, by_derivatives
    grads = torch.empty_like(x), torch.empty_like(widths), torch.empty_like(heights), torch.empty_like(derivatives)
    rows, event = _checks.as_rows(x)
    _dispatch.triton_module("rq_spline").rq_spline_bwd(
        rows, event, widths.shape[-1], x, widths, heights, derivatives, grad_y, grad_log_det, *grads, bound, inverse, zuko
    )
    return grads


_ARGUMENTS = "Tensor x, Tensor widths, Tensor heights, Tensor derivatives"
_OPTIONS = "float bound, bool inverse, bool zuko, str backend"

_transform = _dispatch.raw_op(
    "rq_spline",
    f"({_ARGUMENTS}, {_OPTIONS}) -> (Tensor, Tensor)",
    _forward,
    lambda x, *_: (torch.empty_like(x), _checks.per_sample(x)),
)
_differentiate = _dispatch.raw_op(
    "rq_spline_bwd",
    f"({_ARGUMENTS}, Tensor? grad_y, Tensor? grad_log_det, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    lambda *args: tuple(torch.empty_like(v) for v in args[:4]),
)


class _RQSpline(torch.autograd.Function):
    """Saves the inputs alone; the backward kernel normalises the parameters and finds the bins again."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        widths: Tensor,
        heights: Tensor,
        derivatives: Tensor,
        bound: float,
        inverse: bool,
        zuko: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, widths, heights, derivatives)
        ctx.options = bound, inverse, zuko, backend
        return _transform(x, widths, heights, derivatives, bound, inverse, zuko, backend)

    @staticmethod
    @_dispatch.differentiable_once
    def backward(ctx: Any, grad_y: Tensor | None, grad_log_det: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_y = grad_y if grad_y is None else grad_y.contiguous()
        grad_log_det = grad_log_det if grad_log_det is None else grad_log_det.contiguous()
        return *_differentiate(*ctx.saved_tensors, grad_y, grad_log_det, *ctx.options), None, None, None, None


def rq_spline(
    x: Tensor,
    widths: Tensor,
    heights: Tensor,
    derivatives: Tensor,
    *,
    bound: float,
    inverse: bool = False,
    convention: str = "nflows",
    backend: str | None = None,
) -> Splined:
    """Transform every element of x by its own monotonic rational-quadratic spline of K bins on [-bound, bound].

    Args:
        x: [N, ...], floating point. float64 is served by the reference.
        widths: unnormalised widths of the bins, [..., K]; the leading dimensions are those of ``x`` or broadcast to them.
        heights: unnormalised heights of the bins, [..., K].
        derivatives: unnormalised derivatives at the inner knots, [..., K - 1].
        bound: half the side of the square that holds the spline; positive. Outside, the map is the identity.
        inverse: apply the inverse map; ``log_det`` is then that of the inverse.
        convention: how parameters are normalised: "nflows", as nflows' unconstrained_rational_quadratic_spline with linear
            tails (bins of at least 1e-3 of the interval, derivatives of at least 1e-3), or "zuko", as zuko's
            MonotonicRQSTransform (parameters clipped softly, derivatives by exp; its usual bound is 5).
        backend: None, "reference", "cpp" or "triton".

    Returns:
        ``(y, log_det)``: the result in the shape and dtype of ``x``, and nats per sample [N] in float32 (float64 for float64).

    Raises:
        TypeError, ValueError: for arguments of the wrong type, shape or device, a bound that is not positive, or an unknown
            convention.

    >>> y, log_det = rq_spline(torch.randn(8, 2), torch.zeros(8, 2, 5), torch.zeros(8, 2, 5), torch.zeros(8, 2, 4), bound=3.0)
    >>> y.shape, log_det.shape
    (torch.Size([8, 2]), torch.Size([8]))
    """
    _check_options(widths, bound, convention)
    zuko = convention == "zuko"
    if _dispatch.launch_mode(backend, None) is not None:
        made = _cpp[bool(inverse), zuko].record.attempt(x, widths, heights, derivatives, bound)
        if made:
            return Splined._make(made)
    x, widths, heights, derivatives = prepare(x, widths, heights, derivatives, bound, convention)
    chosen = _dispatch.choose(SPEC, backend, x)
    if chosen == "reference":
        return rq_spline_reference(x, widths, heights, derivatives, bound=bound, inverse=inverse, convention=convention)
    values = x.contiguous(), widths.contiguous(), heights.contiguous(), derivatives.contiguous()
    options = float(bound), bool(inverse), zuko, chosen
    if torch.is_grad_enabled() and any(v.requires_grad for v in values):
        return Splined(*_RQSpline.apply(*values, *options))
    return Splined(*_transform(*values, *options))


def _example_inputs(
    rows: int,
    event: tuple[int, ...],
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    generator: torch.Generator | None = None,
    bins: int = 8,
    inverse: bool = False,
    convention: str = "nflows",
) -> dict[str, Any]:
    def draw(*size: int) -> Tensor:
        return torch.randn(rows, *event, *size, generator=generator).to(device, dtype)

    bound = 3.0
    x, widths, heights, derivatives = 2 * draw(), draw(bins) / 2, draw(bins) / 2, draw(bins - 1) / 2
    # away from the knots, where the gradient of log_det jumps
    knots = _knots((heights if inverse else widths).double(), bound, convention)[0]
    middle = (knots[..., 1:] + knots[..., :-1]) / 2
    distance, nearest = (x.double()[..., None] - knots).abs().min(-1, keepdim=True)
    moved = middle.gather(-1, nearest.clamp(max=bins - 1)).squeeze(-1).to(dtype)
    x = torch.where(distance.squeeze(-1) < 1e-5, moved, x)
    parameters = {"widths": widths, "heights": heights, "derivatives": derivatives}
    return {"x": x, **parameters, "bound": bound, "inverse": inverse, "convention": convention}


def _bytes_moved(inputs: dict[str, Any], mode: str) -> int:
    # forward: x and its parameters -> y; backward: those and dy -> four gradients
    x = inputs["x"]
    everything = sum(inputs[name].nbytes for name in ("x", "widths", "heights", "derivatives"))
    forward = everything + x.nbytes + 4 * len(x)
    return forward if mode == "fwd" else 2 * forward + everything


SPEC = OpSpec(
    name="rq_spline",
    function=rq_spline,
    reference=rq_spline_reference,
    outputs={"y": "conditioned", "log_det": "conditioned"},
    gradients=("x", "widths", "heights", "derivatives"),
    example_inputs=_example_inputs,
    flags={"bins": (8, 1, 2, 3, 4, 5, 10, 16, 32), "inverse": (False, True), "convention": CONVENTIONS},
    shapes=((64, (2,)), (512, (32,)), (4096, (32,))),
    bytes_moved=_bytes_moved,
    gradient_precision="conditioned",
)
