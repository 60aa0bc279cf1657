"""Kernels that run in another process: NEON under qemu-user on x86-64, and any instruction set under sanitizers.

The tables made here look like those of ``fastgen._C``, so that the contract test runs through them unchanged.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import importlib.util
import os
import platform
import shutil
import struct
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
NATIVE = ROOT / "tests/native"
FLAGS = {
    "neon": ["-DFASTGEN_NEON"],
    "scalar": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c", "-mbmi2"],
    "avx512": ["-march=x86-64-v4"],
}
COMMON = ["-std=c++17", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"]


class Remote:
    """A harness process and the kernels it offers."""

    def __init__(self, command: list[str]) -> None:
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def table(self) -> dict[str, Any]:
        from fastgen import _C

        return {name: functools.partial(self.call, name, signature) for name, signature in _C.signatures().items()}

    def call(self, name: str, signature: str, *args: Any) -> None:
        assert len(args) == len(signature), (name, signature, args)
        request, buffers = [struct.pack("<q", len(name)), name.encode()], []
        for letter, value in zip(signature, args, strict=True):
            if letter == "r":
                request.append(struct.pack("<d", value))
            elif letter == "i":
                request.append(struct.pack("<q", value))
            elif value is None:
                request.append(struct.pack("<q", -1))
            else:
                buffers.append(value)
                request += [struct.pack("<q", value.nbytes), ctypes.string_at(value.data_ptr(), value.nbytes)]
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            stdin.write(b"".join(request))
            stdin.flush()
        except BrokenPipeError:
            self.fail(name)
        for tensor in buffers:
            data = stdout.read(tensor.nbytes)
            if len(data) != tensor.nbytes:
                self.fail(name)
            ctypes.memmove(tensor.data_ptr(), data, tensor.nbytes)

    def fail(self, name: str) -> None:
        errors = self.process.stderr.read().decode() if self.process.stderr else ""
        raise RuntimeError(f"the harness died in {name}, exit {self.process.wait()}:\n{errors[-4000:]}")


def build(isa: str, compiler: str, flags: list[str], folder: Path, ops: Sequence[str] = ()) -> Path:
    """Compile the harness and one instruction set's kernels: those of the named ops, or all. Several processes may ask for the
    same: one builds, the others wait for it.
    """
    program = folder / "-".join(["harness", isa, Path(compiler).name, *ops])
    parts = program.with_suffix(".parts")
    parts.mkdir(exist_ok=True)
    with (parts / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if program.exists():
            return program
        ops = ops or sorted(header.stem for header in (ROOT / "csrc/ops").glob("*.h"))
        (parts / "units.inc").write_text("".join(f"UNIT({isa}, {op})\n" for op in ops))

        def compile_one(op: str | None) -> Path:
            source = "csrc/unit.cpp" if op else "tests/native/harness.cpp"
            names = [f"-DFASTGEN_ISA={isa}", f"-DFASTGEN_OP={op}", f"-I{NATIVE}"] if op else [f"-I{parts}"]
            target = parts / f"{op or 'harness'}.o"
            command = [compiler, *COMMON, *FLAGS[isa], *flags, *names, "-c", str(ROOT / source), "-o", str(target)]
            subprocess.run(command, check=True, capture_output=True, text=True)
            return target

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = [str(unit) for unit in pool.map(compile_one, [None, *ops])]
        linked = program.with_suffix(".new")
        subprocess.run([compiler, *flags, *objects, "-o", str(linked)], check=True, capture_output=True, text=True)
        linked.rename(program)
    return program


def neon_reason() -> str | None:
    """Why NEON cannot be emulated here; None if it can."""
    if platform.machine() != "x86_64":
        return "only emulated on x86-64"
    missing = [tool for tool in ("aarch64-linux-gnu-g++", "qemu-aarch64") if not shutil.which(tool)]
    return f"{' and '.join(missing)} not installed (Debian: g++-aarch64-linux-gnu, qemu-user)" if missing else None


def require_neon() -> None:
    """Skip the test where NEON cannot be had; fail where FASTGEN_REQUIRE_NEON=1 says that it must."""
    reason = None if platform.machine() == "aarch64" else neon_reason()
    if reason and os.environ.get("FASTGEN_REQUIRE_NEON") == "1":
        pytest.fail(reason)
    if reason:
        pytest.skip(reason)


@functools.cache
def compiled(isa: str, folder: Path, *ops: str) -> Remote:
    """Kernels of an instruction set, those of the named ops or all; under qemu-user where it is foreign."""
    if isa == "neon" and platform.machine() == "x86_64":
        return Remote(["qemu-aarch64", str(build(isa, "aarch64-linux-gnu-g++", ["-O2", "-static"], folder, ops))])
    return Remote([str(build(isa, "g++", ["-O2"], folder, ops))])


@functools.cache
def sanitized(isa: str, op: str, folder: Path) -> Remote:
    """The kernels of one op, all units of its name, and one instruction set under AddressSanitizer; the scalar ones, the
    quickest to compile, under UndefinedBehaviorSanitizer too.
    """
    kinds = "address,undefined" if isa == "scalar" else "address"
    flags = ["-O1", f"-fsanitize={kinds}", "-fno-sanitize-recover=all"]
    units = sorted(header.stem for header in (ROOT / "csrc/ops").glob(f"{op}*.h"))
    return Remote([str(build(isa, "g++", flags, folder, units))])


if __name__ == "__main__":
    sys.exit(neon_reason() or (importlib.util.find_spec("fastgen._C") is None and "fastgen._C is not built") or 0)
