"""Replays against the calls that they were written down from."""

from __future__ import annotations

import copy
import re
import threading

import pytest
import torch
from torch import nn

from fastgen import ops
from fastgen.nn.inference import optimize
from fastgen.nn.replay import Replay, UnrepeatableError, write_down
from fastgen.ops import _native
from tests.nn.networks import FULL, KINDS, build, inputs

every = pytest.mark.parametrize("kind", KINDS)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def replays_of(network):
    """What an optimized network, or any function, has written down."""
    return [replay for replay in network.forward.replays.values() if replay is not None]


def checked(function, *first):
    """Write a function of tensors down and compare it with its replay on values that it has not seen."""
    tensors = dict(zip("abc", first, strict=False))

    def call(**named):
        return function(*(named[name] for name in tensors))

    result, replay = write_down(call, tensors, {})
    assert torch.equal(result, function(*first))
    for scale in (1.0, -0.7):
        values = {name: value * scale for name, value in tensors.items()}
        assert torch.equal(replay(**values), function(*values.values()))
    return replay


@every
@dtypes
@torch.no_grad()
def test_an_optimized_network_replays_its_third_call(kind, dtype, monkeypatch):
    fast = optimize(build(kind, **FULL), dtype=dtype)
    x, t, named = inputs(kind, size=(16, 16), labels=True, context=True)
    first, second = fast(x, t, **named), fast(x, t, **named)
    assert torch.equal(first, second)
    assert len(replays_of(fast)) == 1
    other, late, _ = inputs(kind, size=(16, 16), seed=5)
    changed = {"labels": named["labels"].flip(0), "context": -named["context"]}
    expected = type(fast).forward(fast, other, late, **changed)
    monkeypatch.setattr(fast.forward, "_own", None)  # nothing but the replay can answer
    assert torch.equal(fast(x, t, **named), first)
    assert torch.equal(fast(other, late, **changed), expected)


