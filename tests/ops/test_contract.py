"""What every op keeps, whatever it computes: every SPEC x backend x instruction set, forward and backward.

An op's own mathematics is tested in tests/ops/test_NAME.py. Inputs are drawn from a seed; hypothesis draws shapes, seeds,
dtypes and flags. NEON runs under qemu-user where the cross-compiler is installed, and must where FASTGEN_REQUIRE_NEON=1.
"""

from __future__ import annotations

import contextlib
import inspect
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from fastgen.ops import _native, all_specs, explain, use_backend
from tests import emulation
from tests.ops.tolerances import error

SPECS = all_specs()
BACKENDS = ["triton", *(f"cpp:{isa}" for isa in _native.available_isas()), "cpp:neon"]
if _native.missing():
    BACKENDS = ["triton"]
SIZES = [0, 1, 2, 3, 4, 5, 15, 16, 17, 31, 33, 63, 64, 65, 127, 300, 2047, 2048, 2049, 5000]

every_op = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
TWICE = [s for s in SPECS.values() if s.double_backward]
every_twice_differentiable_op = pytest.mark.parametrize("spec", TWICE, ids=lambda s: s.name)


def _with_backends(specs):
    """Every pair; an op without kernels of its own is held to the same, under the name of the backend that runs it."""
    return pytest.mark.parametrize(
        ("spec", "backend"),
        [
            pytest.param(spec, backend, id=f"{backend}-{spec.name}")
            for spec in specs
            for backend in ([b for b in BACKENDS if b.partition(":")[0] in spec.backends] if spec.backends else ["reference"])
        ],
    )


every_backend = _with_backends(SPECS.values())
every_backend_twice = _with_backends(TWICE)
every_native_op = pytest.mark.parametrize("spec", [s for s in SPECS.values() if "cpp" in s.backends], ids=lambda s: s.name)


