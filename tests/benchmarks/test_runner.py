"""The runner end to end on tiny work: what it prints and writes, and what it refuses to time."""

from __future__ import annotations

import importlib
import json
import math
import time

import pytest
import torch

from benchmarks import __main__ as runner_main
from benchmarks import peers, report, revision
from benchmarks.composites import composites, measured
from benchmarks.figures import FIGURES
from benchmarks.machine import LoadWatch, level_of
from benchmarks.measure import Timing, peak_bytes, quantiles, time_rounds
from benchmarks.parity import ParityError, check_normal
from benchmarks.peer import Peer
from benchmarks.peers import PEERS
from benchmarks.runner import ALL, OWN, WRONG, Row, run_workload
from benchmarks.workload import SETS, Workload, bind, sweep
from fastgen.ops import _native, all_specs, reparameterize
from fastgen.random import key

FAST = ["--seconds", "0.001", "--rounds", "1"]
TINY = Workload("reparameterize", 64, (16,), "fwdbwd")
needs_kernels = pytest.mark.skipif(_native.missing() is not None, reason="no compiled kernels")


def run(*arguments):
    return runner_main.main([*FAST, *arguments])


@needs_kernels
def test_end_to_end(tmp_path, capsys):
    out = tmp_path / "results" / "run.json"
    assert run("--op", "reparameterize", "--size", "64x16", "--backend", "reference,cpp,peers", "--json", str(out)) == 0
    text = capsys.readouterr().out
    assert "control (fused op against itself)" in text
    assert "eager PyTorch" in text

    document = json.loads(out.read_text())
    assert document["schema"] == report.SCHEMA
    machine = document["machine"]
    assert {"cpu", "isa", "threads", "torch", "commit", "dirty", "date", "caches"} <= set(machine)
    rows = [row for row in document["rows"] if row["status"] == "ok"]
    providers = {"cpp", "reference", "eager PyTorch", "torch.compile of it"}
    nothing = ("fwdbwd", "an autograd function that computes nothing")
    assert {(r["mode"], r["provider"]) for r in rows} == {(m, p) for m in ("fwd", "fwdbwd") for p in providers} | {nothing}
    for row in rows:
        assert 0 < row["p20_us"] <= row["median_us"] <= row["p80_us"]
        assert row["gb_per_s"] == pytest.approx(row["bytes_moved"] / row["median_us"] / 1e3)
        assert row["copy_share"] == pytest.approx(row["gb_per_s"] / row["copy_gb_per_s"])
        assert row["control"] > 0
        assert isinstance(row["contended"], bool)
        assert row["threads"] == torch.get_num_threads()
        assert (row["fused"], row["isa"]) == (row["provider"] == "cpp", machine["isa"])
        assert row["peak_bytes"] >= 64 * 16 * 4
    assert all(row["ratio"] == 1 for row in rows if row["fused"])
    assert report.read(out)[1] == [Row(**row) for row in document["rows"]]


def spoiled(spoil):
    """What monkeypatch.setattr takes to spoil the outputs of reparameterize's kernels."""
    reparameterize(
        torch.zeros(1, 1), torch.zeros(1, 1), key(0)
    )  # from its first use on, attempt is a function of the extension
    record = importlib.import_module("fastgen.ops.reparameterize")._record
    attempt = record.attempt

    def wrong(*arguments):
        outputs = attempt(*arguments)
        if outputs:
            spoil(*outputs)
        return outputs

    return record, "attempt", wrong


@needs_kernels
def test_wrong_kernel_is_not_timed(monkeypatch, capsys):
    def off(z, kl):
        z[-1, -1] += 1e-3

    monkeypatch.setattr(*spoiled(off))
    assert run("--op", "reparameterize", "--size", "64x16", "--mode", "fwd", "--backend", "reference,cpp") == 1
    assert "z is off by" in capsys.readouterr().out
    [row] = run_workload(Workload("reparameterize", 64, (16,)), backends=["reference", "cpp"], seconds=0, min_rounds=1)
    assert row.provider == ALL
    assert row.status.startswith(WRONG)
    assert row.median_us is None


