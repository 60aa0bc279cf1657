"""diffusion_loss: torch's losses against the target of diffuse, weights, precision, the noise it repeats."""

import pytest
import torch
from torch.nn import functional as F

from fastgen import ops, random
from fastgen.ops import _native

VELOCITY = torch.tensor([0.8, 0.6, -0.6, 0.8])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_mean_is_mse_loss_of_the_target_of_diffuse(layout):
    x0, rows, key = torch.randn(9, 3, 20, 20).contiguous(memory_format=layout), torch.randn(9, 4), random.key(2, step=9)
    _, target = ops.diffuse(x0, rows, key)
    pairs = []
    for loss in (
        lambda out: ops.diffusion_loss(out, x0, rows, key).mean(),
        lambda out: F.mse_loss(out, target),
    ):
        out = torch.ones_like(x0).requires_grad_()
        value = loss(out)
        value.backward()
        pairs.append((value.detach(), out.grad))
    torch.testing.assert_close(pairs[0][0], pairs[1][0])
    torch.testing.assert_close(pairs[0][1], pairs[1][1])
    assert pairs[0][1].is_contiguous(memory_format=layout)


@pytest.mark.parametrize("delta", [0.1, 1.0, 30.0])
def test_huber_is_torchs(delta):
    out, x0, key = torch.randn(8, 50, requires_grad=True), torch.randn(8, 50), random.key(2)
    target = ops.diffuse(x0, VELOCITY, key).target
    loss = ops.diffusion_loss(out, x0, VELOCITY, key, kind="huber", delta=delta)
    expected = F.huber_loss(out, target, reduction="none", delta=delta).mean(1)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(
        torch.autograd.grad(loss.sum(), out)[0], torch.autograd.grad(expected.sum(), out)[0], rtol=1e-5, atol=1e-7
    )


def test_the_perfect_model_has_no_loss():
    x0, key = torch.randn(5, 3, 8, 8), random.key(2)
    out = ops.normal(x0.shape, key).requires_grad_()
    loss = ops.diffusion_loss(out, x0, torch.tensor([0.8, 0.6, 0.0, 1.0]), key)
    assert torch.equal(loss, torch.zeros(5))
    loss.sum().backward()
    assert torch.equal(out.grad, torch.zeros_like(x0))


def test_expected_loss_of_predicting_nothing_is_the_variance_of_the_noise():
    zeros = torch.zeros(64, 1 << 14)
    loss = ops.diffusion_loss(zeros, zeros, torch.tensor([0.8, 0.6, 0.0, 3.0]), random.key(2))
    assert loss.mean().item() == pytest.approx(9, rel=5 * (2 / zeros.numel()) ** 0.5)


def test_weights():
    out, x0, key = torch.randn(8, 50, requires_grad=True), torch.randn(8, 50), random.key(2)
    plain = ops.diffusion_loss(out, x0, VELOCITY, key)
    (gradient,) = torch.autograd.grad(plain.sum(), out)
    for weight in (0.25, torch.tensor(0.25), torch.rand(8), torch.rand(8).double(), torch.rand(16)[::2], torch.zeros(8)):
        loss = ops.diffusion_loss(out, x0, VELOCITY, key, weight=weight)
        torch.testing.assert_close(loss, (plain * weight).float())
        factor = weight.float().view(-1, 1) if isinstance(weight, torch.Tensor) else weight
        torch.testing.assert_close(torch.autograd.grad(loss.sum(), out)[0], gradient * factor)