@pytest.fixture(autouse=True)
def _poisoned():
    """Memory from torch.empty is NaN: an output that a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def folder(shared_folder):
    return shared_folder


@contextlib.contextmanager
def running(backend: str, folder):
    """Within the block, ops take this backend; "cpp:ISA" forces an instruction set."""
    name, _, isa = backend.partition(":")
    if isa == "neon" and "neon" not in _native.available_isas():
        emulation.require_neon()
        _native.add_table("neon", emulation.compiled("neon", folder).table())
    with use_backend(name), _native.use_isa(isa) if isa else contextlib.nullcontext():
        yield


def examples_for(backend: str) -> int:
    """Interpreted and emulated backends cost more per example."""
    share = {"triton": 0.5, "cpp:neon": 0.5}.get(backend, 1.0)
    return max(5, int(settings.default.max_examples * share))


@st.composite
def calls(draw, spec, backend=""):
    """(rows, event, dtype, seed, flags) of one call. Interpreted, a row costs as much as thousands do compiled: there are
    fewer, and two at most where the event is long.
    """
    rank = draw(st.sampled_from(spec.event_ranks))
    if rank == 3:
        event = (draw(st.integers(1, 4)), draw(st.integers(1, 9)), draw(st.integers(1, 9)))
    else:
        event = (draw(st.sampled_from(spec.sizes or SIZES)),) * rank
    size = math.prod(event)
    if backend == "triton":
        counts = [0, 1, 2] if size > 300 else [0, 1, 2, 3, 17]
    else:
        counts = [0, 1, 2, 3, 5, 17] if size > 64 else [0, 1, 2, 3, 17, 40, 130]
    rows = draw(st.sampled_from(counts))
    flags = {name: draw(st.sampled_from(values)) for name, values in spec.flags.items()}
    return rows, event, draw(st.sampled_from(spec.dtypes)), draw(st.integers(0, 2**31)), flags


def inputs_for(spec, rows, event, dtype, seed, flags):
    return spec.example_inputs(rows, event, dtype=dtype, generator=torch.Generator().manual_seed(seed), **flags)


def default_inputs(spec, rows=6, event=None, seed=1, **flags):
    event = (37,) if event is None else event
    return inputs_for(spec, rows, event, torch.float32, seed, {**{k: v[0] for k, v in spec.flags.items()}, **flags})


def truth(spec, inputs):
    """The reference on float64 copies of the inputs."""
    known = inspect.signature(spec.reference).parameters
    wide = {
        name: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
        if name in known
    }
    return spec.outputs_of(spec.reference(**wide)), wide


def with_gradients(function, inputs, names, outputs_of, seed):
    """Outputs, and the gradients of a random combination of them."""
    leaves = {name: inputs[name].detach().clone().requires_grad_() for name in names if inputs.get(name) is not None}
    outputs = outputs_of(function(**{**inputs, **leaves}))
    live = [o for o in outputs.values() if o.requires_grad]
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(o.shape, generator=generator, dtype=torch.float32).to(o.dtype) for o in live]
    grads = torch.autograd.grad(live, list(leaves.values()), weights, retain_graph=True) if live else ()
    again = torch.autograd.grad(live, list(leaves.values()), weights) if live else ()
    for name, first, second in zip(leaves, grads, again, strict=True):
        assert torch.equal(first.nan_to_num(), second.nan_to_num()), f"a second backward changes the gradient of {name}"
    return outputs, dict(zip(leaves, grads, strict=True)), weights


def errors(spec, backend, call, folder):
    """Yields (what, precision class, dtype, error in units of the tolerance) of every output and gradient of a call."""
    rows, event, dtype, seed, flags = call
    inputs = inputs_for(spec, rows, event, dtype, seed, flags)
    expected, wide = truth(spec, inputs)
    fast = flags.get("math") == "fast"
    with running(backend, folder):
        results, grads, weights = with_gradients(spec.function, inputs, spec.gradients, spec.outputs_of, seed)
    for name, precision in spec.precisions(len(results)).items():
        precision = "fast" if fast and precision == "exact" else precision
        yield name, precision, results[name].dtype, error(results[name], expected[name], precision)
    if not grads:
        return
    leaves = {name: wide[name].requires_grad_() for name in grads}
    live = [o for o in spec.outputs_of(spec.reference(**wide)).values() if o.requires_grad]
    exact = torch.autograd.grad(live, list(leaves.values()), [w.double() for w in weights])
    for name, gradient in zip(leaves, exact, strict=True):
        assert grads[name].dtype is inputs[name].dtype
        precision = spec.gradient_precision
        yield f"gradient of {name}", precision, grads[name].dtype, error(grads[name], gradient, precision)


@every_backend
def test_matches_reference(spec, backend, folder):
    @settings(max_examples=examples_for(backend))
    @given(calls(spec, backend))
    def check(call):
        for what, _, _, size in errors(spec, backend, call, folder):
            assert size <= 1, what

    with running(backend, folder):  # skips before hypothesis starts
        pass
    check()


@every_op
def test_reference_gradient_is_right(spec):
    if not spec.gradients or spec.stops_gradient:
        return
    inputs = default_inputs(spec, rows=3, event=(5,))
    _, wide = truth(spec, inputs)
    names = [n for n in spec.gradients if wide.get(n) is not None]

    def function(*leaves):
        outputs = spec.outputs_of(spec.reference(**{**wide, **dict(zip(names, leaves, strict=True))}))
        return tuple(o for o in outputs.values() if o.is_floating_point())

    assert torch.autograd.gradcheck(function, [wide[n].requires_grad_() for n in names])


@every_twice_differentiable_op
def test_reference_second_gradient_is_right(spec):
    for flags in [{}, *({name: value} for name, values in spec.flags.items() for value in values[1:])]:
        _, wide = truth(spec, default_inputs(spec, rows=2, event=(5,), **flags))
        names = [n for n in spec.gradients if wide.get(n) is not None]

        def function(*leaves, wide=wide, names=names):
            return tuple(spec.outputs_of(spec.reference(**{**wide, **dict(zip(names, leaves, strict=True))})).values())

        leaves = [wide[n].requires_grad_() for n in names]
        many = sum(leaf.numel() for leaf in leaves) > 2000  # then along random directions, not one element at a time
        assert torch.autograd.gradgradcheck(function, leaves, fast_mode=many), flags


def second_gradients(function, inputs, names, outputs_of, seed):
    """Gradients of a random combination of the first gradients, by the inputs and by what weighted the outputs."""
    leaves = {name: inputs[name].detach().clone().requires_grad_() for name in names if inputs.get(name) is not None}
    outputs = {name: o for name, o in outputs_of(function(**{**inputs, **leaves})).items() if o.requires_grad}
    generator = torch.Generator().manual_seed(seed)

    def draw_like(x):  # multiples of 1/8: the same in every storage type
        return (torch.randint(-16, 17, x.shape, generator=generator) / 8).to(x.dtype)

    weights = {f"weight of {name}": draw_like(o).requires_grad_() for name, o in outputs.items()}
    grads = torch.autograd.grad(list(outputs.values()), list(leaves.values()), list(weights.values()), create_graph=True)
    wanted = {**leaves, **weights}
    directions = [draw_like(g) for g in grads]
    second = [
        torch.autograd.grad(grads, list(wanted.values()), directions, retain_graph=True, materialize_grads=True)
        for _ in range(2)
    ]
    for name, once, twice in zip(wanted, *second, strict=True):
        assert torch.equal(once.nan_to_num(), twice.nan_to_num()), f"a second pass changes the second gradient of {name}"
    return dict(zip(wanted, second[0], strict=True))


def second_errors(spec, backend, call, folder):
    """The same of every second gradient."""
    rows, event, dtype, seed, flags = call
    inputs = inputs_for(spec, rows, event, dtype, seed, flags)
    _, wide = truth(spec, inputs)
    with running(backend, folder):
        results = second_gradients(spec.function, inputs, spec.gradients, spec.outputs_of, seed)
    exact = second_gradients(spec.reference, wide, spec.gradients, spec.outputs_of, seed)
    for name, value in exact.items():
        precision = spec.gradient_precision
        yield f"second gradient of {name}", precision, results[name].dtype, error(results[name], value, precision)


@every_backend_twice
def test_second_gradients_match_reference(spec, backend, folder):
    @settings(max_examples=examples_for(backend))
    @given(calls(spec, backend))
    def check(call):
        for what, _, _, size in second_errors(spec, backend, call, folder):
            assert size <= 1, what

    with running(backend, folder):  # skips before hypothesis starts
        pass
    check()


@pytest.mark.parametrize("spec", [s for s in SPECS.values() if s.gradients and not s.double_backward], ids=lambda s: s.name)
def test_second_derivative_is_right_or_refused(spec):
    """Never zero in silence, although the incoming gradient is a constant."""
    inputs = default_inputs(spec, rows=3, event=(5,))
    leaves = {n: inputs[n].detach().clone().requires_grad_() for n in spec.gradients if inputs.get(n) is not None}
    outputs = [o for o in spec.outputs_of(spec.function(**{**inputs, **leaves})).values() if o.requires_grad]
    grads = torch.autograd.grad(outputs, list(leaves.values()), [torch.ones_like(o) for o in outputs], create_graph=True)
    with pytest.raises(RuntimeError, match="can be differentiated once"):
        sum(g.sum() for g in grads).backward()


class _RawCalls(TorchDispatchMode):
    """Collects the calls of fastgen's registered operators."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastgen":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


