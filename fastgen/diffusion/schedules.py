"""Schedules: how much signal and how much noise there is at a time, what a network predicts there, and what that is worth.

    x_t = alpha(t) x0 + sigma(t) eps,    eps ~ N(0, I),    SNR(t) = alpha^2 / sigma^2

Time runs from the data to the noise. A :class:`Schedule` gives alpha and sigma in float64; everything else follows from them:

* a **target** is what the network is trained to predict, linear in x0 and eps: a row (a, b, c, d) of
  :func:`fastgen.ops.diffuse`, x_t = a x0 + b eps and target = c x0 + d eps. Its inverse is a row (p, q) of
  :func:`fastgen.ops.denoise`, x0 = p x + q m;
* a **weight** multiplies the squared error of a prediction.

Sources: Ho et al. (2020), "Denoising diffusion probabilistic models" (linear); Nichol and Dhariwal (2021), "Improved denoising
diffusion probabilistic models" (cosine); Rombach et al. (2022), "High-resolution image synthesis with latent diffusion models"
(scaled linear); Lin et al. (2024), "Common diffusion noise schedules and sample steps are flawed" (zero terminal SNR); Song et
al. (2021), "Score-based generative modeling through stochastic differential equations" (VP, VE, sub-VP); Karras et al. (2022),
"Elucidating the design space of diffusion-based generative models" (rho-spaced noise levels); Lee et al. (2024), "Beta
sampling is all you need"; Lipman et al. (2023), "Flow
matching for generative modeling"; Salimans and Ho (2022), "Progressive distillation for fast sampling of diffusion models"
(v, SNR weights); Hang et al. (2023), "Efficient diffusion training via min-SNR weighting strategy"; Choi et al. (2022),
"Perception prioritized training of diffusion models" (P2); Kingma et al. (2021), "Variational diffusion models" (the bound).
"""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from fastgen._extras import require

__all__ = [
    "VE",
    "VP",
    "Betas",
    "Cosine",
    "Discrete",
    "Flow",
    "Grid",
    "Karras",
    "Levels",
    "Schedule",
    "Spacing",
    "SubVP",
    "Target",
    "Weight",
    "betas",
    "estimate_rows",
    "karras_levels",
    "loss_weights",
    "noise_levels",
    "target_rows",
    "zero_terminal_snr",
]

Betas = Literal["linear", "scaled_linear", "cosine", "sigmoid", "laplace"]
Levels = Literal["karras", "exponential", "beta"]
Spacing = Literal["trailing", "leading", "linspace", "karras", "exponential", "beta"]
Target = Literal["epsilon", "x0", "v", "velocity"]
Weight = Literal["simple", "vlb", "snr", "min_snr", "p2"]


class Grid(NamedTuple):
    """The steps of a sampler: step i goes from time[i] to next_time[i], in float64 on the CPU, noisiest first.

    The next of a step is the first of the one after it, but in ``compat="diffusers"``, where upstream's need not be. The last
    step ends at the data: alpha 1, sigma 0.
    """

    schedule: Schedule
    time: Tensor
    alpha: Tensor
    sigma: Tensor
    next_time: Tensor
    next_alpha: Tensor
    next_sigma: Tensor

    @classmethod
    def through(cls, schedule: Schedule, time: Tensor, alpha: Tensor, sigma: Tensor) -> Grid:
        """The grid that steps from each point to the next; the last point is an end, where nothing is evaluated."""
        return cls(schedule, time[:-1], alpha[:-1], sigma[:-1], time[1:], alpha[1:], sigma[1:])

    def tail(self, steps: int) -> Grid:
        """The last ``steps`` steps."""
        return Grid(self.schedule, *(column[len(column) - steps :] for column in self[1:]))


