"""The commands, gathered."""

from __future__ import annotations

from typing import Annotated

import typer

from fastgen.cli import show
from fastgen.cli.bench import bench
from fastgen.cli.demo import demo
from fastgen.cli.evaluate import evaluate
from fastgen.cli.info import info
from fastgen.cli.names import list_names
from fastgen.cli.parity import parity
from fastgen.cli.sample import sample
from fastgen.cli.train import train

__all__ = ["app"]

app = typer.Typer(
    name="fastgen",
    help="Generative models whose hot paths are fused kernels.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
) -> None:
    """Generative models whose hot paths are fused kernels."""
    if version:
        from fastgen import __version__

        show.line(__version__)
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


app.command()(train)
app.command()(sample)
app.command()(evaluate)
# The benchmark runner parses its own options, --help among them.
app.command(
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []},
    add_help_option=False,
)(bench)
app.command()(info)
app.command(name="list")(list_names)
app.command()(demo)
app.add_typer(parity, name="parity")
