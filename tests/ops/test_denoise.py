"""denoise: the samplers of diffusers, step by step, as rows of coefficients; guidance, clamp, variance, history, noise."""

import importlib
import math

import diffusers
import pytest
import torch

from fastgen import ops, random
from fastgen.ops import _native
from tests.ops.test_contract import BACKENDS, folder, running  # noqa: F401 - folder is a fixture

SHAPE = (4, 3, 8, 8)


def close(result, expected):
    torch.testing.assert_close(result, expected, rtol=2e-5, atol=2e-5)


def estimate_row(prediction, alpha, sigma):
    """(p, q) with x0 = p x + q model_out for x = alpha x0 + sigma eps."""
    return {
        "epsilon": (1 / alpha, -sigma / alpha),
        "v_prediction": (alpha, -sigma),
        "sample": (0.0, 1.0),
    }[prediction]


def ancestors(scheduler, t):
    """abar at t and at the step after it, in float64."""
    t_next = scheduler.previous_timestep(t)
    table = scheduler.alphas_cumprod.double()
    return table[t].item(), table[t_next].item() if t_next >= 0 else 1.0


def ddpm_row(scheduler, t):
    now, after = ancestors(scheduler, t)
    alpha = now / after
    posterior = (math.sqrt(alpha) * (1 - after) / (1 - now), math.sqrt(after) * (1 - alpha) / (1 - now))
    deviation = math.sqrt((1 - after) / (1 - now) * (1 - alpha)) if t > 0 else 0.0
    return [*estimate_row(scheduler.config.prediction_type, math.sqrt(now), math.sqrt(1 - now)), *posterior, deviation]


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_ddpm(prediction, monkeypatch):
    scheduler = diffusers.DDPMScheduler(prediction_type=prediction)
    x, model_out, noise = torch.randn(3, *SHAPE).unbind()
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, **__: noise)
    times = [999, 500, 100, 0]  # close to 0 diffusers loses the float32 digits of beta
    rows = torch.tensor([ddpm_row(scheduler, t) for t in times])
    expected = [scheduler.step(model_out, t, x) for t in times]
    for row, step in zip(rows, expected, strict=True):
        x_next, x0 = ops.denoise(x, model_out, row, noise=noise, clamp=1.0)
        close(x_next, step.prev_sample)
        close(x0, step.pred_original_sample)
    ragged, _ = ops.denoise(x, model_out, rows, noise=noise, clamp=1.0)  # each sample at its own time
    close(ragged, torch.stack([step.prev_sample[i] for i, step in enumerate(expected)]))


@pytest.mark.parametrize("t", [700, 100, 0])
def test_ddpm_with_a_learned_range_reads_the_channels_of_the_network_in_place(t, monkeypatch):
    scheduler = diffusers.DDPMScheduler(variance_type="learned_range")
    x, noise = torch.randn(2, *SHAPE).unbind()
    network = torch.randn(SHAPE[0], 6, *SHAPE[2:])
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, **__: noise)
    step = scheduler.step(network, t, x)
    now, after = ancestors(scheduler, t)
    beta = 1 - now / after
    variance = max((1 - after) / (1 - now) * beta, 1e-20)
    row = torch.tensor([*ddpm_row(scheduler, t)[:4], float(t > 0)])
    bounds = torch.tensor([math.log(variance), math.log(beta)])
    model_out, v = network.chunk(2, dim=1)
    assert not model_out.is_contiguous()
    close(ops.denoise(x, model_out, row, noise=noise, clamp=1.0, log_variance=(v, bounds)).x_next, step.prev_sample)
    logarithm = bounds[0] + (v + 1) / 2 * (bounds[1] - bounds[0])
    close(ops.denoise(x, model_out, row, noise=noise, clamp=1.0, log_variance=logarithm).x_next, step.prev_sample)


