from __future__ import annotations

import math

import pytest
import torch

from fastgen import data, random
from fastgen.data.toy import toy_names

NAMES = list(toy_names())


def _grid(density, step):
    low, high = density.bounds
    n = math.ceil((high - low) / step)
    axis = low + (torch.arange(n, dtype=torch.float64) + 0.5) * ((high - low) / n)
    return torch.cartesian_prod(axis, axis), ((high - low) / n) ** 2


@pytest.mark.parametrize("name", NAMES)
def test_density_integrates_to_one(name):
    density = data.toy(name)
    points, area = _grid(density, 0.04)
    assert density.log_prob(points).exp().sum().item() * area == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_entropy_is_mean_surprise(name):
    density = data.toy(name)
    n = 20_000
    surprise = -density.log_prob(density.sample(n, key=random.key(3)))
    error = surprise.std().item() / math.sqrt(n)
    assert surprise.mean().item() == pytest.approx(density.entropy, abs=4 * error + 1e-6)


def test_entropy_of_separate_gaussians():
    density = data.toy("gaussians8")  # far apart: log 8 more than one of them
    assert density.entropy == pytest.approx(math.log(8) + math.log(2 * math.pi * math.e * 0.15**2), abs=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_samples_follow_the_density(name):
    """Chi-square of a histogram against the density integrated over its cells."""
    density = data.toy(name)
    n, cells, fine = 20_000, 16, 14
    low, high = density.bounds
    points, area = _grid(density, (high - low) / (cells * fine))
    mass = density.log_prob(points).exp().view(cells, fine, cells, fine).sum((1, 3)).flatten() * area
    x = density.sample(n, key=random.key(11))
    cell = ((x - low) / (high - low) * cells).long().clamp(0, cells - 1)
    seen = torch.bincount(cell[:, 0] * cells + cell[:, 1], minlength=cells**2)
    expected = mass * n
    large = expected > 5
    chi = ((seen - expected).square() / expected)[large].sum().item()
    degrees = int(large.sum()) - 1
    assert abs(chi - degrees) < 4.5 * math.sqrt(2 * degrees)
    assert seen[~large].sum().item() <= expected[~large].sum().item() + 5 * math.sqrt(expected[~large].sum().item()) + 1


@pytest.mark.parametrize("name", NAMES)
def test_sample_i_depends_on_its_index_alone(name):
    density = data.toy(name)
    key = random.key(5)
    whole = density.sample(50, key=key)
    assert whole.dtype == torch.float32
    assert tuple(whole.shape) == (50, 2)
    assert torch.equal(density.sample(20, key=random.at(key, sample=30)), whole[30:])
    assert not torch.equal(density.sample(50, key=random.key(6)), whole)
    assert tuple(density.sample(0, key=key).shape) == (0, 2)


def test_torch_seed_rules_without_a_key():
    density = data.toy("moons")
    torch.manual_seed(4)
    first = density.sample(9)
    assert not torch.equal(density.sample(9), first)
    torch.manual_seed(4)
    assert torch.equal(density.sample(9), first)


@pytest.mark.parametrize("name", NAMES)
def test_log_prob_keeps_shape_and_dtype(name):
    density = data.toy(name)
    x = density.sample(12, key=random.key(0)).view(3, 4, 2)
    values = density.log_prob(x)
    assert tuple(values.shape) == (3, 4)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values.double(), density.log_prob(x.double()), rtol=1e-4, atol=1e-3)
    assert density.log_prob(x[:0]).shape == (0, 4)
    for wrong in (torch.zeros(3), torch.zeros(3, 3), torch.zeros(3, 2, dtype=int)):
        with pytest.raises(ValueError, match="x must be floats"):
            density.log_prob(wrong)


@pytest.mark.parametrize("name", [n for n in NAMES if n != "checkerboard"])
def test_score(name):
    density = data.toy(name)
    x = density.sample(4, key=random.key(0)).double().requires_grad_()
    assert torch.autograd.gradcheck(density.log_prob, x)


@pytest.mark.parametrize("name", ["moons", "swissroll", "two_spirals", "rings"])
def test_no_ripple_along_the_curve(name):
    density = data.toy(name)
    nearest = torch.cdist(density.means, density.means).fill_diagonal_(torch.inf).amin(1)
    assert nearest.max().item() <= density.sigma


def test_checkerboard_is_zero_on_light_squares():
    density = data.toy("checkerboard")
    x = torch.tensor([[-1.5, -1.5], [-0.5, -1.5], [0.5, 0.5], [2.5, 0.5], [-2.5, -2.5], [2.0, 2.0]])
    assert density.log_prob(x).exp().tolist() == pytest.approx([1 / 8, 0, 1 / 8, 0, 0, 1 / 8])


def test_unknown_toy():
    with pytest.raises(ValueError, match="unknown toy density 'moon'; did you mean 'moons'"):
        data.toy("moon")


@pytest.mark.parametrize("name", NAMES)
def test_as_data_set(name):
    train, test = (data.load(name, split=s) for s in ("train", "test"))
    assert (len(train), len(test)) == (50_000, 10_000)
    assert (train.kind, train.event_shape, train.num_classes) == ("vector", (2,), None)
    assert train.density is data.toy(name)
    assert not {tuple(p) for p in train.x.tolist()} & {tuple(p) for p in test.x.tolist()}
    assert data.load(name).fingerprint == train.fingerprint != test.fingerprint
    with pytest.raises(ValueError, match=f"{name} holds vectors"):
        data.load(name, image_size=8)
