"""`myserve status`: what a server or a fleet is at: replicas, weights, load, cache hits, class of bits."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from typing import Annotated, Any

import typer
from rich.table import Table

from myserve.cli.client import ServerClient, ServerError
from myserve.cli.console import DEFAULT_URL, fail, out

__all__ = ["status"]

_COLUMNS = ("model", "replica", "state", "weights", "running", "waiting", "requests", "hits", "class")
_PIPE_WIDTH = 240


def status(
    url: Annotated[str, typer.Argument(help="The server's root, or OpenAI's base URL.")] = DEFAULT_URL,
) -> None:
    """Show each replica of a fleet: its weights, its load, what its cache has saved, and the class of its bits."""
    try:
        version = asyncio.run(_version_of(url))
    except ServerError as error:
        fail(str(error))
    if not out.is_terminal:
        # a pipe has no width: names that are cut would be of no use to a script
        out.width = _PIPE_WIDTH
    table = Table(box=None, header_style="bold")
    for name in _COLUMNS:
        table.add_column(name, no_wrap=True)
    for row in rows_of(version):
        table.add_row(*row)
    out.print(table)


async def _version_of(url: str) -> Mapping[str, Any]:
    client = ServerClient(url, os.environ.get("MYSERVE_API_KEY", ""))
    try:
        version: Mapping[str, Any] = await client.get("/version")
        return version
    finally:
        await client.aclose()


def rows_of(version: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return the table's rows from `GET /version`; of a server that is no fleet, one for each model.

    >>> rows_of({"weights": {"m": {"weight_version": 3}}})
    [('m', '', 'ready', '3', '', '', '', '', '')]
    """
    fleets = version.get("replicas", {})
    rows = []
    for model, weights in version.get("weights", {}).items():
        if model not in fleets:
            rows.append((model, "", "ready", str(weights["weight_version"]), *[""] * 5))
        for replica in fleets.get(model, ()):
            hits = replica["hit_tokens"] / replica["prompt_tokens"] if replica["prompt_tokens"] else 0.0
            rows.append(
                (
                    model,
                    replica["name"],
                    replica["state"],
                    str(replica["weight_version"]),
                    str(replica["num_running"]),
                    str(replica["num_waiting"]),
                    str(sum(replica["requests"].values())),
                    f"{hits:.0%}",
                    replica["class"],
                )
            )
    return rows
