"""What the commands print: short, aligned lines on stdout."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

__all__ = ["amount", "duration", "heading", "line", "pairs", "stanzas", "table"]


def _console() -> Console:
    return Console(highlight=False, soft_wrap=True)


def line(text: str = "") -> None:
    """One plain line, never wrapped."""
    _console().print(Text(text))


def heading(text: str) -> None:
    """A bold line."""
    _console().print(Text(text, style="bold"))


def table(rows: Iterable[Sequence[str]], columns: Sequence[str], *, right: Sequence[str] = ()) -> None:
    """Rows under bold headings; the columns named in ``right`` are flush right. A terminal wraps long cells, a pipe gets
    a line per row."""
    console = _console()
    out = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in columns:
        out.add_column(name, justify="right" if name in right else "left", overflow="fold")
    for row in rows:
        out.add_row(*[Text(cell) for cell in row])
    if not console.is_terminal:
        console.width = 10_000
    with console.capture() as captured:
        console.print(out)
    console.file.write("".join(f"{text.rstrip()}\n" for text in captured.get().splitlines()))


def stanzas(items: Iterable[Sequence[str]]) -> None:
    """A name and its first line side by side, further lines under the first."""
    items = list(items)
    width = max((len(name) for name, *_ in items), default=0)
    for name, *lines in items:
        for i, text in enumerate(lines):
            line(f"  {name if i == 0 else '':<{width}}  {text}")


def pairs(values: Mapping[str, object]) -> None:
    """``name  value`` lines, aligned."""
    width = max(map(len, values), default=0)
    for name, value in values.items():
        line(f"{name:<{width}}  {value}")


def amount(value: float) -> str:
    """A number with a sensible count of digits: 10,000 | 123.45 | 0.01234."""
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.2f}" if abs(value) >= 1 else f"{value:.4g}"


def duration(seconds: float) -> str:
    """12.3 s | 2 min 05 s | 1 h 02 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds) // 60
    return f"{minutes} min {round(seconds) % 60:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