@every_backend
def test_opcheck(spec, backend, folder):
    if _native.missing() and backend != "triton":
        return
    recorder = _RawCalls()
    checked = set()
    with running(backend, folder):
        with recorder:
            for flags in [{}, *({k: v[-1]} for k, v in spec.flags.items())]:
                with_gradients(spec.function, default_inputs(spec, **flags), spec.gradients, spec.outputs_of, 0)
        assert recorder.calls, "no registered operator was called"
        for operator, args in recorder.calls:
            detached = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in args)
            form = [(a.shape, a.stride(), a.dtype) if isinstance(a, torch.Tensor) else a for a in args]
            # tracing, which costs most, asks only which arguments there are; every call is checked once, every such set traced
            tensors = [isinstance(a, torch.Tensor) for a in args]
            call, traced = f"{operator} {form}", f"{operator} {tensors}"
            if call in checked:
                continue
            cheap = {"test_utils": ("test_schema", "test_faketensor")} if traced in checked else {}
            torch.library.opcheck(operator, detached, **cheap)
            checked |= {call, traced}


@every_op
@pytest.mark.parametrize("grad", [False, True], ids=["fwd", "fwdbwd"])
def test_compiles_whole(spec, grad):
    inputs = default_inputs(spec)
    names = [n for n in spec.gradients if inputs.get(n) is not None] if grad else []
    if grad and not names:
        return

    def function(leaves, rest):
        return tuple(spec.outputs_of(spec.function(**leaves, **rest)).values())

    def run(call):
        leaves = {n: inputs[n].detach().clone().requires_grad_() for n in names}
        outputs = call(leaves, {k: v for k, v in inputs.items() if k not in names})
        live = [o for o in outputs if o.requires_grad]
        grads = torch.autograd.grad([o.sum() for o in live], list(leaves.values())) if live else ()
        return [*outputs, *grads]

    torch._dynamo.reset()
    compiled = run(torch.compile(function, fullgraph=True))
    for got, expected in zip(compiled, run(function), strict=True):
        assert torch.equal(got, expected)