@needs_kernels
def test_wrong_gradient_is_not_timed(monkeypatch):
    def off(z, kl):
        z.grad_fn.register_hook(lambda grads, _: (grads[0], grads[1] * 1.001, *grads[2:]))

    monkeypatch.setattr(*spoiled(off))
    [row] = run_workload(TINY, backends=["cpp"], seconds=0, min_rounds=1)
    assert row.status.startswith(WRONG)
    assert "gradient of log_var" in row.status


def test_missing_and_wrong_peers_cost_one_line(monkeypatch):
    def missing(inputs, mode):
        import a_package_that_is_not_there

        return a_package_that_is_not_there

    def zeros(inputs, mode):
        return lambda: (torch.zeros_like(inputs["mean"]), torch.zeros(len(inputs["mean"])))

    monkeypatch.setitem(PEERS, "reparameterize", [Peer("missing", missing), Peer("wrong", zeros)])
    rows = run_workload(Workload("reparameterize", 4, (3,)), backends=["reference", "peers"], seconds=0, min_rounds=1, sets=2)
    status = {row.provider: row.status for row in rows}
    assert status["reference"] == "ok"
    assert status["missing"].startswith("not installed: a_package_that_is_not_there")
    assert status["wrong"].startswith(WRONG)


def test_backend_that_cannot_serve_says_why(monkeypatch):
    monkeypatch.setattr(_native, "missing", lambda: "no kernels here")
    rows = run_workload(Workload("normal", 4, (3,)), backends=["reference", "cpp"], seconds=0, min_rounds=1, sets=2)
    status = {row.provider: row.status for row in rows}
    assert "no kernels here" in status["cpp"]
    assert status["reference"] == "ok"
    assert all(row.ratio is None for row in rows)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--op", "nothing"], "--op takes some of"),
        (["--mode", "bwd"], "--mode takes some of"),
        (["--backend", "cuda"], "--backend takes some of"),
        (["--threads", "0"], "--threads must be a whole number of at least 1"),
        (["--size", "7x7x7"], "no workload is left"),
        (["--base", "no-such-revision"], "git worktree"),
    ],
)
def test_bad_arguments(arguments, words, capsys):
    assert run(*arguments) == 2
    assert words in capsys.readouterr().err


def test_figures_refer_to_what_exists():
    providers = {"reference", "compile"}
    for figure in FIGURES:
        workload = figure.workload
        assert figure.op in measured()
        assert workload.has_mode()
        assert all(value in workload.spec.flags[name] for name, value in figure.flags)
        named = {p.name for p in PEERS.get(figure.op, []) if p.when(dict(figure.flags)) and figure.mode in p.modes}
        assert set(figure.against) <= named | providers, figure.work
        assert workload.inputs("cpu", 1)
        assert figure.floor is None or figure.floor != figure.target
    assert set(PEERS) <= set(measured())


def _in_miniature(workload):
    rows, event = min(workload.rows, 4), workload.event
    event = (event[0], 4, 4) if len(event) == 3 else (min(event[0], 16),)
    return Workload(workload.op, rows, event, workload.mode, workload.flags, workload.dtype)


@needs_kernels
@pytest.mark.parametrize(
    "workload", dict.fromkeys(_in_miniature(figure.workload) for figure in FIGURES), ids=lambda workload: workload.title
)
def test_figures_in_miniature(monkeypatch, workload):
    pytest.importorskip("diffusers")
    quick = [peer for peer in PEERS.get(workload.op, []) if "compile" not in peer.name]
    monkeypatch.setitem(PEERS, workload.op, quick)
    rows = run_workload(workload, backends=["cpp", "peers"], seconds=0, min_rounds=1, sets=2)
    assert [row.provider for row in rows if row.fused] == ["cpp" if workload.spec.backends else OWN]
    for row in rows:
        assert row.status == "ok" or row.status.startswith("not installed: "), (row.provider, row.status)