@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_ddim(eta):
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(20)
    x, noise = torch.randn(2, *SHAPE).unbind()
    state = x
    for t in scheduler.timesteps.tolist():
        model_out = torch.sin(3 * state)
        step = scheduler.step(model_out, t, state, eta=eta, variance_noise=noise if eta else None)
        after_t = t - 1000 // 20
        now = scheduler.alphas_cumprod[t].double().item()
        after = (scheduler.alphas_cumprod[after_t] if after_t >= 0 else scheduler.final_alpha_cumprod).double().item()
        deviation = eta * math.sqrt((1 - after) / (1 - now) * (1 - now / after))
        alpha, sigma = math.sqrt(now), math.sqrt(1 - now)
        direction = math.sqrt(1 - after - deviation**2)
        row = [1 / alpha, -sigma / alpha, direction / sigma, math.sqrt(after) - direction * alpha / sigma, deviation]
        x_next, x0 = ops.denoise(state, model_out, torch.tensor(row), noise=noise)
        torch.testing.assert_close(x_next, step.prev_sample, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(x0, step.pred_original_sample, rtol=1e-4, atol=1e-3)
        state = step.prev_sample


def test_dpm_solver_pp_2m_with_the_last_estimate_as_history():
    scheduler = diffusers.DPMSolverMultistepScheduler(
        algorithm_type="dpmsolver++", solver_order=2, final_sigmas_type="sigma_min"
    )
    scheduler.set_timesteps(12)
    sigmas = scheduler.sigmas.double()
    alphas = (1 + sigmas**2).rsqrt()
    lambdas = -sigmas.log()
    state, before = torch.randn(SHAPE), torch.zeros(1, *SHAPE)
    for i, t in enumerate(scheduler.timesteps):
        model_out = torch.sin(3 * state)
        expected = scheduler.step(model_out, t, state).prev_sample
        alpha, sigma = alphas[i], sigmas[i] * alphas[i]
        h = lambdas[i + 1] - lambdas[i]
        first_order = i == 0 or (i == 11 and scheduler.config.lower_order_final)
        r = 0.0 if first_order else 0.5 * h / (lambdas[i] - lambdas[i - 1])
        weight = -alphas[i + 1] * torch.expm1(-h)
        ratio = sigmas[i + 1] * alphas[i + 1] / sigma
        row = torch.tensor([1 / alpha, -sigma / alpha, ratio, weight * (1 + r), 0, -weight * r])
        x_next, x0 = ops.denoise(state, model_out, row, history=before)
        torch.testing.assert_close(x_next, expected, rtol=1e-4, atol=1e-4)
        state, before = expected, x0.unsqueeze(0)


def test_euler():
    scheduler = diffusers.EulerDiscreteScheduler()
    scheduler.set_timesteps(10)
    state = torch.randn(SHAPE) * scheduler.init_noise_sigma
    for i, t in enumerate(scheduler.timesteps):
        model_out = torch.sin(3 * scheduler.scale_model_input(state, t))
        step = scheduler.step(model_out, t, state)
        sigma, after = scheduler.sigmas[i : i + 2].double().tolist()
        row = torch.tensor([1.0, -sigma, after / sigma, 1 - after / sigma, 0.0])
        x_next, x0 = ops.denoise(state, model_out, row)
        torch.testing.assert_close(x_next, step.prev_sample, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(x0, step.pred_original_sample, rtol=1e-4, atol=1e-4)
        state = step.prev_sample


def test_linear_denoiser_samples_the_gaussian_it_knows():
    """For data N(0, 4) the best estimate of x0 is linear; DDPM's chain must end at that variance."""
    scheduler = diffusers.DDPMScheduler(variance_type="fixed_small")
    key = random.key(3, stream=random.Stream.DENOISE)
    x = ops.normal((1 << 14, 2), random.key(4))
    for t in range(999, -1, -1):
        now, _ = ancestors(scheduler, t)
        _, _, A, B, S = ddpm_row(scheduler, t)
        gain = 4 * math.sqrt(now) / (4 * now + 1 - now)
        row = torch.tensor([0.0, 1.0, A, B, S])
        key[2] = t
        ops.denoise(x, gain * x, row, key, out=x, return_x0=False)
    assert x.mean().item() == pytest.approx(0, abs=5 * 2 / math.sqrt(x.numel()))
    assert x.std().item() == pytest.approx(2, rel=0.02)


ROW = (1.3, -0.8, 0.6, 0.4, 0.3)


def test_noise_is_that_of_normal_and_advances_with_the_step():
    key = random.key(8, step=3)
    zero = torch.zeros(7, 33)
    row = torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0])
    assert torch.equal(ops.denoise(zero, zero, row, key).x_next, ops.normal((7, 33), key))
    key[2] += 1
    assert torch.equal(ops.denoise(zero, zero, row, key).x_next, ops.normal((7, 33), random.key(8, step=4)))


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_a_row_without_noise_does_not_read_it(backend, folder):  # noqa: F811
    rows = torch.tensor([ROW, (*ROW[:4], 0.0)]).repeat(3, 1)
    for event in (5, 700):
        x, m, noise = torch.randn(3, 6, event).unbind()
        noise[1::2] = math.nan
        x[2] = math.nan
        infinite = torch.full_like(x, math.inf)
        with running(backend, folder):
            x_next, _ = ops.denoise(x, m, rows, noise=noise)
            drawn, _ = ops.denoise(x, m, rows, random.key(1))
            varied, _ = ops.denoise(x, m, rows, random.key(1), log_variance=infinite)
        assert x_next[[0, 1, 3, 4, 5]].isfinite().all()
        assert x_next[2].isnan().all()
        assert torch.equal(x_next[1::2], drawn[1::2])
        assert torch.equal(x_next[1::2], varied[1::2])
        expected = ops.denoise(x, m, rows[0], random.key(1), backend="reference").x_next
        torch.testing.assert_close(drawn[::2], expected[::2], equal_nan=True)


