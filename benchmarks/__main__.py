"""``python -m benchmarks``: every op against its reference, the compiler and its peers, on this machine."""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import torch

from benchmarks import report, revision
from benchmarks.composites import measured
from benchmarks.figures import FIGURES
from benchmarks.machine import describe
from benchmarks.runner import BACKENDS, FUSED, WRONG, Row, run_workload
from benchmarks.workload import MODES, SETS, Workload, sweep

__all__ = ["main", "run"]


def _choices(text: str, known: Sequence[str], what: str) -> list[str]:
    values = [value.strip() for value in text.split(",") if value.strip()]
    unknown = [value for value in values if value not in known]
    if unknown or not values:
        raise ValueError(f"{what} takes some of {', '.join(known)}, got {text!r}")
    return values


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, and leaves its usage to ``--help``."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message.removeprefix("argument ").replace(": must", " must", 1))


def _number(kind: type[int] | type[float], least: float) -> Callable[[str], float]:
    """Reader of a number of at least so much."""

    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = -math.inf
        if not least <= value < math.inf:
            raise argparse.ArgumentTypeError(
                f"must be a {'whole ' if kind is int else ''}number of at least {least:g}, got {text!r}"
            )
        return value

    return read


def _file(text: str) -> Path:
    """Where a file can be written: said before hours of measuring, not after."""
    path = Path(text)
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if path.is_dir() or not folder.is_dir():
        raise argparse.ArgumentTypeError(
            f"must be a file, got {text!r}, where there is {'a folder' if path.is_dir() else folder}"
        )
    return path


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = _Parser(prog=prog, description=__doc__)
    add = parser.add_argument
    add("--op", nargs="+", action="extend", metavar="NAME", help="only these ops and composites (default: all)")
    add("--backend", metavar="LIST", help=f"some of {','.join(BACKENDS)} (default: all that suit the device)")
    add("--mode", default=",".join(MODES), metavar="LIST", help="some of %(default)s (default: both)")
    add("--size", metavar="SUBSTR", help="only shapes that contain this (64x3), or small, middle, large, extra")
    add(
        "--dtype",
        default="float32",
        choices=["float32", "bfloat16", "float16", "float64"],
        help="storage (default: %(default)s)",
    )
    add("--device", default="cpu", choices=["cpu", "cuda"], help="where to measure (default: %(default)s)")
    add("--threads", type=_number(int, 1), metavar="N", help="threads (default: PyTorch's)")
    add(
        "--seconds",
        type=_number(float, 0),
        default=2.0,
        metavar="S",
        help="time for the rounds of one workload (default: %(default)s)",
    )
    add("--rounds", type=_number(int, 1), default=7, metavar="N", help="at least so many rounds (default: %(default)s)")
    add("--base", metavar="REV", help="compare the fused ops with those of another commit, in alternating processes")
    add("--figures", action="store_true", help="only the workloads of the published figures; ends with their table in Markdown")
    add("--json", type=_file, metavar="FILE", help="write the rows there too")
    return parser


def _workloads(arguments: argparse.Namespace, ops: Sequence[str], modes: Sequence[str]) -> list[Workload]:
    published = list(dict.fromkeys(figure.workload for figure in FIGURES))
    if arguments.figures:
        size = arguments.size
        return [w for w in published if w.op in ops and w.mode in modes and (not size or size in w.shape or size == w.size)]
    extra = [w for w in published if w.dtype == arguments.dtype]
    return sweep(ops, modes, extra, arguments.dtype, arguments.size)


def _against_base(arguments: argparse.Namespace, ops: Sequence[str], modes: Sequence[str], backends: Sequence[str]) -> int:
    times = 3
    passed = ["--op", *ops, "--mode", ",".join(modes), "--backend", ",".join(b for b in backends if b in FUSED)]
    passed += ["--dtype", arguments.dtype, "--device", arguments.device, "--rounds", str(arguments.rounds)]
    passed += ["--seconds", str(arguments.seconds / times), "--threads", str(torch.get_num_threads())]
    passed += ["--size", arguments.size] if arguments.size else []
    passed += ["--figures"] if arguments.figures else []
    found, rows = revision.compare(arguments.base, passed, times)
    if not found:
        raise ValueError(f"nothing was timed at both {arguments.base!r} and the working tree")
    print(report.headline(describe(arguments.device)))
    print(revision.table(found, arguments.base))
    if arguments.json:
        changes = [dataclasses.asdict(change) for change in found]
        report.write(arguments.json, describe(arguments.device), rows, base=arguments.base, changes=changes)
    return 0


def _measure(arguments: argparse.Namespace, workloads: Sequence[Workload], backends: Sequence[str]) -> int:
    machine = describe(arguments.device)
    print(report.headline(machine))
    print(f"{len(workloads)} workloads, up to {SETS} input sets each, at least {arguments.seconds:g} s each\n", flush=True)
    rows: list[Row] = []
    for i, workload in enumerate(workloads):
        print(f"[{i + 1}/{len(workloads)}] {workload.title}", file=sys.stderr, flush=True)
        named = {name for f in FIGURES if f.workload == workload for name in f.against}
        # what no figure of this workload names would only cost time
        spare = {"reference", "compile"} - named if arguments.figures and not arguments.backend else set()
        rows += run_workload(
            workload,
            backends=[backend for backend in backends if backend not in spare],
            device=arguments.device,
            seconds=arguments.seconds,
            min_rounds=arguments.rounds,
            started=i > 0,
            isa=machine["isa"],
            peers=named if arguments.figures else None,
        )
    print(report.row_table(rows))
    controls = [r.control for r in rows if r.fused and r.control is not None]
    if controls:
        print(f"\ncontrol (fused op against itself): {min(controls):.3f} to {max(controls):.3f}")
    for warning in report.warnings(rows):
        print(f"WARNING: {warning}")
    if arguments.figures:
        chosen = [figure for figure in FIGURES if figure.workload in workloads]
        print("\n" + report.figure_table(chosen, rows))
    if arguments.json:
        report.write(arguments.json, machine, rows)
    return 1 if any(row.status.startswith(WRONG) and row.provider != "compile" for row in rows) else 0


def run(argv: Sequence[str], prog: str = "python -m benchmarks") -> int:
    """Measure. 0: done; 1: something failed its parity check and was not timed.

    Args:
        argv: the options.
        prog: what the help calls the command.

    Raises:
        ValueError: for options that cannot be used.
    """
    arguments = _parser(prog).parse_args(argv)
    threads = torch.get_num_threads()
    try:
        if arguments.threads is not None:
            torch.set_num_threads(arguments.threads)
        if arguments.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda: this PyTorch sees no GPU")
        ops = _choices(",".join(arguments.op), list(measured()), "--op") if arguments.op else list(measured())
        modes = _choices(arguments.mode, MODES, "--mode")
        unsuited = {"triton" if arguments.device == "cpu" else "cpp"}
        backends = (
            _choices(arguments.backend, BACKENDS, "--backend")
            if arguments.backend
            else [b for b in BACKENDS if b not in unsuited]
        )
        if arguments.base:
            return _against_base(arguments, ops, modes, backends)
        workloads = _workloads(arguments, ops, modes)
        if not workloads:
            raise ValueError("no workload is left: --op, --mode and --size exclude all")
        return _measure(arguments, workloads, backends)
    finally:
        torch.set_num_threads(threads)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line: :func:`run`, and 2 for options that cannot be used, which one line explains."""
    try:
        return run(sys.argv[1:] if argv is None else argv)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
