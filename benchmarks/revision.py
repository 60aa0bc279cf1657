"""Another commit beside the working tree: a throwaway git worktree with its own build, measured in alternating processes."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.machine import ROOT
from benchmarks.measure import Quantiles, quantiles
from benchmarks.report import read
from benchmarks.runner import Row
from benchmarks.table import aligned

__all__ = ["Change", "changes", "compare", "table", "worktree"]


@dataclasses.dataclass(frozen=True)
class Change:
    """A provider at the base revision and in the working tree, in microseconds; ``ratio`` is base / now."""

    op: str
    shape: str
    mode: str
    provider: str
    base_us: float
    now_us: float
    ratio: Quantiles


def _checked(command: Sequence[str], cwd: Path, what: str) -> None:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        detail = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        raise ValueError(f"{what} failed: {detail[0] if detail else f'exit code {done.returncode}'}")


@contextlib.contextmanager
def worktree(revision: str, build: bool = True) -> Iterator[Path]:
    """A folder from which ``python -m benchmarks`` measures ``revision`` with the benchmarks of this tree.

    Raises:
        ValueError: for an unknown revision, or one that does not build.
    """
    with tempfile.TemporaryDirectory(prefix="fastgen-base-") as folder:
        tree, place = Path(folder, "tree"), Path(folder, "place")
        _checked(["git", "worktree", "add", "--detach", str(tree), revision], ROOT, f"git worktree of {revision!r}")
        try:
            if build:
                _checked([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], tree, f"building {revision!r}")
            kernels = tree / "fastgen" / "kernels"
            if not kernels.exists():
                kernels.symlink_to(tree / "kernels")
            place.mkdir()
            (place / "fastgen").symlink_to(tree / "fastgen")
            for name in ("benchmarks", "tests"):
                (place / name).symlink_to(ROOT / name)
            yield place
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=ROOT, capture_output=True, check=False)


def changes(pairs: Sequence[tuple[Sequence[Row], Sequence[Row]]]) -> list[Change]:
    """One line for each provider that both sides timed, from (base rows, rows now) of alternating runs."""
    series: dict[tuple[str, ...], list[tuple[float, float]]] = {}
    for base, now in pairs:
        before = {_identity(row): row.median_us for row in base if row.median_us is not None}
        for row in now:
            reference = before.get(_identity(row))
            if row.median_us is not None and reference is not None:
                series.setdefault(_identity(row), []).append((reference, row.median_us))
    return [
        Change(
            op, f"{shape} {dtype}{flags}", mode, provider,
            quantiles([b for b, _ in times]).median, quantiles([n for _, n in times]).median,
            quantiles([b / n for b, n in times]),
        )
        for (op, shape, dtype, flags, mode, provider), times in series.items()
    ]  # fmt: skip


def _identity(row: Row) -> tuple[str, str, str, str, str, str]:
    return row.op, row.shape, row.dtype, "".join(f" {k}={v}" for k, v in row.flags.items()), row.mode, row.provider


def compare(revision: str, arguments: Sequence[str], times: int = 3) -> tuple[list[Change], list[Row]]:
    """Measure ``revision`` and the working tree in turns, each in processes of its own.

    Args:
        arguments: options of ``python -m benchmarks`` for both.
        times: processes of each; which goes first alternates.

    Returns:
        The changes, and the rows of the working tree's last process.
    """
    pairs = []
    with worktree(revision) as place, tempfile.TemporaryDirectory() as folder:
        for turn in range(times):
            found: dict[str, list[Row]] = {}
            sides = [("base", place), ("now", ROOT)]
            for side, cwd in sides if turn % 2 == 0 else sides[::-1]:
                out = Path(folder, f"{side}{turn}.json")
                # the folder comes first on the path, before an installed fastgen
                environment = {**os.environ, "PYTHONPATH": str(cwd)}
                command = [sys.executable, "-m", "benchmarks", *arguments, "--json", str(out)]
                done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
                if not out.is_file():
                    lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
                    raise ValueError(
                        f"measuring {side} ({revision if side == 'base' else 'working tree'}) failed: {lines[-1:]}"
                    )
                found[side] = read(out)[1]
            pairs.append((found["base"], found["now"]))
    return changes(pairs), list(pairs[-1][1])


def table(found: Sequence[Change], revision: str) -> str:
    """Aligned text; a ratio above 1 says that the working tree is faster."""
    heads = ("op", "shape", "mode", "provider", f"us at {revision}", "us now", "base / now", "p20", "p80")
    rows = [
        (
            *(c.op, c.shape, c.mode, c.provider, f"{c.base_us:.2f}", f"{c.now_us:.2f}"),
            *(f"{share:.3f}" for share in (c.ratio.median, c.ratio.p20, c.ratio.p80)),
        )
        for c in found
    ]
    return aligned(rows, heads, left=(0, 1, 2, 3))
