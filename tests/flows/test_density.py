"""Densities: they integrate to one, are never NaN on finite input, overfit a few points and reach known entropies."""

import functools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fastgen
from fastgen.data import toy
from tests.flows.zoo import FLOWS, draw, make

_frozen = functools.cache(lambda case: make(case).eval().requires_grad_(False))
VECTORS = [case for case in FLOWS if len(FLOWS[case][1]["event_shape"]) == 1]
LARGEST = torch.finfo(torch.float32).max
SPECIAL = [0.0, -0.0, 1e-45, 1e-30, 0.5, 1.0, 4.999999, 5.0, 5.000001, 20.0, 1e4, 1e9, 1e18, 1e19, 1e30, LARGEST]


@pytest.mark.parametrize("case", VECTORS)
def test_integrates_to_one(case):
    """By the trapezoid rule, on a grid in the plane that holds all but a little of the mass."""
    model = make(case, event_shape=(2,))
    context = draw(model, 1)[1]
    samples = model.sample(4096, context=context)
    low, high = samples.amin(0) - 2.0, samples.amax(0) + 2.0
    n = 400
    axes = [torch.linspace(float(a), float(b), n) for a, b in zip(low, high, strict=True)]
    with torch.no_grad():
        log_prob = model.log_prob(torch.cartesian_prod(*axes), context)
    cell = float((axes[0][1] - axes[0][0]) * (axes[1][1] - axes[1][0]))
    assert abs(float(log_prob.double().exp().sum()) * cell - 1) < 0.01


# the test of cnf has all these values in one batch
@pytest.mark.parametrize("case", [case for case in FLOWS if not case.startswith("cnf")])
@given(values=st.lists(st.sampled_from(SPECIAL), min_size=32, max_size=32), signs=st.integers(0, 2**32 - 1))
def test_no_finite_input_gives_nan(case, values, signs):
    """Far out the density may underflow to zero, its logarithm to -inf. Noise up to a thousand deviations gives finite samples,
    unless scales are not bounded from below.
    """
    model = _frozen(case)
    rows = torch.tensor([v if signs >> i & 1 else -v for i, v in enumerate(values)])
    x, context = draw(model, 4)
    for place in range(model.features):
        x.view(4, -1)[:, place] = rows[(place * 4 + torch.arange(4)) % 32]
    with torch.no_grad():
        log_prob = model(context).log_prob(x)
        drawn = model.transform.inv_and_ladj(x.flatten(1).clamp(-1e3, 1e3), context)
    assert not log_prob.isnan().any()
    assert (log_prob < math.inf).all()
    if getattr(model.config, "bound", None) != "sigmoid":
        assert all(t.isfinite().all() for t in drawn)


@pytest.mark.parametrize("case", ["nsf", "nsf-nflows", "nsf-context"])
@given(seed=st.integers(0, 2**16))
def test_gradients_are_finite_at_knots_and_ends(case, seed):
    model = make(case)
    bound = model.config.bound
    generator = torch.Generator().manual_seed(seed)
    places = torch.tensor([-bound, bound, math.nextafter(bound, 9), math.nextafter(-bound, 0), 0.0, 1e6, -1e6, 2.5])
    x = places[torch.randint(0, len(places), (8, model.features), generator=generator)].requires_grad_()
    context = draw(model, 8)[1]
    model.log_prob(x, context).sum().backward()
    assert x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("case", ["nice", "realnvp", "nsf", "realnvp-image", "glow", "maf", "nsf-autoregressive", "planar"])
def test_overfits_a_few_points(case):
    """Likelihood grows without bound on a few points: each flow must use that."""
    options = {"event_shape": (1, 2, 4)} if case == "realnvp-image" else {}
    model = make(case, learning_rate=0.02, **options)
    x = draw(model, 4)[0]
    if model.config.is_image:
        x = (x * 255).round() / 255
    first = model.loss(x, key=fastgen.random.key(0)).loss.item()
    result = fastgen.fit(model, x, steps=60, batch_size=4, progress=False)
    assert result.metrics["train/loss"] < first - 0.5 * model.features


@pytest.mark.parametrize(
    ("name", "options", "density", "nats"),
    [
        ("nsf", {"layers": 4, "bins": 8, "hidden": (64, 64)}, "moons", 0.05),
        ("realnvp", {"layers": 8, "hidden": (64, 64)}, "moons", 0.1),
        ("maf", {"layers": 10, "hidden": (64, 64)}, "moons", 0.1),
    ],
)
def test_reaches_the_entropy_of_a_toy_density(name, options, density, nats):
    torch.manual_seed(0)
    model = fastgen.create(name, features=2, **options)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    steps = 800
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    target = toy(density)
    for step in range(steps):
        optimizer.zero_grad()
        model.loss(target.sample(256, key=fastgen.random.key(1, step=step))).loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        x = target.sample(20_000, key=fastgen.random.key(2))
        # the same points on both sides: the difference is an estimate of the divergence, with little variance
        divergence = (target.log_prob(x) - model.log_prob(x)).mean().item()
    assert -0.01 < divergence < nats