def karras_levels(steps: int, low: float, high: float, rho: float = 7.0) -> Tensor:
    """Noise levels from ``high`` to ``low``, evenly spaced in their rho-th root: [steps] float64."""
    if not 0 < low <= high < math.inf:
        raise ValueError(f"noise levels need 0 < low <= high, finite, got {low} and {high}")
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    return (high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho


def noise_levels(kind: Levels, steps: int, low: float, high: float) -> Tensor:
    """Noise levels from ``high`` to ``low``: [steps] float64.

    Args:
        kind: "karras", :func:`karras_levels`; "exponential", evenly in their logarithm; "beta", the quantiles of
            Beta(0.6, 0.6), densest at both ends (Lee et al., 2024; needs scipy).
        steps: how many.
        low, high: the smallest and the largest.
    """
    if kind == "karras":
        return karras_levels(steps, low, high)
    if not 0 < low <= high < math.inf:
        raise ValueError(f"noise levels need 0 < low <= high, finite, got {low} and {high}")
    if kind == "exponential":
        return torch.linspace(math.log(high), math.log(low), steps, dtype=torch.float64).exp()
    special: Any = require("scipy.special", package="scipy", extra="demo", purpose="beta spacing")
    shares = special.betaincinv(0.6, 0.6, torch.linspace(1, 0, steps, dtype=torch.float64).numpy())
    return low + torch.from_numpy(shares) * (high - low)


class Schedule(abc.ABC):
    """alpha and sigma as functions of time, both ways.

    Attributes:
        clean: the time at which alpha = 1 and sigma = 0.
        spacing: how :meth:`grid` lays out steps unless told.
    """

    clean: float = 0.0
    spacing: Spacing = "trailing"

    @abc.abstractmethod
    def at(self, time: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma), float64, of the shape of ``time``."""

    @abc.abstractmethod
    def time(self, ratio: Tensor) -> Tensor:
        """The time at which sigma / alpha is ``ratio``, within the schedule's range."""

    @abc.abstractmethod
    def times(self, steps: int, spacing: Spacing) -> Tensor:
        """The times of ``steps`` evaluations, falling: "trailing" starts at the noisiest, "leading" ends at the cleanest,
        "linspace" does both."""

    def of_ratio(self, ratio: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) where sigma / alpha is ``ratio``, exactly: here for alpha^2 + sigma^2 = 1."""
        alpha = torch.rsqrt(1 + ratio.square())
        return alpha, alpha * ratio

    def prior_std(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Standard deviation of the noise that sampling starts from: 1 where the variance is preserved."""
        return torch.ones_like(sigma)

    def straight_scale(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """s, such that the samplers of second order step x / s by sigma / s: alpha, as in k-diffusion and EDM."""
        return alpha

    def of_level(self, level: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(time, alpha, sigma) where sigma / s is ``level``."""
        return self.time(level), *self.of_ratio(level)

    def log_snr(self, time: Tensor) -> Tensor:
        """log(alpha^2 / sigma^2) in nats."""
        alpha, sigma = self.at(time)
        return 2 * (alpha.log() - sigma.log())

    def grid(self, steps: int | Sequence[float], spacing: Spacing | None = None) -> Grid:
        """The steps from noise to data.

        Args:
            steps: how many, or the times themselves, falling.
            spacing: how they lie, see :meth:`times`; "karras", "exponential" and "beta" space the level sigma / s as
                :func:`noise_levels` does: sigma / alpha, but along a flow the time (see :meth:`straight_scale`).

        Raises:
            ValueError: for times that do not fall, or more steps than there are.
        """
        spacing = spacing or self.spacing
        if spacing not in get_args(Spacing):
            raise ValueError(f"spacing must be one of {', '.join(get_args(Spacing))}, got {spacing!r}")
        if not isinstance(steps, int):
            time = torch.as_tensor(steps, dtype=torch.float64)
            if time.dim() != 1 or len(time) < 1 or not bool((time.diff() < 0).all()):
                raise ValueError(f"steps must be a number or falling times, got {steps!r}")
            alpha, sigma = self.at(time)
        elif steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        elif spacing in get_args(Levels):
            alpha, sigma = self.at(self.times(2, "linspace"))
            high, low = (sigma / self.straight_scale(alpha, sigma)).tolist()
            time, alpha, sigma = self.of_level(noise_levels(spacing, steps, low, high))  # type: ignore[arg-type]
        else:
            time = self.times(steps, spacing)
            alpha, sigma = self.at(time)
        end = [torch.tensor([value], dtype=torch.float64) for value in (self.clean, 1.0, 0.0)]
        return Grid.through(self, *(torch.cat(pair) for pair in zip((time, alpha, sigma), end, strict=True)))


def betas(
    kind: Betas,
    steps: int = 1000,
    *,
    start: float = 1e-4,
    end: float = 0.02,
    zero_snr: bool = False,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Variances beta_t of the forward chain x_t = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) eps: [steps].

    Args:
        kind: "linear", "scaled_linear" (linear in the square root) or "sigmoid" between ``start`` and ``end``, "cosine", or
            "laplace", whose log-SNR is spread as that distribution, with diffusers' constants.
        steps: length of the chain.
        start, end: first and last beta; "cosine" and "laplace" have their own.
        zero_snr: rescale with :func:`zero_terminal_snr`.
        dtype: that it is computed in; float32 gives diffusers' values bit by bit.

    >>> betas("linear", 3)
    tensor([0.0001, 0.0101, 0.0200], dtype=torch.float64)
    """
    if steps < 1:
        raise ValueError(f"a schedule needs at least 1 step, got {steps}")
    if kind == "linear":
        out = torch.linspace(start, end, steps, dtype=dtype)
    elif kind == "scaled_linear":
        out = torch.linspace(start**0.5, end**0.5, steps, dtype=dtype).square()
    elif kind == "sigmoid":
        out = torch.linspace(-6, 6, steps, dtype=dtype).sigmoid() * (end - start) + start
    elif kind == "cosine":
        bar = torch.cos((torch.arange(steps + 1, dtype=torch.float64) / steps + 0.008) / 1.008 * math.pi / 2).square()
        out = (1 - bar[1:] / bar[:-1]).clamp(max=0.999).to(dtype)
    elif kind == "laplace":
        left = 0.5 - torch.arange(steps + 1, dtype=torch.float64) / steps
        bar = torch.sigmoid(-0.5 * torch.ones_like(left).copysign(left) * (1 - 2 * left.abs() + 1e-6).log()).sqrt()
        out = (1 - bar[1:] / bar[:-1]).clamp(max=0.999).to(dtype)
    else:
        raise ValueError(f"schedule must be one of {', '.join(get_args(Betas))}, got {kind!r}")
    return zero_terminal_snr(out) if zero_snr else out


def zero_terminal_snr(betas: Tensor) -> Tensor:
    """Shift and scale sqrt(alpha_bar) so that its first value stays and its last is 0 (Lin et al., algorithm 1)."""
    root = (1 - betas).cumprod(0).sqrt()
    bar = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))).square()
    return 1 - torch.cat([bar[:1], bar[1:] / bar[:-1]])


