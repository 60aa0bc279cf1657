"""group_norm_silu: against PyTorch's own group norm, inputs far from zero, channels last, all ranks, mixed storage types."""

import importlib
import math

import pytest
import torch
from torch.nn import functional

from fastgen import ops


def composed(x, groups, weight, bias, scale, shift, eps=1e-5, activation="silu"):
    """The op by PyTorch's functions."""
    ones = (1,) * (x.dim() - 2)
    z = functional.group_norm(x, groups, weight, bias, eps)
    z = z * (1 + scale.reshape(*scale.shape, *ones)) + shift.reshape(*shift.shape, *ones)
    return functional.silu(z) if activation else z


def drawn(samples, channels, *pixels, dtype=torch.float32):
    return (
        torch.randn(samples, channels, *pixels, dtype=dtype),
        *torch.randn(2, channels, dtype=dtype),
        *torch.randn(2, samples, channels, dtype=dtype),
    )


def channels_last(x):
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(
    ("channels", "groups", "pixels"),
    [(32, 8, (8, 8)), (64, 4, ()), (6, 2, (129,)), (40, 5, (5, 7)), (3, 1, (9000,)), (24, 24, (4, 4, 4)), (9000, 3, (2,))],
)
@pytest.mark.parametrize("activation", ["silu", None])
def test_matches_pytorch(channels, groups, pixels, last, activation):
    wide = drawn(3, channels, *pixels, dtype=torch.float64)
    leaves = [v.float().requires_grad_() for v in wide]
    if last:
        leaves[0] = channels_last(leaves[0].detach()).requires_grad_()
    wide = [v.detach().double().requires_grad_() for v in leaves]
    expected = composed(wide[0], groups, *wide[1:], activation=activation)
    x, weight, bias, scale, shift = leaves
    y = ops.group_norm_silu(x, groups, weight, bias, scale=scale, shift=shift, activation=activation)
    torch.testing.assert_close(y.double(), expected, rtol=2e-6, atol=5e-6)
    assert y.stride() == x.stride()
    weights = torch.randn_like(expected)
    grads = torch.autograd.grad(y, leaves, weights.float())
    for got, want in zip(grads, torch.autograd.grad(expected, wide, weights), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=3e-6, atol=3e-6 * max(1, want.abs().max().item()))


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("backend", ["cpp", "triton"])
def test_inputs_far_from_zero(last, backend):
    """Mean 1000, deviation 1: E[x^2] - E[x]^2 would leave three digits."""
    x = 1000 + torch.randn(2, 32, 24, 24, dtype=torch.float64)
    x[1] *= -3
    x = x.float()
    x = channels_last(x) if last else x
    leaf, wide = x.requires_grad_(), x.detach().double().requires_grad_()
    y, expected = ops.group_norm_silu(leaf, 4, backend=backend), functional.silu(functional.group_norm(wide, 4))
    torch.testing.assert_close(y.double(), expected, rtol=1e-6, atol=1e-6)
    weights = torch.randn(x.shape)
    (grad,) = torch.autograd.grad(y, leaf, weights)
    (exact,) = torch.autograd.grad(expected, wide, weights.double())
    torch.testing.assert_close(grad.double(), exact, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("backend", ["cpp", "triton"])
def test_an_outlier_where_the_pivot_is_taken(last, backend):
    x = torch.randn(1, 16, 64, 64)
    x[0, :, :1, :4] = 3e4
    x = channels_last(x) if last else x
    y = ops.group_norm_silu(x, 2, activation=None, backend=backend)
    torch.testing.assert_close(y.double(), functional.group_norm(x.double(), 2), rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("samples", [1, 2, 3, 8])
def test_few_groups_are_shared_by_the_threads(samples, last):
    """One result for any number of threads, whether they share units or tiles."""
    x, weight, bias, scale, shift = drawn(samples, 48, 40, 40)
    x = channels_last(x) if last else x
    runs = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        leaves = [v.clone().requires_grad_() for v in (x, weight, bias, scale, shift)]
        y = ops.group_norm_silu(leaves[0], 1, *leaves[1:3], scale=leaves[3], shift=leaves[4])
        runs.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    torch.set_num_threads(before)
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))
    torch.testing.assert_close(runs[0][0], composed(x, 1, weight, bias, scale, shift), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("own", "others"), [(64, 0), (20, 12), (17, 47), (3, 1), (96, 96)])
