"""The Triton kernels as the compiler leaves them: no spills, 16-byte accesses, no byte moved for nothing."""

from __future__ import annotations

import json
import os
import pkgutil
import subprocess
import sys

import fastgen.kernels
import pytest

from benchmarks.machine import ROOT
from benchmarks.static import StaticReport, _code, _tile_traffic, _width

OPS = [m.name for m in pkgutil.iter_modules(fastgen.kernels.__path__) if not m.name.startswith("_")]


def reports(tmp_path, *arguments):
    """The report of a process of its own, in which Triton compiles instead of interpreting."""
    out = tmp_path / "static.json"
    done = run(*arguments, "--json", str(out))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return [StaticReport(**r) for r in json.loads(out.read_text())]


def check(found):
    assert found
    for r in found:
        where = f"{r.kernel} ({r.case}) on sm_{r.arch}"
        assert r.spills == 0, where
        assert r.registers > 0, where
        assert r.bytes_per_element <= 1.01 * r.minimum_bytes_per_element, where
        if r.wide_wanted:  # what reads rows of K - 1 derivatives or shifted ones, or writes one number a column, cannot
            assert r.wide_share == 1, where
            assert any("16" in kind for kind in r.accesses), where
    assert {r.op for r in found if not r.wide_wanted and r.case.startswith("float32")} <= {
        *("moments", "rq_spline", "rq_spline_rebuild", "upfirdn2d")
    }


def test_every_kernel_on_sm_90(tmp_path):
    found = reports(tmp_path, "--arch", "90", "--case", "float32")
    check(found)
    assert {r.op for r in found} == set(OPS)


@pytest.mark.slow
def test_every_kernel_everywhere(tmp_path):
    found = reports(tmp_path)
    check(found)
    assert {r.arch for r in found} == {80, 90, 100}
    assert {r.op for r in found} == set(OPS)


def run(*arguments):
    """``python -m benchmarks.static`` in a process where Triton compiles instead of interpreting."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.static", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("--op", "nothing"), "no Triton kernels for op 'nothing'"), (("--arch", "75"), "75")],
)
def test_unknown_op_and_architecture(arguments, message):
    done = run(*arguments)
    assert done.returncode == 2
    assert message in done.stderr


def test_disassembly_is_read_right():
    sass = """
f:
.text.f:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   LDG.E.128 R4, desc[UR6][R2.64] ;
        /*0020*/              @P0 FADD R4, R4, R5 ;
        /*0030*/              @P1 BRA `(.L_x_1) ;
        /*0040*/                   STG.E.U16 desc[UR6][R2.64], R4 ;
        /*0050*/                   EXIT ;
.L_x_2:
        /*0060*/                   BRA `(.L_x_2);
        /*0070*/                   NOP;
$__internal_0_$__slow:
        /*0080*/                   MUFU.RSQ R4, R4 ;
"""
    main_code, cold, loops = _code(sass)
    assert [address for address, _ in main_code] == [0, 16, 32, 48, 64, 80, 96]
    assert cold == ["MUFU.RSQ R4, R4"]
    assert loops == [(16, 48)]
    assert [_width(o) for o in ("LDG.E.128", "STG.E.U16", "LDG.E.64", "LDG.E", "STG.E.U8")] == [16, 2, 8, 4, 1]


def test_traffic_is_read_from_the_ir():
    ir = """
  tt.func public @k() {
    %0 = tt.load %p : !tt.ptr<i64> loc(#1)
    %1 = scf.for %i = %a to %b step %c iter_args(%x = %y) -> (f32)  : i32 {
      %2 = tt.load %q, %m, %o : tensor<2x1024x!tt.ptr<f32>, #blocked> loc(#1)
    }
    tt.store %q, %2, %m : tensor<2x1x!tt.ptr<bf16>, #blocked> loc(#1)
  }
"""
    assert _tile_traffic(ir) == [(1, 8, False), (2048, 4, True), (2, 2, False)]
