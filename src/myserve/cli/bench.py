"""`myserve bench`: measure any OpenAI-compatible server; print a table, write JSON and a chart."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from myserve.bench import report
from myserve.bench.figures import Figures
from myserve.bench.load import BenchError, Target
from myserve.bench.session import Session
from myserve.bench.workload import PRESETS, Workload
from myserve.cli.console import DEFAULT_URL, err, fail, out
from myserve.errors import MyserveError
from myserve.sdk.display.plotting import check_chart_path

__all__ = ["bench"]

DEFAULT_WORKLOADS = ("decode1", "decode8", "decode32")


def bench(
    url: Annotated[
        str, typer.Option(help="The server's root: ours, or any with OpenAI's API.")
    ] = DEFAULT_URL,
    model: Annotated[str | None, typer.Option(help="None: the first that the server lists.")] = None,
    workload: Annotated[
        list[str] | None,
        typer.Option(
            help=f"As 8x128:64@top_p,n=1, or one of {', '.join(PRESETS)}; may be given several times."
        ),
    ] = None,
    repeat: Annotated[int, typer.Option(help="Runs of each workload; medians are shown.", min=1)] = 3,
    vocab_size: Annotated[
        int | None,
        typer.Option(
            help="Prompts of ids below this. None: of ids that the server's /tokenize gives, else text."
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of prompts and draws. None: new ones, which no cache knows.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all figures here.")] = None,
    chart: Annotated[
        Path | None, typer.Option(help="Write a chart here (.svg, .png or .pdf); needs myserve[plot].")
    ] = None,
) -> None:
    """Measure a server: time to the first token, time between tokens, tokens a second."""
    try:
        if chart is not None:
            check_chart_path(chart)  # before minutes of measuring
        workloads = {name: Workload.parse(name) for name in workload or DEFAULT_WORKLOADS}
        target = Target(url, model or "", os.environ.get("MYSERVE_API_KEY", ""))
        results, record = asyncio.run(_measure(target, workloads, repeat, vocab_size, seed))
    except MyserveError as error:
        fail(str(error))
    out.print(report.table(results))
    if json_file is not None:
        json_file.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    if chart is not None:
        report.chart(results, f"{target.model} at {url}", chart)


async def _measure(
    target: Target, workloads: dict[str, Workload], repeat: int, vocab_size: int | None, seed: int | None
) -> tuple[dict[str, Figures], dict[str, Any]]:
    """Return the medians by label, and the whole record for JSON."""
    target.model = target.model or await _first_model(target)
    results: dict[str, Figures] = {}
    record: dict[str, Any] = {
        "url": target.url,
        "model": target.model,
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "workloads": {},
    }
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        drawn = secrets.randbits(32) if seed is None else seed
        session = await Session.open(target, vocab_size=vocab_size, seed=drawn, seeds_draws=seed is not None)
        # Twice a second: drawing costs CPU that the server may need.
        with Progress(*columns, console=err, refresh_per_second=2, transient=True) as progress:
            for name, workload in workloads.items():
                total = repeat * workload.choices * workload.output_len
                bar = progress.add_task(name, total=total)
                session.on_read = lambda data, bar=bar: progress.advance(bar, data.count(b"data: {"))  # type: ignore[misc]  # mypy cannot infer a lambda with a default
                figures, runs, dialect = await session.measure(workload, repeat)
                results[name] = figures
                record["workloads"][name] = {
                    "workload": str(workload),
                    "prompt_ids": dialect.takes_ids,
                    "extras": dict(dialect.extras),
                    "median": figures.as_dict(),
                    "runs": [run.as_dict() for run in runs],
                }
    finally:
        await target.aclose()
    return results, record


async def _first_model(target: Target) -> str:
    models = (await target.get("/v1/models") or {}).get("data")
    if not models:
        raise BenchError(f"{target.url} lists no model: pass --model")
    return str(models[0]["id"])
