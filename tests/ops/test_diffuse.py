"""diffuse: diffusers' schedulers with the same noise, the law of x_t, layouts, the noise it uses."""

import math

import pytest
import torch

from fastgen import ops, random
from fastgen.ops import _native


def rows_of(scheduler, t, prediction):
    """The rows (a, b, c, d) of a diffusers scheduler."""
    alpha, sigma = scheduler.alphas_cumprod[t].double().sqrt(), (1 - scheduler.alphas_cumprod[t].double()).sqrt()
    zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
    target = {"epsilon": (zero, one), "sample": (one, zero), "v_prediction": (-sigma, alpha)}[prediction]
    return torch.stack([alpha, sigma, *target], 1)


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_is_diffusers_add_noise_and_target(prediction):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    x0, t, key = torch.randn(9, 3, 8, 8), torch.randint(0, 1000, (9,)), random.key(5, step=2)
    noise = ops.normal(x0.shape, key)
    x_t, target = ops.diffuse(x0, rows_of(scheduler, t, prediction), key)
    torch.testing.assert_close(x_t, scheduler.add_noise(x0, noise, t), rtol=1e-6, atol=1e-6)
    expected = {"epsilon": noise, "sample": x0, "v_prediction": scheduler.get_velocity(x0, noise, t)}[prediction]
    torch.testing.assert_close(target, expected, rtol=1e-6, atol=1e-6)


