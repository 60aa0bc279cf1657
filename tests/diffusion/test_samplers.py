"""Samplers on Gaussian data, where mean, covariance and order of convergence are known; and how they are related."""

import itertools
import math

import pytest
import torch

from fastgen.diffusion import samplers
from fastgen.diffusion.samplers import (
    DDIM,
    DDPM,
    DPM2,
    LMS,
    SAMPLERS,
    Consistency,
    DPMSolver,
    DPMSolverSinglestep,
    Euler,
    EulerAncestral,
    Heun,
    SASolver,
    UniPC,
    make_sampler,
)
from fastgen.diffusion.schedules import VE, VP, Discrete, Flow, Grid, Karras, SubVP, betas
from tests.diffusion.gaussian import COVARIANCE, MEAN, linear_map, moments

SCHEDULES = {
    "chain": (Discrete(betas("linear")), "epsilon"),
    "zero-snr": (Discrete(betas("linear", zero_snr=True)), "v"),
    "vp": (VP(), "v"),
    "sub-vp": (SubVP(), "epsilon"),
    "ve": (VE(), "epsilon"),
    "karras": (Karras(), "x0"),
    "flow": (Flow(), "velocity"),
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_marginal_of_gaussian_data(sampler, name):
    """From the noise of the prior to the data: mean and covariance come near those of the data."""
    schedule, target = SCHEDULES[name]
    method = make_sampler(sampler)
    if sampler == "lms" and name == "zero-snr":
        with pytest.raises(ValueError, match="cannot start where alpha is 0"):
            method.plan(schedule.grid(5))
        return
    errors = []
    for steps in (20, 80):
        plan = method.plan(schedule.grid(steps))
        std = float(schedule.prior_std(plan.alpha[0], plan.sigma[0]))
        mean, covariance = moments(schedule, plan, target, torch.zeros(2).double(), std**2 * torch.eye(2).double())
        errors.append(max(float((mean - MEAN).abs().max()), float((covariance - COVARIANCE).abs().max())))
    prior = 0.03 if name in ("chain", "vp", "sub-vp", "ve", "karras") else 0.0  # the data is not quite gone in the noise
    if sampler in ("consistency", "tcd"):
        assert max(errors) < 2.0  # it starts over from each estimate, and is exact only for networks that say all at once
        return
    first_order = sampler in ("ddpm", "ddim", "euler", "euler_ancestral", "edm", "pc") or name in ("sub-vp", "ve")
    assert errors[-1] < (0.06 if first_order else 0.015) + prior, errors
    assert errors[-1] < errors[0] + 1e-3, errors


def between(schedule, steps, first, last):
    """A grid over a fixed range of levels that stays away from the data, with smoothly varying steps."""
    time = torch.linspace(first, last, steps + 1, dtype=torch.float64)
    return Grid.through(schedule, time, *schedule.at(time))


@pytest.mark.parametrize("name", ["vp", "flow", "karras"])
@pytest.mark.parametrize(
    ("sampler", "order"),
    [
        (DDIM(), 1),
        (Euler(), 1),
        (Heun(), 2),
        (DPM2(), 2),
        (LMS(2), 2),
        (LMS(4), 2),
        (DPMSolver(1), 1),
        (DPMSolver(2), 2),
        (DPMSolver(2, solver="heun"), 2),
        (DPMSolver(3), 2),
        (UniPC(2, lower_order_final=False), 2),
        (UniPC(2, uncorrected=tuple(range(80))), 2),
        (UniPC(1), 2),
        (UniPC(2), 2),
        (UniPC(3), 2),
        (UniPC(2, solver="bh1"), 2),
        (DPMSolverSinglestep(1), 1),
        (DPMSolverSinglestep(2), 2),
        (DPMSolverSinglestep(2, "heun"), 2),
        (DPMSolverSinglestep(3), 2),
        (DPMSolverSinglestep(3, "heun"), 3),
        (DPMSolverSinglestep(2, on="noise"), 2),
        (DPMSolverSinglestep(3, "heun", on="noise"), 3),
        (DPMSolver(1, on="noise"), 1),
        (DPMSolver(2, on="noise"), 2),
        (DPMSolver(2, solver="heun", on="noise"), 2),
        (DPMSolver(3, on="noise"), 2),
        (SASolver(1, 0, 0.0), 1),
        (SASolver(2, 2, 0.0), 2),
        (SASolver(3, 3, 0.0), 2),
        (SASolver(2, 2, 0.0, on="noise"), 2),
        (UniPC(2, on="noise"), 2),
        (UniPC(2, lower_order_final=False, on="noise"), 2),
    ],
    ids=str,
)
def test_order_of_convergence_to_the_probability_flow(sampler, order, name):
    """The flow of Gaussian data from one level to another is x -> (V_end / V_start)^(1/2) x, per eigenvalue of V.

    Methods of higher order start with a step of order 1 (UniPC ends with one too), which limits the whole to order 2.
    """
    schedule, target = SCHEDULES[name]
    first, last = {"vp": (0.6, 0.1), "flow": (0.9, 0.2), "karras": (3.0, 0.3)}[name]

    def variance(time):
        alpha, sigma = schedule.at(torch.tensor(time))
        return alpha**2 * COVARIANCE + sigma**2 * torch.eye(2).double()

    def power(matrix, exponent):
        values, vectors = torch.linalg.eigh(matrix)
        return vectors @ torch.diag(values**exponent) @ vectors.T

    exact = power(variance(last), 0.5) @ power(variance(first), -0.5)
    errors = []
    # of the third order it takes more steps until the first ones lead the error, which is a tenth of the second order's
    for steps in (160, 320) if sampler == DPMSolver(3) else (40, 80):
        _, of_start, _ = linear_map(schedule, sampler.plan(between(schedule, steps, first, last)), target)
        errors.append(float((of_start - exact).abs().max()))
    slope = math.log2(errors[0] / errors[1])
    assert slope > order - 0.25, (errors, slope)
    if order == 1:
        assert slope < 1.6, (errors, slope)


@pytest.mark.parametrize("name", ["vp", "flow", "karras"])
@pytest.mark.parametrize(
    ("sampler", "order"),
    [
        (DDPM(), 1),
        (DDPM("large"), 1),
        (DDIM(0.6), 1),
        (EulerAncestral(), 1),
        (DPM2(1.0), 2),
        (DPM2(0.5), 2),
        (SASolver(1, 0), 1),
        (SASolver(2, 2), 2),
        (SASolver(3, 3), 2),
        (SASolver(2, 2, on="noise"), 2),
        (SASolver(2, 2, 0.4), 2),
        (DPMSolver(1, stochastic=True), 1),
        (DPMSolver(2, stochastic=True), 2),
        (DPMSolver(2, stochastic=True, solver="heun"), 2),
        (DPMSolver(3, stochastic=True), 2),
        (DPMSolver(1, stochastic=True, on="noise"), 1),
        (DPMSolver(2, stochastic=True, on="noise"), 2),
        (DPMSolver(2, stochastic=True, solver="heun", on="noise"), 2),
    ],
    ids=str,
)
def test_order_of_convergence_in_distribution(sampler, order, name):
    """From the true marginal at one level to that at another, noise and all."""
    schedule, target = SCHEDULES[name]
    first, last = {"vp": (0.6, 0.1), "flow": (0.9, 0.2), "karras": (3.0, 0.3)}[name]
    errors = []
    # of SA-Solver it takes more steps until the leading error leads
    for steps in (80, 160) if isinstance(sampler, SASolver) else (40, 80):
        grid = between(schedule, steps, first, last)
        (alpha, sigma), (alpha1, sigma1) = schedule.at(torch.tensor(first)), schedule.at(torch.tensor(last))
        eye = torch.eye(2).double()
        start = alpha * MEAN, alpha**2 * COVARIANCE + sigma**2 * eye
        mean, covariance = moments(schedule, sampler.plan(grid), target, *start)
        errors.append(
            max(
                float((mean - alpha1 * MEAN).abs().max()),
                float((covariance - alpha1**2 * COVARIANCE - sigma1**2 * eye).abs().max()),
            )
        )
    assert math.log2(errors[0] / errors[1]) > order - 0.25, errors
    assert errors[1] < 0.03, errors


@pytest.mark.parametrize("name", SCHEDULES)
def test_samplers_that_are_the_same(name):
    schedule, _ = SCHEDULES[name]
    grid = schedule.grid(12)
    same = [(DDIM(1.0), DDPM()), (DDIM(1.0), EulerAncestral()), (DDIM(), Euler()), (DDIM(), DPMSolver(1))]
    same.append((DDIM(), SASolver(1, 0, 0.0)))
    same += [(DDIM(1.0), SASolver(1, 0)), (DDIM(1.0), DPMSolver(1, stochastic=True)), (Consistency(0.0), DDIM())]
    for one, other in same:
        a, b = one.plan(grid), other.plan(grid)
        torch.testing.assert_close(a.rows[:, :3], b.rows[:, :3], rtol=1e-9, atol=1e-9)
        assert torch.equal(a.time, b.time)


def test_heun_follows_edm():
    """Algorithm 2 of Karras et al. by hand, churn included, against the rows on a network that is not linear."""
    from fastgen import random
    from fastgen.diffusion.loop import run, tabulate
    from fastgen.diffusion.schedules import target_rows

    schedule, steps = Karras(), 8
    churn, low, high, scale = 3.0, 0.05, 50.0, 1.003
    method = Heun(churn=churn, churn_min=low, churn_max=high, churn_noise=scale)
    plan = method.plan(schedule.grid(steps))
    noise = torch.randn(len(plan.time), 5, 2, dtype=torch.float64)
    first = torch.randn(5, 2, dtype=torch.float64)

    def network(x, time):
        return torch.tanh(x + time.log()[:, None])

    levels = [*schedule.grid(steps).sigma.tolist(), 0.0]
    x, draws = first * levels[0], iter(noise[1::2])
    for i, (now, after) in enumerate(itertools.pairwise(levels)):
        gamma = min(churn / steps, math.sqrt(2) - 1) if low <= now <= high else 0.0
        hat = now * (1 + gamma)
        if i:
            x = x + math.sqrt(hat**2 - now**2) * scale * next(draws)
        else:
            assert gamma == 0  # the first level lies above churn_max
        d = (x - network(x, torch.full((5,), hat).double())) / hat
        x_next = x + (after - hat) * d
        if after:
            d2 = (x_next - network(x_next, torch.full((5,), after).double())) / after
            x_next = x + (after - hat) * (0.5 * d + 0.5 * d2)
        x = x_next
    table = tabulate(plan, lambda a, s: target_rows("x0", a, s), schedule, dtype=torch.float64)
    assert len(plan.time) == 2 * steps - 1
    got = run(network, first * levels[0], table, random.key(0), noise=noise.__getitem__)
    torch.testing.assert_close(got, x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("order", [1, 2, 3, 4, 6])
def test_lms_integrates_polynomials_exactly(order):
    """Slopes that are a polynomial of degree order - 1 of the level are integrated without error."""
    grid = Karras(0.1, 3.0).grid(9)
    rows = LMS(order).plan(grid).rows
    assert bool((rows[:, 0] == 1).all())
    weights = torch.cat([rows[:, 1:2], rows[:, 3:]], 1)
    for i in range(order - 1, 9):
        now, after = grid.sigma[i], grid.next_sigma[i]
        past = grid.sigma[i - order + 1 : i + 1].flip(0)
        for degree in range(order):
            exact = (after ** (degree + 1) - now ** (degree + 1)) / (degree + 1)
            torch.testing.assert_close((weights[i] * past**degree).sum(), exact, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("stochastic", [False, True])
def test_third_order_integrates_parabolas_exactly(stochastic):
    """Estimates that are a parabola in log(alpha / sigma), against the integral of the step; at order 2 a line."""
    schedule = VP()
    time = torch.linspace(0.7, 0.2, 8, dtype=torch.float64)
    grid = Grid.through(schedule, time, *schedule.at(time))
    level = torch.log(grid.alpha / grid.sigma)
    end = torch.log(grid.next_alpha / grid.next_sigma)
    scale = 2.0 if stochastic else 1.0
    for order, solver in ((2, "heun"), (3, "midpoint")):
        rows = DPMSolver(order, stochastic=stochastic, solver=solver).plan(grid).rows
        weights = torch.cat([rows[:, 1:2], rows[:, 3:]], 1)
        for degree in range(order):
            values = level**degree
            for i in range(order - 1, 7):
                got = (weights[i] * values[i - order + 1 : i + 1].flip(0)).sum()
                places = torch.linspace(0, 1, 2001, dtype=torch.float64) * (end[i] - level[i]) + level[i]
                exact = torch.trapezoid(scale * torch.exp(scale * (places - end[i])) * places**degree, places)
                torch.testing.assert_close(got, grid.next_alpha[i] * exact, rtol=1e-6, atol=1e-7)


def test_consistency_sampling_renews_the_noise():
    grid = Flow().grid(4)
    rows = make_sampler("consistency").plan(grid).rows
    assert torch.equal(rows, torch.stack([torch.zeros(4).double(), grid.next_alpha, grid.next_sigma], 1))


@pytest.mark.parametrize("name", SCHEDULES)
def test_noise_of_trajectory_consistency_leads_back_to_the_level(name):
    """What a perfect network gives in any step has the signal and the noise of where the step ends."""
    schedule, _ = SCHEDULES[name]
    grid = schedule.grid(6)
    for gamma in (0.2, 0.5, 1.0):
        keep, signal, noise = Consistency(gamma).plan(grid).rows.unbind(1)
        torch.testing.assert_close(keep * grid.alpha + signal, grid.next_alpha, rtol=1e-9, atol=1e-12)
        level = (keep * grid.sigma).square() + noise.square()
        torch.testing.assert_close(level, grid.next_sigma.square(), rtol=1e-9, atol=1e-12)
        assert bool((noise[:-1] > 0).all())
        assert noise[-1] == 0


def test_large_variance_is_that_of_the_forward_step():
    chain = Discrete(betas("linear"))
    plan = DDPM("large").plan(chain.grid(1000))
    torch.testing.assert_close(plan.rows[:-1, 2].square(), chain.betas.flip(0)[:-1], rtol=1e-9, atol=0)
    assert plan.rows[-1, 2] == 0
    learned = DDPM("learned").plan(chain.grid(1000))
    small = DDPM("small").plan(chain.grid(1000))
    torch.testing.assert_close(learned.bounds[:-1, 0].exp().sqrt(), small.rows[:-1, 2], rtol=1e-9, atol=0)
    torch.testing.assert_close(learned.bounds[:, 1].exp(), chain.betas.flip(0), rtol=1e-9, atol=0)
    assert learned.rows[-1, 2] == 0
    assert bool((learned.rows[:-1, 2] == 1).all())
    assert bool(learned.bounds.isfinite().all())


@pytest.mark.parametrize("sampler", [s for s in SAMPLERS if s != "lms"])
def test_zero_terminal_snr_gives_finite_tables(sampler):
    for schedule in (SCHEDULES["zero-snr"][0], Flow()):
        plan = make_sampler(sampler).plan(schedule.grid(20))
        assert bool(plan.rows.isfinite().all())
        assert bool(plan.time.isfinite().all())


def test_one_step_goes_to_the_estimate():
    for sampler in SAMPLERS:
        for schedule, _ in SCHEDULES.values():
            if sampler != "lms":
                rows = make_sampler(sampler).plan(schedule.grid(1)).rows
                torch.testing.assert_close(rows[-1, :3], torch.tensor([0.0, 1.0, 0.0]).double())


@pytest.mark.parametrize(
    "method",
    [
        DPMSolver(3, on="noise"),
        DPMSolver(2, True, on="noise"),
        DPMSolverSinglestep(3, on="noise"),
        UniPC(3, on="noise"),
    ],
    ids=str,
)
def test_solvers_on_the_noise_end_at_the_estimate_of_the_data(method):
    for name in ("chain", "vp", "karras"):
        plan = method.plan(SCHEDULES[name][0].grid(1))
        alpha, sigma = float(plan.alpha[0]), float(plan.sigma[0])
        torch.testing.assert_close(plan.rows[0, :3], torch.tensor([1 / alpha, -sigma / alpha, 0.0]).double())
        assert bool(method.plan(SCHEDULES[name][0].grid(20)).rows.isfinite().all())
    assert not method.clamps
    with pytest.raises(ValueError, match="on the noise cannot start where alpha is 0"):
        method.plan(Flow().grid(5))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: make_sampler("dimm"), "unknown sampler 'dimm'; did you mean ddim"),
        (lambda: make_sampler("ddpm", eta=0.5), "sampler 'ddpm' has no option 'eta'; it has: variance"),
        (lambda: make_sampler(DDIM(), eta=0.5), "options of a sampler are given to its class, DDIM"),
        (lambda: DDPM("huge"), "variance must be 'small', 'large' or 'learned', got 'huge'"),
        (lambda: DDIM(-1), "eta must not be negative"),
        (lambda: DDIM(3.0).plan(Flow().grid(5)), "eta 3.0 adds more noise than a step leaves"),
        (lambda: Consistency(1.5), r"gamma must be in 0 \.\. 1, got 1.5"),
        (lambda: DPM2(1.5), r"eta must be in 0 \.\. 1, got 1.5"),
        (lambda: Euler(churn=-1), "churn must not be negative"),
        (lambda: LMS(0), "order must be in 1 .. 8"),
        (lambda: DPMSolver(4), "order must be 1, 2 or 3, got 4"),
        (lambda: DPMSolver(solver="rk"), "solver must be 'midpoint' or 'heun'"),
        (lambda: DPMSolver(on="slope"), "on must be 'data' or 'noise', got 'slope'"),
        (lambda: DPMSolver(3, stochastic=True, on="noise"), "order must be 1 or 2 for the stochastic solver on the noise"),
        (lambda: DPMSolverSinglestep(4), "order must be 1, 2 or 3, got 4"),
        (lambda: DPMSolverSinglestep(solver="rk"), "solver must be 'midpoint' or 'heun'"),
        (lambda: DPMSolverSinglestep(on="slope"), "on must be 'data' or 'noise', got 'slope'"),
        (lambda: UniPC(on="slope"), "on must be 'data' or 'noise', got 'slope'"),
        (lambda: SASolver(5), r"order must be in 1 \.\. 4, got 5"),
        (lambda: SASolver(corrector=5), r"corrector must be in 0 \.\. 4, got 5"),
        (lambda: SASolver(tau=-1.0), "tau must not be negative"),
        (lambda: SASolver(on="slope"), "on must be 'data' or 'noise', got 'slope'"),
        (lambda: UniPC(4), "order must be 1, 2 or 3"),
        (lambda: UniPC(solver="bh3"), "solver must be 'bh1' or 'bh2'"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_names():
    assert make_sampler("dpmpp_2m_sde", order=1) == DPMSolver(1, stochastic=True)
    assert make_sampler("edm", churn=None).churn == 40
    assert make_sampler("ddim", eta=0.3) == DDIM(0.3)
    assert issubclass(SAMPLERS["heun"][0], samplers.Sampler)
