from __future__ import annotations

import pytest
import torch

from fastgen.training.order import Order, permutation


@pytest.mark.parametrize(("n", "batch_size"), [(10, 3), (10, 10), (3, 10), (1, 4), (7, 1)])
def test_every_epoch_has_every_sample_once(n, batch_size):
    order = Order(n, batch_size, seed=5)
    epochs = 3
    batches = [order.batch(i) for i in range(-(-epochs * n // batch_size))]
    assert all(b.shape == (batch_size,) and b.dtype == torch.int64 for b in batches)
    sequence = torch.cat(batches)
    for epoch in range(epochs):
        assert sorted(sequence[epoch * n : (epoch + 1) * n].tolist()) == list(range(n))


def test_a_batch_is_a_function_of_its_number():
    one, other = Order(10, 4, seed=5), Order(10, 4, seed=5)
    forward = [one.batch(i) for i in range(9)]
    backward = [other.batch(i) for i in reversed(range(9))]
    for a, b in zip(forward, reversed(backward), strict=True):
        assert torch.equal(a, b)


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = {tuple(permutation(20, seed, epoch).tolist()) for seed in (0, 1, 1 << 32) for epoch in range(4)}
    assert len(orders) == 12


def test_torchs_generator_is_left_alone():
    before = torch.get_rng_state()
    permutation(20, 0, 0)
    assert torch.equal(torch.get_rng_state(), before)


def test_bad_arguments():
    with pytest.raises(ValueError, match="empty"):
        Order(0, 1, seed=0)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        Order(1, 0, seed=0)
