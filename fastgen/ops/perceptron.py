"""perceptron: a fully connected network with ReLU between its layers and one or several outputs, in one call each way.

    h_1 = relu(W_1 clamp(x, -limit, limit) + b_1 + added),    h_i = relu(W_i h_(i-1) + b_i),    y_j = V_j h + c_j

with h the last hidden layer. ``added`` is what else enters the first layer, a projected context for one. Gradients flow to
``x``, ``parameters`` and ``added``, with e_i the gradient of what goes into relu and [.] one where true and zero where not:

    e = [h > 0] * sum_j V_j' dy_j,    e_(i-1) = [h_(i-1) > 0] * W_i' e_i,
    dW_i = sum over samples of e_i h_(i-1)',    db_i = sum over samples of e_i

A tile of samples goes through all layers while its activations lie in the cache, bias, ReLU and its derivative on the way.
That is faster than a library's matrix products with passes over the activations between them as long as layers are narrow,
see :func:`perceptron_serves`. For large batches the backward pass computes the hidden layers again, tile by tile, and nothing
is kept but the inputs. Sums are in a fixed order: nothing depends on the number of threads. Second derivatives are those of
the reference.

float32 on CPUs has kernels. Elsewhere the reference serves: the matrix products are those of PyTorch's libraries.

Source: Rumelhart, Hinton and Williams (1986), "Learning representations by back-propagating errors"; the tiles are those of
Müller et al. (2021), "Real-time neural radiance caching for path tracing" (arXiv:2106.12372), section 4.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen.ops import _dispatch, _native
from fastgen.ops._spec import OpSpec

__all__ = ["perceptron", "perceptron_reference", "perceptron_serves"]

_TILE, _PANEL = 128, 32
"""Samples of a tile, and columns that lie together, in hidden layers that are kept."""
_MOST_HIDDEN, _MOST_OUTPUTS = 7, 4
_ABSENT = (None,) * _MOST_OUTPUTS
_KEPT = 1 << 20
"""Numbers in hidden layers that are still kept by default."""
_WIDEST = 512
"""From here on a tile of a layer does not fit in the cache beside its weights."""


Parameters = Tensor | Sequence[tuple[Tensor, Tensor]]
"""Weight [out, in] and bias [out] of each hidden layer, then of each output; or all of them flattened, in one vector."""


def _sizes(inputs: int, hidden: Sequence[int], outputs: Sequence[int]) -> list[tuple[int, int]]:
    """(inputs, outputs) of every linear layer, in the order of the parameters."""
    widths = [inputs, *hidden]
    return [*itertools.pairwise(widths), *((widths[-1], size) for size in outputs)]


def join(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat([t.reshape(-1) for t in tensors])


def as_tensors(parameters: Parameters) -> tuple[Tensor, ...]:
    return (parameters,) if isinstance(parameters, Tensor) else tuple(t for layer in parameters for t in layer)


def perceptron_reference(
    x: Tensor,
    parameters: Parameters,
    *,
    hidden: Sequence[int],
    outputs: Sequence[int],
    added: Tensor | None = None,
    limit: float | None = None,
) -> tuple[Tensor, ...]:
    """:func:`perceptron` in plain PyTorch."""
    _check(x)
    check_network(x, x.shape[1], parameters, hidden, outputs, added, limit)
    if isinstance(parameters, Tensor):
        sizes = _sizes(x.shape[1], hidden, outputs)
        parts = parameters.split([size for n, m in sizes for size in (m * n, m)])
        layers = [(parts[2 * i].view(m, n), parts[2 * i + 1]) for i, (n, m) in enumerate(sizes)]
    else:
        layers = list(parameters)
    with torch.autocast(x.device.type, enabled=False):
        h = x if limit is None else x.clamp(-limit, limit)
        for i, (weight, bias) in enumerate(layers[: len(hidden)]):
            h = F.linear(h, weight, bias)
            h = torch.relu(h if i or added is None else h + added)
        return tuple(F.linear(h, weight, bias) for weight, bias in layers[len(hidden) :])


def _check(x: Tensor) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"x must be a floating-point tensor, got {getattr(x, 'dtype', type(x).__name__)}")
    if x.dim() != 2 or not x.shape[1]:
        raise ValueError(f"x must have shape [N, D] with D at least 1, got {list(x.shape)}")


def check_network(
    x: Tensor,
    inputs: int,
    parameters: Parameters,
    hidden: Sequence[int],
    outputs: Sequence[int],
    added: Tensor | None,
    limit: float | None,
) -> None:
    """Raise for a network that does not fit ``inputs`` columns of x."""
    for name, widths in (("hidden", hidden), ("outputs", outputs)):
        if not widths or min(widths) < 1:
            raise ValueError(f"{name} must be the widths of at least one layer, got {tuple(widths)}")
    if limit is not None and not limit > 0:
        raise ValueError(f"limit must be positive or None, got {limit!r}")
    sizes = _sizes(inputs, hidden, outputs)
    if isinstance(parameters, Tensor):
        _check_one("parameters", parameters, x, [sum(m * n + m for n, m in sizes)])
    else:
        if len(parameters) != len(sizes):
            raise ValueError(f"parameters must have weight and bias of {len(sizes)} layers, got {len(parameters)}")
        for i, ((weight, bias), (n, m)) in enumerate(zip(parameters, sizes, strict=True)):
            _check_one(f"weight {i} of parameters", weight, x, [m, n])
            _check_one(f"bias {i} of parameters", bias, x, [m])
    if added is not None:
        _check_one("added", added, x, [x.shape[0], hidden[0]])


def _check_one(name: str, value: Tensor, x: Tensor, shape: list[int]) -> None:
    if not isinstance(value, Tensor) or value.dtype is not x.dtype or value.device != x.device:
        what = f"{value.dtype} on {value.device}" if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name} must be a tensor of {x.dtype} on {x.device} like x, got {what}")
    if list(value.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {list(value.shape)}")


@functools.lru_cache(maxsize=256)
def widths_of(*widths: int) -> Tensor:
    """As the kernels read them. Nobody writes to it."""
    return torch.tensor(widths)


def kept_columns(*widths: int) -> int:
    """Numbers of a sample in layers of these widths that are kept."""
    return sum(-(-width // _PANEL) * _PANEL for width in widths)


def kept_like(x: Tensor, columns: int) -> Tensor:
    """Room for what is kept of a batch, in tiles and panels."""
    return x.new_empty(-(-x.shape[0] // _TILE) * _TILE * columns)


def keeps_hidden(x: Tensor, hidden: Sequence[int]) -> bool:
    """Whether hidden layers are kept for the backward pass by default."""
    return x.shape[0] * sum(hidden) <= _KEPT


def _results_like(x: Tensor, hidden: Sequence[int], outputs: Sequence[int], keep: bool) -> list[Tensor]:
    """The outputs, and the hidden layers in tiles and panels."""
    kept = kept_like(x, kept_columns(*hidden) if keep else 0)
    return [*(x.new_empty(x.shape[0], size) for size in outputs), kept]


def _forward(
    x: Tensor,
    parameters: Tensor,
    added: Tensor | None,
    hidden: Sequence[int],
    outputs: Sequence[int],
    limit: float,
    keep: bool,
) -> list[Tensor]:
    results = _results_like(x, hidden, outputs, keep)
    *heads, kept = results
    _native.kernel("perceptron_fwd")(
        x.shape[0], len(hidden), len(outputs), widths_of(x.shape[1], *hidden, *outputs), x, added, parameters, limit,
        kept if keep else None, *heads, *_ABSENT[len(outputs) :], torch.get_num_threads(),
    )  # fmt: skip
    return results


def gradients_like(x: Tensor, parameters: Tensor, hidden: Sequence[int], wanted: Sequence[bool]) -> list[Tensor]:
    """Room for the gradients in x, in all parameters and in ``added``, empty where not wanted."""
    by_x, by_parameters, by_added = wanted
    return [
        torch.empty_like(x) if by_x else x.new_empty(0),
        torch.empty_like(parameters) if by_parameters else x.new_empty(0),
        x.new_empty(x.shape[0], hidden[0]) if by_added else x.new_empty(0),
    ]


def _backward(
    x: Tensor,
    parameters: Tensor,
    added: Tensor | None,
    kept: Tensor,
    grads: Sequence[Tensor | None],
    hidden: Sequence[int],
    outputs: Sequence[int],
    limit: float,
    wanted: Sequence[bool],
) -> list[Tensor]:
    found = gradients_like(x, parameters, hidden, wanted)
    grad_x, grad_parameters, grad_added = (g if want else None for g, want in zip(found, wanted, strict=True))
    _native.kernel("perceptron_bwd")(
        x.shape[0], len(hidden), len(outputs), widths_of(x.shape[1], *hidden, *outputs), x, added, parameters, limit,
        kept if kept.numel() else None, *grads, *_ABSENT[len(outputs) :], grad_x, grad_added, grad_parameters,
        torch.get_num_threads(),
    )  # fmt: skip
    return found


_apply = _dispatch.raw_op(
    "perceptron",
    "(Tensor x, Tensor parameters, Tensor? added, int[] hidden, int[] outputs, float limit, bool keep) -> Tensor[]",
    _forward,
    lambda x, parameters, added, hidden, outputs, limit, keep: _results_like(x, hidden, outputs, keep),
)
_differentiate = _dispatch.raw_op(
    "perceptron_bwd",
    "(Tensor x, Tensor parameters, Tensor? added, Tensor kept, Tensor?[] grads, int[] hidden, int[] outputs, float limit,"
    " bool[] wanted) -> Tensor[]",
    _backward,
    lambda x, parameters, added, kept, grads, hidden, outputs, limit, wanted: gradients_like(x, parameters, hidden, wanted),
)


class _Perceptron(torch.autograd.Function):
    """Saves the inputs, and the hidden layers where they are to be kept."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        added: Tensor | None,
        hidden: tuple[int, ...],
        outputs: tuple[int, ...],
        limit: float,
        keep: bool,
        *parameters: Tensor,
    ) -> tuple[Tensor, ...]:
        *results, kept = _apply(x, join(parameters), added, hidden, outputs, limit, keep)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, added, kept, *parameters)
        ctx.hidden, ctx.outputs, ctx.limit = hidden, outputs, limit
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, added, kept, *parameters = ctx.saved_tensors
        by_x, by_added, _, _, _, _, *by_each = ctx.needs_input_grad
        # torch.compile has no second derivatives
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            limit = None if math.isinf(ctx.limit) else ctx.limit
            network = functools.partial(perceptron_reference, hidden=ctx.hidden, outputs=ctx.outputs, limit=limit)
            wanted = [by_x, by_added, *by_each]
            first, second, *rest = differentiable_gradients(network, x, added, parameters, grads, wanted)
            return first, second, None, None, None, None, *rest
        dense = [g if g is None else g.contiguous() for g in grads]
        wanted = [by_x, any(by_each), by_added]
        joined = join(parameters)
        sizes = ctx.hidden, ctx.outputs
        grad_x, grad, grad_added = _differentiate(x, joined, added, kept, dense, *sizes, ctx.limit, wanted)
        of_each = gradients_of_each(grad, parameters, by_each)
        return grad_x if by_x else None, grad_added if by_added else None, None, None, None, None, *of_each