@every_op
def test_compiles_without_key_and_draws_afresh(spec):
    inputs = default_inputs(spec)
    if inputs.pop("key", None) is None or spec.needs_key:
        return
    torch._dynamo.reset()
    compiled = torch.compile(lambda **kw: next(iter(spec.outputs_of(spec.function(**kw)).values())), fullgraph=True)
    assert not torch.equal(compiled(**inputs), compiled(**inputs))


@every_op
def test_key_none_follows_manual_seed(spec):
    inputs = default_inputs(spec)
    if inputs.pop("key", None) is None or spec.needs_key:
        return
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(next(iter(spec.outputs_of(spec.function(**inputs)).values())))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


@every_op
def test_autocast_changes_nothing(spec):
    inputs = default_inputs(spec)
    plain = with_gradients(spec.function, inputs, spec.gradients, spec.outputs_of, 0)
    with torch.autocast("cpu", torch.bfloat16):
        cast = with_gradients(spec.function, inputs, spec.gradients, spec.outputs_of, 0)
    for first, second in zip(plain[:2], cast[:2], strict=True):
        for name in first:
            assert torch.equal(first[name], second[name]), name


def _strided(x):
    """The same values in every other column of a larger tensor."""
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), math.nan, dtype=x.dtype)
    wide[..., ::2] = x
    return wide[..., ::2]


def _transposed(x):
    return x.transpose(0, -1).contiguous().transpose(0, -1)


def _channels_last(x):
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


@every_backend
@pytest.mark.parametrize("layout", [_strided, _transposed, _channels_last])
def test_layout_of_inputs_does_not_matter(spec, backend, layout, folder):
    rank = max(spec.event_ranks)
    inputs = default_inputs(spec, event=(3, 6, 7) if rank == 3 else (37,))
    moved = {
        k: layout(v) if isinstance(v, torch.Tensor) and v.is_floating_point() and v.dim() > 1 else v for k, v in inputs.items()
    }
    with running(backend, folder):
        plain = with_gradients(spec.function, inputs, spec.gradients, spec.outputs_of, 0)
        other = with_gradients(spec.function, moved, spec.gradients, spec.outputs_of, 0)
    for first, second in zip(plain[:2], other[:2], strict=True):
        for name in first:
            precision = "reduction" if first[name].dtype is torch.float64 else "elementwise"
            assert error(second[name], first[name], precision) <= 1, name


