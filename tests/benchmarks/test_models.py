"""Comparisons of whole models in miniature: every side computes the same, and what is wrong or missing costs a line."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from benchmarks.models import __main__ as models_main
from benchmarks.models import diffusion, runner
from benchmarks.models.__main__ import CASES
from benchmarks.models.case import Case, Goal, Side
from benchmarks.models.common import difference, training_step
from benchmarks.models.runner import WRONG, ModelRow, figure_table, product_share, row_table, run_case
from benchmarks.parity import ParityError
from fastgen import ops
from fastgen.ops import _native


def case_of(sides, goals=(), **more):
    return Case("case", "work", "one call", lambda tiny: sides, goals, **more)


SIDES = [(name, side) for name, case in CASES.items() for side in case.sides(True)]


@pytest.mark.parametrize(("case", "side"), SIDES, ids=[f"{case}-{side}".replace(" ", "_") for case, side in SIDES])
def test_sides_compute_the_same(case, side):
    for package in ("diffusers", "zuko", "nflows", "normflows", "FrEIA"):
        if side == package or (package == "diffusers" and CASES[case] in diffusion.CASES):
            pytest.importorskip(package)
    made = CASES[case].sides(True)[side]()
    if made.check is not None:
        assert 0 <= made.check() < 2e-2
    made.call()


def test_goals_name_their_sides():
    for case in CASES.values():
        for goal in case.goals:
            assert {goal.ours, *goal.against} <= set(case.sides(True)), case.name


def test_missing_and_wrong_sides_cost_a_line():
    def missing():
        import a_package_that_is_not_there

        return a_package_that_is_not_there

    def wrong():
        return Side(lambda: None, lambda: difference(torch.zeros(3), torch.ones(3), 1e-3))

    sides = {"good": lambda: Side(lambda: torch.ones(9) @ torch.ones(9)), "missing": missing, "wrong": wrong}
    rows = {row.side: row for row in run_case(case_of(sides), tiny=True)}
    assert rows["good"].status == "ok"
    assert rows["good"].median_ms > 0
    assert rows["missing"].status.startswith("not installed: a_package_that_is_not_there")
    assert rows["wrong"].status.startswith(WRONG)
    assert rows["wrong"].median_ms is None
    text = row_table(list(rows.values()))
    assert "case  missing: not installed" in text


def test_share_of_products():
    a = torch.randn(400, 400)
    assert product_share(lambda: a @ a) > 0.3
    assert product_share(lambda: torch.nn.functional.conv2d(a[None, None], a[None, None, :3, :3])) > 0.3
    assert product_share(lambda: a + a) is None
    parts = product_share(lambda: (a @ a, [a.exp().sin() for _ in range(60)]))
    assert 0 < parts < product_share(lambda: a @ a)


@pytest.mark.skipif(_native.missing() is not None, reason="no compiled kernels")
def test_share_counts_our_own_products():
    x, weight = torch.randn(8, 64, 48, 48), torch.randn(64, 64, 3, 3)  # milliseconds, so that what surrounds them is little
    assert product_share(lambda: ops.winograd_conv2d(x, weight, backend="cpp")) > 0.3
    tokens = torch.randn(16, 512, 4, 8)
    assert product_share(lambda: ops.attention(tokens, tokens, tokens, backend="cpp")) > 0.3


PEAK = """
import torch
from benchmarks.models import runner
from benchmarks.models.case import Case, Side

held = torch.ones(1 << 22)

def call():
    first = torch.ones(1 << 23)
    second = first + 1
    del first
    return (second + held.sum()).sum().item()

print(runner.peak_of_side(Case("case", "work", "timed", lambda tiny: {"side": lambda: Side(call)}, ()), "side"))
"""


@pytest.mark.skipif(not runner.Path("/proc/self/clear_refs").exists(), reason="needs /proc")
def test_peak_is_what_a_call_adds():
    """In a process of its own: optimized networks have this one keep the memory that it frees."""
    found = subprocess.run([sys.executable, "-c", PEAK], cwd=runner.ROOT, capture_output=True, text=True, check=True)
    assert 0.8 * (2 << 25) < int(found.stdout) < 1.5 * (3 << 25)


def test_end_to_end(tmp_path, capsys):
    out = tmp_path / "results" / "models.json"
    assert models_main.main(["--tiny", "--figures", "--case", "flow-depth", "--json", str(out)]) == 0
    text = capsys.readouterr().out
    assert "| gradients of RealNVP" in text
    rows = [ModelRow(**row) for row in json.loads(out.read_text())["models"]]
    assert [row.side for row in rows] == list(CASES["flow-depth"].sides(True))
    for row in rows:
        assert 0 < row.p20_ms <= row.median_ms <= row.p80_ms
        assert row.peak_bytes >= 0
        assert 0 < row.product_share < 1
        assert row.threads == torch.get_num_threads()


def test_figures_are_those_of_the_same_round():
    goals = (
        Goal("ours", ("slow", "quick"), 3),
        Goal("ours", ("slow", "quick"), 2, of="memory"),
        Goal("slow", ("ours",), 9, growth=True),
    )

    def row(side, rounds, peak):
        return ModelRow("case", "work", "one call", side, median_ms=rounds[1], rounds_ms=rounds, peak_bytes=peak)

    rows = [
        row("ours", [1.0, 2.0, 4.0], 4 << 20),
        row("slow", [9.0, 18.0, 30.0], 6 << 20),
        row("quick", [4.0, 8.0, 8.0], 9 << 20),
    ]
    time, memory, growth = figure_table([case_of({}, goals)], rows).splitlines()[2:]
    assert "| quick | at least 3x | 4.00x (2.80 to 4.00) |" in time
    assert "| slow | at least 2x | 1.50x (4 MiB against 6), not reached |" in memory
    assert "| ours | at most 9x | 9.00x (8.10 to 9.00) |" in growth
    assert "not measured" in figure_table([case_of({}, goals)], []).splitlines()[2]


def test_difference():
    a = torch.tensor([3.0, 4.0])
    assert difference(a * 1.01, a, 0.1) == pytest.approx(0.01, rel=1e-4)
    with pytest.raises(ParityError, match="differ by"):
        difference(a * 1.01, a, 0.001)
    with pytest.raises(ParityError, match="shape"):
        difference(a[:1], a, 1)
    with pytest.raises(ParityError, match="nan"):
        difference(a * torch.nan, a, 1)


def test_training_step_trains():
    weight = torch.nn.Parameter(torch.ones(2))
    call = training_step([weight], lambda: weight.square().sum())
    assert call() > call()


@pytest.mark.parametrize(
    ("arguments", "words"), [(["--case", "nothing"], "--case takes some of"), (["--threads", "0"], "--threads must be")]
)
def test_bad_arguments(arguments, words, capsys):
    assert models_main.main(arguments) == 2
    assert words in capsys.readouterr().err
