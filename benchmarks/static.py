"""What the compiler made of every Triton kernel, found without a GPU: ``python -m benchmarks.static``.

Each launch that a kernel file lists in ``static_cases()`` is compiled ahead of time and disassembled with the tools that Triton
ships. Instructions per element stand beside the budget above which a GPU issues instructions longer than it moves the bytes:

    budget = SMs * 128 lanes * clock / (memory bandwidth / bytes per element)

from nominal figures (A100 SXM, H100 SXM, B200). A static count is no time: nothing here is measured on a GPU.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import dataclasses
import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.table import aligned

__all__ = ["BUDGET_PER_BYTE", "StaticReport", "all_cases", "analyse", "main", "report"]

BUDGET_PER_BYTE = {80: 108 * 128 * 1.41 / 2039, 90: 132 * 128 * 1.755 / 3350, 100: 148 * 128 * 1.85 / 8000}
"""Instructions that a GPU can issue while it moves one byte: SMs * lanes * GHz / (GB/s)."""

_SIZES = {"f32": 4, "f16": 2, "bf16": 2, "f64": 8, "i64": 8, "i32": 4, "i16": 2, "i8": 1, "i1": 1}


@dataclasses.dataclass(frozen=True)
class StaticReport:
    """What one launch became on one architecture. Counts are per thread unless said otherwise."""

    op: str
    kernel: str
    case: str
    arch: int
    registers: int
    spills: int
    """Loads and stores of local memory."""
    shared_bytes: int
    barriers: int
    accesses: dict[str, int]
    """Global loads and stores by width in bytes: {"ld16": 2, "st16": 1, ...}."""
    wide_share: float
    """Share of the bytes of whole tiles that moves in accesses of at least 16 bytes."""
    wide_wanted: bool
    instructions: int
    """Static count without padding and without out-of-line routines."""
    cold_instructions: int
    """Instructions of out-of-line routines, entered for rare arguments only."""
    instructions_per_element: float
    budget_per_element: float
    bytes_per_element: float
    minimum_bytes_per_element: float

    @property
    def problems(self) -> list[str]:
        """What a kernel must not have."""
        found = [f"{self.spills} spills"] if self.spills else []
        if self.wide_wanted and self.wide_share < 1:
            found.append(f"only {self.wide_share:.0%} of the bytes move in 16-byte accesses")
        if self.bytes_per_element > 1.01 * self.minimum_bytes_per_element:
            found.append(f"moves {self.bytes_per_element:.2f} bytes an element, {self.minimum_bytes_per_element:.2f} would do")
        return found


def all_cases(ops: Sequence[str] | None = None, named: str = "") -> list[tuple[str, Any]]:
    """(op, case) of every kernel file, or of some, whose names contain ``named``.

    Raises:
        ValueError: for an op without a kernel file, or a kernel file without ``static_cases()``.
    """
    package = importlib.import_module("fastgen.kernels")
    names = [m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_")]
    for op in ops or ():
        if op not in names:
            raise ValueError(f"no Triton kernels for op {op!r}; there are: {', '.join(names)}")
    found = []
    for name in ops or names:
        module = importlib.import_module(f"fastgen.kernels.{name}")
        if not hasattr(module, "static_cases"):
            raise ValueError(f"kernels/{name}.py has no static_cases()")
        found += [(name, case) for case in module.static_cases() if named in case.name]
    return found


def _tool(name: str, *args: str) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([str(path), *args], capture_output=True, text=True, check=True).stdout


def _tile_traffic(ttgir: str) -> list[tuple[int, int, bool]]:
    """(elements, bytes of one element, inside a loop) of each global load and store of a program, from Triton's own IR."""
    traffic, depth, loops = [], 0, []
    for line in ttgir.splitlines():
        if re.search(r"\bscf\.(for|while)\b", line):
            loops.append(depth)
        depth += line.count("{") - line.count("}")
        while loops and depth <= loops[-1]:
            loops.pop()
        found = re.search(r"tt\.(load|store) .*: (?:tensor<((?:\d+x)*))?!tt\.ptr<(\w+)>", line)
        if found:
            elements = 1
            for extent in re.findall(r"\d+", found[2] or ""):
                elements *= int(extent)
            traffic.append((elements, _SIZES[found[3]], bool(loops)))
    return traffic


def _code(sass: str) -> tuple[list[tuple[int, str]], list[str], list[tuple[int, int]]]:
    """(address, instruction) of the kernel, instructions of its out-of-line routines, and its loops as address ranges."""
    main: list[tuple[int, str]] = []
    cold: list[str] = []
    labels: dict[str, int] = {}
    waiting: list[str] = []
    in_routine = False
    for line in sass.splitlines():
        text = line.strip()
        if text.endswith(":") and not text.startswith("/*"):
            in_routine = in_routine or text.startswith("$")
            waiting.append(text[:-1])
        elif found := re.match(r"/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", text):
            address, instruction = int(found[1], 16), found[2]
            labels.update(dict.fromkeys(waiting, address))
            waiting.clear()
            if "NOP" not in instruction.split():
                if in_routine:
                    cold.append(instruction)
                else:
                    main.append((address, instruction))
    loops = []
    for address, instruction in main:
        target = re.search(r"\bBRA\b.*`\((\S+?)\)", instruction)
        if target and labels.get(target[1], address) < address:
            loops.append((labels[target[1]], address))
    return main, cold, loops


def _width(opcode: str) -> int:
    bits = re.search(r"\.[US]?(8|16|64|128|256)\b", opcode)
    return int(bits[1]) // 8 if bits else 4