@every_native_op
def test_thread_count_does_not_matter(spec):
    if _native.missing():
        pytest.skip(_native.missing())
    before = torch.get_num_threads()
    largest = max(spec.sizes or (40_001,))
    for rows, event in ((1, (min(largest, 40_001),)), (700, (33,)), (3, (min(largest, 20_000),))):
        runs = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with use_backend("cpp"):
                runs.append(
                    with_gradients(spec.function, default_inputs(spec, rows, event), spec.gradients, spec.outputs_of, 0)
                )
        torch.set_num_threads(before)
        for other in runs[1:]:
            for first, second in zip(runs[0][:2], other[:2], strict=True):
                for name in first:
                    assert torch.equal(first[name], second[name]), name


@every_backend
def test_nan_stays_in_its_sample(spec, backend, folder):
    inputs = default_inputs(spec, rows=5, event=(19,))
    rowwise = [k for k, v in inputs.items() if isinstance(v, torch.Tensor) and v.is_floating_point() and v.shape[:1] == (5,)]
    if not rowwise or not spec.samplewise:
        return
    with running(backend, folder):
        clean = with_gradients(spec.function, inputs, spec.gradients, spec.outputs_of, 0)
        for name in rowwise:
            dirty = inputs[name].clone()
            dirty[2].view(-1)[-1] = math.nan
            spoilt = with_gradients(spec.function, {**inputs, name: dirty}, spec.gradients, spec.outputs_of, 0)
            for part in (0, 1):
                for output, value in spoilt[part].items():
                    if value.shape[:1] != (5,):
                        continue  # not one row per sample
                    others = [0, 1, 3, 4]
                    assert torch.equal(value[others], clean[part][output][others]), (name, output)
            if backend == "reference":  # there, the reference may not take a NaN
                assert any(v[2].isnan().any() for v in spoilt[0].values()), f"a NaN in {name} vanished"
                continue
            # it may go unread, such as the derivative at a knot of another bin: the reference knows
            expected, _ = truth(spec, {**inputs, name: dirty})
            for output, value in spoilt[0].items():
                assert bool(value[2].isnan().any()) == bool(expected[output][2].isnan().any()), (name, output)


@every_op
def test_inputs_are_not_changed(spec):
    inputs = default_inputs(spec)
    copies = {k: v.clone() for k, v in inputs.items() if isinstance(v, torch.Tensor)}
    with_gradients(spec.function, inputs, spec.gradients, spec.outputs_of, 0)
    for name, value in copies.items():
        assert torch.equal(inputs[name], value), name


@every_op
def test_explain_names_what_runs(spec):
    text = explain(spec.name, **default_inputs(spec))
    assert text.startswith(f"{spec.name} runs on {'reference' if _native.missing() or 'cpp' not in spec.backends else 'cpp'}")
    assert all(f"  {backend}: " in text for backend in ("triton", "cpp", "reference"))


@every_op
def test_impossible_choice_says_why(spec):
    inputs = default_inputs(spec)
    wide = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
    if "dtype" in wide:
        wide["dtype"] = torch.float64
    if torch.float64 in spec.dtypes:
        return
    with pytest.raises(ValueError, match=rf"{spec.name}: backend 'cpp' was asked for but cannot serve: .*float64"):
        spec.function(**wide, backend="cpp")
    with pytest.raises(ValueError, match="backend must be one of"):
        spec.function(**inputs, backend="cuda")


@pytest.mark.slow
@every_native_op
@pytest.mark.parametrize("isa", [i for i in _native.available_isas() if i != "neon"])
def test_memory_is_respected(spec, isa, folder):
    """Under AddressSanitizer and UndefinedBehaviorSanitizer, where every buffer is an allocation of its own."""
    name = f"sanitized-{isa}"

    @settings(max_examples=max(40, settings.default.max_examples))
    @given(calls(spec))
    def check(call):
        inputs = inputs_for(spec, *call)
        with use_backend("cpp"), _native.use_isa(name):
            with_gradients(spec.function, inputs, spec.gradients, spec.outputs_of, 0)
            if spec.double_backward:
                second_gradients(spec.function, inputs, spec.gradients, spec.outputs_of, 0)

    with _native.extra_table(name, emulation.sanitized(isa, spec.name, folder).table()):
        check()