def test_is_diffusers_flow_matching():
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    x0, key = torch.randn(6, 40), random.key(5)
    t = scheduler.timesteps[torch.randint(0, 1000, (6,))]
    sigma = t / scheduler.config.num_train_timesteps
    one = torch.ones_like(sigma)
    x_t, target = ops.diffuse(x0, torch.stack([1 - sigma, sigma, -one, one], 1), key)
    noise = ops.normal(x0.shape, key)
    torch.testing.assert_close(x_t, scheduler.scale_noise(x0, t, noise), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(target, noise - x0)


def test_law_of_x_t():
    """A point mass at 2 becomes N(2 a, b^2)."""
    x_t, _ = ops.diffuse(torch.full((1 << 18, 4), 2.0), torch.tensor([0.6, 0.8, 0.0, 1.0]), random.key(1))
    assert x_t.mean().item() == pytest.approx(1.2, abs=4 * 0.8 / 1024)
    assert x_t.std().item() == pytest.approx(0.8, rel=4 / math.sqrt(2 * x_t.numel()))


def test_noise_is_that_of_normal_to_the_bit():
    x0, key = torch.randn(7, 3, 5, 6), random.key(8, step=3)
    assert torch.equal(ops.diffuse(x0, torch.tensor([1.0, 0.5, 0.0, 1.0]), key).target, ops.normal(x0.shape, key))


def test_one_row_serves_all_samples():
    x0, key, row = torch.randn(130, 5), random.key(8), torch.tensor([0.8, 0.6, -0.6, 0.8])
    for one, each in zip(ops.diffuse(x0, row, key), ops.diffuse(x0, row.expand(130, 4), key), strict=True):
        assert torch.equal(one, each)


def test_samples_do_not_depend_on_the_batch():
    x0, rows = torch.randn(20, 3, 9, 9), torch.randn(20, 4)
    whole = ops.diffuse(x0, rows, random.key(3))
    part = ops.diffuse(x0[5:12], rows[5:12], random.key(3, sample=5))
    for all_of_them, some in zip(whole, part, strict=True):
        assert torch.equal(all_of_them[5:12], some)


# blocks of pixels and of channels, whole and broken; quartets that straddle channels
@pytest.mark.parametrize("event", [(3, 32, 32), (4, 8, 8), (2, 5, 7), (16, 33, 31), (48, 10, 9), (300, 3, 3), (5000, 1, 2)])
@pytest.mark.parametrize("isa", _native.available_isas() or [None])
def test_channels_last_has_the_same_values_and_stays_so(event, isa):
    if isa is None:
        pytest.skip(_native.missing())
    x0, rows, key = torch.randn(3, *event), torch.randn(3, 4), random.key(4)
    moved = x0.contiguous(memory_format=torch.channels_last).requires_grad_()
    with ops.use_backend("cpp"), _native.use_isa(isa):
        plain, other = ops.diffuse(x0, rows, key), ops.diffuse(moved, rows, key)
    for first, second in zip(plain, other, strict=True):
        assert torch.equal(first, second)
        assert second.is_contiguous(memory_format=torch.channels_last)
    (other.x_t.sum() + 2 * other.target.sum()).backward()
    torch.testing.assert_close(moved.grad, (rows[:, 0] + 2 * rows[:, 2]).view(3, 1, 1, 1).expand_as(x0))


@pytest.mark.parametrize("backend", ["reference", "cpp", "triton"])
def test_without_the_target(backend):
    if backend == "cpp" and _native.missing():
        pytest.skip(_native.missing())
    x0, rows, key = torch.randn(5, 33, requires_grad=True), torch.randn(5, 4), random.key(4)
    alone = ops.diffuse(x0, rows, key, target=False, backend=backend)
    assert alone.target is None
    assert torch.equal(alone.x_t, ops.diffuse(x0, rows, key, backend=backend).x_t)
    alone.x_t.sum().backward()
    torch.testing.assert_close(x0.grad, rows[:, :1].expand(5, 33))


def test_one_output_alone():
    x0, rows = torch.randn(9, 70), torch.randn(9, 4)
    for output, column in ((0, 0), (1, 2)):
        x = x0.clone().requires_grad_()
        ops.diffuse(x, rows, random.key(4))[output].sum().backward()
        torch.testing.assert_close(x.grad, rows[:, column, None].expand(9, 70))


def test_given_noise():
    x0, noise, rows = torch.randn(3, 6, 5), torch.randn(3, 6, 5, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    x_t, target = ops.diffuse(x0, rows, noise=noise)
    a, b, c, d = rows.detach().view(3, 4, 1, 1).unbind(1)
    torch.testing.assert_close(x_t, a * x0 + b * noise)
    torch.testing.assert_close(target, c * x0 + d * noise)
    assert not x_t.requires_grad
    with pytest.raises(ValueError, match="give key or noise, not both"):
        ops.diffuse(x0, rows, random.key(0), noise=noise)


def test_tables_in_float64_and_bfloat16_are_used_in_float32():
    x0, key, rows = torch.randn(5, 33), random.key(0), torch.randn(5, 4, dtype=torch.float64)
    assert torch.equal(ops.diffuse(x0, rows, key).x_t, ops.diffuse(x0, rows.float(), key).x_t)
    assert torch.equal(ops.diffuse(x0, rows.bfloat16(), key).x_t, ops.diffuse(x0, rows.bfloat16().float(), key).x_t)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1.0], torch.zeros(4)), TypeError, "x0 must be a tensor, got list"),
        ((torch.zeros(3, dtype=torch.int64), torch.zeros(4)), TypeError, "x0 must be a floating-point tensor, got torch.int64"),
        ((torch.zeros(()), torch.zeros(4)), ValueError, "x0 must have a sample dimension"),
        ((torch.zeros(3, 2), [1.0, 0, 0, 1]), TypeError, "coefficients must be a floating-point tensor, got list"),
        ((torch.zeros(3, 2), torch.zeros(3, 5)), ValueError, r"coefficients must have shape \[4\] or \[3, 4\], got \[3, 5\]"),
        ((torch.zeros(3, 2), torch.zeros(2, 4)), ValueError, r"coefficients must have shape \[4\] or \[3, 4\], got \[2, 4\]"),
        ((torch.zeros(3, 2), torch.zeros(4, device="meta")), ValueError, "coefficients is on meta, expected cpu"),
        ((torch.zeros(3, 2), torch.zeros(4), random.key([1, 2])), ValueError, r"key must have shape \[4\] or \[3, 4\]"),
    ],
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        ops.diffuse(*arguments)