@every
@torch.no_grad()
def test_each_kind_of_call_has_its_own_replay(kind):
    network = build(kind, **FULL)
    fast = optimize(network, dtype=torch.float32)
    x, t, named = inputs(kind, size=(8, 8), labels=True, context=True)
    few, early, fewer = inputs(kind, n=2, size=(8, 8), labels=True, context=True)
    calls = [((x, t), named), ((x, t), {}), ((x, t[:1]), named), ((x, t[:1].expand(3)), {}), ((few, early), fewer)]
    for _ in range(3):
        for args, kwargs in calls:
            torch.testing.assert_close(fast(*args, **kwargs), network(*args, **kwargs), rtol=1e-4, atol=1e-4)
    assert len(replays_of(fast)) == len(calls)
    with torch.inference_mode():
        torch.testing.assert_close(fast(x, t), network(x, t), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_oldest_kind_goes_first():
    for most in (1, 2, 5):
        replay = Replay(nn.Linear(3, 3).eval().requires_grad_(False), most)
        for n in range(1, 8):
            for _ in range(2):
                replay(torch.ones(n, 3))
            assert [kind[0][1][0] for kind in replay.replays] == list(range(1, n + 1))[-most:]


@torch.no_grad()
def test_nothing_outlives_its_last_use():
    fast = optimize(build("unet"), dtype=torch.float32)
    x, t, _ = inputs("unet", size=(16, 16))
    fast(x, t), fast(x, t)
    (replay,) = replays_of(fast)
    made = {"x", "time", *re.findall(r"\bt\d+\b", replay.source)}
    gone = [name for line in re.findall(r"del (.*)", replay.source) for name in line.split(", ")]
    assert len(gone) == len(set(gone))
    assert made - set(gone) == {re.search(r"return (.*)", replay.source)[1]}


def views(x):
    query, key, value = x.view(*x.shape[:-1], 3, -1).unbind(-2)
    left, right = (query + key).chunk(2, -1)
    return torch.cat([left.transpose(0, 1), right.transpose(0, 1)], -1) * value.transpose(0, 1)[..., :1]


def writes(x):
    made = x * 2
    made[1:].add_(1)
    row = made[0]
    row.mul_(3)
    return made + row


def hidden_write(x):
    made = torch.empty_like(x)
    made.copy_(x)
    torch.add(made, 1, out=made)
    return made


def constants(x):
    return x * torch.arange(x.shape[-1]).float().exp().log1p() + float("inf") * 0.5 ** x.abs()


def of_ops(x):
    image = x.unflatten(-1, (3, 2)).permute(0, 2, 1)[..., None].contiguous()
    return ops.group_norm_silu(image, 1, torch.ones(2), torch.zeros(2))


def kernels_first(x):
    return ops.dynamic_threshold(x, 0.9, 2.0).flip(0)


@pytest.mark.parametrize("function", [views, writes, hidden_write, constants, of_ops, kernels_first])
@torch.no_grad()
def test_what_a_function_may_do(function):
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    checked(function, x)
    strided = torch.randn(6, 9, generator=torch.Generator().manual_seed(1))[:, 2:6].t()
    replay = checked(function, strided)
    elsewhere = torch.randn(70).as_strided(strided.shape, strided.stride(), 3)  # lies at another offset of its memory
    assert torch.equal(replay(a=elsewhere), function(elsewhere))


@torch.no_grad()
def test_arguments_may_have_any_names():
    def function(t1, c2, mul_3, t3):
        return (t1 * c2 * mul_3).sin() * t3 * KEPT.exp() * t3

    tensors = {name: torch.randn(3) for name in ("t1", "c2", "mul_3", "t3")}
    _, replay = write_down(function, tensors, {})
    assert torch.equal(replay(**tensors), function(**tensors))


@pytest.mark.parametrize("draw", [torch.randn_like, lambda x: torch.rand(3), lambda x: ops.normal((3,))])
@torch.no_grad()
def test_what_is_drawn_is_drawn_anew(draw):
    _, replay = write_down(lambda x: x + draw(x), {"x": torch.zeros(3)}, {})
    torch.manual_seed(0)
    first, second = replay(x=torch.zeros(3)), replay(x=torch.zeros(3))
    torch.manual_seed(0)
    assert torch.equal(first, draw(torch.zeros(3)))
    assert torch.equal(second, draw(torch.zeros(3)))
    assert not torch.equal(first, second)


KEPT = torch.zeros(3)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x if x.sum() > 0 else -x,
        lambda x: x * x.max().item(),
        lambda x: x[x > 0],
        lambda x: x + KEPT.add_(1),
        lambda x: x + torch.zeros(3).add_(x),
        lambda x: (x, x),
        lambda x: torch.ones(3),
    ],
    ids=["branch", "item", "mask", "buffer", "constant", "tuple", "nothing"],
)
@torch.no_grad()
def test_what_is_not_repeatable_is_refused_and_still_right(function):
    class Network(nn.Module):
        def forward(self, x):
            return function(x)

    with pytest.raises(UnrepeatableError):
        write_down(function, {"x": torch.ones(3)}, {})
    network = Network().eval()
    replay = Replay(network)
    KEPT.zero_()
    for i in range(4):
        x = torch.tensor([1.0, -2.0, i])
        before = KEPT.clone()
        got = replay(x)
        KEPT.copy_(before)
        expected = function(x)
        assert all(map(torch.equal, got, expected)) if isinstance(got, tuple) else torch.equal(got, expected)
    assert list(replay.replays.values()) == [None]


