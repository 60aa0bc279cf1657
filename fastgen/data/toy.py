"""Toy densities on the plane with exact log-density, for seeing what a model learns and by how many nats it misses.

All but the checkerboard are equal mixtures of K Gaussians of one width,

    p(x) = 1/K sum_k N(x; mu_k, sigma^2 I),

the curves with centres so close along the curve (at most sigma apart) that the ripple is below 1e-8. So the log-density is
exact by construction and not an approximation of some noisy curve. The checkerboard is uniform on its squares. All have
zero mean, or nearly, and reach about 2 to 2.5 from the origin.
"""

from __future__ import annotations

import difflib
import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from fastgen import ops
from fastgen.data.source import ArraySource, check_split
from fastgen.random import Stream, fresh_key
from fastgen.random import key as make_key

__all__ = ["Checkerboard", "Mixture", "ToyDensity", "ToySource", "toy", "toy_names"]

_CHUNK = 1 << 22  # pairs of point and component held at once
_COUNT = {"train": 50_000, "test": 10_000}
_SEED = 0x746F79


class ToyDensity:
    """A density on the plane.

    Attributes:
        name: for logs.
        bounds: (low, high): all but less than 1e-6 of the mass lies in [low, high] x [low, high].
    """

    name: str
    bounds: tuple[float, float]

    def sample(self, n: int, *, key: Tensor | None = None) -> Tensor:
        """Independent draws.

        Args:
            n: how many.
            key: a :mod:`fastgen.random` key; sample i depends on the noise at index ``key.sample + i`` alone. None
                draws a fresh one from PyTorch's generator.

        Returns:
            float32 [n, 2].
        """
        raise NotImplementedError

    def log_prob(self, x: Tensor) -> Tensor:
        """Exact log-density in nats of points x [..., 2], shape [...]; -inf where the density is zero."""
        raise NotImplementedError

    @property
    def entropy(self) -> float:
        """Differential entropy in nats: the least mean negative log-likelihood that a model can reach."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"


def _check_points(x: Tensor) -> None:
    if x.shape[-1:] != (2,) or not x.is_floating_point():
        raise ValueError(f"x must be floats [..., 2], got {x.dtype} {list(x.shape)}")


class Mixture(ToyDensity):
    """Equal mixture of isotropic Gaussians.

    Args:
        name: for logs.
        means: float64 [K, 2].
        sigma: standard deviation of every component, along both axes.
    """

    def __init__(self, name: str, means: Tensor, sigma: float) -> None:
        self.name = name
        self.means = means.double()
        self.sigma = sigma
        reach = float(self.means.abs().max()) + 6 * sigma
        self.bounds = (-reach, reach)

    def sample(self, n: int, *, key: Tensor | None = None) -> Tensor:
        """float32 [n, 2]; see :meth:`ToyDensity.sample`."""
        key = fresh_key() if key is None else key
        # A sample's normals come from its first quartet of random words, so the choice of component uses the second.
        u = ops.uniform((n, 5), key)[:, 4].double()
        component = (u * len(self.means)).long().clamp_(max=len(self.means) - 1)
        return self.means.to(u.device)[component].float() + self.sigma * ops.normal((n, 2), key)

    def log_prob(self, x: Tensor) -> Tensor:
        """Nats, shape [...] for x [..., 2]; differentiable."""
        _check_points(x)
        means = self.means.to(x)
        constant = math.log(2 * math.pi * self.sigma**2 * len(means))
        flat = x.reshape(-1, 2)
        parts = [
            torch.logsumexp(self._squared_distance(part, means) / (-2 * self.sigma**2), dim=1) - constant
            for part in torch.split(flat, max(1, _CHUNK // len(means)))
        ]
        return torch.cat(parts).reshape(x.shape[:-1])

    @staticmethod
    def _squared_distance(x: Tensor, means: Tensor) -> Tensor:
        """[n, K]; by differences, since the expanded square loses digits."""
        return (x[:, :1] - means[:, 0]).square() + (x[:, 1:] - means[:, 1]).square()

    @functools.cached_property
    def _entropy(self) -> float:
        low, high = self.bounds
        points = math.ceil((high - low) / (self.sigma / 3))  # the trapezoid rule converges faster than any power here
        axis = torch.linspace(low, high, points, dtype=torch.float64)
        step = float(axis[1] - axis[0])
        near = axis[:, None].sub(self.means[:, 0]).abs().amin(1) < 7 * self.sigma  # columns where there is any density
        total = 0.0
        for column in axis[near]:
            log_p = self.log_prob(torch.stack([column.expand(points), axis], -1))
            total -= float((log_p.exp() * log_p).sum())
        return total * step * step

    @property
    def entropy(self) -> float:
        """Nats, by the trapezoid rule with step sigma/3 (error below 1e-6)."""
        return self._entropy


class Checkerboard(ToyDensity):
    """Uniform on the dark squares of a 4 x 4 board on [-2, 2] x [-2, 2]."""

    name = "checkerboard"
    bounds = (-2.0, 2.0)
    entropy = math.log(8.0)

    def sample(self, n: int, *, key: Tensor | None = None) -> Tensor:
        """float32 [n, 2]; see :meth:`ToyDensity.sample`."""
        u = ops.uniform((n, 3), fresh_key() if key is None else key)
        row = (u[:, 0] * 4).floor().clamp(max=3)
        # column 0 or 2 of the even rows, 1 or 3 of the odd ones
        across = u[:, 1] * 2
        half = across.floor().clamp(max=1)
        x = 2 * half + row % 2 + (across - half)
        y = row + u[:, 2]
        return torch.stack([x, y], -1) - 2

    def log_prob(self, x: Tensor) -> Tensor:
        """Nats, shape [...] for x [..., 2]: -log 8 on the dark squares, -inf elsewhere."""
        _check_points(x)
        cell = (x + 2).floor()
        dark = ((x >= -2) & (x <= 2)).all(-1) & (cell.clamp(0, 3).sum(-1) % 2 == 0)
        return torch.where(dark, -self.entropy, -torch.inf).to(x.dtype)


def _polar(radius: Tensor | float, angle: Tensor) -> Tensor:
    return torch.stack([radius * angle.cos(), radius * angle.sin()], -1)


def _midpoints(low: float, high: float, n: int) -> Tensor:
    return low + (torch.arange(n, dtype=torch.float64) + 0.5) * ((high - low) / n)


def _gaussians8() -> Mixture:
    return Mixture("gaussians8", _polar(2.0, _midpoints(-math.pi / 8, 2 * math.pi - math.pi / 8, 8)), 0.15)


def _gaussians25() -> Mixture:
    axis = torch.arange(-2, 3, dtype=torch.float64)
    return Mixture("gaussians25", torch.cartesian_prod(axis, axis), 0.1)


def _moons() -> Mixture:
    t = _midpoints(0, math.pi, 64)
    upper = _polar(1.0, t)
    lower = torch.tensor([1.0, 0.5], dtype=torch.float64) - upper
    return Mixture("moons", 1.3 * (torch.cat([upper, lower]) - torch.tensor([0.5, 0.25], dtype=torch.float64)), 0.1)


def _swissroll() -> Mixture:
    t = _midpoints(1.5 * math.pi, 4.5 * math.pi, 256)
    means = _polar(t / 7, t)
    return Mixture("swissroll", means - means.mean(0), 0.08)


def _two_spirals() -> Mixture:
    t = 3 * math.pi * _midpoints(0, 1, 360).sqrt()  # the root spreads the centres evenly along the arm
    arm = _polar(0.1 + t / (1.5 * math.pi), t)
    return Mixture("two_spirals", torch.cat([arm, -arm]), 0.08)


def _rings() -> Mixture:
    t = _midpoints(0, 2 * math.pi, 160)
    return Mixture("rings", torch.cat([_polar(radius, t) for radius in (0.5, 1.0, 1.5, 2.0)]), 0.08)


_TOYS: dict[str, tuple[Callable[[], ToyDensity], str]] = {
    "gaussians8": (_gaussians8, "8 Gaussians on a ring"),
    "gaussians25": (_gaussians25, "25 Gaussians on a square grid"),
    "moons": (_moons, "two interleaved half circles"),
    "swissroll": (_swissroll, "one spiral"),
    "two_spirals": (_two_spirals, "two interleaved spirals"),
    "rings": (_rings, "four concentric circles of equal mass"),
    "checkerboard": (Checkerboard, "uniform on the dark squares of a 4 x 4 board"),
}


def toy_names() -> dict[str, str]:
    """Names of the toy densities -> one-line descriptions."""
    return {name: text for name, (_, text) in _TOYS.items()}


@functools.lru_cache
def toy(name: str) -> ToyDensity:
    """A toy density by name; ``ValueError`` with near misses where there is none.

    >>> round(toy("checkerboard").entropy, 4)
    2.0794
    """
    if name not in _TOYS:
        near = difflib.get_close_matches(name, _TOYS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(_TOYS)}"
        raise ValueError(f"unknown toy density {name!r}; {hint}")
    return _TOYS[name][0]()


class ToySource(ArraySource):
    """A fixed sample of a toy density: 50,000 points to train on, 10,000 others to test on.

    Attributes:
        density: the :class:`ToyDensity` itself, with ``log_prob`` and ``entropy``.
    """

    def __init__(self, name: str, *, split: str = "train", n: int | None = None) -> None:
        check_split(split)
        self.density = toy(name)
        step = ("train", "test").index(split)
        count = _COUNT[split] if n is None else n
        points = self.density.sample(count, key=make_key(_SEED, stream=Stream.DATA, step=step))
        super().__init__(name, points)
