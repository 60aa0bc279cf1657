"""attention: softmax(query key' / sqrt(D)) value of every head, for narrow heads.

    y_t = sum over s of p_ts value_s,    p_ts = exp(query_t . key_s / sqrt(D)) / sum over s' of the same

A matrix library is slow with heads of 8 or 16 numbers, each of which is a product of its own. The kernels keep a head's keys
and values transposed in a cache and take a few queries through all of them at a time; scores never leave it. The largest
score of a query is taken off before exponentials, so that none overflows. Tensors are read with the strides they have: the
three parts of one joint projection go in as they are.

Gradients flow to ``query``, ``key`` and ``value``; the backward pass computes the weights again, and second derivatives are
right. float32 on CPUs with D <= 32 has kernels. Elsewhere the reference serves: on GPUs ``F.scaled_dot_product_attention``,
which is fused there.

Source: Vaswani et al. (2017), arXiv:1706.03762; Rabe and Staats (2021), arXiv:2112.05682, and Dao et al. (2022),
arXiv:2205.14135, for the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen.ops import _dispatch, _native
from fastgen.ops._spec import OpSpec

__all__ = ["attention", "attention_reference", "attention_serves"]

_WIDEST = 32
"""Width of the widest head that the kernels take."""


def attention_reference(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """:func:`attention` in plain PyTorch."""
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    if query.is_cpu:  # what PyTorch has fused has no second derivatives
        scores = query * query.shape[-1] ** -0.5 @ key.transpose(2, 3)
        return (scores.softmax(-1) @ value).transpose(1, 2)
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2)


def _check(query: Tensor, key: Tensor, value: Tensor) -> None:
    if not isinstance(query, Tensor) or not query.is_floating_point():
        raise TypeError(f"query must be a floating-point tensor, got {getattr(query, 'dtype', type(query).__name__)}")
    if query.dim() != 4 or not query.shape[3]:
        raise ValueError(f"query must have shape [N, T, heads, D] with D at least 1, got {list(query.shape)}")
    for name, x in (("key", key), ("value", value)):
        if not isinstance(x, Tensor) or x.dtype is not query.dtype or x.device != query.device:
            what = f"{x.dtype} on {x.device}" if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"{name} must be a tensor of {query.dtype} on {query.device} like query, got {what}")
        n, _, heads, width = query.shape
        if x.dim() != 4 or (x.shape[0], *x.shape[2:]) != (n, heads, width) or x.shape[1] != key.shape[1]:
            tokens = "S" if x is key else key.shape[1]
            raise ValueError(f"{name} must have shape [{n}, {tokens}, {heads}, {width}], got {list(x.shape)}")


def _sizes(query: Tensor, key: Tensor) -> tuple[int, int, int, int, int, float]:
    """As the kernels take them."""
    n, tokens, heads, width = query.shape
    return n, heads, tokens, key.shape[1], width, width**-0.5


def _strided(*tensors: Tensor) -> list[Any]:
    """Each tensor and its strides but the last, which is 1."""
    return [part for x in tensors for part in (x, *x.stride()[:3])]


def _results_like(query: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    n, tokens, heads, _ = query.shape
    return query.new_empty(query.shape), query.new_empty((n, heads, tokens, 2) if keep else 0)


def _forward(query: Tensor, key: Tensor, value: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    out, kept = _results_like(query, keep)
    _native.kernel("attention_fwd")(
        *_sizes(query, key), *_strided(query, key, value), out, kept if keep else None, torch.get_num_threads()
    )
    return out, kept


def _gradients_like(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _backward(
    query: Tensor, key: Tensor, value: Tensor, out: Tensor, kept: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    grads = _gradients_like(query, key, value)
    _native.kernel("attention_bwd")(
        *_sizes(query, key), *_strided(query, key, value), out, kept, grad, *_strided(*grads), torch.get_num_threads()
    )
    return grads


_apply = _dispatch.raw_op(
    "attention",
    "(Tensor query, Tensor key, Tensor value, bool keep) -> (Tensor, Tensor)",
    _forward,
    lambda query, key, value, keep: _results_like(query, keep),
)
_differentiate = _dispatch.raw_op(
    "attention_bwd",
    "(Tensor query, Tensor key, Tensor value, Tensor out, Tensor kept, Tensor grad) -> (Tensor, Tensor, Tensor)",
    _backward,
    lambda query, key, value, out, kept, grad: _gradients_like(query, key, value),
)


class _Attention(torch.autograd.Function):
    """Saves the inputs, the output, and two numbers a query: its largest score and the inverse of the sum of exponentials."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out, kept = _apply(query, key, value, True)
        ctx.save_for_backward(query, key, value, out, kept)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, kept = ctx.saved_tensors
        # torch.compile has no second derivatives
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # aliases, so that nothing but this op is differentiated
            inputs = [x.view_as(x) for x in (query, key, value)]
            wanted = [x for x, want in zip(inputs, ctx.needs_input_grad, strict=True) if want]
            found = iter(torch.autograd.grad(attention_reference(*inputs), wanted, grad, create_graph=True))
            return tuple(next(found) if want else None for want in ctx.needs_input_grad)
        grads = _differentiate(query, key, value, out, kept, grad.contiguous())
        return tuple(g if want else None for g, want in zip(grads, ctx.needs_input_grad, strict=True))