class Discrete(Schedule):
    """A chain of T steps, t = 0 .. T-1 as in diffusers: alpha^2 = prod_{s <= t} (1 - beta_s), alpha^2 + sigma^2 = 1.

    Times between steps interpolate log(sigma / alpha). The data itself lies one step before the first, at t = -1.
    """

    clean = -1.0

    def __init__(self, betas: Tensor) -> None:
        if betas.dim() != 1 or not len(betas) or not bool(((betas > 0) & (betas <= 1)).all()):
            raise ValueError("betas must be a vector of values in (0, 1]")
        self.betas = betas.double().cpu()
        self.alphas_cumprod = (1 - self.betas).cumprod(0)

    @property
    def steps(self) -> int:
        """T."""
        return len(self.betas)

    @property
    def _log_ratio(self) -> Tensor:
        return 0.5 * (torch.log1p(-self.alphas_cumprod) - self.alphas_cumprod.log())

    def at(self, time: Tensor) -> tuple[Tensor, Tensor]:
        time = torch.as_tensor(time, dtype=torch.float64)
        below = time.floor().clamp(0, self.steps - 1).long()
        bar = self.alphas_cumprod[below]
        alpha, sigma = bar.sqrt(), (1 - bar).sqrt()
        part = time - below
        if bool((part != 0).any()):
            if float(time.min()) < 0 or float(time.max()) > self.steps - 1:
                raise ValueError(f"times must be in 0 .. {self.steps - 1}, got {time.tolist()}")
            logs, above = self._log_ratio, (below + 1).clamp(max=self.steps - 1)
            between = self.of_ratio(torch.exp(torch.where(part > 0, logs[below].lerp(logs[above], part), logs[below])))
            alpha, sigma = torch.where(part > 0, between[0], alpha), torch.where(part > 0, between[1], sigma)
        return alpha, sigma

    def time(self, ratio: Tensor) -> Tensor:
        logs, log = self._log_ratio, ratio.double().log()
        if self.steps == 1:
            return torch.zeros_like(log)
        below = (torch.searchsorted(logs, log.contiguous(), right=True) - 1).clamp(0, self.steps - 2)
        part = ((log - logs[below]) / (logs[below + 1] - logs[below])).clamp(0, 1)
        return below + torch.where(torch.isinf(logs[below + 1]), torch.isinf(log).double(), part)

    def times(self, steps: int, spacing: Spacing) -> Tensor:
        if steps > self.steps:
            raise ValueError(f"steps must be at most the {self.steps} of the schedule, got {steps}")
        count = torch.arange(steps, dtype=torch.float64)
        if spacing == "trailing":
            return (self.steps - count * self.steps / steps).round() - 1
        if spacing == "leading":
            return count.flip(0) * (self.steps // steps)
        return torch.linspace(self.steps - 1, 0, steps, dtype=torch.float64).round()


class _Continuous(Schedule):
    """Times in (0, 1]; ``first`` is the cleanest at which a network is asked."""

    first: float = 1e-3

    def times(self, steps: int, spacing: Spacing) -> Tensor:
        count = torch.arange(steps, dtype=torch.float64)
        if spacing == "trailing":
            return 1 - count / steps
        if spacing == "leading":
            return self.first + count.flip(0) / steps
        return torch.linspace(1, self.first, steps, dtype=torch.float64)


class VP(_Continuous):
    """Variance-preserving SDE with beta(t) linear: log alpha = -t^2 (beta_max - beta_min) / 4 - t beta_min / 2."""

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0) -> None:
        if not 0 < beta_min <= beta_max:
            raise ValueError(f"need 0 < beta_min <= beta_max, got {beta_min} and {beta_max}")
        self.beta_min, self.beta_max = beta_min, beta_max

    def _log_alpha(self, time: Tensor) -> Tensor:
        time = time.double()
        return -0.25 * time.square() * (self.beta_max - self.beta_min) - 0.5 * time * self.beta_min

    def _time_of_log_alpha(self, log_alpha: Tensor) -> Tensor:
        # the root of t^2 (beta_max - beta_min) / 4 + t beta_min / 2 + log alpha = 0 in its form without cancellation
        slope, curve = 0.5 * self.beta_min, 0.25 * (self.beta_max - self.beta_min)
        return -2 * log_alpha / (slope + (slope**2 - 4 * curve * log_alpha).sqrt())

    def at(self, time: Tensor) -> tuple[Tensor, Tensor]:
        log_alpha = self._log_alpha(time)
        return log_alpha.exp(), (-torch.expm1(2 * log_alpha)).sqrt()

    def time(self, ratio: Tensor) -> Tensor:
        return self._time_of_log_alpha(-0.5 * torch.log1p(ratio.double().square()))