@needs_kernels
def test_compiled_step_does_the_same():
    rows = run_workload(
        Workload("denoise", 2, (3, 4, 4), flags=(("history", 0), ("clamp", 1.0))),
        backends=["cpp", "peers"], seconds=0, min_rounds=1, sets=1,
    )  # fmt: skip
    assert {row.provider: row.status for row in rows}["torch.compile of it"] == "ok"


@needs_kernels
def test_figure_table(capsys):
    assert run("--figures", "--op", "reparameterize", "--size", "4x16") in (0, 1)
    table = capsys.readouterr().out.split("\n\n")[-1]
    assert table.count("\n| ") >= 2
    for line in table.splitlines():
        assert line.count("|") == 7 or not line.startswith("|")


def test_figures_time_what_they_name(monkeypatch):
    asked = {}

    def record(workload, *, backends, peers, **_):
        asked[workload] = backends, peers
        return []

    monkeypatch.setattr(runner_main, "run_workload", record)
    assert run("--figures") == 0
    assert set(asked) == {figure.workload for figure in FIGURES}
    for figure in FIGURES:
        backends, peers = asked[figure.workload]
        assert set(figure.against) <= peers
        assert ("reference" in backends) == any("reference" in f.against for f in FIGURES if f.workload == figure.workload)
    assert run("--figures", "--backend", "reference", "--op", "normal") == 0
    assert asked[FIGURES[0].workload][0] == ["reference"]


def test_figure_takes_the_fastest_rival():
    def row(provider, **values):
        common = {
            "op": "normal",
            "shape": "4x3",
            "size": "extra",
            "cache": "L1",
            "mode": "fwd",
            "dtype": "float32",
            "flags": {},
        }
        return Row(**common, provider=provider, median_us=1.0, p20_us=1.0, p80_us=1.0, ratio_p20=0, ratio_p80=9, **values)

    figure = report.Figure("work", "normal", 4, (3,), ("slow", "quick"), 5, floor=3)
    rows = [row("cpp", fused=True, ratio=1.0, copy_share=0.5), row("slow", ratio=8.0), row("quick", ratio=4.0)]
    line = report.figure_table([figure], rows).splitlines()[-1]
    assert "| quick | 5x, at least 3x | 4.00x" in line
    assert "not reached" not in line
    rows[2].ratio = 2.5
    assert "2.50x (0.00 to 9.00), not reached" in report.figure_table([figure], rows)


def test_sweep_covers_every_op_and_adds_the_figures():
    found = sweep(list(all_specs()), ["fwd", "fwdbwd"], [figure.workload for figure in FIGURES])
    assert {w.op for w in found} == set(all_specs())
    assert {figure.workload for figure in FIGURES if figure.op not in composites()} <= set(found)
    assert {w.op for w in sweep(list(measured()), ["fwd"])} == {*all_specs(), *composites()}
    assert len(set(found)) == len(found)
    assert not [w for w in found if w.mode == "fwdbwd" and not w.spec.gradients]
    assert {w.size for w in sweep(["normal"], ["fwd"], size="large")} == {"large"}


def test_rounds_interleave_and_rotate():
    seen = []
    providers = {
        name: [lambda name=name, i=i: seen.append((name, i)) or math.factorial(9000) for i in range(3)] for name in "ab"
    }
    times = time_rounds(providers, seconds=0, min_rounds=6)
    assert {len(t.seconds) for t in times.values()} == {6}
    assert {t.inner for t in times.values()} == {1}
    rounds = [seen[i : i + 2] for i in range(len(seen) - 12, len(seen), 2)]
    assert all({name for name, _ in pair} == {"a", "b"} for pair in rounds)
    assert [{i for _, i in pair} for pair in rounds] == [{0}, {1}, {2}] * 2
    assert len({pair[0][0] for pair in rounds}) == 2, "the order is not random"