def _dense(x: Tensor) -> Tensor:
    """With the numbers of a head side by side: itself where they are."""
    return x if x.stride(3) == 1 else x.contiguous()


def attention(query: Tensor, key: Tensor, value: Tensor, *, backend: str | None = None) -> Tensor:
    """Attend from every query to all keys of its sample and head: softmax(query key' / sqrt(D)) value.

    Args:
        query: [N, T, heads, D], floating point, D at least 1. float32 on CPUs with D <= 32 has kernels, the rest the reference.
        key, value: [N, S, heads, D].
        backend: None, "reference" or "cpp".

    Returns:
        [N, T, heads, D], zeros where there are no keys; contiguous from the kernels.

    Raises:
        TypeError, ValueError: for arguments of the wrong type, shape, dtype or device.

    >>> query, key, value = torch.randn(2, 196, 3, 4, 8).unbind(2)
    >>> attention(query, key, value).shape
    torch.Size([2, 196, 4, 8])
    """
    _check(query, key, value)
    if _dispatch.choose(SPEC, backend, query, inputs={"query": query, "key": key}) == "reference":
        return attention_reference(query, key, value)
    query, key, value = _dense(query), _dense(key), _dense(value)
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        return _Attention.apply(query, key, value)
    return _apply(query, key, value, False)[0]


def attention_serves(query: Tensor) -> bool:
    """Whether there is a kernel for such queries, and nothing about it is better left to PyTorch.

    False where something wants to see or to change the products: autocast, transforms of ``torch.func``, forward-mode
    differentiation.
    """
    if type(query) is not Tensor or torch.is_autocast_enabled(query.device.type):
        return False
    if torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0:
        return False
    return _dispatch.choose(SPEC, None, query, inputs={"query": query, "key": query}) == "cpp"


def _supports(backend: str, inputs: dict[str, Any]) -> str | None:
    width = inputs["query"].shape[-1]
    if backend == "cpp" and width > _WIDEST:
        return f"its kernels take heads of at most {_WIDEST} numbers, got {width}"
    if backend == "cpp" and not inputs["key"].shape[1]:
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
    keys: int | None = None,
) -> dict[str, Any]:
    (tokens,) = event

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    if keys is None:  # the parts of a joint projection
        query, key, value = draw(rows, tokens, 3, heads, width).unbind(2)
    else:
        query = draw(rows, tokens, heads, width)
        key, value = draw(rows, keys, 2, heads, width).unbind(2)
    return {"query": query, "key": key, "value": value}


def _bytes_moved(inputs: dict[str, Any], mode: str) -> int:
    # forward: query, key, value -> y; backward: the same, y, dy -> their gradients
    query, key, value = inputs["query"], inputs["key"], inputs["value"]
    given = query.nbytes + key.nbytes + value.nbytes
    return given + query.nbytes if mode == "fwd" else 3 * (given + query.nbytes)


def _operations(inputs: dict[str, Any], mode: str) -> int:
    # two products forward; backward the scores again and four more
    query, key = inputs["query"], inputs["key"]
    return 2 * query.numel() * key.shape[1] * (2 if mode == "fwd" else 7)


SPEC = OpSpec(
    name="attention",
    function=attention,
    reference=attention_reference,
    outputs={"y": "reduction"},
    gradients=("query", "key", "value"),
    example_inputs=_example_inputs,
    flags={"heads": (2, 1, 3), "width": (8, 1, 5, 16, 31, 32), "keys": (None, 1, 17, 100)},
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
