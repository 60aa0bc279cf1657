"""uniform: range, statistics, bits."""

import math

import numpy as np
import pytest
import torch
from scipy import special

from fastgen import ops, random
from fastgen.ops import _philox
from tests.ops.test_contract import BACKENDS, folder, running  # noqa: F401 - folder is a fixture


@pytest.mark.parametrize("backend", BACKENDS)
def test_bits_are_the_references(backend, folder):  # noqa: F811
    key = random.key(99, stream=2, step=2**31)
    for shape in ((4, 1 << 18), (1 << 18, 4), (3, 1001)):
        expected = _philox.uniforms(shape, key)
        with running(backend, folder):
            assert torch.equal(ops.uniform(shape, key), expected)


def test_strictly_inside_the_unit_interval():
    words = torch.tensor([0, 2**32 - 1])
    low, high = (((words >> 9).float() + 0.5) * 2.0**-23).tolist()
    assert low == 2.0**-24
    assert high == 1 - 2.0**-24
    u = ops.uniform((16, 1 << 18), random.key(3))
    assert u.min() > 0
    assert u.max() < 1


def test_distribution():
    u = np.sort(ops.uniform((16, 1 << 18), random.key(3)).double().flatten().numpy())
    grid = np.arange(1, u.size + 1) / u.size
    distance = max((grid - u).max(), (u - (grid - 1 / u.size)).max())
    assert special.kolmogorov(distance * math.sqrt(u.size)) > 1e-3


def test_each_sample_has_its_own_values():
    u = ops.uniform((500, 3), random.key(3))
    assert len(u.unique(dim=0)) == 500
    assert torch.equal(u[100:], ops.uniform((400, 3), random.key(3, sample=100)))


def test_errors():
    with pytest.raises(ValueError, match="shape must be"):
        ops.uniform(())
    with pytest.raises(ValueError, match="key is on cpu, device says cuda"):
        ops.uniform((2,), random.key(0), device="cuda")
