"""docs/accuracy.md says what was measured, and the tolerances are neither below that nor far above."""

from __future__ import annotations

import re

import pytest
import torch

from tests.emulation import ROOT
from tests.ops import accuracy
from tests.ops.tolerances import BOUNDS

FACTOR = 25  # as docs/accuracy.md says
TEXT = (ROOT / "docs/accuracy.md").read_text()
ROWS = {
    (row[0], getattr(torch, row[1])): row[2:]
    for row in (re.split(r"\s*\|\s*", line.strip("| ")) for line in TEXT.splitlines() if line.startswith("| "))
    if row[0] != "class"
}


def test_every_tolerance_was_measured():
    assert f"more than {FACTOR} times" in TEXT
    assert ROWS.keys() == BOUNDS.keys()
    for key, (relative, absolute) in BOUNDS.items():
        assert ROWS[key][:2] == [f"{relative:.2g}", f"{absolute:.2g}"], key


@pytest.mark.parametrize("key", ROWS, ids=lambda key: f"{key[0]}-{str(key[1]).removeprefix('torch.')}")
def test_tolerance_is_near_what_was_measured(key):
    worst = float(ROWS[key][2])
    assert worst <= 1
    assert worst == 0 or worst >= 1 / FACTOR


def test_a_measurement_finds_errors(tmp_path, capsys, monkeypatch):
    """Of a kernel that is off by more than its tolerance, and of none."""
    arguments = ["--op", "uniform", "--op", "diffuse", "--backend", "cpp:scalar", "--examples", "5"]
    assert accuracy.main([*arguments, "--json", str(tmp_path / "worst.json")]) == 0
    assert "| elementwise | float32 |" in capsys.readouterr().out
    monkeypatch.setitem(BOUNDS, ("elementwise", torch.float32), (0.0, 1e-12))
    assert accuracy.main(arguments) == 1
    assert "diffuse on cpp:scalar" in capsys.readouterr().err
