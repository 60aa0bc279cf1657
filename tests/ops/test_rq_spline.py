"""rq_spline: the map against its definition, its inverse and Jacobian, the edges of the bins and of the interval, accuracy."""

import math

import pytest
import torch

from fastgen import ops
from fastgen.ops.rq_spline import _knots, rq_spline_reference

both_conventions = pytest.mark.parametrize("convention", ["nflows", "zuko"])
both_ways = pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
BOUND = 3.0


def draw(*shape, bins=8, scale=1.0, dtype=torch.float32):
    x = (2 * torch.rand(shape, dtype=dtype) - 1) * BOUND
    return x, *(scale * torch.randn(*shape, n, dtype=dtype) for n in (bins, bins, bins - 1))


@both_conventions
def test_knots_and_their_derivatives(convention):
    """The spline meets its knots, computed here one by one, with the derivatives that the parameters say."""
    _, widths, heights, derivatives = draw(1, bins=5, dtype=torch.float64)
    w, h, d = (v[0].tolist() for v in (widths, heights, derivatives))
    if convention == "nflows":
        shares = [[1e-3 + (1 - 5e-3) * math.exp(u) / sum(map(math.exp, v)) for u in v] for v in (w, h)]
        slopes = [1.0, *(1e-3 + math.log1p(math.exp(u)) for u in d), 1.0]
    else:
        limit = math.log(1e3)
        clipped = [[u / (1 + 2 * abs(u) / limit) for u in v] for v in (w, h)]
        shares = [[math.exp(u) / sum(map(math.exp, v)) for u in v] for v in clipped]
        slopes = [1.0, *(math.exp(u / (1 + abs(u) / limit)) for u in d), 1.0]
    xs, ys = ([2 * BOUND * (sum(v[:k]) - 0.5) for k in range(6)] for v in shares)
    for k in range(1, 5):
        for side in (-1e-9, 1e-9):
            x = torch.tensor([xs[k] + side], dtype=torch.float64)
            y, log_det = ops.rq_spline(x, widths, heights, derivatives, bound=BOUND, convention=convention)
            assert y.item() == pytest.approx(ys[k], abs=1e-7)
            assert log_det.item() == pytest.approx(math.log(slopes[k]), abs=1e-6)


@both_conventions
@pytest.mark.parametrize("bins", [1, 2, 8, 11])
def test_round_trip(convention, bins):
    """x -> y -> x: to rounding in float64, to the conditioning of the map in float32."""
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
        x, *parameters = draw(500, 7, bins=bins, scale=0.7, dtype=dtype)
        x = 1.3 * x  # tails too
        y, log_det = ops.rq_spline(x, *parameters, bound=BOUND, convention=convention)
        back, inverse_log_det = ops.rq_spline(y, *parameters, bound=BOUND, convention=convention, inverse=True)
        torch.testing.assert_close(back, x, rtol=0, atol=tolerance)
        torch.testing.assert_close(inverse_log_det, -log_det, rtol=0, atol=30 * tolerance)


@both_conventions
@both_ways
def test_log_det_is_that_of_the_jacobian(convention, inverse):
    x, *parameters = draw(4, 6, dtype=torch.float64)

    def row(i):
        return lambda v: ops.rq_spline(
            v[None], *(p[i : i + 1] for p in parameters), bound=BOUND, inverse=inverse, convention=convention
        ).y[0]

    _, log_det = ops.rq_spline(x, *parameters, bound=BOUND, inverse=inverse, convention=convention)
    for i in range(4):
        jacobian = torch.autograd.functional.jacobian(row(i), x[i])
        assert torch.linalg.slogdet(jacobian)[1].item() == pytest.approx(log_det[i].item(), abs=1e-10)
    fused = ops.rq_spline(x.float(), *(p.float() for p in parameters), bound=BOUND, inverse=inverse, convention=convention)
    torch.testing.assert_close(fused.log_det.double(), log_det, rtol=1e-3, atol=1e-3)


