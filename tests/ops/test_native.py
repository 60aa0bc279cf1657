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
        _replace(1, torch.zeros(6, 5, 4)),
        _replace(1, torch.zeros(6, 5, 3, dtype=torch.bfloat16)),
        _replace(2, torch.zeros(3, dtype=torch.int64)),
        _replace(2, torch.zeros(4, dtype=torch.int32)),
        _replace(2, torch.zeros(5, 4, dtype=torch.int64)),
        _replace(3, torch.zeros(6, 15)),
    ],
    ids=[
        *("strided", "float64", "scalar", "meta", "subclass", "sparse", "no tensor", "other shape", "other dtype"),
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
