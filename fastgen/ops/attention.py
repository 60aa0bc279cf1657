"""attention: softmax(query key' / sqrt(D)) value of every head, for narrow heads.

    y_t = sum over s of p_ts value_s,    p_ts = exp(query_t . key_s / sqrt(D)) / sum over s' of the same

A matrix library is slow with heads of 8 or 16 numbers, each of which is a product of its own. The kernels keep a head's keys
and values transposed in a cache and take a few queries through all of them at a time; scores never leave it. The largest
score of a query is taken off before exponentials, so that none overflows. Tensors are read with the strides they have: the
three parts of one joint projection go in as they are.

Gradients flow to ``queries``, ``keys`` and ``values``; the backward pass computes the weights again, and second derivatives are
right. float32 on CPUs with D <= 32 has kernels. Elsewhere the reference serves: on GPUs ``F.scaled_dot_product_attention``,
which is fused there.

Source: Vaswani et al. (2017), arXiv:1706.03762; Rabe and Staats (2021), arXiv:2112.05682, and Dao et al. (2022),
arXiv:2205.14135, for the backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen.ops import _dispatch, _native
from fastgen.ops._spec import OpSpec

__all__ = ["attention", "attention_reference", "attention_serves"]

_WIDEST = 32
"""Width of the widest head that the kernels take."""


def attention_reference(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """:func:`attention` in plain PyTorch."""
    queries, keys, values = queries.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2)
    if queries.is_cpu:  # what PyTorch has fused has no second derivatives
        scores = queries * queries.shape[-1] ** -0.5 @ keys.transpose(2, 3)
        return (scores.softmax(-1) @ values).transpose(1, 2)
    return F.scaled_dot_product_attention(queries, keys, values).transpose(1, 2)


def _check_type(queries: Tensor) -> None:
    if not isinstance(queries, Tensor) or not queries.is_floating_point():
        raise TypeError(f"queries must be a floating-point tensor, got {getattr(queries, 'dtype', type(queries).__name__)}")


def _check(queries: Tensor, keys: Tensor, values: Tensor) -> None:
    if queries.dim() != 4 or not queries.shape[3]:
        raise ValueError(f"queries must have shape [N, T, heads, D] with D at least 1, got {list(queries.shape)}")
    for name, x in (("keys", keys), ("values", values)):
        if not isinstance(x, Tensor) or x.dtype is not queries.dtype or x.device != queries.device:
            what = f"{x.dtype} on {x.device}" if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"{name} must be a tensor of {queries.dtype} on {queries.device} like queries, got {what}")
        n, _, heads, width = queries.shape
        if x.dim() != 4 or (x.shape[0], *x.shape[2:]) != (n, heads, width) or x.shape[1] != keys.shape[1]:
            tokens = "S" if x is keys else keys.shape[1]
            raise ValueError(f"{name} must have shape [{n}, {tokens}, {heads}, {width}], got {list(x.shape)}")


def _sizes(queries: Tensor, keys: Tensor) -> tuple[int, int, int, int, int, float]:
    """As the kernels take them."""
    n, tokens, heads, width = queries.shape
    return n, heads, tokens, keys.shape[1], width, width**-0.5


def _strided(*tensors: Tensor) -> list[Any]:
    """Each tensor and its strides but the last, which is 1."""
    return [part for x in tensors for part in (x, *x.stride()[:3])]


def _results_like(queries: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    n, tokens, heads, _ = queries.shape
    return queries.new_empty(queries.shape), queries.new_empty((n, heads, tokens, 2) if keep else 0)


def _forward(queries: Tensor, keys: Tensor, values: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    out, kept = _results_like(queries, keep)
    _native.kernel("attention_fwd")(
        *_sizes(queries, keys), *_strided(queries, keys, values), out, kept if keep else None, torch.get_num_threads()
    )
    return out, kept


def _gradients_like(queries: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return queries.new_empty(queries.shape), keys.new_empty(keys.shape), values.new_empty(values.shape)


def _differentiate_into(grads: Sequence[Tensor], parts: Sequence[Tensor], out: Tensor, kept: Tensor, grad: Tensor) -> None:
    _native.kernel("attention_bwd")(
        *_sizes(*parts[:2]), *_strided(*parts), out, kept, grad, *_strided(*grads), torch.get_num_threads()
    )


def _backward(
    queries: Tensor, keys: Tensor, values: Tensor, out: Tensor, kept: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    grads = _gradients_like(queries, keys, values)
    _differentiate_into(grads, (queries, keys, values), out, kept, grad)
    return grads


def _backward_of_joint(joint: Tensor, out: Tensor, kept: Tensor, grad: Tensor) -> Tensor:
    by_joint = joint.new_empty(joint.shape)
    _differentiate_into(by_joint.unbind(2), joint.unbind(2), out, kept, grad)
    return by_joint


_apply = _dispatch.raw_op(
    "attention",
    "(Tensor queries, Tensor keys, Tensor values, bool keep) -> (Tensor, Tensor)",
    _forward,
    lambda queries, keys, values, keep: _results_like(queries, keep),
)
_differentiate = _dispatch.raw_op(
    "attention_bwd",
    "(Tensor queries, Tensor keys, Tensor values, Tensor out, Tensor kept, Tensor grad) -> (Tensor, Tensor, Tensor)",
    _backward,
    lambda queries, keys, values, out, kept, grad: _gradients_like(queries, keys, values),
)
_differentiate_joint = _dispatch.raw_op(
    "attention_joint_bwd",
    "(Tensor joint, Tensor out, Tensor kept, Tensor grad) -> Tensor",
    _backward_of_joint,
    lambda joint, *_: joint.new_empty(joint.shape),
)


class _Attention(torch.autograd.Function):
    """Saves the inputs, the output, and two numbers a query: its largest score and the inverse of the sum of exponentials."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        out, kept = _apply(queries, keys, values, True)
        ctx.save_for_backward(queries, keys, values, out, kept)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        queries, keys, values, out, kept = ctx.saved_tensors
        # torch.compile has no second derivatives
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # aliases, so that nothing but this op is differentiated
            inputs = [x.view_as(x) for x in (queries, keys, values)]
            wanted = [x for x, want in zip(inputs, ctx.needs_input_grad, strict=True) if want]
            found = iter(torch.autograd.grad(attention_reference(*inputs), wanted, grad, create_graph=True))
            return tuple(next(found) if want else None for want in ctx.needs_input_grad)
        grads = _differentiate(queries, keys, values, out, kept, grad.contiguous())
        return tuple(g if want else None for g, want in zip(grads, ctx.needs_input_grad, strict=True))