@both_conventions
@both_ways
@pytest.mark.parametrize("bins", [8, 32, 41])
def test_as_accurate_as_pytorch_in_float32(convention, inverse, bins):
    """Errors of results and gradients at the median and at the 99.9th percentile, against those of the reference in float32."""
    inputs = draw(2000, 10, bins=bins)
    results = {}
    for name, dtype, backend in (
        ("truth", torch.float64, "reference"),
        ("torch", torch.float32, "reference"),
        ("fused", torch.float32, None),
    ):
        leaves = [v.to(dtype).requires_grad_() for v in inputs]
        y, log_det = ops.rq_spline(*leaves, bound=BOUND, inverse=inverse, convention=convention, backend=backend)
        results[name] = [y, log_det, *torch.autograd.grad(y.sin().sum() + log_det.sum(), leaves)]
    for truth, eager, fused in zip(*results.values(), strict=True):
        for quantile in (0.5, 0.999):
            errors = [(v.double() - truth).abs().flatten()[: 1 << 23].quantile(quantile).item() for v in (eager, fused)]
            assert errors[1] <= 3 * errors[0] + 1e-7


@both_conventions
@both_ways
def test_edges_and_tails(convention, inverse):
    x = torch.tensor([-math.inf, -1e30, -4.0, -BOUND, BOUND, 4.0, 1e30, math.inf])[:, None].requires_grad_()
    _, *parameters = draw(8, 1)
    parameters = [p.requires_grad_() for p in parameters]
    y, log_det = ops.rq_spline(x, *parameters, bound=BOUND, inverse=inverse, convention=convention)
    assert torch.equal(y, x)
    torch.testing.assert_close(log_det, torch.zeros(8), atol=1e-6, rtol=0)
    grads = torch.autograd.grad(torch.where(y.isfinite(), y, 0 * x).sum() + log_det.sum(), [x, *parameters])
    inside = torch.tensor([False, False, False, convention == "nflows", True, False, False, False])
    assert grads[0][~inside & x.isfinite()[:, 0]].eq(1).all()
    for gradient in grads[1:]:
        assert gradient.isfinite().all()
        assert gradient[~inside].eq(0).all()


@both_conventions
@both_ways
def test_on_the_knots(convention, inverse):
    """Exactly on computed knots, and one step beside them: finite, continuous, monotone to rounding."""
    _, widths, heights, derivatives = draw(50, 1)
    knots = _knots((heights if inverse else widths)[:, 0], BOUND, convention)[0]
    other = _knots((widths if inverse else heights)[:, 0], BOUND, convention)[0]
    parameters = [p.expand(50, 9, -1).contiguous().requires_grad_() for p in (widths, heights, derivatives)]
    for x in (knots, knots.nextafter(torch.tensor(9.0)), knots.nextafter(torch.tensor(-9.0))):
        x = x.clone().requires_grad_()
        y, log_det = ops.rq_spline(x, *parameters, bound=BOUND, inverse=inverse, convention=convention)
        slope = torch.autograd.grad(y.sum(), x, retain_graph=True)[0]
        assert ((y - other).abs() <= 3e-6 * slope.clamp_min(1)).all()
        for gradient in torch.autograd.grad(y.sum() + log_det.sum(), [x, *parameters]):
            assert gradient.isfinite().all()


@both_conventions
@both_ways
def test_extreme_parameters(convention, inverse):
    """Bins of minimal width and height, derivatives from 1e-3 to 1e3 and beyond: everything finite, the inverse bounded."""
    x = torch.linspace(-BOUND, BOUND, 4001)[:, None].requires_grad_()
    for seed in range(6):
        torch.manual_seed(seed)
        scale = (5.0, 100.0, 1e4)[seed % 3]
        parameters = [(scale * torch.randn(1, 1, n)).expand(4001, 1, n).clone().requires_grad_() for n in (8, 8, 7)]
        y, log_det = ops.rq_spline(x, *parameters, bound=BOUND, inverse=inverse, convention=convention)
        assert y.abs().max() <= BOUND
        assert log_det.isfinite().all()
        for gradient in torch.autograd.grad(y.sum() + log_det.sum(), [x, *parameters]):
            assert gradient.isfinite().all()
        with torch.no_grad():
            truth = rq_spline_reference(
                x.double(), *(p.double() for p in parameters), bound=BOUND, inverse=inverse, convention=convention
            )
        # x is known to one rounding: y to that times the slope nearby
        slope = truth.log_det.exp()[:, None]
        near = torch.nn.functional.max_pool1d(slope.T[None], 9, 1, 4)[0].T
        assert ((y - truth.y).abs() <= 1e-4 + 3e-6 * near).float().mean() > 0.999


