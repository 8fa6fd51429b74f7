"""The `myserve` command imports only what the chosen subcommand needs: `--help` imports no torch."""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated

import typer

from myserve.cli.bench import bench
from myserve.cli.chat import chat
from myserve.cli.sample import sample
from myserve.cli.serve import serve

__all__ = ["app"]

app = typer.Typer(
    name="myserve",
    help="Deterministic, batch-invariant sampling from language models: serve, chat, sample, measure.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,  # our errors are sentences; a bug's traceback should be Python's own
    add_completion=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"myserve {version('myserve')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


for command in (serve, chat, sample, bench):
    app.command()(command)