@pytest.mark.parametrize("pixels", [(1, 1), (5, 7), (33, 40)])
def test_coefficients_give_the_normalisation(own, others, pixels):
    """Of two images side by side, wherever between the groups the one ends."""
    wide = drawn(3, own + others, *pixels, dtype=torch.float64)
    wide[0].mul_(2).add_(30)
    x, weight, bias, scale, shift = (v.float() for v in wide)
    first, skip = x.split([own, others], 1) if others else (x, None)
    groups = math.gcd(4, own + others)
    found = ops.group_norm_coefficients(first, groups, weight, bias, skip=skip, scale=scale, shift=shift)
    assert found.shape == (3, 3, own + others)
    expected = composed(x.double(), groups, *(v.float().double() for v in wide[1:]), activation=None)
    for recorded in (False, True):
        if recorded:  # what autograd sees is plain
            leaves = [v.clone().requires_grad_() for v in (first, weight)]
            found = ops.group_norm_coefficients(leaves[0], groups, leaves[1], bias, skip=skip, scale=scale, shift=shift)
            assert all(g.isfinite().all() for g in torch.autograd.grad(found.sum(), leaves))
        center, slope, level = found.detach()[(...,) + (None,) * len(pixels)].unbind(1)
        y = (x - center).double() * slope + level
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=3e-5)


def test_coefficients_of_bad_arguments():
    with pytest.raises(ValueError, match=r"skip must be like x, \[2, 4, 3, 3\] in torch.float32, .*, got \[2, 4, 3, 2\]"):
        ops.group_norm_coefficients(torch.zeros(2, 4, 3, 3), 2, skip=torch.zeros(2, 4, 3, 2))
    with pytest.raises(ValueError, match="groups must divide the channels of x, got 4 for 6 channels"):
        ops.group_norm_coefficients(torch.zeros(2, 4, 3, 3), 4, skip=torch.zeros(2, 2, 3, 3))


@pytest.mark.parametrize("last", [False, True])
def test_large_outputs_are_complete(last):
    """8 MiB and more go around the caches."""
    x = torch.randn(2, 64, 130, 130)
    x = channels_last(x) if last else x
    torch.testing.assert_close(ops.group_norm_silu(x, 8), functional.silu(functional.group_norm(x, 8)), rtol=1e-5, atol=1e-5)


def test_a_constant_group_gives_its_bias_and_no_gradient():
    x = torch.full((2, 4, 3, 3), 7.5, requires_grad=True)
    bias = torch.tensor([0.0, 1.0, -2.0, 3.0])
    y = ops.group_norm_silu(x, 2, torch.ones(4), bias)
    torch.testing.assert_close(y, functional.silu(bias)[None, :, None, None].expand(2, 4, 3, 3))
    (grad,) = torch.autograd.grad(y[0, 0].sum(), x)  # half of the group: what is left is dy - mean(dy), times 1 / sqrt(eps)
    torch.testing.assert_close(grad[0, 0], torch.full((3, 3), 0.25 / math.sqrt(1e-5)))
    single = torch.randn(3, 5, requires_grad=True)
    (grad,) = torch.autograd.grad(ops.group_norm_silu(single, 5, torch.randn(5), torch.randn(5)).sum(), single)
    assert torch.equal(grad, torch.zeros(3, 5))


