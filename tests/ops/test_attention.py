"""attention: against float64 and PyTorch's own, at its extremes, on tensors as they lie in memory, and what it refuses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

from fastgen.ops import _native, attention, attention_serves, explain, use_backend

native = pytest.mark.skipif(_native.missing() is not None, reason="no compiled kernels")
every_isa = pytest.mark.parametrize("isa", _native.available_isas())


def drawn(n, tokens, heads, width, keys=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    key, value = torch.randn(n, keys or tokens, 2, heads, width, generator=generator).unbind(2)
    return torch.randn(n, tokens, heads, width, generator=generator), key, value


def fused(query, key, value):
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, key, value))).transpose(1, 2)


@native
@every_isa
@pytest.mark.parametrize(("tokens", "keys", "width"), [(196, 196, 8), (5, 130, 32), (67, 3, 7), (1, 1, 1)])
def test_is_as_near_to_float64_as_pytorch(isa, tokens, keys, width):
    inputs = [x.requires_grad_() for x in drawn(3, tokens, 2, width, keys)]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    weight = torch.randn(3, tokens, 2, width)

    def run(function, leaves):
        out = function(*leaves)
        return [out, *torch.autograd.grad(out, leaves, weight.to(out.dtype))]

    with _native.use_isa(isa):
        found = run(attention, inputs)
    for got, other, exact in zip(found, run(fused, inputs), run(fused, wide), strict=True):
        error = (got - exact).abs().max()
        assert error <= max(2e-6 * exact.abs().max(), 2 * (other - exact).abs().max())


@native
@every_isa
def test_scores_neither_overflow_nor_lose_the_largest(isa):
    query, key, value = drawn(1, 6, 1, 4, 20)
    with _native.use_isa(isa):
        sharp = attention(query * 1e6, key * 1e6, value)
        expected = value[0, (query[0, :, 0] @ key[0, :, 0].T).argmax(1), 0]
        torch.testing.assert_close(sharp[0, :, 0], expected, rtol=0, atol=0)
        alike = attention(query, key[:, :1].expand(-1, 20, -1, -1) - 1e4, value)
        torch.testing.assert_close(alike, value.mean(1, keepdim=True).expand_as(alike), rtol=1e-5, atol=1e-6)


@native
@every_isa
def test_scores_far_below_the_rest_have_no_weight(isa):
    query, key = torch.ones(1, 1, 1, 1), torch.tensor([0.0, -1e3, -float("inf")]).view(1, 3, 1, 1)
    value = torch.tensor([1.0, 1e30, 5.0]).view(1, 3, 1, 1)
    with _native.use_isa(isa):
        assert attention(query, key, value).item() == 1


@native
@every_isa
def test_a_nan_stays_in_its_query_and_an_infinite_score_makes_one(isa):
    query, key, value = drawn(2, 9, 2, 8)
    with _native.use_isa(isa):
        clean = attention(query, key, value)
        for bad in (float("nan"), float("inf")):
            dirty = query.clone()
            dirty[1, 4, 1, 3] = bad
            out = attention(dirty, key, value)
            assert out[1, 4, 1].isnan().all()
            out[1, 4, 1] = clean[1, 4, 1]
            assert torch.equal(out, clean)


@native
def test_tensors_are_read_as_they_lie():
    query, key, value = drawn(3, 21, 2, 8)
    expected = attention(query, key.contiguous(), value.contiguous())
    joint = torch.stack((query, key, value), 2)
    assert torch.equal(attention(*joint.unbind(2)), expected)
    heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key, value)]
    assert torch.equal(attention(*heads_first), expected)
    scattered = [torch.stack((x, x), 4)[..., 0] for x in (query, key, value)]
    assert torch.equal(attention(*scattered), expected)
    one = attention(query, key[:1].expand(3, -1, -1, -1), value[:1].expand(3, -1, -1, -1))
    assert torch.equal(one[0], expected[0])


@native
def test_a_joint_projection_gets_the_gradients_of_its_parts():
    joint = torch.randn(2, 50, 3, 2, 8, requires_grad=True)
    parts = [x.detach().requires_grad_() for x in joint.unbind(2)]
    weight = torch.randn(2, 50, 2, 8)
    (whole,) = torch.autograd.grad(attention(*joint.unbind(2)), joint, weight)
    assert torch.equal(whole, torch.stack(torch.autograd.grad(attention(*parts), parts, weight), 2))
    assert torch.equal(torch.autograd.grad(attention(joint), joint, weight)[0], whole)
    (by_key,) = torch.autograd.grad(attention(parts[0].detach(), parts[1], parts[2].detach()), parts[1], weight)
    assert torch.equal(by_key, whole[:, :, 1])


@native
def test_three_parts_in_one_tensor():
    joint = torch.randn(2, 5, 3, 2, 4, dtype=torch.float64)
    assert torch.equal(attention(joint), attention(*joint.unbind(2)))  # of the reference
    joint = torch.randn(2, 8, 4, 2, 7).transpose(1, 4)[:, :, 1:]  # the numbers of a head apart
    weight = torch.randn(2, 7, 2, 8)
    found = []
    for form in (
        attention,
        lambda joint: attention(*joint.unbind(2)),
        lambda joint: attention(*joint.unbind(2), backend="reference"),
    ):
        leaf = joint.detach().clone().requires_grad_()
        out = form(leaf)
        (grad,) = torch.autograd.grad(out, leaf, weight, create_graph=True)
        found.append((out, grad, torch.autograd.grad(grad.square().sum(), leaf)[0]))
    for others in found[1:]:
        torch.testing.assert_close(found[0], others, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        assert torch.equal(attention(joint), found[0][0])
    for wrong in (torch.randn(2, 5, 2, 2, 4), torch.randn(2, 5, 2, 4)):
        with pytest.raises(ValueError, match="without keys and values"):
            attention(wrong)
    with pytest.raises(ValueError, match="without keys and values"):
        attention(joint[:, :, 0], joint[:, :, 1])
    with pytest.raises(TypeError, match="queries must be a floating-point tensor, got list"):
        attention(joint.tolist())
    assert "cpp: can serve" in explain("attention", joint)


@native
@pytest.mark.parametrize("heads", [1, 3])
def test_nothing_depends_on_the_threads_or_on_the_rest_of_the_batch(heads):
    inputs = [x.requires_grad_() for x in drawn(5, 530, heads, 16)]
    before, runs = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        out = attention(*inputs)
        runs.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
    torch.set_num_threads(before)
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))
    assert torch.equal(attention(*(x[3:4] for x in inputs)), runs[0][0][3:4])


@pytest.mark.parametrize("shape", [(0, 5, 2, 8), (2, 0, 2, 8), (2, 5, 0, 8)])
def test_nothing_in_nothing_out(shape):
    inputs = [torch.randn(shape, requires_grad=True) for _ in range(3)]
    out = attention(*inputs)
    assert out.shape == shape
    assert all(g.shape == shape for g in torch.autograd.grad(out.sum(), inputs))


def test_no_queries_leave_keys_without_gradient_and_no_keys_give_zeros():
    query, key, value = (x.requires_grad_() for x in drawn(2, 4, 1, 8))
    grads = torch.autograd.grad(attention(query[:, :0], key, value).sum(), [key, value])
    assert all((g == 0).all() for g in grads)
    assert torch.equal(attention(query, key[:, :0], value[:, :0]), torch.zeros(2, 4, 1, 8))


@native
def test_when_the_kernels_are_best():
    query = torch.randn(2, 5, 2, 8)
    assert attention_serves(query)
    assert not attention_serves(torch.randn(2, 5, 2, 64))
    assert not attention_serves(query.double())
    with torch.autocast("cpu", torch.bfloat16):
        assert not attention_serves(query)
    with use_backend("reference"):
        assert not attention_serves(query)
    with forward_ad.dual_level():
        assert not attention_serves(query)
    served = []
    torch.func.vmap(lambda x: served.append(attention_serves(x)) or x)(query[None])
    assert served == [False]


def test_errors():
    query, key, value = drawn(2, 4, 3, 8, 6)
    with pytest.raises(TypeError, match=r"queries must be a floating-point tensor, got torch\.int64"):
        attention(query.long(), key, value)
    with pytest.raises(ValueError, match=r"queries must have shape \[N, T, heads, D\] with D at least 1, got \[2, 4, 3\]"):
        attention(query[..., 0], key, value)
    with pytest.raises(ValueError, match=r"keys must have shape \[2, S, 3, 8\], got \[2, 6, 2, 8\]"):
        attention(query, key[:, :, :2], value)
    with pytest.raises(ValueError, match=r"values must have shape \[2, 6, 3, 8\], got \[2, 5, 3, 8\]"):
        attention(query, key, value[:, :5])
    with pytest.raises(
        TypeError, match=r"values must be a tensor of torch\.float32 .* like queries, got torch\.float64 on cpu"
    ):
        attention(query, key, value.double())


@native
def test_impossible_choices_say_why():
    query = torch.randn(2, 5, 1, 33)
    with pytest.raises(ValueError, match="its kernels take heads of at most 32 numbers, got 33"):
        attention(query, query, query, backend="cpp")
    with pytest.raises(ValueError, match="there are no keys"):
        attention(query[..., :8], query[:, :0, :, :8], query[:, :0, :, :8], backend="cpp")