def test_long_calls_are_in_two_rounds():
    ran = {"long": 0, "known": 0, "short": 0}

    def call(name, seconds):
        def work():
            ran[name] += 1
            time.sleep(seconds)

        return [work]

    calls = {name: call(name, seconds) for name, seconds in (("long", 0.3), ("known", 0.0), ("short", 0.0))}
    times = time_rounds(calls, seconds=0, min_rounds=4, known={"known": 3.0}, patience=0.2)
    assert {name: len(t.seconds) for name, t in times.items()} == {"long": 2, "known": 2, "short": 4}
    assert (ran["long"], ran["known"]) == (1 + 2, 2), "a call that is known is not run to find out"
    assert times["long"].over(times["short"]).median > 1


def test_arithmetic_needs_one_input_set():
    small, large = (Workload("sqrtm", 1, (n,), dtype="float64") for n in (16, 128))
    assert (len(small.inputs("cpu")), len(large.inputs("cpu"))) == (SETS, 1)


def test_op_without_kernels_is_timed_as_it_is():
    workload = Workload("sqrtm", 2, (8,), dtype="float64")
    rows = run_workload(workload, backends=["reference", "cpp"], seconds=0, min_rounds=1)
    own, reference = rows
    assert (own.provider, own.fused, own.ratio) == (OWN, True, 1)
    assert own.control > 0
    assert (reference.provider, reference.fused) == ("reference", False)
    assert own.gemm_share == pytest.approx(own.operations / own.median_us / 1e3 / own.gemm_gflop_per_s)
    assert "of GEMM" in report.row_table(rows)
    assert [row.provider for row in run_workload(workload, backends=["reference"], seconds=0, min_rounds=1)] == ["reference"]


@needs_kernels
def test_composite_passes_the_gate_of_ops(monkeypatch):
    from fastgen import ops

    assert not set(composites()) & set(ops.all_specs()), "a composite is no op"
    workload = Workload("diffusion_objective", 4, (3, 4, 4), "fwdbwd", flags=(("kept", False),))
    monkeypatch.setitem(PEERS, "diffusion_objective", [])
    backends = ["reference", "cpp", "peers"]
    rows = {row.provider: row for row in run_workload(workload, backends=backends, seconds=0, min_rounds=1)}
    assert {name: row.status for name, row in rows.items()} == {"cpp": "ok", "reference": "ok"}
    assert rows["cpp"].copy_share > 0

    def wrong(model_out, *rest, **options):  # the right loss, but a gradient that is 0.1 % too large
        return ops.diffusion_loss(1.001 * model_out - 0.001 * model_out.detach(), *rest, **options)

    monkeypatch.setattr("benchmarks.composites.diffusion_loss", wrong)
    [row] = run_workload(workload, backends=["cpp"], seconds=0, min_rounds=1)
    assert row.status.startswith(WRONG)
    assert "gradient of model_out" in row.status


def test_short_calls_are_timed_in_loops():
    times = time_rounds({"nothing": [lambda: None]}, seconds=0, min_rounds=2)
    assert times["nothing"].inner > 1000


def test_statistics():
    found = quantiles([5.0, 1.0, 2.0, 4.0, 3.0])
    assert (found.p20, found.median, found.p80) == pytest.approx((1.8, 3.0, 4.2))
    ratio = Timing([2.0, 8.0, 4.0], 1).over(Timing([1.0, 2.0, 4.0], 1))
    assert ratio.median == 2.0, "the median of the ratios, not the ratio of the medians"


def test_peak_memory():
    def call():
        first = torch.empty(1 << 18)
        second = torch.empty(1 << 17)
        del first
        return second, torch.empty(1 << 16)

    assert peak_bytes(call, "cpu") == 6 << 18


def test_gradients_have_the_same_weights_in_any_precision():
    inputs = TINY.inputs("cpu", 1)[0]
    plain = TINY.for_reference(inputs)
    narrow = bind(TINY.spec.reference, plain, "fwdbwd", TINY.spec.gradients)()
    wide = {k: v.double() if v.is_floating_point() else v for k, v in plain.items()}
    for a, b in zip(narrow, bind(TINY.spec.reference, wide, "fwdbwd", TINY.spec.gradients)(), strict=True):
        assert torch.allclose(a.double(), b, rtol=1e-4, atol=1e-4)


