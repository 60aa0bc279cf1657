"""``python -m benchmarks.models``: whole models against the libraries that have them, on this machine."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.machine import describe
from benchmarks.models import diffusion, flows
from benchmarks.models.runner import WRONG, ModelRow, figure_table, peak_of_side, row_table, run_case
from benchmarks.report import headline

__all__ = ["CASES", "main"]

CASES = {case.name: case for case in (*diffusion.CASES, *flows.CASES)}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.models", description=__doc__)
    add = parser.add_argument
    add("--case", nargs="+", action="extend", metavar="NAME", help=f"only these of {', '.join(CASES)} (default: all)")
    add("--figures", action="store_true", help="end with the table of figures in Markdown")
    add("--seconds", type=float, default=0.0, metavar="S", help="time for the rounds of one case, beyond its fewest rounds")
    add("--threads", type=int, metavar="N", help="threads (default: PyTorch's)")
    add("--tiny", action="store_true", help="sizes of a test: shows that it runs, and measures nothing")
    add("--json", type=Path, metavar="FILE", help="write the rows there too")
    add("--peak", nargs=2, metavar=("CASE", "SIDE"), help="only the peak memory of one side, as JSON")
    return parser


def _run(arguments: argparse.Namespace) -> int:
    unknown = [name for name in arguments.case or () if name not in CASES]
    if unknown:
        raise ValueError(f"--case takes some of {', '.join(CASES)}, got {unknown[0]!r}")
    chosen = [CASES[name] for name in arguments.case or CASES]
    machine = describe("cpu")
    print(headline(machine), flush=True)
    rows: list[ModelRow] = []
    for i, case in enumerate(chosen):
        print(f"[{i + 1}/{len(chosen)}] {case.work}: {case.timed}", file=sys.stderr, flush=True)
        rows += run_case(case, seconds=arguments.seconds, tiny=arguments.tiny, started=i > 0)
    print(row_table(rows))
    for case in chosen:
        own = [row for row in rows if row.case == case.name and row.status == "ok"]
        if own and own[0].contended:
            print(f"WARNING: {case.name}: control {own[0].control:.3f}, other work took {own[0].foreign_cores:.2f} cores")
    if arguments.figures:
        print("\n" + figure_table(chosen, rows))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        document = {"schema": 1, "machine": machine, "models": [dataclasses.asdict(row) for row in rows]}
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")
    return 1 if any(row.status.startswith(WRONG) for row in rows) else 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. 0: measured; 1: a side failed its parity check and was not timed; 2: bad arguments."""
    arguments = _parser().parse_args(argv)
    threads = torch.get_num_threads()
    try:
        if arguments.threads is not None:
            if arguments.threads < 1:
                raise ValueError(f"--threads must be at least 1, got {arguments.threads}")
            torch.set_num_threads(arguments.threads)
        if arguments.peak:
            name, side = arguments.peak
            print(json.dumps({"peak_bytes": peak_of_side(CASES[name], side, arguments.tiny)}))
            return 0
        return _run(arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    raise SystemExit(main())
