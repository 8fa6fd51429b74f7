"""The `myserve` command. Only what the chosen subcommand needs is imported: `--help` costs no torch."""

from __future__ import annotations

import typer

from myserve.cli.bench import bench
from myserve.cli.chat import chat
from myserve.cli.sample import sample
from myserve.cli.serve import serve

app = typer.Typer(
    name="myserve",
    help="Sampling from language models, exactly: serve them, talk to them, sample from them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,  # our errors are sentences; a bug's traceback should be Python's own
    add_completion=False,
)
for command in (serve, chat, sample, bench):
    app.command()(command)