class TestWhoGoesTheNetworksOwnWay:
    @pytest.fixture
    def fast(self):
        fast = optimize(build("mlp"), dtype=torch.float32)
        with torch.no_grad():
            for _ in range(3):
                fast(*inputs("mlp")[:2])

        def refuse(*args, **kwargs):
            raise AssertionError("was replayed")

        fast.forward.replays = dict.fromkeys(fast.forward.replays, refuse)
        with torch.no_grad(), pytest.raises(AssertionError, match="was replayed"):
            fast(*inputs("mlp")[:2])
        return fast

    def test_gradients(self, fast):
        x, t, _ = inputs("mlp")
        fast(x.requires_grad_(), t).sum().backward()
        assert x.grad.abs().sum() > 0

    @torch.no_grad()
    def test_hooks(self, fast):
        seen = []
        layer = next(module for name, module in fast.named_modules() if name)
        handle = layer.register_forward_hook(lambda *args: seen.append(args))
        fast(*inputs("mlp")[:2])
        assert seen
        handle.remove()
        with pytest.raises(AssertionError, match="was replayed"):
            fast(*inputs("mlp")[:2])

    @torch.no_grad()
    def test_modes(self, fast):
        x, t, _ = inputs("mlp")
        with ops.use_backend("reference"):
            fast(x, t)
        with torch.autocast("cpu", torch.bfloat16):
            fast(x, t)
        torch.func.vmap(lambda x: fast(x[None], t[:1]))(x)
        fast.train()
        fast(x, t)

    @torch.no_grad()
    def test_subclasses(self, fast):
        x, t, _ = inputs("mlp")
        fast(nn.Parameter(x, requires_grad=False), t)

    @torch.no_grad()
    def test_arguments_that_do_not_fit(self, fast):
        x, t, _ = inputs("mlp")
        for wrong in [lambda: fast(x, t, None, None, None), lambda: fast(x, t, x=x), lambda: fast(x), lambda: fast(x, t, y=1)]:
            with pytest.raises(TypeError, match="argument"):
                wrong()
        with pytest.raises(AttributeError, match="list"):
            fast(x, t.tolist())


@torch.no_grad()
def test_copies_have_weights_of_their_own():
    fast = optimize(build("mlp"), dtype=torch.float32)
    x, t, _ = inputs("mlp")
    for _ in range(3):
        expected = fast(x, t)
    other = copy.deepcopy(fast)
    assert other.forward is not fast.forward
    for parameter in other.parameters():
        parameter.zero_()
    for _ in range(3):
        assert not torch.equal(other(x, t), expected)
        assert torch.equal(fast(x, t), expected)
    assert len(replays_of(other)) == 1


@torch.no_grad()
def test_threads_share_a_network():
    fast = optimize(build("unet"), dtype=torch.float32)
    cases = [inputs("unet", seed=seed)[:2] for seed in range(4)]
    expected = [type(fast).forward(fast, *case) for case in cases]
    wrong = []

    def work(case, result):
        with torch.no_grad():  # of each thread
            wrong.extend(1 for _ in range(20) if not torch.equal(fast(*case), result))

    threads = [threading.Thread(target=work, args=pair) for pair in zip(cases, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(replays_of(fast)) == 1


@pytest.mark.skipif(not _native.ready(), reason="no compiled kernels")
@torch.no_grad()
def test_a_kernel_that_refuses_says_so():
    weight = torch.ones(2)
    _, replay = write_down(lambda x: ops.group_norm_silu(x, 1, weight, weight), {"x": torch.ones(2, 2, 3)}, {})
    with pytest.raises(RuntimeError, match="must not be changed") as raised:
        replay(x=torch.ones(2, 3, 3))
    assert "group_norm_silu_fwd_" in str(raised.traceback[1].statement)  # the line is there to be read


@pytest.mark.skipif(not _native.ready(), reason="no compiled kernels")
def test_listeners_hear_this_thread_alone():
    heard = []
    with _native.listening(lambda kernel, plan, args, made: heard.append(kernel)):
        with _native.listening(None):
            ops.moments(torch.ones(2, 3))
        thread = threading.Thread(target=lambda: ops.moments(torch.ones(2, 3)))
        thread.start()
        thread.join()
        assert not heard
        ops.moments(torch.ones(2, 3))
        assert heard == ["moments_fwd"]
    ops.moments(torch.ones(2, 3))
    assert heard == ["moments_fwd"]