class _JointAttention(torch.autograd.Function):
    """:class:`_Attention` of three parts of one tensor, whose gradients are written into one."""

    @staticmethod
    def forward(ctx: Any, joint: Tensor) -> Tensor:
        out, kept = _apply(*joint.unbind(2), True)
        ctx.save_for_backward(joint, out, kept)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        joint, out, kept = ctx.saved_tensors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            alias = joint.view_as(joint)
            return torch.autograd.grad(attention_reference(*alias.unbind(2)), alias, grad, create_graph=True)[0]
        return _differentiate_joint(joint, out, kept, grad.contiguous())


def _dense(x: Tensor) -> Tensor:
    """With the numbers of a head side by side: itself where they are."""
    return x if x.stride(-1) == 1 else x.contiguous()


def attention(
    queries: Tensor, keys: Tensor | None = None, values: Tensor | None = None, *, backend: str | None = None
) -> Tensor:
    """Attend from every query to all keys of its sample and head: softmax(query key' / sqrt(D)) value.

    Args:
        queries: [N, T, heads, D], floating point, D at least 1. float32 on CPUs with D <= 32 has kernels, else the reference.
            Or all three in one tensor, [N, T, 3, heads, D], whose gradient then is one too.
        keys, values: [N, S, heads, D]; None where queries holds them.
        backend: None, "reference" or "cpp".

    Returns:
        [N, T, heads, D], zeros where there are no keys; contiguous from the kernels.

    Raises:
        TypeError, ValueError: for arguments of the wrong type, shape, dtype or device.

    >>> queries, keys, values = torch.randn(2, 196, 3, 4, 8).unbind(2)
    >>> attention(queries, keys, values).shape
    torch.Size([2, 196, 4, 8])
    """
    _check_type(queries)
    joint = None
    if keys is None or values is None:
        if keys is not None or values is not None or queries.dim() != 5 or queries.shape[2] != 3:
            raise ValueError(f"without keys and values queries must have shape [N, T, 3, heads, D], got {list(queries.shape)}")
        joint = _dense(queries)
        queries, keys, values = joint.unbind(2)
    _check(queries, keys, values)
    if _dispatch.choose(SPEC, backend, queries, inputs={"queries": queries, "keys": keys}) == "reference":
        return attention_reference(queries, keys, values)
    if joint is not None and joint.requires_grad and torch.is_grad_enabled():
        return _JointAttention.apply(joint)
    queries, keys, values = _dense(queries), _dense(keys), _dense(values)
    if torch.is_grad_enabled() and (queries.requires_grad or keys.requires_grad or values.requires_grad):
        return _Attention.apply(queries, keys, values)
    return _apply(queries, keys, values, False)[0]