def gradients_of_each(grad: Tensor, parameters: Sequence[Tensor], wanted: Sequence[bool]) -> list[Tensor | None]:
    """From the gradient in all parameters, flattened, that in each of those wanted."""
    if not any(wanted):
        return [None] * len(parameters)
    parts = grad.split([p.numel() for p in parameters])
    return [g.view(p.shape) if want else None for g, p, want in zip(parts, parameters, wanted, strict=True)]


def differentiable_gradients(
    network: Callable[..., Sequence[Tensor]],
    x: Tensor,
    added: Tensor | None,
    parameters: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients in x, ``added`` and each of ``parameters``, as functions of these and of ``grads``, by plain PyTorch.

    ``network(x, parameters, added=)`` gives what has the gradients ``grads``.
    """
    # aliases, so that nothing but this network is differentiated
    x, added, own = x.view_as(x), None if added is None else added.view_as(added), [p.view_as(p) for p in parameters]
    results = network(x, own[0] if len(own) == 1 else list(zip(own[::2], own[1::2], strict=True)), added=added)
    pairs = [(y, g) for y, g in zip(results, grads, strict=True) if g is not None]
    leaves = [t for t, want in zip((x, added, *own), wanted, strict=True) if t is not None and want]
    # an output without a gradient leaves its own parameters out of the graph
    options: dict[str, Any] = {"create_graph": True, "allow_unused": True, "materialize_grads": True}
    found = iter(torch.autograd.grad([y for y, _ in pairs], leaves, [g for _, g in pairs], **options))
    return [next(found) if want else None for want in wanted]


def supports_network(backend: str, inputs: dict[str, Any]) -> str | None:
    hidden, outputs = inputs["hidden"], inputs["outputs"]
    if backend == "cpp" and (len(hidden) > _MOST_HIDDEN or len(outputs) > _MOST_OUTPUTS):
        return f"its kernels take at most {_MOST_HIDDEN} hidden layers and {_MOST_OUTPUTS} outputs"
    return None


def perceptron_serves(x: Tensor, hidden: Sequence[int], outputs: Sequence[int]) -> bool:
    """Whether there is a kernel for such a network on inputs like ``x``, and nothing about it is better left to PyTorch.

    False for wide layers, whose products a library does faster, and where something wants to see or to change the linear
    layers: torch.compile, autocast, transforms of ``torch.func``.
    """
    if x.dtype is not torch.float32 or type(x) is not Tensor or x.dim() != 2 or torch.compiler.is_compiling():
        return False
    if max(*hidden, *outputs, x.shape[1]) > _WIDEST or torch.is_autocast_enabled(x.device.type):
        return False
    if torch._C._are_functorch_transforms_active():
        return False
    return _dispatch.choose(SPEC, None, x, inputs={"hidden": hidden, "outputs": outputs}) == "cpp"


def perceptron(
    x: Tensor,
    parameters: Parameters,
    *,
    hidden: Sequence[int],
    outputs: Sequence[int],
    added: Tensor | None = None,
    limit: float | None = None,
    keep: bool | None = None,
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    """Apply a fully connected network with ReLU after each layer but the last, which may be several side by side.

    Args:
        x: [N, D], floating point. float32 on CPUs has kernels, the rest the reference.
        parameters: (weight [out, in], bias [out]) of each hidden layer, then of each output; or all of them flattened in one
            vector [P].
        hidden: widths of the hidden layers, at least one.
        outputs: sizes of the outputs, at least one.
        added: [N, hidden[0]], added to what enters the first ReLU.
        limit: x saturates at -limit and limit; None: it does not.
        keep: keep the hidden layers for the backward pass, or compute them again there, tile by tile, which takes no memory:
            faster than to read them from far away, slower than from a cache. None: keep up to 4 MB of them.
        backend: None, "reference" or "cpp".

    Returns:
        one tensor [N, outputs[j]] for each of ``outputs``.

    Raises:
        TypeError, ValueError: for arguments of the wrong type, shape, dtype or device.

    >>> first, last = torch.nn.Linear(3, 8), torch.nn.Linear(8, 2)
    >>> layers = [(first.weight, first.bias), (last.weight, last.bias)]
    >>> (y,) = perceptron(torch.randn(5, 3), layers, hidden=(8,), outputs=(2,))
    >>> y.shape
    torch.Size([5, 2])
    """
    _check(x)
    check_network(x, x.shape[1], parameters, hidden, outputs, added, limit)
    if _dispatch.choose(SPEC, backend, x, inputs={"hidden": hidden, "outputs": outputs}) == "reference":
        return perceptron_reference(x, parameters, hidden=hidden, outputs=outputs, added=added, limit=limit)
    x, added, tensors = x.contiguous(), added if added is None else added.contiguous(), as_tensors(parameters)
    tensors = tuple(t.contiguous() for t in tensors)
    most = math.inf if limit is None else float(limit)
    keep = keeps_hidden(x, hidden) if keep is None else keep
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, added, *tensors)):
        return _Perceptron.apply(x, added, tuple(hidden), tuple(outputs), most, keep, *tensors)
    return tuple(_apply(x, join(tensors), added, tuple(hidden), tuple(outputs), most, False)[:-1])


def _example_inputs(
    rows: int,
    event: tuple[int, ...],
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    generator: torch.Generator | None = None,
    hidden: tuple[int, ...] = (33, 8),
    outputs: tuple[int, ...] = (5, 40),
    added: bool = False,
    limit: float | None = 1.125,
    keep: bool | None = None,
) -> dict[str, Any]:
    # Multiples of powers of two, and biases between them: nothing that enters a ReLU is so near to zero that rounding could
    # take it to the other side, where the gradient is another.
    def draw(*shape: int) -> Tensor:
        return torch.randint(-8, 9, shape, generator=generator)

    unit, layers, units = 2.0**-3, [], []
    for n, m in _sizes(event[0], hidden, outputs):
        scale = 2.0 ** -round(math.log2(n) / 2)
        units.append(unit * scale)
        layers.append((draw(m, n).sign() * scale, (draw(m) + 0.5) * units[-1]))
        unit = units[min(len(units), len(hidden)) - 1] / 2
    return {
        "x": (draw(rows, *event) / 4).to(device, dtype),
        "parameters": join(as_tensors(layers)).to(device, dtype),
        "hidden": hidden,
        "outputs": outputs,
        "added": (draw(rows, hidden[0]) * units[0]).to(device, dtype) if added else None,
        "limit": limit,
        "keep": keep,
    }


def _bytes_moved(inputs: dict[str, Any], mode: str) -> int:
    # forward: x, parameters -> y; backward: x, parameters, dy -> dx, dparameters
    x, size = inputs["x"], inputs["x"].element_size()
    moved = x.nbytes + inputs["parameters"].nbytes + size * len(x) * sum(inputs["outputs"])
    return moved * (1 if mode == "fwd" else 3)


def _operations(inputs: dict[str, Any], mode: str) -> int:
    x = inputs["x"]
    products = sum(n * m for n, m in _sizes(x.shape[1], inputs["hidden"], inputs["outputs"]))
    return 2 * len(x) * products * (1 if mode == "fwd" else 3)


SPEC = OpSpec(
    name="perceptron",
    function=perceptron,
    reference=perceptron_reference,
    outputs={"first": "reduction", "second": "reduction"},
    gradients=("x", "parameters", "added"),
    example_inputs=_example_inputs,
    flags={
        "hidden": ((33, 8), (130,), (64, 32), (4, 3, 2), (128, 128)),
        "outputs": ((5, 40), (1, 1), (32, 32)),
        "added": (False, True),
        "limit": (1.125, None),
        "keep": (None, False),
    },
    event_ranks=(1,),
    sizes=(1, 2, 3, 4, 5, 15, 16, 17, 31, 33, 63, 64, 65, 127, 300),
    backends=("cpp",),
    shapes=((64, (16,)), (4096, (32,)), (16384, (32,))),
    bytes_moved=_bytes_moved,
    operations=_operations,
    dtypes=(torch.float32,),
    gradient_precision="reduction",
    double_backward=True,
    supports=supports_network,
)