@pytest.mark.parametrize("activation", ["silu", None])
def test_extreme_values_stay_finite(activation):
    shift = torch.tensor([[-1e4, -200.0, -88.0, -20.0, 20.0, 88.0, 200.0, 1e4]])
    x = torch.zeros(1, 8, 3, requires_grad=True)
    leaf = shift.clone().requires_grad_()
    y = ops.group_norm_silu(x, 2, shift=leaf, activation=activation)
    expected = functional.silu(shift.double()) if activation else shift.double()
    torch.testing.assert_close(y[0].double(), expected[0, :, None].expand(8, 3), rtol=1e-6, atol=1e-30)
    (grad,) = torch.autograd.grad(y.sum(), leaf)
    wide = shift.double().requires_grad_()
    (exact,) = torch.autograd.grad(3 * functional.silu(wide).sum(), wide)
    torch.testing.assert_close(grad.double(), exact if activation else torch.full((1, 8), 3.0).double(), rtol=1e-6, atol=1e-30)


def test_nan_stays_in_its_group():
    for last in (False, True):
        x = torch.randn(3, 8, 5, 5)
        x[1, 3, 2, 2] = math.nan
        x = channels_last(x) if last else x
        odd = ops.group_norm_silu(x, 4).isnan()
        assert odd[1, 2:4].all()
        assert odd.sum() == 2 * 25


def test_storage_types_mix():
    x, weight, bias, scale, shift = drawn(2, 16, 6, 6)
    expected = composed(x, 4, weight, bias, scale, shift)
    for types in (
        (torch.bfloat16, torch.float32, torch.float32, torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.bfloat16),
    ):
        leaves = [v.to(t).requires_grad_() for v, t in zip((x, weight, bias, scale, shift), types, strict=True)]
        y = ops.group_norm_silu(leaves[0], 4, leaves[1], leaves[2], scale=leaves[3], shift=leaves[4])
        assert y.dtype is types[0]
        torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.1)
        for leaf, grad in zip(leaves, torch.autograd.grad(y.sum(), leaves), strict=True):
            assert grad.dtype is leaf.dtype
            assert grad.shape == leaf.shape


