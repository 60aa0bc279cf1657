"""The ``fastgen`` command: train, sample, evaluate, bench, info, list, demo, parity.

Exit codes: 0 done; 1 training stopped on a non-finite loss, or parity was not reached; 2 the user's input cannot be used (one
line on stderr says which and why); 130 interrupted. A defect of fastgen keeps its traceback.
"""

from __future__ import annotations

import dis
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

__all__ = ["main"]

_PACKAGE = str(Path(__file__).resolve().parent.parent)
_RAISE = dis.opmap["RAISE_VARARGS"]


def _raised_by_fastgen(error: BaseException) -> bool:
    """Whether a ``raise`` statement of this package made the error: a check that spoke, not a defect that surfaced."""
    tb = error.__traceback__
    while tb is not None and tb.tb_next is not None:
        tb = tb.tb_next
    if tb is None or not str(Path(tb.tb_frame.f_code.co_filename).resolve()).startswith(_PACKAGE + os.sep):
        return False
    return tb.tb_frame.f_code.co_code[tb.tb_lasti] == _RAISE


def _message(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    else:
        text = str(error) or type(error).__name__
    return " ".join(text.split())


def _fail(error: BaseException, code: int, text: str | None = None) -> int:
    if os.environ.get("FASTGEN_DEBUG", "") not in ("", "0"):
        traceback.print_exception(error)
    print(f"fastgen: error: {text or _message(error)}", file=sys.stderr)
    return code


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code.

    Args:
        argv: the arguments after the program's name; None takes ``sys.argv[1:]``.
    """
    try:
        import rich  # noqa: F401 - typer's help and our tables need it
        import typer
    except ImportError as error:
        return _fail(error, 2, f"the command line needs {error.name}: pip install 'fastgen-torch[cli]'")

    from fastgen.cli.app import app

    usage_error = typer.BadParameter.__mro__[2]  # click's ClickException, which typer keeps private
    try:
        return app(args=None if argv is None else list(argv), prog_name="fastgen", standalone_mode=False) or 0
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader left; flushing at exit must not fail
        return 0
    except (KeyboardInterrupt, typer.Abort):
        print("\nfastgen: interrupted", file=sys.stderr)
        return 130
    except OSError as error:
        return _fail(error, 2)
    except (ValueError, TypeError, ImportError) as error:
        if not _raised_by_fastgen(error):
            raise
        return _fail(error, 2)
    except Exception as error:
        if isinstance(error, usage_error):
            return _fail(error, 2, error.format_message())  # type: ignore[attr-defined]
        from fastgen.training import NonFiniteLoss

        if isinstance(error, NonFiniteLoss):
            return _fail(error, 1)
        raise
