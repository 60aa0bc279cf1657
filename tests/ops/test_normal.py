"""normal: bits, invariance under every cut, statistics, accuracy."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import special, stats

from fastgen import ops, random
from fastgen.ops import _native, _philox, use_backend
from tests.ops.test_contract import BACKENDS, folder, running  # noqa: F401 - folder is a fixture

DRAWS = (16, 1 << 18)  # 2^22


@pytest.mark.parametrize("backend", BACKENDS)
def test_bits_are_the_references(backend, folder):  # noqa: F811
    key = random.key(-12345678901, stream=200, step=77, sample=2**40)
    for shape in ((4, 1 << 18), (1 << 10, 1 << 10), (1 << 18, 4), (997, 1), (997, 2), (997, 3), (37, 196)):
        expected = _philox.normals(shape, key)
        with running(backend, folder):
            assert torch.equal(ops.normal(shape, key).view(torch.int32), expected.view(torch.int32))


@given(
    st.integers(1, 40),
    st.integers(1, 300),
    st.integers(0, 2**62),
    st.integers(0, 2**40),
    st.data(),
    st.sampled_from(["exact", "fast"]),
)
def test_any_cut_of_a_batch_draws_the_same(samples, elements, seed, first, data, mode):
    whole = ops.normal((samples, elements), random.key(seed, sample=first), math=mode)
    cut = data.draw(st.integers(0, samples))
    parts = [
        ops.normal((cut, elements), random.key(seed, sample=first), math=mode),
        ops.normal((samples - cut, elements), random.key(seed, sample=first + cut), math=mode),
    ]
    assert torch.equal(whole, torch.cat(parts))
    rows = torch.stack([random.key(seed, sample=first + i) for i in range(samples)])
    assert torch.equal(whole, ops.normal((samples, elements), rows, math=mode))
    shorter = data.draw(st.integers(0, elements))
    assert torch.equal(whole[:, :shorter], ops.normal((samples, shorter), random.key(seed, sample=first), math=mode))


@pytest.mark.parametrize("backend", ["reference", "triton", *(["cpp"] if _native.ready() else [])])
def test_memory_format_and_shape_do_not_matter(backend):
    key = random.key(3)
    plain = ops.normal((2, 3, 5, 7), key, backend=backend)
    last = ops.normal((2, 3, 5, 7), key, memory_format=torch.channels_last, backend=backend)
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(plain, last)
    assert torch.equal(plain, ops.normal((2, 105), key, backend=backend).reshape(2, 3, 5, 7))
    assert torch.equal(plain.bfloat16(), ops.normal((2, 3, 5, 7), key, dtype=torch.bfloat16, backend=backend))


def test_float64_holds_the_float32_values():
    key = random.key(3)
    assert torch.equal(ops.normal((4, 9), key).double(), ops.normal((4, 9), key, dtype=torch.float64))


def test_global_modes():
    key, exact = random.key(1), ops.normal((8, 4096), random.key(1))
    with ops.use_math("fast"):
        fast = ops.normal((8, 4096), key)
    assert torch.equal(fast, ops.normal((8, 4096), key, math="fast"))
    assert torch.equal(exact, ops.normal((8, 4096), key))
    with pytest.raises(ValueError, match="math must be one of exact, fast, got 'quick'"):
        ops.normal((1,), math="quick")
    with pytest.raises(ValueError, match="backend must be one of"), use_backend("gpu"):
        pass


def test_accuracy_against_float64():
    """Against Box-Muller in float64 on the same bits: 2e-7 absolute, and a few ulp where the value is not near zero."""
    a, b, *_ = _philox.words(random.key(11), *DRAWS)
    u = (a.double() + 0.5) / 2**32
    theta = 2 * math.pi * (b.double() + 0.5) / 2**32
    radius = (-2 * u.log()).sqrt()
    x, y = _philox.box_muller(a, b)
    for z, truth in ((x, radius * theta.cos()), (y, radius * theta.sin())):
        # u itself is rounded to 24 bits, which moves the radius by up to 2^-25 / radius near u = 1
        bound = 4 * 2.0**-24 * truth.abs() + 2.0**-24 * radius + 2.0**-25 / radius.clamp_min(1e-3)
        assert ((z.double() - truth).abs() <= bound).all()


def test_extreme_words():
    """The smallest and largest words give finite values; the largest |z| is sqrt(66 ln 2)."""
    ends = torch.tensor([0, 1, 2**31 - 1, 2**31, 2**32 - 128, 2**32 - 1])
    a, b = (t.flatten() for t in torch.meshgrid(ends, ends, indexing="ij"))
    x, y = _philox.box_muller(a, b)
    assert x.isfinite().all()
    assert y.isfinite().all()
    assert max(x.abs().max(), y.abs().max()).item() == pytest.approx(math.sqrt(66 * math.log(2)), rel=1e-6)


@pytest.fixture(scope="module", params=["exact", "fast"])
def draws(request):
    """2^22 normals."""
    return ops.normal(DRAWS, random.key(2024), math=request.param).double()


class TestStatistics:
    """On 2^22 draws or more; fixed keys, so that a failure is a defect and not bad luck."""

    def test_kolmogorov_smirnov(self, draws):
        z = np.sort(draws.flatten().numpy())
        cdf, n = special.ndtr(z), z.size
        grid = np.arange(1, n + 1) / n
        distance = max((grid - cdf).max(), (cdf - (grid - 1 / n)).max())
        assert special.kolmogorov(distance * math.sqrt(n)) > 1e-3

    def test_four_moments(self, draws):
        n = draws.numel()
        for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
            assert abs((draws**power).mean().item() - mean) < 4 * math.sqrt(variance / n), power

    def test_tails(self):
        n, threshold = 1 << 26, 4.5
        count = sum(
            int((ops.normal((64, 1 << 16), random.key(5, step=step)).abs() > threshold).sum()) for step in range(n >> 22)
        )
        expected = n * 2 * special.ndtr(-threshold)
        assert stats.poisson.cdf(count, expected) > 1e-4
        assert stats.poisson.sf(count, expected) > 1e-4

    @pytest.mark.parametrize("lag", [1, 2, 3, 4, 5, 64, 4096])
    def test_neighbouring_elements(self, draws, lag):
        _uncorrelated(draws[:, :-lag], draws[:, lag:])

    def test_neighbouring_samples(self, draws):
        _uncorrelated(draws[:-1], draws[1:])

    @pytest.mark.parametrize("change", [{"step": 1}, {"stream": 1}, {"sample": 2**32}])
    def test_neighbouring_steps_and_streams(self, draws, change):
        _uncorrelated(draws, ops.normal(DRAWS, random.at(random.key(2024), **change)).double())

    def test_neighbouring_seeds(self, draws):
        _uncorrelated(draws, ops.normal(DRAWS, random.key(2025)).double())


def _uncorrelated(x, y):
    """Values, magnitudes and signs of x and y are uncorrelated, to 4 standard errors."""
    for f in (lambda v: v, lambda v: v.square() - 1, torch.sign):
        a, b = f(x).flatten(), f(y).flatten()
        correlation = (a * b).mean() / (a.std() * b.std())
        assert abs(correlation.item()) < 4 / math.sqrt(a.numel())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (((),), ValueError, r"shape must be \(samples, ...\)"),
        (((3, -1),), ValueError, "without negative sizes"),
        (((3,), torch.zeros(4)), TypeError, "key must be an int64 tensor made by fastgen.random.key, got torch.float32"),
        (((3,), 7), TypeError, "got int"),
        (((3,), torch.zeros(2, 4, dtype=torch.int64)), ValueError, r"key must have shape \[4\] or \[3, 4\], got \[2, 4\]"),
    ],
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        ops.normal(*arguments)
