"""Schedules against diffusers and against their definitions, targets and their inverses, weights."""

import math

import diffusers
import pytest
import torch

from fastgen import ops
from fastgen.diffusion import schedules
from fastgen.diffusion.schedules import (
    VE,
    VP,
    Cosine,
    Discrete,
    Flow,
    Karras,
    SubVP,
    betas,
    estimate_rows,
    loss_weights,
    noise_levels,
    target_rows,
)

SCHEDULES = [
    Discrete(betas("linear")),
    Discrete(betas("cosine")),
    VP(),
    SubVP(),
    VE(),
    Karras(),
    Flow(),
    Flow(shift=3.0),
    Cosine(),
]
NAMES = ["linear", "cosine", "vp", "sub-vp", "ve", "karras", "flow", "flow-shifted", "quarter-circle"]


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize(
    ("kind", "upstream"),
    [
        ("linear", "linear"),
        ("scaled_linear", "scaled_linear"),
        ("cosine", "squaredcos_cap_v2"),
        ("sigmoid", "sigmoid"),
        ("laplace", "laplace"),
    ],
)
def test_chain_is_that_of_diffusers(kind, upstream, zero_snr):
    theirs = diffusers.DDPMScheduler(
        beta_schedule=upstream, beta_start=0.00085, beta_end=0.012, rescale_betas_zero_snr=zero_snr
    )
    ours = Discrete(betas(kind, start=0.00085, end=0.012, zero_snr=zero_snr))
    # theirs are float32: a difference of 1e-7 in a beta, summed over up to 1000 of them
    torch.testing.assert_close(ours.alphas_cumprod.float(), theirs.alphas_cumprod, rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(ours.betas.float(), theirs.betas, rtol=1e-4, atol=1e-6)
    if zero_snr:
        assert ours.alphas_cumprod[-1] == 0
        assert ours.alphas_cumprod[0] == pytest.approx(float(1 - betas(kind, start=0.00085, end=0.012)[0]), abs=1e-12)


def test_cosine_follows_its_formula():
    bar = Discrete(betas("cosine")).alphas_cumprod

    def f(t):
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    assert bar[499] == pytest.approx(f(0.5) / f(0), rel=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=NAMES)
def test_time_is_the_inverse_of_the_ratio(schedule):
    time = schedule.grid(17).time
    alpha, sigma = schedule.at(time)
    finite = alpha > 0
    torch.testing.assert_close(schedule.time((sigma / alpha)[finite]), time[finite], rtol=1e-9, atol=1e-9)
    for ours, exact in zip(schedule.of_ratio((sigma / alpha)[finite]), (alpha[finite], sigma[finite]), strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-12, atol=0)
    assert bool((schedule.log_snr(time).diff() > 0).all())


def test_times_between_the_steps_of_a_chain():
    chain = Discrete(betas("linear"))
    half = chain.at(torch.tensor([499.5]))
    below, above = chain.log_snr(torch.tensor([499.0, 500.0])).tolist()
    assert float(2 * (half[0] / half[1]).log()) == pytest.approx((below + above) / 2, abs=1e-12)
    assert float(chain.time(half[1] / half[0])) == pytest.approx(499.5, abs=1e-9)
    assert float(half[0].square() + half[1].square()) == pytest.approx(1, abs=1e-15)


@pytest.mark.parametrize("t", [0.1, 0.7])
def test_stochastic_differential_equations(t):
    """d alpha / dt = f alpha and d sigma^2 / dt = 2 f sigma^2 + g^2 for the drift and diffusion of the papers."""
    time = torch.tensor(t, dtype=torch.float64)
    beta = 0.1 + t * 19.9
    integral = 0.1 * t + 0.5 * t * t * 19.9
    step = 1e-5
    for schedule, f, g2 in (
        (VP(), -beta / 2, beta),
        (SubVP(), -beta / 2, beta * (1 - math.exp(-2 * integral))),
        (VE(), 0.0, float(VE().at(time)[1]) ** 2 * 2 * math.log(5000)),
    ):
        alpha, sigma = schedule.at(time)
        (alpha1, sigma1), (alpha2, sigma2) = schedule.at(time - step), schedule.at(time + step)
        assert float((alpha2 - alpha1) / (2 * step)) == pytest.approx(f * float(alpha), rel=1e-5, abs=1e-8)
        slope = float((sigma2.square() - sigma1.square()) / (2 * step))
        assert slope == pytest.approx(2 * f * float(sigma) ** 2 + g2, rel=1e-5)


def test_karras_levels_follow_their_formula():
    levels = schedules.karras_levels(18, 0.002, 80.0)
    for i in (0, 5, 17):
        assert levels[i] == pytest.approx((80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7, rel=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=NAMES)
@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace", "karras"])
def test_every_step_ends_where_the_next_begins(schedule, spacing):
    if isinstance(schedule, Cosine) and spacing == "karras":
        with pytest.raises(ValueError, match=r"noise levels need 0 < low <= high, finite, got .* and inf"):
            schedule.grid(7, spacing)
        return
    for steps in (1, 7, 30):
        grid = schedule.grid(steps, spacing)
        assert len(grid.time) == steps
        assert torch.equal(grid.time[1:], grid.next_time[:-1])
        assert torch.equal(grid.alpha[1:], grid.next_alpha[:-1])
        assert torch.equal(grid.sigma[1:], grid.next_sigma[:-1])
        assert (grid.next_alpha[-1], grid.next_sigma[-1], grid.next_time[-1]) == (1, 0, schedule.clean)
        assert bool((grid.time.diff() < 0).all())


def test_chain_steps():
    chain = Discrete(betas("linear"))
    assert chain.grid(4, "trailing").time.tolist() == [999, 749, 499, 249]
    assert chain.grid(4, "leading").time.tolist() == [750, 500, 250, 0]
    assert chain.grid(4, "linspace").time.tolist() == [999, 666, 333, 0]
    assert chain.grid(1000).time.tolist() == list(range(999, -1, -1))
    assert chain.grid([900, 3, 0.5]).time.tolist() == [900, 3, 0.5]
    karras = chain.grid(10, "karras")
    ratio = (1 / chain.alphas_cumprod - 1).sqrt()
    torch.testing.assert_close(
        karras.sigma / karras.alpha, schedules.karras_levels(10, float(ratio[0]), float(ratio[-1])), rtol=1e-12, atol=0
    )
    assert chain.grid(10).tail(3).time.tolist() == chain.grid(10).time.tolist()[-3:]


@pytest.mark.parametrize("target", ["epsilon", "x0", "v", "velocity"])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=NAMES)
def test_estimate_inverts_the_target(schedule, target):
    alpha, sigma = schedule.at(schedule.grid(9).time)
    known = alpha > 0
    rows = target_rows(target, alpha, sigma)[known]
    x0, eps = torch.randn(2, len(rows), 5, dtype=torch.float64)
    x_t, m = ops.diffuse(x0, rows, noise=eps)
    p, q = estimate_rows(rows).unbind(-1)
    torch.testing.assert_close(p[:, None] * x_t + q[:, None] * m, x0, rtol=1e-9, atol=1e-9)


def test_targets_are_those_of_the_papers():
    rows = target_rows("v", torch.tensor(0.8), torch.tensor(0.6))
    torch.testing.assert_close(rows, torch.tensor([0.8, 0.6, -0.6, 0.8]))
    torch.testing.assert_close(estimate_rows(rows.double()), torch.tensor([0.8, -0.6]).double(), rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="says nothing about the data"):
        estimate_rows(target_rows("epsilon", torch.zeros(1), torch.ones(1)))


@pytest.mark.parametrize("target", ["epsilon", "x0", "v"])
def test_weights_weigh_the_error_of_the_data(target):
    """A weight on the prediction times its error is the weight on x0 times that of x0."""
    chain = Discrete(betas("linear"))
    rows = target_rows(target, *chain.at(torch.arange(1000)))
    snr = chain.alphas_cumprod / (1 - chain.alphas_cumprod)
    q2 = estimate_rows(rows)[:, 1].square()
    expected = {
        "snr": snr,
        "min_snr": snr.clamp(max=5),
        "p2": snr / (1 + snr),
        "vlb": 500 * torch.cat([snr[:1], snr[:-1] - snr[1:]]),
    }
    for name, of_data in expected.items():
        torch.testing.assert_close(loss_weights(name, rows), of_data * q2, rtol=1e-9, atol=0)
    assert bool((loss_weights("simple", rows) == 1).all())


def test_weights_known_forms():
    chain = Discrete(betas("linear"))
    alpha, sigma = chain.at(torch.arange(1000))
    snr = (alpha / sigma).square()
    noise, v = target_rows("epsilon", alpha, sigma), target_rows("v", alpha, sigma)
    torch.testing.assert_close(loss_weights("snr", noise), torch.ones(1000).double())
    torch.testing.assert_close(loss_weights("min_snr", noise), snr.clamp(max=5) / snr)
    torch.testing.assert_close(loss_weights("min_snr", v), snr.clamp(max=5) / (snr + 1))
    # Ho et al., eq. 12, with sigma_t^2 the posterior's: beta^2 / (2 sigma^2 alpha (1 - abar)), for t > 0
    beta, bar = chain.betas, chain.alphas_cumprod
    posterior = beta[1:] * (1 - bar[:-1]) / (1 - bar[1:])
    bound = beta[1:].square() / (2 * posterior * (1 - beta[1:]) * (1 - bar[1:]))
    torch.testing.assert_close(loss_weights("vlb", noise)[1:] / 1000, bound, rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: betas("quadratic"),
            "schedule must be one of linear, scaled_linear, cosine, sigmoid, laplace, got 'quadratic'",
        ),
        (lambda: betas("linear", 0), "at least 1 step, got 0"),
        (lambda: Discrete(torch.tensor([0.1, 1.5])), r"values in \(0, 1\]"),
        (lambda: Discrete(betas("linear")).grid(1001), "at most the 1000 of the schedule, got 1001"),
        (lambda: Discrete(betas("linear")).grid(0), "at least 1, got 0"),
        (lambda: Discrete(betas("linear")).grid([3, 5]), "falling times"),
        (lambda: VP().grid(5, "even"), "spacing must be one of trailing"),
        (lambda: VP(beta_min=0), "need 0 < beta_min"),
        (lambda: VE(sigma_min=3, sigma_max=1), "need 0 < sigma_min"),
        (lambda: Flow(shift=0), "shift must be positive"),
        (lambda: target_rows("score", torch.ones(1), torch.ones(1)), "target must be one of epsilon"),
        (lambda: loss_weights("flat", torch.ones(1, 4)), "weight must be one of simple"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_noise_levels():
    """Ends as asked for; even in the logarithm; and the quantiles of Beta(0.6, 0.6), by scipy's own distribution."""
    stats = pytest.importorskip("scipy.stats")
    for kind in ("karras", "exponential", "beta"):
        levels = noise_levels(kind, 9, 0.03, 14.0)
        torch.testing.assert_close(levels[[0, -1]], torch.tensor([14.0, 0.03], dtype=torch.float64), rtol=1e-12, atol=0)
        assert bool((levels.diff() < 0).all())
    torch.testing.assert_close(noise_levels("exponential", 9, 0.03, 14.0).log().diff(2), torch.zeros(7).double())
    shares = (noise_levels("beta", 9, 0.03, 14.0) - 0.03) / (14.0 - 0.03)
    expected = torch.from_numpy(stats.beta.ppf(torch.linspace(1, 0, 9, dtype=torch.float64).numpy(), 0.6, 0.6))
    torch.testing.assert_close(shares, expected, rtol=1e-9, atol=1e-12)
    for kind in ("exponential", "beta"):
        with pytest.raises(ValueError, match=r"noise levels need 0 < low <= high"):
            noise_levels(kind, 3, 0.0, 1.0)


@pytest.mark.parametrize("spacing", ["exponential", "beta"])
def test_spacings_by_level(spacing):
    grid = Discrete(betas("linear")).grid(12, spacing)
    ratio = grid.sigma / grid.alpha
    torch.testing.assert_close(ratio, noise_levels(spacing, 12, float(ratio[-1]), float(ratio[0])), rtol=1e-9, atol=0)
    assert float(grid.time[0]) == 999
    assert float(grid.time[-1]) == 0
    # along a flow it is the time that is spaced: sigma / alpha is infinite at its start
    along = Flow().grid(12, spacing)
    torch.testing.assert_close(along.time, noise_levels(spacing, 12, 1e-3, 1.0), rtol=1e-9, atol=0)
    assert torch.equal(along.sigma, along.time)
