"""What every answer has, whatever made it: a request id, safe headers, a count, a line in the log, no bare crash."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from myserve.server import caller
from myserve.server.errors import error_response
from myserve.server.observe import logs
from myserve.server.observe.http_meters import HttpMeters
from myserve.server.observe.traces import Traces, follow

log = logging.getLogger("myserve.access")

# An answer is data: no browser shall guess its type, frame it, keep it, or tell others where it came from.
SAFE_HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}


class Edge:
    """The outermost layer. It looks at an answer's head and at its end; what lies between passes untouched."""

    def __init__(self, app: ASGIApp, meters: HttpMeters, traces: Traces | None) -> None:
        self._app = app
        self._meters = meters
        self._traces = traces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        notes = logs.begin(request_id_of(scope))
        caller.begin(asyncio.get_running_loop().time())
        trace = None if self._traces is None else self._traces.begin(scope, notes["request_id"])
        follow(trace)
        if trace is not None:
            notes["trace_id"] = trace.trace_id
        began = time.perf_counter()
        status, ended = 0, False

        async def send_noted(message: Message) -> None:
            nonlocal status, ended
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = notes["request_id"]
                for name, value in SAFE_HEADERS.items():
                    headers.setdefault(name, value)
            else:
                ended = not message.get("more_body", False)
            await send(message)

        self._meters.in_progress += 1
        try:
            await self._app(scope, receive, send_noted)
        except Exception as error:
            log.exception("%s %s failed", scope["method"], scope["path"])
            if trace is not None:
                trace.fail(error)
            if status == 0:
                await error_response(error)(scope, receive, send_noted)
        finally:
            self._end(scope, notes, status, time.perf_counter() - began, cut=not ended)
            if trace is not None:
                trace.end(handler_of(scope), status, cut=not ended)
            self._meters.in_progress -= 1

    def _end(self, scope: Scope, notes: dict[str, Any], status: int, seconds: float, *, cut: bool) -> None:
        handler = handler_of(scope)
        self._meters.add(scope["method"], handler, status, seconds)
        if cut:
            notes["cut"] = True  # the client left, or we had to end a stream
        notes |= {"status": status, "seconds": round(seconds, 4)}
        log.info("%s %s", scope["method"], handler, extra={"fields": notes})


def handler_of(scope: Scope) -> str:
    """The route's path as it is declared, once it is known."""
    path: str = getattr(scope.get("route"), "path", "none")
    return path


def request_id_of(scope: Scope) -> str:
    """The client's, which both sides' logs then share, or a new one.

    Bounded and printable: what comes back must not be a way to write headers or fill logs.
    """
    sent = Headers(scope=scope).get("x-request-id", "")
    return sent if 0 < len(sent) <= 128 and sent.isprintable() and sent.isascii() else uuid.uuid4().hex
