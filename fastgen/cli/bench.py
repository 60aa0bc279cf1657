"""``fastgen bench``: the door to the repository's benchmark runner."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path

import typer

__all__ = ["bench"]


def _has_runner() -> bool:
    try:
        return importlib.util.find_spec("benchmarks.__main__") is not None
    except ModuleNotFoundError:
        return False


def bench(context: typer.Context) -> None:
    """Time the ops against their peers.

    Takes the options of `python -m benchmarks`; try `fastgen bench --help`.
    """
    checkout = Path(__file__).resolve().parents[2]
    if (checkout / "benchmarks" / "__main__.py").is_file():
        sys.path.insert(0, str(checkout))
    elif not _has_runner():
        raise ModuleNotFoundError("bench needs a source checkout of fastgen: the wheel does not carry benchmarks/")
    runner = importlib.import_module("benchmarks.__main__")
    try:
        code = runner.run(list(context.args), prog="fastgen bench")
    except ValueError as error:
        raise ValueError(str(error)) from error  # said as all that a command line gets wrong
    raise typer.Exit(code)
