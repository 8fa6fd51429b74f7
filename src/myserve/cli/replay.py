"""`myserve replay`: draw recorded samples again, on servers or a local engine; say what differs, where, and why."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from myserve.cli.console import DEFAULT_URL, fail, out
from myserve.errors import MyserveError
from myserve.verify.replay.compare import ReplayResult
from myserve.verify.replay.records import read_records
from myserve.verify.replay.run import replay as replay_records
from myserve.verify.replay.run import replay_summary
from myserve.verify.subject import VerifyError

__all__ = ["replay"]

_SHOWN = 20  # records that differ
_LOCAL_NAME = "replayed"


def replay(
    file: Annotated[Path, typer.Argument(help="A journal, requests with answers or streams, or one answer.")],
    against: Annotated[
        list[str] | None, typer.Option(help=f"A server's root; several are compared. None: {DEFAULT_URL}.")
    ] = None,
    engine: Annotated[
        str | None, typer.Option(help='A local engine instead: a model\'s folder, or "embedded".')
    ] = None,
    model: Annotated[str, typer.Option(help="Its name on the server. Default: the one in each record.")] = "",
    request: Annotated[
        Path | None, typer.Option(help="JSON of the request, for an answer or a stream kept without it.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all results here.")] = None,
) -> None:
    """Draw recorded samples again and compare every field.

    The exit status is 0 where all records are identical on every server.
    """
    try:
        asked = None if request is None else json.loads(request.read_text("utf-8"))
        records = read_records(file, asked)
        with ExitStack() as stack:
            urls = list(against or ([] if engine else [DEFAULT_URL]))
            if engine:
                urls.append(stack.enter_context(_local_server(engine)))
                model = model or _LOCAL_NAME
            runs = asyncio.run(
                replay_records(records, urls, model=model, api_key=os.environ.get("MYSERVE_API_KEY", ""))
            )
    except (MyserveError, OSError, ValueError) as error:
        fail(str(error))
    _show(runs)
    if json_file is not None:
        results = [[result.as_dict() for result in results] for results in runs]
        json_file.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    if any(result.verdict != "identical" for results in runs for result in results):
        raise typer.Exit(1)


def _show(runs: Sequence[Sequence[ReplayResult]]) -> None:
    for results in runs:
        wrong = [result for result in results if result.verdict != "identical"]
        if wrong:
            out.print(_table(wrong[:_SHOWN]))
        if len(wrong) > _SHOWN:
            out.print(f"and {len(wrong) - _SHOWN} more: --json has all")
        out.print(Text(replay_summary(results)))
    if len(runs) > 1:
        alike = sum(
            len({(r.verdict, r.token, r.what) for r in same}) == 1 for same in zip(*runs, strict=True)
        )
        out.print(f"{alike} of {len(runs[0])} records came out the same on all {len(runs)} servers")


def _table(results: Sequence[ReplayResult]) -> Table:
    shown = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in ("record", "", "what", "margin", "likely cause"):
        shown.add_column(name, overflow="fold")
    for result in results:
        margin = "" if result.margin is None else f"{result.margin:+.3f}"
        shown.add_row(*map(Text, (result.source, result.verdict, result.what, margin, result.cause)))
    return shown


@contextmanager
def _local_server(model: str) -> Iterator[str]:
    """Serve a model on a free port of this machine until the block ends; give its URL. Raises VerifyError."""
    from myserve.embedded import embedded_model_path
    from myserve.server.app import create_app
    from myserve.server.edge.graceful import GracefulServer
    from myserve.server.settings import Settings

    path = str(embedded_model_path()) if model == "embedded" else model
    app: Any = create_app(Settings(models={_LOCAL_NAME: path}))
    listener = socket.create_server(("127.0.0.1", 0))
    server = GracefulServer(app)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        while app.state.models.readiness().get(_LOCAL_NAME) == "loading" or not server.started:
            if not thread.is_alive():
                raise VerifyError(f"{model} cannot be served")
            time.sleep(0.05)
        if app.state.models.readiness()[_LOCAL_NAME] != "ready":
            raise VerifyError(f"{model} does not load; `myserve serve {model}` says why")
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listener.close()
