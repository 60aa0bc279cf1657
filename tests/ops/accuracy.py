"""The worst errors of the fused backends, over many calls of every op: what docs/accuracy.md records.

    python -m tests.ops.accuracy [--op NAME] [--backend NAME] [--examples N] [--seconds S] [--json FILE]

Calls are drawn as the contract test draws them, NEON runs under qemu-user and Triton in its interpreter. An error is given in
units of the tolerance of its class and storage type (tests/ops/tolerances.py); what is over 1 is printed with its call.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton

import argparse
import collections
import json
import sys
import tempfile
import time
from pathlib import Path

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.ops import test_contract as contract
from tests.ops.tolerances import BOUNDS

Key = tuple[str, str, str]  # op, precision class, dtype


def measure(op: str, backend: str, examples: int, seconds: float, folder: Path) -> dict[Key, float]:
    """The worst error of each class and dtype of one op on one backend, over so many calls or seconds."""
    spec = contract.SPECS[op]
    worst: dict[Key, float] = collections.defaultdict(float)
    end = time.monotonic() + seconds

    @seed(0)
    @settings(
        max_examples=examples, phases=[Phase.generate], database=None, deadline=None, suppress_health_check=list(HealthCheck)
    )
    @given(contract.calls(spec, backend))
    def one(call):
        if time.monotonic() > end:
            return
        kinds = [contract.errors, contract.second_errors] if spec.double_backward else [contract.errors]
        for kind in kinds:
            for what, precision, dtype, size in kind(spec, backend, call, folder):
                key = (op, precision, str(dtype).removeprefix("torch."))
                worst[key] = max(worst[key], size)
                if size > 1:
                    print(f"{op} on {backend}: {what} is off by {size:.3g} tolerances at {call}", file=sys.stderr, flush=True)

    one()
    return worst


def table(worst: dict[Key, float]) -> str:
    """Markdown: a row per class and dtype with its tolerance, the worst share of it that was seen, and where."""
    lines = ["| class | storage | relative | absolute | worst seen, of the tolerance | in |", "|---|---|---|---|---|---|"]
    for (precision, dtype), (relative, absolute) in BOUNDS.items():
        name = str(dtype).removeprefix("torch.")
        sizes = {op: size for (op, p, d), size in worst.items() if (p, d) == (precision, name)}
        if sizes:
            op = max(sizes, key=sizes.__getitem__)
            lines.append(f"| {precision} | {name} | {relative:.2g} | {absolute:.2g} | {sizes[op]:.2f} | `{op}` |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Measure, print the table; 1 if anything was over its tolerance."""
    parser = argparse.ArgumentParser(prog="python -m tests.ops.accuracy", description=__doc__.splitlines()[0])
    parser.add_argument("--op", action="append", choices=list(contract.SPECS))
    parser.add_argument("--backend", action="append", choices=[*contract.BACKENDS, "reference"])
    parser.add_argument("--examples", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=600.0, help="at most so long per op and backend")
    parser.add_argument("--json", type=Path, help="keep the worst errors here, those of earlier runs included")
    arguments = parser.parse_args(argv)
    torch.use_deterministic_algorithms(True)  # memory from torch.empty is NaN
    worst: dict[Key, float] = collections.defaultdict(float)
    if arguments.json and arguments.json.exists():
        worst.update((tuple(key.split()), size) for key, size in json.loads(arguments.json.read_text()).items())
    with tempfile.TemporaryDirectory() as folder:
        for op, spec in contract.SPECS.items():
            if arguments.op and op not in arguments.op:
                continue
            backends = [b for b in contract.BACKENDS if b.partition(":")[0] in spec.backends] or ["reference"]
            for backend in arguments.backend or backends:
                if backend in backends:
                    for key, size in measure(op, backend, arguments.examples, arguments.seconds, Path(folder)).items():
                        worst[key] = max(worst[key], size)
                if arguments.json:
                    arguments.json.write_text(json.dumps({" ".join(key): size for key, size in worst.items()}, indent=0))
    print(table(worst))
    return int(any(size > 1 for size in worst.values()))


if __name__ == "__main__":
    sys.exit(main())