def test_guidance():
    x, plain, conditional = torch.randn(3, 6, 3, 5).unbind()
    both, row, key = torch.cat([plain, conditional]), torch.tensor(ROW), random.key(2)
    for g in (0.0, 1.0, 7.5):
        expected = ops.denoise(x, plain + g * (conditional - plain), row, key)
        for guidance in (g, torch.tensor(g), torch.full((6,), g)):
            for result, value in zip(ops.denoise(x, both, row, key, guidance=guidance), expected, strict=True):
                torch.testing.assert_close(result, value)
    weights = torch.rand(6) * 5
    expected = ops.denoise(x, plain + weights[:, None, None] * (conditional - plain), row, key).x_next
    torch.testing.assert_close(ops.denoise(x, both, row, key, guidance=weights).x_next, expected)


def test_clamp_acts_on_the_estimate_alone():
    x = torch.linspace(-9, 9, 37).repeat(2, 1)
    row = torch.tensor([1.0, 0.0, 2.0, 1.0, 0.0])
    for clamp, (low, high) in ((1.5, (-1.5, 1.5)), ((-2.0, 5.0), (-2.0, 5.0)), ((0.0, math.inf), (0.0, math.inf))):
        x_next, x0 = ops.denoise(x, x, row, clamp=clamp)
        assert torch.equal(x0, x.clamp(low, high))
        assert torch.equal(x_next, 2 * x + x0)


def test_history_of_any_length():
    x, m, *history = torch.randn(6, 5, 11).unbind()
    base = ops.denoise(x, m, torch.tensor([*ROW[:4], 0.0])).x_next
    weights = (0.5, -1.0, 2.0, 0.25)
    for n in range(1, 5):
        row = torch.tensor([*ROW[:4], 0.0, *weights[:n]])
        expected = base + sum(c * h for c, h in zip(weights[:n], history, strict=False))
        torch.testing.assert_close(ops.denoise(x, m, row, history=torch.stack(history[:n])).x_next, expected)


