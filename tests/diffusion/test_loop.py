"""The loop by hand: guidance, clamping, history, noise by sample and step, learned variance, callbacks, nothing read back."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastgen import ops, random
from fastgen.diffusion.loop import run, tabulate
from fastgen.diffusion.samplers import DDIM, DDPM, DPMSolver, Heun, UniPC, make_sampler
from fastgen.diffusion.schedules import Discrete, Karras, betas, target_rows
from fastgen.random import Stream

CHAIN = Discrete(betas("linear"))
WEIGHT = torch.randn(6, 6, generator=torch.Generator().manual_seed(5)) * 0.4


def table_of(sampler, steps=8, target="v", **options):
    return tabulate(sampler.plan(CHAIN.grid(steps)), lambda a, s: target_rows(target, a, s), CHAIN, **options)


def network(x, time):
    return torch.tanh(x @ WEIGHT + torch.sin(time / 200)[:, None])


def start(n=7, seed=0):
    return ops.normal((n, 6), random.key(seed, stream=Stream.LATENT))


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "heun", "lms", "dpmpp_2m_sde", "unipc"])
def test_rows_by_hand(sampler):
    """x_next = A x + B x0 + S z + sum C_k x0_k, with the estimates counted back and z at (step, sample) of the key."""
    method = make_sampler(sampler)
    plan = method.plan(CHAIN.grid(9))
    table = table_of(method, 9)
    x, key, estimates = start(), random.key(3, sample=20), []
    for i, row in enumerate(plan.rows.float()):
        m = network(x, plan.time[i].float().expand(7))
        p, q = table.coefficients[i, :2]
        estimate = p * x + q * m
        z = ops.normal((7, 6), random.key(3, stream=Stream.DENOISE, step=i, sample=20))
        after = row[0] * x + row[1] * estimate + row[2] * z
        for c, older in zip(row[3:], reversed(estimates), strict=False):
            after = after + c * older
        estimates.append(estimate)
        x = after
    torch.testing.assert_close(run(network, start(), table, key), x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sampler", [DDPM(), DDIM(0.5), Heun(churn=5.0), DPMSolver(stochastic=True), UniPC()], ids=str)
def test_samples_do_not_depend_on_the_batch(sampler):
    table = table_of(sampler)
    whole = run(network, start(), table, random.key(3))
    part = run(network, start()[2:5], table, random.key(3, sample=2))
    torch.testing.assert_close(whole[2:5], part, rtol=0, atol=1e-6)
    chosen = torch.tensor([5, 0, 3])
    keys = torch.cat([random.key(3)[:3].expand(3, 3), chosen[:, None]], 1)
    before = keys.clone()
    torch.testing.assert_close(whole[chosen], run(network, start()[chosen], table, keys), rtol=0, atol=1e-6)
    assert torch.equal(keys, before)


def test_inputs_and_generator_are_left_alone():
    x, key = start(), random.key(3)
    kept, state = x.clone(), torch.get_rng_state()
    end = run(network, x, table_of(DPMSolver()), key)
    assert torch.equal(x, kept)
    assert torch.equal(key, random.key(3))
    assert torch.equal(torch.get_rng_state(), state)
    assert end.data_ptr() != x.data_ptr()


def test_guidance():
    seen = []

    def both(x, time):
        seen.append(x.clone())
        plain, told = x.chunk(2)
        return torch.cat([network(plain, time[:7]), network(told, time[7:]) + 0.3])

    def mixed(x, time):
        u = network(x, time)
        return u + 2.5 * (u + 0.3 - u)

    table = table_of(UniPC())
    torch.testing.assert_close(
        run(both, start(), table, random.key(1), guidance=2.5), run(mixed, start(), table, random.key(1)), rtol=1e-4, atol=1e-5
    )
    assert all(torch.equal(*x.chunk(2)) for x in seen)


def test_clamp_and_adjust():
    table = table_of(DPMSolver())
    clamped = run(network, start(), table, random.key(1), clamp=0.2)
    bounds = []

    def adjust(step):
        bounds.append((step.step, step.total, float(step.sigma)))
        return step.x0.clamp(-0.2, 0.2)

    adjusted = run(network, start(), table, random.key(1), adjust=adjust)
    torch.testing.assert_close(adjusted, clamped, rtol=1e-5, atol=1e-5)
    assert clamped.abs().max() <= 0.2  # the last step goes to the estimate
    assert run(network, start(), table, random.key(1)).abs().max() > 0.2
    grid = CHAIN.grid(8)
    assert [b[:2] for b in bounds] == [(i, 8) for i in range(8)]
    assert [b[2] for b in bounds] == pytest.approx(grid.sigma.tolist(), rel=1e-6)


@pytest.mark.parametrize("sampler", [DDIM(), DPMSolver(), Heun()], ids=str)
def test_callback_sees_and_replaces(sampler):
    table, steps = table_of(sampler), []

    def watch(step):
        steps.append((step.step, float(step.alpha), float(step.sigma), step.x.clone(), step.x0.clone()))

    end = run(network, start(), table, random.key(1), callback=watch)
    assert torch.equal(end, run(network, start(), table, random.key(1)))
    assert torch.equal(steps[-1][3], end)
    torch.testing.assert_close(steps[-1][4], end)
    assert steps[-1][1:3] == (1, 0)
    assert [s[0] for s in steps] == list(range(len(table.time)))

    def pin(step):
        x = step.x.clone()
        x[:, 0] = step.alpha * 2.0
        return x

    assert run(network, start(), table, random.key(1), callback=pin)[:, 0].tolist() == [2.0] * 7


def test_learned_variance():
    plan = DDPM("learned").plan(CHAIN.grid(6))
    table = tabulate(plan, lambda a, s: target_rows("epsilon", a, s), CHAIN)

    def at(share):
        def learned(x, time):
            return torch.cat([network(x, time), torch.full_like(x, share)], 1)

        return learned

    key = random.key(1)
    for share, variance in ((-1.0, "small"), (1.0, "large")):
        fixed = table_of(DDPM(variance), 6, "epsilon")
        torch.testing.assert_close(run(at(share), start(), table, key), run(network, start(), fixed, key), rtol=1e-4, atol=1e-4)
    # a sampler with its own variance leaves the network's alone
    other = table_of(DDIM(), 6, "epsilon")
    assert torch.equal(run(at(1.0), start(), other, key), run(network, start(), other, key))


def test_learned_variance_with_guidance_is_the_conditional_one():
    plan = DDPM("learned").plan(CHAIN.grid(6))
    table = tabulate(plan, lambda a, s: target_rows("epsilon", a, s), CHAIN)

    def both(x, time):
        spread = torch.cat([torch.full_like(x[:7], 0.9), torch.full_like(x[:7], -1.0)])
        return torch.cat([network(x, time), spread], 1)

    expected = run(network, start(), table_of(DDPM(), 6, "epsilon"), random.key(1))
    got = run(both, start(), table, random.key(1), guidance=1.0)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_nothing_is_read_back():
    """On fake tensors, which have shapes and no values, any look at a value is an error: so is a wait for a device."""
    for sampler in (DDPM(), UniPC(), Heun(churn=3.0)):
        table, key, x = table_of(sampler), random.key(1), start()
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = [None if t is None else mode.from_tensor(t) for t in table]
            end = run(network, mode.from_tensor(x), type(table)(*fake), mode.from_tensor(key), guidance=None, clamp=1.0)
        assert end.shape == x.shape


def test_float64():
    table = table_of(DPMSolver(), dtype=torch.float64)
    assert table.coefficients.dtype == torch.float64
    narrow = run(network, start(), table_of(DPMSolver()), random.key(1))
    wide = run(lambda x, t: network(x.float(), t.float()).double(), start().double(), table, random.key(1))
    torch.testing.assert_close(wide.float(), narrow, rtol=1e-4, atol=1e-5)


def test_time_scale():
    plan = DDIM().plan(Karras().grid(3))
    table = tabulate(plan, lambda a, s: target_rows("x0", a, s), Karras(), time_scale=10.0)
    torch.testing.assert_close(table.time, 10 * plan.time.float())
