"""What makes the network a DiT: tokens, positions, gates."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from fastgen.nn import dit
from fastgen.nn.dit import DiT, position_embedding
from tests.nn.networks import SMALL_DIT, build, inputs


@torch.no_grad()
def test_blocks_start_as_the_identity():
    torch.manual_seed(0)
    net = DiT(2, **SMALL_DIT, context_channels=5)
    for block in net.blocks:
        tokens = torch.randn(3, 7, 16)
        assert torch.equal(block(tokens, torch.randn(3, 16), torch.randn(3, 4, 5)), tokens)


def test_initial_gradients_reach_the_gates_and_no_further():
    torch.manual_seed(0)
    net = DiT(2, **SMALL_DIT)
    x, t, _ = inputs("dit")
    net(x, t).sum().backward()
    assert {name for name, p in net.named_parameters() if p.grad is not None and p.grad.any()} == {"out.weight", "out.bias"}


def test_positions_are_the_papers():
    table = position_embedding(3, 5, 8).view(3, 5, 8)
    for row in range(3):
        for column in range(5):
            expected = [f(p * w) for p in (column, row) for f in (math.sin, math.cos) for w in (1.0, 0.01)]
            torch.testing.assert_close(table[row, column], torch.tensor(expected))


@torch.no_grad()
def test_without_positions_patches_may_be_permuted(monkeypatch):
    net = build("dit")
    x, t, _ = inputs("dit", size=(8, 8))
    moved = torch.roll(x, (2, 4), (2, 3))  # whole patches of 2
    assert not torch.allclose(torch.roll(net(x, t), (2, 4), (2, 3)), net(moved, t), atol=1e-3)
    monkeypatch.setattr(dit, "position_embedding", lambda rows, columns, width, device: torch.zeros(rows * columns, width))
    torch.testing.assert_close(torch.roll(net(x, t), (2, 4), (2, 3)), net(moved, t), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_patches_go_out_where_they_came_in():
    """With no blocks a pixel depends on its own patch alone."""
    net = build("dit", depth=0)
    x, t, _ = inputs("dit", size=(6, 8))
    base = net(x, t)
    changed = x.clone()
    changed[:, :, 2:4, 4:6] += 1
    moved = (net(changed, t) - base).abs().amax((0, 1)) > 1e-4
    expected = torch.zeros(6, 8, dtype=torch.bool)
    expected[2:4, 4:6] = True
    assert torch.equal(moved, expected)


@torch.no_grad()
def test_block_is_the_papers_formula():
    net = build("dit")
    block, tokens, told = net.blocks[0], torch.randn(2, 5, 16), torch.randn(2, 16)
    shift1, scale1, gate1, shift2, scale2, gate2 = F.linear(told, block.modulation.weight, block.modulation.bias)[
        :, None
    ].chunk(6, 2)

    def norm(x):
        return (x - x.mean(2, keepdim=True)) / (x.var(2, unbiased=False, keepdim=True) + 1e-6).sqrt()

    h = norm(tokens) * (1 + scale1) + shift1
    q, k, v = block.attention.to_rest(h).chunk(3, 2)
    heads = []
    for i in range(2):  # two heads of 8
        part = slice(8 * i, 8 * i + 8)
        weights = (q[..., part] @ k[..., part].mT / math.sqrt(8)).softmax(2)
        heads.append(weights @ v[..., part])
    expected = tokens + gate1 * block.attention.out(torch.cat(heads, 2))
    expected = expected + gate2 * block.mlp(norm(expected) * (1 + scale2) + shift2)
    torch.testing.assert_close(block(tokens, told, None), expected, rtol=1e-4, atol=1e-5)


def test_grid_needs_features_for_two_axes():
    with pytest.raises(ValueError, match="divisible by 4"):
        position_embedding(2, 2, 6)