def test_out_may_be_the_state_itself():
    x, m = torch.randn(2, 6, 3, 40).unbind()
    row, key = torch.tensor(ROW), random.key(3)
    expected = ops.denoise(x, m, row, key)
    for backend in (None, "reference"):
        state = x.clone()
        x_next, x0 = ops.denoise(state, m, row, key, out=state, backend=backend)
        assert x_next is state
        torch.testing.assert_close(state, expected.x_next)
        torch.testing.assert_close(x0, expected.x0)
    spread = torch.empty(6, 40, 3).transpose(1, 2)
    assert ops.denoise(x, m, row, key, out=spread, return_x0=False).x0 is None
    assert torch.equal(spread, expected.x_next)
    compiled = torch.compile(lambda s, m: ops.denoise(s, m, row, key, out=s).x0, fullgraph=True)
    state = x.clone()
    assert torch.equal(compiled(state, m), expected.x0)
    assert torch.equal(state, expected.x_next)
    with pytest.raises(ValueError, match="out= cannot be given where gradients are required"):
        ops.denoise(x, m.requires_grad_(), row, key, out=state)


@pytest.mark.skipif(not _native.ready(), reason="no C++ kernels here")
@pytest.mark.parametrize("slots", [0, 2])
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("dtype", _native.DTYPES)
def test_a_launch_gives_what_the_long_way_gives(slots, per_sample, dtype, monkeypatch):
    x, m, *past = torch.randn(2 + slots, 5, 2, 7).to(dtype).unbind()
    row = torch.tensor([*ROW, 0.4, -0.7][: 5 + slots])
    row, key = (row.repeat(5, 1), random.key(list(range(5)))) if per_sample else (row, random.key(3))

    def steps():
        for into in (None, "x", "another", "both"):
            for return_x0 in (False, True):
                state, room = x.clone(), torch.empty_like(x)
                out = {None: None, "x": state, "another": room, "both": (state, room) if return_x0 else state}[into]
                history = torch.stack(past) if past else None
                options = {"history": history, "clamp": (-1.0, 0.5), "out": out, "return_x0": return_x0}
                yield ops.denoise(state, m, row, key, **options), out

    at_once = list(steps())
    module = importlib.import_module("fastgen.ops.denoise")
    launched = []
    monkeypatch.setattr(module, "_launched", lambda *args: launched.append(args))
    for (made, out), (want, _) in zip(at_once, steps(), strict=True):
        assert torch.equal(made.x_next, want.x_next)
        assert made.x0 is want.x0 if want.x0 is None else torch.equal(made.x0, want.x0)
        assert out is None or made.x_next is (out[0] if isinstance(out, tuple) else out)
    assert len(launched) == len(at_once)


def test_narrow_network_beside_a_float32_state():
    x, m = torch.randn(2, 4, 50).unbind()
    row, key = torch.tensor(ROW), random.key(3)
    result = ops.denoise(x, m.bfloat16(), row, key)
    assert result.x_next.dtype is torch.float32
    assert torch.equal(result.x_next, ops.denoise(x, m.bfloat16().float(), row, key).x_next)
    assert ops.denoise(x.bfloat16(), m, row, key).x_next.dtype is torch.bfloat16


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("learned_range", [False, True])
def test_gradient_of_a_log_variance(backend, learned_range, folder):  # noqa: F811
    rows = torch.tensor([ROW, (*ROW[:4], 0.0), ROW]).double()
    x, m, v = torch.randn(3, 3, 37).unbind()
    bounds = torch.tensor([-3.0, -1.0])
    grads = []
    for wide in (False, True):
        leaf = (v.double() if wide else v).clone().requires_grad_()
        given = (leaf, bounds) if learned_range else leaf
        with running("reference" if wide else backend, folder):
            state = x.double() if wide else x
            ops.denoise(state, m.to(state), rows.to(state), random.key(5), log_variance=given).x_next.square().sum().backward()
        grads.append(leaf.grad.double())
    assert (grads[1][1] == 0).all()
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-5)


def test_one_output_alone_has_gradients():
    for output in (0, 1):
        grads = []
        for backend in (None, "reference"):
            torch.manual_seed(1)
            x, m = (torch.randn(4, 30).requires_grad_() for _ in range(2))
            ops.denoise(x, m, torch.tensor(ROW), random.key(0), clamp=1.0, backend=backend)[output].sum().backward()
            grads.append((x.grad, m.grad))
        torch.testing.assert_close(*grads)