def attention_serves(queries: Tensor) -> bool:
    """Whether there is a kernel for such queries, and nothing about it is better left to PyTorch.

    False where something wants to see or to change the products: autocast, transforms of ``torch.func``, forward-mode
    differentiation.
    """
    if type(queries) is not Tensor or torch.is_autocast_enabled(queries.device.type):
        return False
    if torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0:
        return False
    return _dispatch.choose(SPEC, None, queries, inputs={"queries": queries, "keys": queries}) == "cpp"


def _supports(backend: str, inputs: dict[str, Any]) -> str | None:
    width = inputs["queries"].shape[-1]
    if backend == "cpp" and width > _WIDEST:
        return f"its kernels take heads of at most {_WIDEST} numbers, got {width}"
    if backend == "cpp" and not inputs.get("keys", inputs["queries"]).shape[1]:  # without keys: all three in one tensor
        return "there are no keys"
    return None


def _example_inputs(
    rows: int,
    event: tuple[int, ...],
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    generator: torch.Generator | None = None,
    heads: int = 2,
    width: int = 8,
    sources: int | None = None,
) -> dict[str, Any]:
    (tokens,) = event

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    if sources is None:  # the parts of a joint projection
        queries, keys, values = draw(rows, tokens, 3, heads, width).unbind(2)
    else:
        queries = draw(rows, tokens, heads, width)
        keys, values = draw(rows, sources, 2, heads, width).unbind(2)
    return {"queries": queries, "keys": keys, "values": values}


def _bytes_moved(inputs: dict[str, Any], mode: str) -> int:
    # forward: queries, keys, values -> y; backward: the same, y, dy -> their gradients
    queries, keys, values = inputs["queries"], inputs["keys"], inputs["values"]
    given = queries.nbytes + keys.nbytes + values.nbytes
    return given + queries.nbytes if mode == "fwd" else 3 * (given + queries.nbytes)


def _operations(inputs: dict[str, Any], mode: str) -> int:
    # two products forward; backward the scores again and four more
    queries, keys = inputs["queries"], inputs["keys"]
    return 2 * queries.numel() * keys.shape[1] * (2 if mode == "fwd" else 7)


SPEC = OpSpec(
    name="attention",
    function=attention,
    reference=attention_reference,
    outputs={"y": "reduction"},
    gradients=("queries", "keys", "values"),
    example_inputs=_example_inputs,
    flags={"heads": (2, 1, 3, 8), "width": (8, 1, 5, 16, 31, 32), "sources": (None, 1, 17, 100)},
    event_ranks=(1,),
    sizes=(1, 2, 3, 4, 5, 15, 16, 17, 31, 33, 63, 64, 65, 127, 300),
    backends=("cpp",),
    shapes=((64, (49,)), (64, (196,)), (8, (1024,))),
    bytes_moved=_bytes_moved,
    operations=_operations,
    dtypes=(torch.float32,),
    gradient_precision="reduction",
    double_backward=True,
    supports=_supports,
)
