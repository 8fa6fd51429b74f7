"""The `myserve` command imports only what the chosen subcommand needs: `--help` imports no torch."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

__all__ = ["app"]

_COMMANDS = ("serve", "chat", "sample", "verify", "replay", "parity", "bench", "quantize", "status")


class _Commands(TyperGroup):
    """Imports a subcommand when it is asked for: `serve` is ready a fifth of a second earlier without the others."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in _COMMANDS:
            return None
        alone = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        alone.command(cmd_name)(getattr(import_module(f"myserve.cli.{cmd_name}"), cmd_name))
        return typer.main.get_command(alone)


app = typer.Typer(
    name="myserve",
    cls=_Commands,
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