def test_min_snr_weights_of_a_diffusers_schedule():
    """min(snr, 5) / snr for noise prediction, as diffusers' training script has it."""
    diffusers = pytest.importorskip("diffusers")
    from diffusers.training_utils import compute_snr

    scheduler, t = diffusers.DDPMScheduler(), torch.randint(0, 1000, (8,))
    snr = compute_snr(scheduler, t)
    weight = snr.clamp(max=5) / snr
    x0, out, key = torch.randn(8, 3, 4, 4), torch.randn(8, 3, 4, 4), random.key(1)
    alpha, sigma = scheduler.alphas_cumprod[t].sqrt(), (1 - scheduler.alphas_cumprod[t]).sqrt()
    rows = torch.stack([alpha, sigma, 0 * t, 0 * t + 1], 1)
    noise = ops.normal(x0.shape, key)
    expected = (F.mse_loss(out, noise, reduction="none").mean((1, 2, 3)) * weight).mean()
    torch.testing.assert_close(ops.diffusion_loss(out, x0, rows, key, weight=weight).mean(), expected)


def test_a_target_that_was_kept_may_be_given_as_noise():
    x0, out, key = torch.randn(6, 30), torch.randn(6, 30), random.key(7)
    target = ops.diffuse(x0, VELOCITY, key).target
    kept = ops.diffusion_loss(out, x0, torch.tensor([0.8, 0.6, 0.0, 1.0]), noise=target)
    torch.testing.assert_close(kept, ops.diffusion_loss(out, x0, VELOCITY, key))


@pytest.mark.parametrize("backend", ["cpp", "triton"])
def test_gradient_of_x0_alone(backend):
    if backend == "cpp" and _native.missing():
        pytest.skip(_native.missing())
    x0, out, key, rows = torch.randn(6, 30, requires_grad=True), torch.randn(6, 30), random.key(7), torch.randn(6, 4)
    pairs = [
        torch.autograd.grad(ops.diffusion_loss(out, x0, rows, key, backend=b).sum(), x0)[0] for b in (backend, "reference")
    ]
    torch.testing.assert_close(*pairs)


@pytest.mark.parametrize("kind", ["mse", "huber"])
@pytest.mark.parametrize("with_x0", [False, True])
def test_gradients_are_the_same_whether_or_not_the_graph_is_kept(kind, with_x0):
    out, x0 = torch.randn(6, 30, requires_grad=True), torch.randn(6, 30, requires_grad=with_x0)
    key, rows, weights, wanted = random.key(7), torch.randn(6, 4), torch.rand(6), (out, x0)[: 1 + with_x0]
    loss = ops.diffusion_loss(out, x0, rows, key, kind=kind, delta=0.7)
    assert not ops.diffusion_loss(out.detach(), x0.detach(), rows.requires_grad_(), key).requires_grad
    passes = [torch.autograd.grad(loss, wanted, weights, retain_graph=keep) for keep in (True, True, False)]
    expected = ops.diffusion_loss(out, x0, rows, key, kind=kind, delta=0.7, backend="reference")
    for grads in passes:
        for mine, right in zip(grads, torch.autograd.grad(expected, wanted, weights, retain_graph=True), strict=True):
            torch.testing.assert_close(mine, right)
    assert len({grads[0].data_ptr() for grads in passes}) == 3
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, wanted, weights)


@pytest.mark.skipif(_native.missing() is not None, reason="needs the C++ kernels")
def test_the_last_gradient_takes_the_memory_of_the_slope_unless_a_hook_may_hold_it():
    out, x0, held = torch.randn(6, 30, requires_grad=True), torch.randn(6, 30), []
    loss = ops.diffusion_loss(out, x0, VELOCITY, random.key(7))
    memory = loss.grad_fn.saved_tensors[0].data_ptr()
    (gradient,) = torch.autograd.grad(loss, out, torch.ones(6))
    assert gradient.data_ptr() == memory
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t) or t, lambda t: t):
        loss = ops.diffusion_loss(out, x0, VELOCITY, random.key(7))
    before = [t.clone() for t in held]
    assert torch.equal(torch.autograd.grad(loss, out, torch.ones(6))[0], gradient)
    assert before
    assert all(map(torch.equal, before, held))


