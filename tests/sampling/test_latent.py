"""Latent paths on a model whose decoder is the identity."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from fastgen.nn.model import Config, Model
from fastgen.sampling.latent import interpolate, manifold, traverse


@dataclasses.dataclass(frozen=True, kw_only=True)
class IdentityConfig(Config):
    latent: int = 2


class Identity(Model):
    """x = z."""

    def __init__(self, latent: int) -> None:
        super().__init__(IdentityConfig(event_shape=(latent,), latent=latent))
        self.unused = nn.Parameter(torch.zeros(()))

    def decode(self, z: Tensor) -> Tensor:
        return z


def test_manifold_is_even_in_probability() -> None:
    n, edge = 5, 0.1
    points = manifold(Identity(2), n, edge=edge, batch_size=7).view(n, n, 2)
    quantiles = torch.special.ndtr(points)
    axis = torch.linspace(edge, 1 - edge, n)
    torch.testing.assert_close(quantiles[..., 0], axis.expand(n, n))  # left to right
    torch.testing.assert_close(quantiles[..., 1], axis.flip(0)[:, None].expand(n, n))  # top to bottom


def test_interpolation_meets_both_ends() -> None:
    a, b = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    for kind in ("linear", "spherical"):
        path = interpolate(Identity(8), a, b, 6, kind=kind)
        assert path.shape == (3, 6, 8)
        torch.testing.assert_close(path[:, 0], a)
        torch.testing.assert_close(path[:, -1], b)
    middle = interpolate(Identity(8), a, b, 3, kind="linear")[:, 1]
    torch.testing.assert_close(middle, (a + b) / 2)


def test_spherical_keeps_the_norm_and_the_angular_speed() -> None:
    a, b = torch.tensor([2.0, 0.0, 0.0]), torch.tensor([0.0, 2.0, 0.0])
    path = interpolate(Identity(3), a, b, 4)[0]
    torch.testing.assert_close(path.norm(dim=1), torch.full((4,), 2.0))
    torch.testing.assert_close(torch.rad2deg(torch.atan2(path[:, 1], path[:, 0])), torch.tensor([0.0, 30, 60, 90]))


def test_spherical_between_parallel_vectors_is_straight() -> None:
    a = torch.tensor([[1.0, 2.0, 3.0]])
    path = interpolate(Identity(3), a, 2 * a, 3)[0]
    torch.testing.assert_close(path, torch.stack([a[0], 1.5 * a[0], 2 * a[0]]))


def test_traverse_moves_one_axis_at_a_time() -> None:
    z = torch.tensor([0.1, 0.2, 0.3])
    walks = traverse(Identity(3), z, span=2.0, steps=5, dims=[2, 0])
    assert walks.shape == (2, 5, 3)
    torch.testing.assert_close(walks[0, :, 2], torch.linspace(-2, 2, 5))
    torch.testing.assert_close(walks[0, :, :2], z[:2].expand(5, 2))
    torch.testing.assert_close(walks[1, :, 0], torch.linspace(-2, 2, 5))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: manifold(Identity(3)), "needs a 2-D latent space, the model's has 3"),
        (lambda: manifold(Identity(2), 1), "n must be at least 2, got 1"),
        (lambda: manifold(Identity(2), edge=0.5), "edge must be in"),
        (lambda: interpolate(Identity(2), torch.zeros(2), torch.zeros(3)), "same shape"),
        (lambda: interpolate(Identity(2), torch.zeros(2), torch.zeros(2), kind="curly"), "'curly'"),  # type: ignore[arg-type]
        (lambda: traverse(Identity(2), torch.zeros(2), dims=[2]), "0 .. 1, got 2"),
    ],
)
def test_errors_name_the_culprit(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call()
