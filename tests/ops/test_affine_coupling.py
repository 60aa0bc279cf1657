"""affine_coupling: the Jacobian by autograd, the published bounds, extreme log-scales, round trips, short rows."""

import math

import pytest
import torch

from fastgen import ops

BOUNDS = [None, "tanh", "sigmoid"]


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("inverse", [False, True])
def test_log_det_is_that_of_the_jacobian(bound, inverse):
    x, shift, log_scale = torch.randn(3, 1, 6, dtype=torch.float64).unbind()
    jacobian = torch.autograd.functional.jacobian(
        lambda v: ops.affine_coupling(v, shift, log_scale, bound=bound, inverse=inverse).y[0], x
    )
    log_det = ops.affine_coupling(x.float(), shift.float(), log_scale.float(), bound=bound, inverse=inverse).log_det
    assert log_det.item() == pytest.approx(torch.linalg.slogdet(jacobian[:, 0]).logabsdet.item(), rel=1e-5, abs=1e-6)


def test_scales_are_the_published_ones():
    log_scale = torch.linspace(-5, 5, 41)[:, None]
    for bound, scale in ((None, log_scale.exp()), ("tanh", log_scale.tanh().exp()), ("sigmoid", (log_scale + 2).sigmoid())):
        y, log_det = ops.affine_coupling(torch.ones(41, 1), torch.zeros(41, 1), log_scale, bound=bound)
        torch.testing.assert_close(y, scale)
        torch.testing.assert_close(log_det, scale.log()[:, 0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("value", [-20.0, -2.0, 0.0, 20.0])
@pytest.mark.parametrize("inverse", [False, True])
def test_extreme_log_scales_are_finite_and_accurate(bound, value, inverse):
    leaves = [torch.full((2, 19), v, requires_grad=True) for v in (0.75, 0.25, value)]
    wide = [v.detach().double().requires_grad_() for v in leaves]
    for inputs in (leaves, wide):
        y, log_det = ops.affine_coupling(*inputs, bound=bound, inverse=inverse)
        (y.sum() + log_det.sum()).backward()
        inputs.extend([y, log_det])
    for got, expected in zip(leaves[3:] + [v.grad for v in leaves[:3]], wide[3:] + [v.grad for v in wide[:3]], strict=True):
        assert got.isfinite().all()
        torch.testing.assert_close(got.double(), expected, rtol=2e-6, atol=1e-12)


@pytest.mark.parametrize("bound", BOUNDS)
def test_inverse_undoes_forward(bound):
    x, shift, log_scale = torch.randn(3, 30, 3, 7).unbind()
    y, log_det = ops.affine_coupling(x, shift, log_scale, bound=bound)
    back, back_log_det = ops.affine_coupling(y, shift, log_scale, bound=bound, inverse=True)
    torch.testing.assert_close(back, x, rtol=1e-5, atol=3e-6)
    assert torch.equal(back_log_det, -log_det)


@pytest.mark.parametrize("event", range(1, 18))
def test_rows_shorter_than_a_vector(event):
    x, shift, log_scale = torch.randn(3, 700, event).unbind()
    log_det = ops.affine_coupling(x, shift, log_scale, bound="sigmoid").log_det
    expected = torch.nn.functional.logsigmoid(log_scale.double() + 2).sum(1)
    torch.testing.assert_close(log_det.double(), expected, rtol=1e-6, atol=1e-6)


def test_large_outputs_are_complete():
    """8 MiB and more go around the caches."""
    x, shift, log_scale = torch.randn(3, 4100, 512).unbind()
    y, log_det = ops.affine_coupling(x, shift, log_scale)
    torch.testing.assert_close(y, x * log_scale.exp() + shift)
    torch.testing.assert_close(log_det, log_scale.sum(1), rtol=1e-5, atol=1e-4)


def test_shared_parameters_broadcast():
    x = torch.randn(6, 4, requires_grad=True)
    shift, log_scale = torch.randn(4, requires_grad=True), torch.randn((), requires_grad=True)
    y, log_det = ops.affine_coupling(x, shift, log_scale)
    torch.testing.assert_close(y, x * log_scale.exp() + shift)
    (y.sum() + log_det.sum()).backward()
    torch.testing.assert_close(shift.grad, torch.full((4,), 6.0))
    torch.testing.assert_close(log_scale.grad, (x * log_scale.exp()).sum() + 24)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("output", [0, 1])
def test_one_output_alone(inverse, output):
    pairs = []
    for backend in (None, "reference"):
        leaves = [v.clone().requires_grad_() for v in torch.linspace(-2, 2, 3 * 5 * 9).reshape(3, 5, 9)]
        result = ops.affine_coupling(*leaves, bound="tanh", inverse=inverse, backend=backend)[output]
        pairs.append(torch.autograd.grad(result.sum(), leaves, allow_unused=True, materialize_grads=True))
    for got, expected in zip(*pairs, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bound", BOUNDS)
def test_infinite_log_scales_do_not_spoil_the_row(bound):
    log_scale = torch.tensor([[-math.inf, 1.0]])
    y, _ = ops.affine_coupling(torch.ones(1, 2), torch.zeros(1, 2), log_scale, bound=bound)
    assert y[0, 0].item() == pytest.approx(math.exp(-1) if bound == "tanh" else 0.0)
    assert y.isfinite().all()


def test_errors():
    x = torch.zeros(3, 4)
    with pytest.raises(ValueError, match="bound must be None, 'tanh' or 'sigmoid', got 'softplus'"):
        ops.affine_coupling(x, x, x, bound="softplus")
    with pytest.raises(TypeError, match="log_scale must be a tensor, got float"):
        ops.affine_coupling(x, x, 1.0)
    with pytest.raises(ValueError, match=r"shift \(5,\)"):
        ops.affine_coupling(x, torch.zeros(5), x)
