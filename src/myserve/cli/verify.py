"""`myserve verify`: test any OpenAI-compatible server's sampler from outside; a table, a page, JSON, JUnit."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from myserve.cli.console import err, fail, out
from myserve.errors import MyserveError
from myserve.verify import report
from myserve.verify.results import CheckResult
from myserve.verify.run import DEFAULT_DRAWS, DEFAULT_ERROR_RATE
from myserve.verify.run import verify as run_checks

__all__ = ["verify"]


def verify(
    url: Annotated[str, typer.Argument(help="The server's root: ours, or any with OpenAI's API.")],
    model: Annotated[str, typer.Option(help="Default: the first that the server lists.")] = "",
    draws: Annotated[int, typer.Option(min=50, help="Of each statistical test.")] = DEFAULT_DRAWS,
    false_alarms: Annotated[
        float, typer.Option(min=1e-9, max=0.5, help="Chance that any check fails without a fault, a run.")
    ] = DEFAULT_ERROR_RATE,
    seed: Annotated[int | None, typer.Option(help="Of the run's own seeds. None: a new one.")] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="A check's name; may be given several times.")
    ] = None,
    html: Annotated[Path | None, typer.Option("--html", help="Write a page here.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write everything here.")] = None,
    junit: Annotated[Path | None, typer.Option("--junit", help="Write JUnit's XML here.")] = None,
) -> None:
    """Test a server's sampler: seeds, distribution, penalties, text, logprobs, independence, refusals.

    The exit status is 0 where no check failed, 1 where one did or the server cannot be asked.
    """
    try:
        run = asyncio.run(
            run_checks(
                url,
                model=model,
                api_key=os.environ.get("MYSERVE_API_KEY", ""),
                seed=seed,
                draws=draws,
                error_rate=false_alarms,
                only=only or (),
                on_result=_show_progress,
            )
        )
        for path, write in (
            (html, report.write_html),
            (json_file, report.write_json),
            (junit, report.write_junit),
        ):
            if path is not None:
                write(run, path)
    except (MyserveError, OSError) as error:
        fail(str(error))
    out.print(report.table(run))
    out.print(Text(report.summary(run)))
    if run.has_failed:
        raise typer.Exit(1)


def _show_progress(result: CheckResult) -> None:
    if err.is_terminal:
        err.print(Text(f"{result.status} {result.id} ({result.seconds} s)", style="dim"))