def _opcode(instruction: str) -> str:
    words = instruction.split()
    return words[1] if words[0].startswith("@") else words[0]


def analyse(op: str, case: Any, arch: int) -> StaticReport:
    """Compile one launch for one architecture and read off what it became. Needs no GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = case.kernel.arg_names
    constants = {**case.constants, **{name: None for name, kind in case.arguments.items() if kind is None}}
    signature = {name: "constexpr" if name in constants else case.arguments[name] for name in names}
    attributes = {
        (i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name not in constants and name not in case.unaligned
    }
    source = ASTSource(case.kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(case.options))
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _tool("cuobjdump", "-res-usage", str(cubin))
        sass = _tool("nvdisasm", "-c", str(cubin))

    instructions, cold, loops = _code(sass)
    times = {address: case.trips if any(a <= address <= b for a, b in loops) else 1 for address, _ in instructions}
    threads = 32 * compiled.metadata.num_warps
    accesses: collections.Counter[str] = collections.Counter()
    wide_bytes = 0
    for address, instruction in instructions:
        opcode = _opcode(instruction)
        if opcode.startswith(("LDG", "STG")):
            width = _width(opcode)
            accesses[f"{opcode[:2].lower()}{width}"] += 1
            wide_bytes += times[address] * width * threads if width >= 16 else 0

    traffic = _tile_traffic(compiled.asm["ttgir"])
    largest = max(elements for elements, _, _ in traffic)
    moved = sum(elements * size * (case.trips if inside else 1) for elements, size, inside in traffic)
    tiles = sum(elements * size * (case.trips if inside else 1) for elements, size, inside in traffic if elements == largest)
    opcodes = [_opcode(i) for _, i in instructions] + [_opcode(i) for i in cold]
    registers = re.search(r"REG:(\d+)", usage)
    return StaticReport(
        op=op,
        kernel=case.kernel.fn.__name__,
        case=case.name,
        arch=arch,
        registers=int(registers[1]) if registers else -1,
        spills=sum(o.startswith(("LDL", "STL")) for o in opcodes),
        shared_bytes=compiled.metadata.shared,
        barriers=sum(o.startswith("BAR") for o in opcodes),
        accesses=dict(sorted(accesses.items())),
        wide_share=min(1.0, wide_bytes / tiles),
        wide_wanted=case.wide,
        instructions=len(instructions),
        cold_instructions=len(cold),
        instructions_per_element=sum(times.values()) * threads / case.elements,
        budget_per_element=BUDGET_PER_BYTE[arch] * case.bytes_per_element,
        bytes_per_element=moved / case.elements,
        minimum_bytes_per_element=case.bytes_per_element,
    )


def report(
    ops: Sequence[str] | None = None, archs: Sequence[int] = (80, 90, 100), named: str = "", workers: int = 0
) -> list[StaticReport]:
    """Every launch on every architecture. TRITON_INTERPRET must not have been set when the kernels were imported."""
    if importlib.import_module("fastgen.kernels._launch").INTERPRET:
        raise RuntimeError(
            "the kernels were imported under TRITON_INTERPRET=1; run python -m benchmarks.static in its own process"
        )
    jobs = [(op, case, arch) for op, case in all_cases(ops, named) for arch in archs]
    with concurrent.futures.ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        return list(pool.map(lambda job: analyse(*job), jobs))


def _text(reports: Sequence[StaticReport]) -> str:
    heads = (
        "kernel",
        "case",
        "sm",
        "regs",
        "spills",
        "shared",
        "bars",
        "global accesses",
        "16 B",
        "instr/elem",
        "budget",
        "B/elem",
    )
    rows = [
        (
            r.kernel,
            r.case,
            str(r.arch),
            str(r.registers),
            str(r.spills),
            str(r.shared_bytes),
            str(r.barriers),
            " ".join(f"{n}x{kind}" for kind, n in r.accesses.items()),
            f"{r.wide_share:.0%}",
            f"{r.instructions_per_element:.1f}",
            f"{r.budget_per_element:.0f}",
            f"{r.bytes_per_element:.2f} of {r.minimum_bytes_per_element:.2f}",
        )
        for r in reports
    ]
    return aligned(rows, heads, left=(0, 1, 7))


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; 1 where a kernel has what it must not have."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.static", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--op", nargs="+", metavar="NAME", help="only the kernels of these ops")
    parser.add_argument("--arch", default="80,90,100", help="compute capabilities, separated by commas (default: %(default)s)")
    parser.add_argument("--case", default="", metavar="SUBSTR", help="only cases whose name contains this: float32")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the reports there too")
    arguments = parser.parse_args(argv)
    if "TRITON_INTERPRET" in os.environ:
        clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        given = list(sys.argv[1:] if argv is None else argv)
        root = Path(__file__).resolve().parents[1]
        return subprocess.run([sys.executable, "-m", "benchmarks.static", *given], env=clean, check=False, cwd=root).returncode
    archs = [int(a) for a in arguments.arch.split(",") if a.strip().isdigit()]
    if not archs or set(archs) - set(BUDGET_PER_BYTE):
        parser.error(f"--arch takes some of {', '.join(map(str, BUDGET_PER_BYTE))}, got {arguments.arch!r}")
    try:
        reports = report(arguments.op, archs, arguments.case)
    except (ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(_text(reports))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps([dataclasses.asdict(r) for r in reports], indent=1) + "\n")
    bad = [(r, p) for r in reports for p in r.problems]
    for r, problem in bad:
        print(f"PROBLEM: {r.kernel} ({r.case}) on sm_{r.arch}: {problem}")
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
