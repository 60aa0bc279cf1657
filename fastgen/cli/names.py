"""``fastgen list``: what there is to train, to train on and to call."""

from __future__ import annotations

import enum
import sys
from typing import Annotated

import typer

from fastgen.cli import show

__all__ = ["What", "list_names"]


class What(str, enum.Enum):
    """The sections of the listing."""

    models = "models"
    data = "data"
    ops = "ops"


def _models() -> list[tuple[str, ...]]:
    from fastgen import registry

    entries = [registry.describe(name) for name in registry.names()]
    return [(e.name, e.summary, e.paper, f"{e.file}, default data {e.data}") for e in entries]


def _data() -> list[tuple[str, ...]]:
    from fastgen import data

    return list(data.names().items())


def _ops() -> list[tuple[str, ...]]:
    from fastgen.ops import all_specs

    rows: list[tuple[str, ...]] = []
    for spec in all_specs().values():
        first = (sys.modules[spec.function.__module__].__doc__ or "").strip().partition("\n")[0]
        rows.append((spec.name, first.removeprefix(f"{spec.name}: "), f"fastgen/ops/{spec.name}.py"))
    return rows


def list_names(
    what: Annotated[What | None, typer.Argument(help="All three when left out.", show_default=False)] = None,
) -> None:
    """List models, data sets and ops."""
    sections = {What.models: _models, What.data: _data, What.ops: _ops}
    for i, section in enumerate([what] if what else sections):
        if i:
            show.line()
        show.heading(section.value)
        show.stanzas(sections[section]())
