"""Launches: what they take at once, what they leave to the long way, and that both ways give the same."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastgen import ops, random
from fastgen.ops import _native

if not _native.ready():
    pytest.skip("no C++ kernels here", allow_module_level=True)

FORWARD = "dtype rows event like like key wide >like >row >wide flag threads"


def _launch() -> _native.Launch:
    return _native.Launch("reparameterize_fwd", FORWARD)


def _arguments(rows: int = 6, dtype: torch.dtype = torch.float32) -> list:
    draw = torch.Generator().manual_seed(rows)
    mean, log_var = torch.randn(2, rows, 5, 3, generator=draw).to(dtype)
    return [mean, log_var, random.key(4), None, False]


@pytest.mark.parametrize("dtype", _native.DTYPES)
@pytest.mark.parametrize("rows", [0, 1, 6])
@pytest.mark.parametrize("per_sample", [False, True])
def test_both_ways_give_the_same(dtype, rows, per_sample):
    arguments = _arguments(rows, dtype)
    if per_sample:
        arguments[2] = random.key(list(range(rows)))
    launch = _launch()
    at_once, spelled_out = launch.attempt(*arguments), launch._spelled_out(*arguments)
    assert [t.dtype for t in at_once] == [dtype, torch.float32, torch.float32]
    for a, b in zip(at_once, spelled_out, strict=True):
        assert torch.equal(a, b)


def test_noise_that_is_given():
    mean, log_var, _, _, fast = _arguments(dtype=torch.bfloat16)
    noise = torch.randn(mean.shape)
    launch = _native.Launch("reparameterize_fwd", FORWARD.replace(">wide", "null"))
    z, kl = launch.attempt(mean, log_var, None, noise, fast)
    want = ops.reparameterize(mean, log_var, noise=noise, backend="reference")
    torch.testing.assert_close(z, want.z)
    torch.testing.assert_close(kl, want.kl, rtol=1e-5, atol=1e-5)


def _replace(index: int, value: object) -> list:
    arguments = _arguments()
    arguments[index] = value
    return arguments


class _Subclass(torch.Tensor):
    pass


@pytest.mark.parametrize(
    "arguments",
    [
        _replace(0, torch.zeros(6, 3, 5).mT),
        _replace(0, torch.zeros(6, 5, 3, dtype=torch.float64)),
        _replace(0, torch.zeros(())),
        _replace(0, torch.zeros(6, 5, 3, device="meta")),
        _replace(0, torch.zeros(6, 5, 3).as_subclass(_Subclass)),
        _replace(0, torch.zeros(6, 5, 3).to_sparse()),
        _replace(0, "mean"),
        _replace(1, None),
        _replace(1, torch.zeros(6, 5, 4)),
        _replace(1, torch.zeros(6, 5, 3, dtype=torch.bfloat16)),
        _replace(2, torch.zeros(3, dtype=torch.int64)),
        _replace(2, torch.zeros(4, dtype=torch.int32)),
        _replace(2, torch.zeros(5, 4, dtype=torch.int64)),
        _replace(3, torch.zeros(6, 15)),
    ],
    ids=[
        *("strided", "float64", "scalar", "meta", "subclass", "sparse", "no tensor", "none", "other shape", "other dtype"),
        *("short key", "int32 key", "keys of other samples", "noise of another shape"),
    ],
)
def test_what_does_not_fit_goes_the_long_way(arguments):
    assert _launch().attempt(*arguments) is None


def test_a_gradient_to_record_is_reported_and_nothing_done():
    arguments = _replace(1, torch.nn.Parameter(torch.zeros(6, 5, 3)))
    assert _launch().attempt(*arguments) is False
    with torch.no_grad():
        assert len(_launch().attempt(*arguments)) == 3


def test_modes_and_transforms_go_the_long_way():
    arguments, seen = _arguments(), []
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert _launch().attempt(*arguments) is None
    torch.func.vmap(lambda x: seen.append(_launch().attempt(x, *arguments[1:])) or x)(arguments[0])
    assert seen == [None]


def test_the_instruction_set_in_use_is_the_one_that_runs():
    outputs = {}
    for isa in _native.available_isas():
        with _native.use_isa(isa):
            outputs[isa] = _launch().attempt(*_arguments())
            ways = _launch()._spelled_out(*_arguments())
        if outputs[isa] is not None:  # a set that is emulated has no launches
            assert all(map(torch.equal, outputs[isa], ways))
    assert outputs[_native.current_isa()] is not None


def _record(
    backward: str = "dtype rows event like like null 0 wide like? row >like >like 0 threads", takes: str = "i0 i1 o2 g0 g1"
):
    def longer(ctx, *grads):
        calls.append([None if g is None else g.is_contiguous() for g in grads])
        return *(torch.full_like(ctx.saved_tensors[0], 7.0) for _ in range(2)), None, None, None

    calls: list = []
    launches = (_native.Launch("reparameterize_fwd", FORWARD.replace(">wide", "null")), _launch())
    backward_launch = _native.Launch("reparameterize_bwd", backward)
    record = _native.Record(*launches, backward_launch, takes=takes, gives="o0 o1", returns=2, longer=longer)
    return record, calls


def test_a_record_has_the_gradients_of_the_reference():
    record, calls = _record()
    arguments = _arguments()
    assert [t.grad_fn for t in record.attempt(*arguments)] == [None, None]
    mean, log_var = (t.requires_grad_() for t in arguments[:2])
    outputs = record.attempt(mean, log_var, *arguments[2:])
    expected = ops.reparameterize(mean, log_var, arguments[2], backend="reference")
    weights = [torch.randn(t.shape) for t in outputs]
    for wanted in (slice(0, 2), slice(0, 1), slice(1, 2)):  # both outputs, or one alone
        found, right = (
            torch.autograd.grad(side[wanted], (mean, log_var), weights[wanted], retain_graph=True)
            for side in (outputs, expected)
        )
        for a, b in zip(found, right, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert not calls


def test_a_record_saves_what_it_keeps_once_and_notices_changes():
    record, _ = _record()
    mean, log_var, *rest = _arguments()
    mean.requires_grad_()
    z, _ = record.attempt(mean, log_var, *rest)
    saved = z.grad_fn.saved_tensors
    assert [t.data_ptr() for t in saved[:2]] == [mean.data_ptr(), log_var.data_ptr()]
    torch.testing.assert_close(saved[2], ops.normal(mean.shape, rest[0]), rtol=0, atol=0)
    log_var.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


@pytest.mark.parametrize("create_graph", [False, True])
def test_the_long_way_back_where_gradients_are_not_plain(create_graph):
    record, calls = _record()
    mean, log_var, *rest = _arguments()
    mean.requires_grad_(), log_var.requires_grad_()
    z, _ = record.attempt(mean, log_var, *rest)
    strided = torch.randn(3, 5, 6).permute(2, 1, 0)
    grads = torch.autograd.grad(
        z, (mean, log_var), torch.randn(z.shape) if create_graph else strided, create_graph=create_graph
    )
    assert calls == [[create_graph, None]]
    assert all((g == 7).all() for g in grads)


def test_launches_that_do_not_fit_each_other_are_refused():
    with pytest.raises(ValueError, match="do not fit each other"):
        _record(takes="i0 i1 o2 g0")[0].attempt(*_arguments())


@pytest.mark.parametrize(
    ("plan", "error"),
    [("dtype rows", "does not fit the signature"), (FORWARD.replace("event", "events"), "unknown word in a plan: events")],
)
def test_a_wrong_plan_is_refused(plan, error):
    with pytest.raises(ValueError, match=error):
        _native.Launch("reparameterize_fwd", plan).attempt(*_arguments())


def test_a_wrong_number_of_arguments_is_refused():
    with pytest.raises(TypeError, match="reparameterize_fwd takes 5 arguments, got 4"):
        _launch().attempt(*_arguments()[:4])


SPLINE = "dtype rows event bins like binned binned knots >like >row number 0 0 threads"


def _spline_arguments():
    x, widths, heights, derivatives = (torch.randn(6, 5, *size) for size in ((), (4,), (4,), (3,)))
    return [x, widths, heights, derivatives, 2.0]


def test_binned_tensors():
    launch, arguments = _native.Launch("rq_spline_fwd", SPLINE), _spline_arguments()
    outputs = launch.attempt(*arguments)
    assert [t.shape for t in outputs] == [(6, 5), (6,)]
    assert all(map(torch.equal, outputs, launch._spelled_out(*arguments)))
    other = [torch.randn(6, 5, 5), torch.randn(6, 4, 4), torch.randn(6, 4), None, torch.randn(6, 5, 4).double()]
    for place, values in ((1, other[1:]), (2, other), (3, [torch.randn(6, 5, 4), None])):
        for value in values:
            assert launch.attempt(*arguments[:place], value, *arguments[place + 1 :]) is None
    for place in range(4):
        assert launch.attempt(*(t.clone().requires_grad_() if i == place else t for i, t in enumerate(arguments))) is False


def test_constants_need_no_gradients():
    launch = _native.Launch("diffuse_fwd", "dtype rows event last like table4 key wide >like >like flag threads")
    x0, rows = torch.randn(6, 5), torch.randn(4, requires_grad=True)
    x_t, target = launch.attempt(x0, rows, None, torch.randn(6, 5, requires_grad=True), False)
    assert not x_t.requires_grad
    assert not target.requires_grad


NORM = "dtype rows channels pixels last like pair1 pair2 groups"
NORM_FORWARD = f"{NORM} number flag >like >grouped threads"
NORM_BACKWARD = f"{NORM} flag grouped like >like >pair1 >pair2 threads"


def _channels_last(x: torch.Tensor) -> torch.Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def _norm_arguments(dtype: torch.dtype = torch.float32, first: torch.dtype = torch.float32, last: bool = False) -> list:
    """x, weight, bias, scale, shift, groups."""
    x = torch.randn(3, 8, 5, 4).to(dtype)
    parameters = [torch.randn(*size).to(t) for size, t in (((8,), first), ((8,), first), ((3, 8), dtype), ((3, 8), dtype))]
    return [_channels_last(x) if last else x, *parameters, 4]


def _same(ours: tuple, theirs: tuple) -> bool:
    return len(ours) == len(theirs) and all(
        a is b is None or (a.dtype is b.dtype and a.stride() == b.stride() and torch.equal(a, b))
        for a, b in zip(ours, theirs, strict=True)
    )


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", _native.DTYPES)
@pytest.mark.parametrize("first", [torch.float32, torch.float16])
@pytest.mark.parametrize("missing", [(), (1,), (2,), (3, 4), (1, 2, 3)])
def test_pairs_and_groups_in_both_layouts(dtype, first, last, missing):
    arguments = _norm_arguments(dtype, first, last)
    for place in missing:
        arguments[place] = None
    launch = _native.Launch("group_norm_silu_fwd", NORM_FORWARD)
    forward = launch.attempt(*arguments, 1e-5, True)
    assert forward[0].stride() == arguments[0].stride()
    assert forward[1].shape == (3, 4, 3)
    assert _same(forward, launch._spelled_out(*arguments, 1e-5, True))
    launch = _native.Launch("group_norm_silu_bwd", NORM_BACKWARD)
    backward = launch.attempt(*arguments, True, forward[1], forward[0])
    assert [g is None for g in backward[1:]] == [v is None for v in arguments[1:5]]
    assert all(g.dtype is v.dtype for g, v in zip(backward, arguments[:5], strict=True) if g is not None)
    assert _same(backward, launch._spelled_out(*arguments, True, forward[1], forward[0]))


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (0, torch.randn(3, 8, 4, 5).mT),
        (0, torch.randn(8)),
        (0, torch.randn(3, 0, 5)),
        (1, torch.randn(7)),
        (1, torch.randn(8, 1)),
        (1, torch.randn(16)[::2]),
        (1, torch.randn(8, dtype=torch.float64)),
        (2, torch.randn(8).bfloat16()),
        (2, torch.zeros(8, dtype=torch.int64)),
        (3, torch.randn(1, 8)),
        (3, torch.randn(8, 3).T),
        (4, torch.randn(3, 8).half()),
        (5, 3),
        (5, 0),
        (5, -4),
        (5, 2**70),
        (5, True),
        (5, 4.0),
    ],
)
@pytest.mark.parametrize("last", [False, True])
def test_pairs_and_groups_that_do_not_fit(place, value, last):
    arguments = _norm_arguments(last=last)
    arguments[place] = value
    assert _native.Launch("group_norm_silu_fwd", NORM_FORWARD).attempt(*arguments, 1e-5, True) is None


@pytest.mark.parametrize("last", [False, True])
def test_what_is_like_the_first_lies_like_the_first(last):
    arguments = _norm_arguments(last=last)
    stats, grad = torch.randn(3, 4, 3), torch.randn(3, 8, 5, 4)
    launch = _native.Launch("group_norm_silu_bwd", NORM_BACKWARD)
    assert (launch.attempt(*arguments, True, stats, grad) is None) == last
    assert (launch.attempt(*arguments, True, stats, _channels_last(grad)) is None) != last
    for other in (None, torch.randn(3, 8, 3), torch.randn(3, 4), stats.double(), torch.randn(3, 3, 4).mT):
        assert launch.attempt(*arguments, True, other, _channels_last(grad) if last else grad) is None
    elsewhere = _native.Launch("reparameterize_fwd", FORWARD)  # a plan for one layout
    assert (elsewhere.attempt(arguments[0], arguments[0], None, torch.randn(3, 8, 5, 4), False) is None) == last


@pytest.mark.parametrize("place", range(5))
def test_gradients_of_pairs_are_recorded(place):
    arguments = _norm_arguments()
    arguments[place] = torch.nn.Parameter(arguments[place])
    launch = _native.Launch("group_norm_silu_fwd", NORM_FORWARD)
    assert launch.attempt(*arguments, 1e-5, True) is False
    arguments[place].requires_grad_(False)
    assert len(launch.attempt(*arguments, 1e-5, True)) == 2


def test_noise_lies_like_the_samples():
    launch = _native.Launch("diffuse_fwd", "dtype rows event last like table4 key wide >like >like flag threads")
    x0, rows, noise = torch.randn(6, 3, 5), torch.randn(4), torch.randn(6, 3, 5)
    for key, drawn in ((random.key(3), None), (None, noise)):
        want = launch.attempt(x0, rows, key, drawn, False)
        arguments = (_channels_last(x0), rows, key, None if drawn is None else _channels_last(drawn), False)
        found = launch.attempt(*arguments)
        assert found[0].stride() == arguments[0].stride()
        assert all(map(torch.equal, found, want))
        assert _same(found, launch._spelled_out(*arguments))
    assert launch.attempt(_channels_last(x0), rows, None, noise, False) is None


CONVOLVE = (
    "rows height width channels own like beside norm flag side outputs doubled memory memory bias image >image >parts threads"
)
COEFFICIENTS = "rows channels pixels own like beside parts1 parts2 pair1 pair2 groups number >norm threads"


def _images():
    """An image and one beside it, what normalises both, a weight of 5 channels, a bias and a residual."""
    x, skip, residual = (_channels_last(torch.randn(3, *size)) for size in ((16, 6, 7), (8, 6, 7), (5, 12, 14)))
    packed = ops.winograd_weight(torch.randn(5, 24, 3, 3)).packed
    return [x, skip, torch.randn(3, 3, 24), True, 4, 5, True, packed, None, torch.randn(3, 9)[:, 2:7], residual]


def test_images_of_two_are_made():
    launch, arguments = _native.Launch("winograd_conv2d", CONVOLVE), _images()
    y, parts = launch.attempt(*arguments)
    assert y.shape == (3, 5, 12, 14)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert parts.shape == (3, 3, 3, 5)
    assert _same((y, parts), launch._spelled_out(*arguments))
    for place in (1, 2, 9, 10):  # none of them is needed
        fewer = [*arguments]
        fewer[place] = None
        if place == 1:
            fewer[2], fewer[7] = torch.randn(3, 3, 16), ops.winograd_weight(torch.randn(5, 16, 3, 3)).packed
        assert _same(launch.attempt(*fewer), launch._spelled_out(*fewer))


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (0, torch.randn(3, 16, 6, 7)),
        (0, _channels_last(torch.randn(3, 16, 6, 7)).bfloat16()),
        (0, _channels_last(torch.randn(3, 16, 42))),
        (1, torch.randn(3, 8, 6, 7)),
        (1, _channels_last(torch.randn(3, 8, 6, 6))),
        (2, torch.randn(3, 3, 16)),
        (9, torch.randn(3, 6)),
        (9, torch.randn(2, 5)),
        (9, torch.randn(5, 3).t()),
        (10, _channels_last(torch.randn(3, 5, 6, 7))),
    ],
)
def test_images_that_do_not_fit_go_the_long_way(place, value):
    arguments = _images()
    arguments[place] = value
    assert _native.Launch("winograd_conv2d", CONVOLVE).attempt(*arguments) is None


@pytest.mark.parametrize("place", [0, 1, 2, 9, 10])
def test_gradients_of_images_are_not_forgotten(place):
    arguments = _images()
    arguments[place].requires_grad_()
    assert _native.Launch("winograd_conv2d", CONVOLVE).attempt(*arguments) is False


def test_a_chain_passes_on_what_its_launches_put_out():
    x, skip, *_ = _images()
    packed, bias = ops.winograd_weight(torch.randn(5, 24, 3, 3)).packed, torch.randn(5)
    normalise, convolve = _native.Launch("group_norm_coefficients", COEFFICIENTS), _native.Launch("winograd_conv2d", CONVOLVE)
    steps = (normalise, "a0 a1 none none none none none none a2 a3"), (convolve, "a0 a1 r0 true a4 a5 false a6 none a7 none")
    chain = _native.Chain(*steps)
    made = chain.attempt(x, skip, 4, 1e-5, 4, 5, packed, bias)
    (norm,) = normalise.attempt(x, skip, *[None] * 6, 4, 1e-5)
    assert _same(made, convolve.attempt(x, skip, norm, True, 4, 5, False, packed, None, bias, None))
    assert chain.attempt(x, skip, 5, 1e-5, 4, 5, packed, bias) is None  # groups that do not divide the channels
    assert chain.attempt(x, skip, 4, 1e-5, 4, 5, packed, bias.requires_grad_()) is None
    with pytest.raises(TypeError, match="a chain takes 8 arguments, got 2"):
        chain.attempt(x, skip)
    again = normalise.attempt(made[0], None, made[1], *[None] * 5, 5, 1e-5)
    torch.testing.assert_close(again, normalise.attempt(made[0], *[None] * 7, 5, 1e-5))
    for other in (made[1][:2], made[1][:, :, :, :4], made[1][:, :, :2], made[1].double()):
        assert normalise.attempt(made[0], None, other, *[None] * 5, 5, 1e-5) is None
    for takes, error in (("a0 a1", "does not fit its launches"), (steps[1][1].replace("r0", "r1"), "not yet there: r1")):
        with pytest.raises(ValueError, match=error):
            _native.Chain(steps[0], (convolve, takes)).attempt(x)


def test_kernels_are_watched():
    x = torch.randn(64, 64)
    with _native.watched() as seconds:
        ops.group_norm_silu(x, 4)
        _native.kernel("reparameterize_fwd")
    assert set(seconds) == {"group_norm_silu_fwd"}
    assert 0 < seconds["group_norm_silu_fwd"] < 1
    with _native.watched() as seconds:
        pass
    assert seconds == {}