def test_normal_check_finds_what_is_not_normal():
    z = torch.randn(64, 1024)
    check_normal(z, (64, 1024))
    for wrong in (z * 1.05, z + 0.05, torch.rand(64, 1024) * 12**0.5 - 3**0.5, z.abs()):
        with pytest.raises(ParityError):
            check_normal(wrong, (64, 1024))
    with pytest.raises(ParityError, match="shape"):
        check_normal(z, (64, 1023))


def test_peer_checks_find_other_work():
    inputs = Workload("reparameterize", 64, (16,)).inputs("cpu", 1)[0]
    check = peers._check_reparameterize
    check(lambda: peers._eager_reparameterize)(inputs)
    with pytest.raises(ParityError, match="kl differs"):
        check(lambda: lambda m, v, e: (peers._eager_reparameterize(m, v, e)[0], torch.zeros(len(m))))(inputs)


def test_load_is_noticed(monkeypatch):
    monkeypatch.setattr("os.getloadavg", lambda: (3.0, 0.0, 0.0))
    assert "load is 3.00" in LoadWatch.busy_before(2, started=True)
    assert LoadWatch.busy_before(3, started=False)


def test_cache_levels(monkeypatch):
    monkeypatch.setattr("benchmarks.machine.caches", lambda: {"L1": 100, "L2": 1000})
    assert [level_of(n) for n in (100, 101, 1001)] == ["L1", "L2", "DRAM"]


def test_changes_pair_what_both_sides_timed():
    def rows(**times):
        common = {
            "op": "normal",
            "shape": "4x3",
            "size": "extra",
            "cache": "L1",
            "mode": "fwd",
            "dtype": "float32",
            "flags": {},
        }
        return [Row(**common, provider=name, median_us=value) for name, value in times.items()]

    pairs = [(rows(cpp=2.0, old=1.0), rows(cpp=1.0, new=1.0)), (rows(cpp=6.0), rows(cpp=2.0)), (rows(cpp=8.0), rows(cpp=2.0))]
    [change] = revision.changes(pairs)
    assert (change.provider, change.ratio.median, change.now_us) == ("cpp", 3.0, 2.0)
    assert "3.000" in revision.table([change], "HEAD")


@pytest.mark.parametrize(
    ("scheduler", "flags"),
    [
        ("DDPMScheduler", (("history", 0), ("clamp", 1.0))),
        ("DDIMScheduler", (("history", 0), ("deterministic", True))),
        ("DPMSolverMultistepScheduler", (("deterministic", True),)),
    ],
)
def test_schedulers_are_checked(monkeypatch, scheduler, flags):
    cls = getattr(pytest.importorskip("diffusers"), scheduler)
    workload = Workload("denoise", 2, (3, 4, 4), flags=flags)
    [peer] = [p for p in PEERS["denoise"] if scheduler in p.name and p.when(dict(flags))]
    inputs = workload.inputs("cpu", 1)[0]
    peer.check(inputs)
    step = cls.step

    def off(self, *args, **kwargs):
        out = step(self, *args, **kwargs)
        out.prev_sample += 1e-2
        return out

    monkeypatch.setattr(cls, "step", off)
    with pytest.raises(ParityError, match="x_next differs"):
        peer.check(inputs)


def test_objective_is_checked(monkeypatch):
    diffusers = pytest.importorskip("diffusers")
    [peer] = PEERS["diffusion_objective"]
    inputs = Workload("diffusion_objective", 2, (3, 4, 4), "fwdbwd").inputs("cpu", 1)[0]
    peer.check(inputs)
    add_noise = diffusers.DDPMScheduler.add_noise
    monkeypatch.setattr(diffusers.DDPMScheduler, "add_noise", lambda self, x, eps, t: add_noise(self, x, eps, t - t.min()))
    with pytest.raises(ParityError, match="x_t differs"):
        peer.check(inputs)
