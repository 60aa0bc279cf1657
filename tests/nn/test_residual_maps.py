"""Planar and radial maps: inverses, log-determinants, gradients, extremes."""

import pytest
import torch

from fastgen.nn import residual_maps as maps

MAPS = {
    "planar": (maps.planar, maps.planar_inverse, maps.planar_size),
    "radial": (maps.radial, maps.radial_inverse, maps.radial_size),
}


def parameters(kind, n, features, scale=1.0):
    return (scale * torch.randn(n, MAPS[kind][2](features), generator=torch.Generator().manual_seed(1))).double()


@pytest.mark.parametrize("kind", MAPS)
@pytest.mark.parametrize("features", [1, 2, 5])
@pytest.mark.parametrize("scale", [1.0, 20.0])
def test_inverse_and_log_det(kind, features, scale):
    forward, inverse, _ = MAPS[kind]
    theta = parameters(kind, 50, features, scale)
    z = 3 * torch.randn(50, features, generator=torch.Generator().manual_seed(2)).double()
    y, ladj = forward(z, theta)
    back, ladj_back = inverse(y, theta)
    for i in range(50):
        jacobian = torch.autograd.functional.jacobian(lambda v, i=i: forward(v[None], theta[i : i + 1])[0][0], z[i])
        sign, expected = torch.linalg.slogdet(jacobian)
        assert sign > 0
        torch.testing.assert_close(ladj[i], expected, rtol=1e-6, atol=1e-6)
    if scale == 1:
        torch.testing.assert_close(back, z, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(ladj_back, -ladj, rtol=1e-9, atol=1e-9)
    again, _ = forward(back, theta)
    torch.testing.assert_close(again, y, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("kind", MAPS)
def test_zeros_are_the_identity(kind):
    z = torch.randn(4, 3)
    theta = torch.zeros(1, MAPS[kind][2](3))
    y, ladj = MAPS[kind][0](z, theta)
    torch.testing.assert_close(y, z)
    torch.testing.assert_close(ladj, torch.zeros(4))


@pytest.mark.parametrize("kind", MAPS)
def test_gradients_of_map_and_inverse(kind):
    forward, inverse, _ = MAPS[kind]
    theta, z = parameters(kind, 4, 3).requires_grad_(), torch.randn(4, 3).double().requires_grad_()
    assert torch.autograd.gradcheck(forward, (z, theta))
    assert torch.autograd.gradcheck(inverse, (z, theta))


@pytest.mark.parametrize("kind", MAPS)
def test_extremes(kind):
    forward, inverse, size = MAPS[kind]
    values = torch.tensor([0.0, 1e-38, 1.0, -1e9, 1e18, 1e30, torch.finfo(torch.float32).max])
    z = torch.cartesian_prod(values, values)
    for scale in (0.0, 1.0, 30.0):
        theta = scale * torch.randn(1, size(2), generator=torch.Generator().manual_seed(0))
        for function in (forward, inverse):
            y, ladj = function(z, theta)
            assert not y.isnan().any()
            assert not ladj.isnan().any()


def test_planar_root_converges_where_newton_alone_would_not():
    """Slopes near -1 make the equation flat at its root."""
    slope = torch.tensor([-0.999999, -0.99, -0.5, 0.0, 10.0, 1e4]).double()[:, None]
    target = torch.linspace(-30, 30, 301).double()[None]
    slope, target = torch.broadcast_tensors(slope, target)
    q = maps._planar_root(target.flatten(), slope.flatten())
    error = q + slope.flatten() * torch.tanh(q) - target.flatten()
    assert error.abs().max() < 1e-9