X = torch.zeros(3, 4)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((X, [0.0], torch.tensor(ROW)), {}, TypeError, "model_out must be a floating-point tensor, got list"),
        ((X, X[:2], torch.tensor(ROW)), {}, ValueError, r"model_out must have shape \(3, 4\) on cpu, got \(2, 4\)"),
        ((X, X, torch.tensor(ROW)), {"guidance": 2.0}, ValueError, r"with guidance must have shape \(6, 4\)"),
        ((X, X, torch.zeros(6)), {}, ValueError, r"coefficients must have shape \[5\] or \[3, 5\], got \[6\]"),
        ((X, X, ROW), {}, TypeError, "coefficients must be a floating-point tensor, got tuple"),
        ((X, None, torch.tensor(ROW), random.key(0)), {}, TypeError, "model_out must be a floating-point tensor, got NoneType"),
        ((X, X, None, random.key(0)), {}, TypeError, "coefficients must be a floating-point tensor, got NoneType"),
        (
            (X, X, torch.zeros(6), random.key(0)),
            {"history": torch.zeros(2, 3, 4)},
            ValueError,
            r"coefficients must have shape \[7\] or \[3, 7\], got \[6\]",
        ),
        (
            (X, X, torch.zeros(6), random.key(0)),
            {"history": torch.zeros(1, 3, 5)},
            ValueError,
            r"history must have shape \(1, 3, 4\)",
        ),
        ((X, X, torch.tensor(ROW), random.key(0)), {"out": X[:2]}, ValueError, "out must be a tensor like x"),
        ((X, X, torch.tensor(ROW)), {"history": X}, ValueError, r"history must have shape \(3, 3, 4\)"),
        ((X, X, torch.tensor(ROW)), {"clamp": -1.0}, ValueError, r"clamp must be a positive number or \(low, high\), got -1.0"),
        ((X, X, torch.tensor(ROW)), {"log_variance": X[0]}, ValueError, r"log_variance must have shape \(3, 4\)"),
        (
            (X, X, torch.tensor(ROW)),
            {"log_variance": (X, torch.zeros(3))},
            ValueError,
            r"bounds of log_variance must have shape \[2\] or \[3, 2\]",
        ),
        ((X, X, torch.tensor(ROW), random.key(0)), {"noise": X}, ValueError, "give key or noise, not both"),
        ((X, X, torch.tensor(ROW)), {"out": X.double()}, ValueError, r"out must be a tensor like x: torch.float32 \(3, 4\)"),
        (
            (X, torch.zeros(6, 4), torch.tensor(ROW)),
            {"guidance": torch.zeros(2)},
            ValueError,
            r"guidance must be a number or have shape \[3\], got \[2\]",
        ),
    ],
)
def test_errors(arguments, options, error, message):
    with pytest.raises(error, match=message):
        ops.denoise(*arguments, **options)


@pytest.mark.parametrize("backend", ["reference", None])
@pytest.mark.parametrize("event", [(2,), (3, 37)])
def test_estimate_goes_into_a_slot_of_the_history_that_the_step_reads(backend, event):
    x, m, history = torch.randn(9, *event), torch.randn(9, *event), torch.randn(2, 9, *event)
    row, key = torch.tensor([1.2, -0.3, 0.5, 0.6, 0.2, 0.4, -0.7]), random.key(3)
    expected = ops.denoise(x, m, row, key, history=history, clamp=1.0, backend=backend)
    state = x.clone()
    x_next, x0 = ops.denoise(state, m, row, key, history=history, clamp=1.0, out=(state, history[1]), backend=backend)
    assert x_next is state
    assert x0.data_ptr() == history[1].data_ptr()
    assert torch.equal(x_next, expected.x_next)
    assert torch.equal(history[1], expected.x0)
    with pytest.raises(ValueError, match="out for x0 must be contiguous"):
        ops.denoise(x, m, row[:5], key, out=(x, history[0]), return_x0=False)