def test_identity():
    """Equal bins and unit derivatives: y = x, log_det = 0."""
    x = torch.linspace(-4, 4, 100)[:, None]
    zeros = torch.zeros(100, 1, 8)
    y, log_det = ops.rq_spline(x, zeros, zeros, zeros[..., :7], bound=BOUND, convention="zuko")
    torch.testing.assert_close(y, x, atol=2e-6, rtol=0)
    torch.testing.assert_close(log_det, torch.zeros(100), atol=2e-6, rtol=0)


def test_shared_parameters_are_broadcast():
    x, *parameters = draw(6, 4)
    shared = [p[0].clone().requires_grad_() for p in parameters]
    y, log_det = ops.rq_spline(x, *shared, bound=BOUND)
    expected = ops.rq_spline(x, *(p.expand(6, *p.shape).contiguous() for p in shared), bound=BOUND)
    assert torch.equal(y, expected.y)
    assert torch.equal(log_det, expected.log_det)
    (y.sum() + log_det.sum()).backward()
    assert [p.grad.shape for p in shared] == [(4, 8), (4, 8), (4, 7)]


def test_one_output_alone():
    for output in (0, 1):
        inputs, pairs = draw(9, 5), []
        for backend in (None, "reference"):
            leaves = [v.clone().requires_grad_() for v in inputs]
            ops.rq_spline(*leaves, bound=BOUND, backend=backend)[output].sum().backward()
            pairs.append([v.grad for v in leaves])
        for fused, eager in zip(*pairs, strict=True):
            torch.testing.assert_close(fused, eager, rtol=1e-3, atol=1e-4)


def test_nan_in_one_element():
    x, *parameters = draw(3, 5)
    clean = ops.rq_spline(x, *parameters, bound=BOUND)
    x[1, 2] = math.nan
    y, log_det = ops.rq_spline(x, *parameters, bound=BOUND)
    assert y.isnan().nonzero().tolist() == [[1, 2]]
    assert log_det.isnan().tolist() == [False, True, False]
    assert torch.equal(y[[0, 2]], clean.y[[0, 2]])


def _arguments(**changes):
    x, widths, heights, derivatives = draw(3, 4)
    return {"x": x, "widths": widths, "heights": heights, "derivatives": derivatives, "bound": 1.0, **changes}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x must be a tensor, got list"),
        ({"x": torch.zeros(3, 4, dtype=torch.int64)}, TypeError, "x must be a floating-point tensor, got torch.int64"),
        ({"widths": torch.zeros(3, 4, 0)}, ValueError, "widths must be .* at least one bin"),
        ({"heights": torch.zeros(3, 4, 7)}, ValueError, r"heights must be \[..., 8\] for 8 bins, got shape \(3, 4, 7\)"),
        ({"derivatives": torch.zeros(3, 4, 8)}, ValueError, r"derivatives must be \[..., 7\] for 8 bins"),
        ({"x": torch.zeros(3, 5)}, ValueError, "shapes do not broadcast"),
        ({"x": torch.zeros(4)}, ValueError, "widths must be .* broadcast to the shape of x"),
        ({"bound": 0.0}, ValueError, "bound must be positive and finite, got 0.0"),
        ({"convention": "durkan"}, ValueError, "convention must be one of nflows, zuko, got 'durkan'"),
        (
            {"widths": torch.zeros(1, 1001), "heights": torch.zeros(1, 1001), "derivatives": torch.zeros(1, 1000)},
            ValueError,
            "1000 bins at most, got 1001",
        ),
    ],
)
def test_errors(changes, error, message):
    with pytest.raises(error, match=message):
        ops.rq_spline(**_arguments(**changes))