def test_one_modulation_for_all_samples():
    x, weight, bias, scale, shift = drawn(3, 8, 4)
    one, level = scale[:1].clone().requires_grad_(), shift[:1].clone().requires_grad_()
    y = ops.group_norm_silu(x, 2, weight, bias, scale=one, shift=level)
    torch.testing.assert_close(y, composed(x, 2, weight, bias, scale[:1], shift[:1]))
    grads = torch.autograd.grad(y.sum(), (one, level))
    wide = [v.detach().double().requires_grad_() for v in (one, level)]
    exact = torch.autograd.grad(composed(x.double(), 2, weight.double(), bias.double(), *wide).sum(), wide)
    for got, want in zip(grads, exact, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


def test_layouts_are_kept():
    x = torch.randn(2, 6, 4, 5)
    for moved in (x.contiguous(memory_format=torch.channels_last), channels_last(x[..., 0]), x[..., 0, 0].contiguous()):
        y = ops.group_norm_silu(moved.clone().requires_grad_(), 3)
        assert y.stride() == moved.stride()
        (grad,) = torch.autograd.grad(y.sum(), [y.grad_fn.next_functions[0][0].variable])
        assert grad.stride() == moved.stride()


def _gradients(leaves, grad):
    y = ops.group_norm_silu(leaves[0], 4, leaves[1], leaves[2], scale=leaves[3], shift=leaves[4])
    grads = torch.autograd.grad(y, [v for v in leaves if v is not None and v.requires_grad], grad)
    return y, *grads


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("other", [False, True])
@pytest.mark.parametrize(
    ("parameters", "missing", "constant"),
    [
        (torch.float32, (), ()),
        (torch.bfloat16, (1, 4), (3,)),
        (torch.float16, (3, 4), (0, 1)),
        (torch.float32, (1, 2, 3, 4), ()),
    ],
)
def test_recorded_or_not_the_bits_are_the_same(monkeypatch, last, other, parameters, missing, constant):
    """`other`: the gradient does not lie as x does. `constant`: without requires_grad."""
    values = drawn(3, 16, 5, 7)
    leaves = [None if i in missing else v.to(parameters if i in (1, 2) else v.dtype) for i, v in enumerate(values)]
    leaves[0] = channels_last(leaves[0]) if last else leaves[0]
    leaves = [v if v is None else torch.nn.Parameter(v, requires_grad=i not in constant) for i, v in enumerate(leaves)]
    grad = torch.randn(3, 16, 5, 7)
    grad = channels_last(grad) if last != other else grad
    found = _gradients(leaves, grad)
    monkeypatch.setattr(importlib.import_module("fastgen.ops.group_norm_silu")._record, "attempt", lambda *_: None)
    longer = _gradients(leaves, grad)
    assert [y.grad_fn.name() for y in (found[0], longer[0])] == ["group_norm_silu_fwdBackward", "_GroupNormSiluBackward"]
    for a, b in zip(found, longer, strict=True):
        assert a.stride() == b.stride()
        assert a.dtype is b.dtype
        assert torch.equal(a, b)


def test_gradients_that_are_expanded_or_missing():
    x, weight, bias, scale, shift = (v.requires_grad_() for v in drawn(2, 16, 6))
    leaves = [x, weight, bias, scale, shift]
    level = torch.randn(())
    for a, b in zip(_gradients(leaves, level.expand(x.shape)), _gradients(leaves, level.expand(x.shape).clone()), strict=True):
        assert torch.equal(a, b)

    class Stop(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y.clone()

        @staticmethod
        def backward(ctx, grad):
            return None

    Stop.apply(ops.group_norm_silu(x, 4, weight)).sum().backward()
    assert not x.grad.any()
    assert not weight.grad.any()
    assert bias.grad is None


def test_saved_tensors_pass_through_hooks():
    leaves = [v.requires_grad_() for v in drawn(2, 16, 6)]
    grad, seen = torch.randn(2, 16, 6), []
    plain = _gradients(leaves, grad)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (seen.append(t.shape), t.double())[1], lambda t: t.float()):
        hooked = _gradients(leaves, grad)
    assert seen == [(2, 16, 6), (16,), (16,), (2, 16), (2, 16), (2, 4, 3)]
    assert all(map(torch.equal, plain, hooked))


@pytest.mark.parametrize("last", [False, True])
def test_no_pixels(last):
    x, weight, bias, scale, shift = drawn(2, 16, 0, 3)
    leaves = [v.requires_grad_() for v in (channels_last(x) if last else x, weight, bias, scale, shift)]
    y, *grads = _gradients(leaves, torch.zeros(2, 16, 0, 3))
    assert y.shape == (2, 16, 0, 3)
    assert all(g.shape == v.shape and not g.any() for g, v in zip(grads, leaves, strict=True))


def test_errors():
    x, line = torch.zeros(2, 6, 3), torch.zeros(6)
    with pytest.raises(ValueError, match="groups must divide the channels of x, got 4 for 6 channels"):
        ops.group_norm_silu(x, 4, line, line)
    with pytest.raises(TypeError, match="groups must be an int, got float"):
        ops.group_norm_silu(x, 2.0, line, line)
    with pytest.raises(ValueError, match=r"weight must have shape \[6\] on cpu, got \[5\] on cpu"):
        ops.group_norm_silu(x, 2, torch.zeros(5), line)
    with pytest.raises(ValueError, match=r"scale must have shape \[2, 6\] on cpu, got \[6\] on cpu"):
        ops.group_norm_silu(x, 2, line, line, scale=line)
    with pytest.raises(TypeError, match=r"bias must be a floating-point tensor, got torch\.int64"):
        ops.group_norm_silu(x, 2, line, line.long())
    with pytest.raises(ValueError, match=r"x must have shape \[N, C, ...\], got \[6\]"):
        ops.group_norm_silu(line, 2)
    with pytest.raises(ValueError, match="activation must be 'silu' or None, got 'relu'"):
        ops.group_norm_silu(x, 2, activation="relu")