class Cosine(_Continuous):
    """The point of a quarter circle at time t: alpha = cos(pi t / 2), sigma = sin(pi t / 2); at t = 1 without any data."""

    def at(self, time: Tensor) -> tuple[Tensor, Tensor]:
        quarter = 0.5 * math.pi
        return torch.sin(quarter * (1 - time.double())), torch.sin(quarter * time.double())

    def time(self, ratio: Tensor) -> Tensor:
        return ratio.double().atan() * (2 / math.pi)


class SubVP(VP):
    """Sub-VP SDE: the alpha of VP and sigma = 1 - alpha^2, the root of VP's squared."""

    def at(self, time: Tensor) -> tuple[Tensor, Tensor]:
        log_alpha = self._log_alpha(time)
        return log_alpha.exp(), -torch.expm1(2 * log_alpha)

    def of_ratio(self, ratio: Tensor) -> tuple[Tensor, Tensor]:
        # 1 - alpha^2 = ratio alpha
        alpha = 2 / (ratio + (ratio.square() + 4).sqrt())
        return alpha, alpha * ratio

    def time(self, ratio: Tensor) -> Tensor:
        return self._time_of_log_alpha(self.of_ratio(ratio.double())[0].log())


class VE(_Continuous):
    """Variance-exploding SDE: alpha = 1, sigma from sigma_min at t = 0 to sigma_max at t = 1, geometrically."""

    first = 1e-5

    def __init__(self, sigma_min: float = 0.01, sigma_max: float = 50.0) -> None:
        if not 0 < sigma_min < sigma_max:
            raise ValueError(f"need 0 < sigma_min < sigma_max, got {sigma_min} and {sigma_max}")
        self.sigma_min, self.sigma_max = sigma_min, sigma_max

    def at(self, time: Tensor) -> tuple[Tensor, Tensor]:
        sigma = self.sigma_min * (self.sigma_max / self.sigma_min) ** time.double()
        return torch.ones_like(sigma), sigma

    def time(self, ratio: Tensor) -> Tensor:
        return (ratio.double() / self.sigma_min).log() / math.log(self.sigma_max / self.sigma_min)

    def of_ratio(self, ratio: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(ratio), ratio

    def prior_std(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return sigma


class Karras(VE):
    """EDM: time is the noise level itself, alpha = 1 and sigma = t, in steps even in the rho-th root of sigma."""

    spacing: Spacing = "karras"

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> None:
        super().__init__(sigma_min, sigma_max)
        self.rho = rho

    def at(self, time: Tensor) -> tuple[Tensor, Tensor]:
        sigma = torch.as_tensor(time, dtype=torch.float64)
        return torch.ones_like(sigma), sigma

    def time(self, ratio: Tensor) -> Tensor:
        return ratio.double()

    def times(self, steps: int, spacing: Spacing) -> Tensor:
        return karras_levels(steps, self.sigma_min, self.sigma_max, self.rho)


class Flow(_Continuous):
    """Flow matching on straight lines: alpha = 1 - t, sigma = t; with ``shift`` s, sampling times are s t / (1 + (s - 1) t)."""

    def __init__(self, shift: float = 1.0) -> None:
        if not shift > 0:
            raise ValueError(f"shift must be positive, got {shift}")
        self.shift = shift

    def at(self, time: Tensor) -> tuple[Tensor, Tensor]:
        sigma = torch.as_tensor(time, dtype=torch.float64)
        return 1 - sigma, sigma

    def time(self, ratio: Tensor) -> Tensor:
        return self.of_ratio(ratio.double())[1]

    def of_ratio(self, ratio: Tensor) -> tuple[Tensor, Tensor]:
        alpha = 1 / (1 + ratio)
        return alpha, torch.where(torch.isinf(ratio), 1.0, alpha * ratio)

    def times(self, steps: int, spacing: Spacing) -> Tensor:
        time = super().times(steps, spacing)
        return self.shift * time / (1 + (self.shift - 1) * time)

    def prior_std(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return sigma

    def straight_scale(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return alpha + sigma

    def of_level(self, level: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return level, *self.at(level)


def target_rows(target: Target, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Rows (a, b, c, d) of :func:`fastgen.ops.diffuse`: x_t = a x0 + b eps and the target c x0 + d eps, [..., 4] float64.

    "epsilon" is the noise, "x0" the data, "v" alpha eps - sigma x0, "velocity" eps - x0.
    """
    one, zero = torch.ones_like(alpha), torch.zeros_like(alpha)
    pairs = {"epsilon": (zero, one), "x0": (one, zero), "v": (-sigma, alpha), "velocity": (-one, one)}
    if target not in pairs:
        raise ValueError(f"target must be one of {', '.join(pairs)}, got {target!r}")
    return torch.stack([alpha, sigma, *pairs[target]], -1)


def estimate_rows(rows: Tensor) -> Tensor:
    """Rows (p, q), [..., 2], with which a prediction m of the target of ``rows`` gives the data: x0 = p x + q m.

    Raises:
        ValueError: where the target and x_t do not determine the data, such as the noise alone where alpha is 0.
    """
    a, b, c, d = rows.unbind(-1)
    volume = a * d - b * c
    if bool((volume == 0).any()):
        raise ValueError("where alpha is 0 a prediction of the noise says nothing about the data: predict v or x0")
    return torch.stack([d / volume, -b / volume], -1)


def loss_weights(
    weight: Weight, rows: Tensor, *, min_snr_gamma: float = 5.0, p2_gamma: float = 1.0, p2_k: float = 1.0
) -> Tensor:
    """Weights of the squared error of a prediction, one per row (a, b, c, d): float64.

    They are defined as weights w of the error of x0 and carried over to the target, whose error is 1 / |q| as large:

    * "simple": 1 on the target as it is;
    * "snr": SNR, which is 1 for the noise;
    * "min_snr": min(SNR, ``min_snr_gamma``);
    * "p2": SNR / (``p2_k`` + SNR)^``p2_gamma``;
    * "vlb": the variational bound of the chain whose steps the rows are, cleanest first: T (SNR_{t-1} - SNR_t) / 2 in nats per
      element; the last term takes p(x0 | x_0) to be Gaussian with variance 1 / SNR_0.
    """
    if weight not in get_args(Weight):
        raise ValueError(f"weight must be one of {', '.join(get_args(Weight))}, got {weight!r}")
    if weight == "simple":
        return torch.ones(rows.shape[:-1], dtype=torch.float64)
    snr = (rows[..., 0] / rows[..., 1]).square()
    if weight == "snr":
        of_data = snr
    elif weight == "min_snr":
        of_data = snr.clamp(max=min_snr_gamma)
    elif weight == "p2":
        of_data = snr / (p2_k + snr) ** p2_gamma
    else:
        of_data = 0.5 * len(snr) * torch.cat([snr[:1], -snr.diff()])
    return of_data * estimate_rows(rows)[..., 1].square()