def test_half_precision_gradients_survive_large_events():
    """2 / E times an error below float16's range: the scale of a gradient scaler comes in before rounding."""
    x0, rows = torch.zeros(2, 1 << 16).half(), torch.tensor([1.0, 0.0, 0.0, 0.0])
    out = torch.full_like(x0, 1e-3).requires_grad_()
    (ops.diffusion_loss(out, x0, rows, random.key(0)) * 65536).sum().backward()
    torch.testing.assert_close(out.grad, torch.full_like(x0, 2 * out.detach()[0, 0].item()))


def test_sum_of_a_long_row_is_accurate():
    """A million squares of 1e-3: the parts of a row are added in float64."""
    out = torch.full((1, 1 << 20), 1e-3)
    loss = ops.diffusion_loss(out, torch.zeros_like(out), torch.zeros(4), random.key(0))
    assert loss.item() == pytest.approx(1e-6, rel=1e-6)


def test_infinite_and_missing_errors():
    out = torch.tensor([[1.0, float("inf")], [1.0, float("nan")], [1.0, -1.0]])
    for kind in ("mse", "huber"):
        loss = ops.diffusion_loss(out, torch.zeros(3, 2), torch.zeros(4), random.key(0), kind=kind)
        assert loss[0].isposinf()
        assert loss[1].isnan()
        assert loss[2] == (1 if kind == "mse" else 0.5)


def test_float64_and_mixed_types():
    x0, key = torch.randn(6, 4), random.key(0)
    assert ops.diffusion_loss(x0.double(), x0.double(), VELOCITY, key).dtype is torch.float64
    out = x0.bfloat16().requires_grad_()
    loss = ops.diffusion_loss(out, x0, VELOCITY, key)
    assert loss.dtype is torch.float32
    loss.sum().backward()
    assert out.grad.dtype is torch.bfloat16


def test_second_derivative_is_refused():
    out = torch.randn(3, 4, requires_grad=True)
    loss = ops.diffusion_loss(out, torch.zeros(3, 4), VELOCITY, random.key(0))
    (gradient,) = torch.autograd.grad(loss.sum(), out, create_graph=True)
    with pytest.raises(RuntimeError, match="can be differentiated once"):
        gradient.sum().backward()
    loss = ops.diffusion_loss(out, torch.zeros(3, 4), VELOCITY, random.key(0), backend="reference")
    (gradient,) = torch.autograd.grad(loss.sum(), out, create_graph=True)
    torch.testing.assert_close(torch.autograd.grad(gradient.sum(), out)[0], torch.full((3, 4), 2 / 4))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model_out": [1.0]}, TypeError, "model_out must be a tensor, got list"),
        ({"model_out": torch.zeros(3, 4)}, ValueError, r"must have the shape of x0, \(3, 2\), got \(3, 4\)"),
        ({"model_out": torch.zeros(3, 1)}, ValueError, r"must have the shape of x0, \(3, 2\), got \(3, 1\)"),
        ({"coefficients": torch.zeros(3, 3)}, ValueError, r"coefficients must have shape \[4\] or \[3, 4\], got \[3, 3\]"),
        ({"key": None}, ValueError, "give key or noise, one of them"),
        ({"noise": torch.zeros(3, 2)}, ValueError, "give key or noise, one of them"),
        ({"kind": "l1"}, ValueError, "kind must be one of mse, huber, got 'l1'"),
        ({"delta": 0.0}, ValueError, "delta must be positive and finite, got 0.0"),
        ({"weight": torch.zeros(3, 1)}, ValueError, r"weight must be a number or have shape \[3\], got \[3, 1\]"),
        ({"weight": torch.zeros(3).long()}, TypeError, "weight must be a number or a floating-point tensor, got torch.int64"),
        ({"weight": torch.zeros(3, device="meta")}, ValueError, "weight is on meta, expected cpu"),
    ],
)
def test_errors(arguments, error, message):
    plain = {"model_out": torch.zeros(3, 2), "x0": torch.zeros(3, 2), "coefficients": torch.zeros(4), "key": random.key(0)}
    with pytest.raises(error, match=message):
        ops.diffusion_loss(**{**plain, **arguments})
