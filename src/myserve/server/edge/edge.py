"""Every answer gets a request id, safe headers, a count, a trace and a line in the log; an exception becomes a 500."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from myserve.server import caller
from myserve.server.errors import error_response, has_anthropic_shape
from myserve.server.observe import logs
from myserve.server.observe.http_meters import HttpMeters, method_label
from myserve.server.observe.traces import Traces, follow

__all__ = ["Edge", "request_id_of"]

log = logging.getLogger("myserve.access")

# An answer is data: no browser shall guess its type, frame it, keep it, or tell others where it came from.
SAFE_HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}


class Edge:
    """The outermost middleware. It changes an answer's head and notes its end; the body passes untouched.

    A HEAD is answered as the GET would be, without its body.
    """

    def __init__(self, app: ASGIApp, meters: HttpMeters, traces: Traces | None) -> None:
        self._app = app
        self._meters = meters
        self._traces = traces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = _Exchange(scope, send, self._meters, self._traces)
        try:
            await self._app(exchange.scope, receive, exchange.send)
        except Exception as error:
            exchange.fail(error)
            if not exchange.has_begun:
                await error_response(error, exchange.scope["path"])(exchange.scope, receive, exchange.send)
        finally:
            exchange.end()


class _Exchange:
    """One request and its answer, as far as it has gone out."""

    def __init__(self, scope: Scope, send: Send, meters: HttpMeters, traces: Traces | None) -> None:
        self._method: str = scope["method"]
        # a copy, for the server below still has to know that it was a HEAD
        self.scope: Scope = {**scope, "method": "GET" if self._method == "HEAD" else self._method}
        self._send = send
        self._meters = meters
        self._status = 0
        self._is_whole = False
        self._began = time.perf_counter()
        self._notes = logs.begin(request_id_of(scope))
        caller.begin(asyncio.get_running_loop().time())
        self._trace = None if traces is None else traces.begin(scope, self._notes["request_id"])
        follow(self._trace)
        if self._trace is not None:
            self._notes["trace_id"] = self._trace.trace_id
        meters.in_progress += 1

    @property
    def has_begun(self) -> bool:
        """True where the answer's head is out."""
        return self._status != 0

    async def send(self, message: Message) -> None:
        """Pass a part of the answer on; its head gets our headers."""
        if message["type"] == "http.response.start":
            self._status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["x-request-id"] = self._notes["request_id"]
            if has_anthropic_shape(self.scope["path"]):
                headers["request-id"] = self._notes["request_id"]
            for name, value in SAFE_HEADERS.items():
                headers.setdefault(name, value)
        else:
            self._is_whole = not message.get("more_body", False)
            if self._method == "HEAD":
                message = {**message, "body": b""}
        await self._send(message)

    def fail(self, error: Exception) -> None:
        """Note an exception that no handler took."""
        log.error("%s %s failed", self._method, self.scope["path"], exc_info=error)
        if self._trace is not None:
            self._trace.fail(error)

    def end(self) -> None:
        """Count the answer, end its trace and write its line. `cut` notes that its last byte is not out."""
        handler = _handler_of(self.scope)
        seconds = time.perf_counter() - self._began
        self._meters.add(self._method, handler, self._status, seconds)
        if not self._is_whole:
            self._notes["cut"] = True
        self._notes |= {"status": self._status, "seconds": round(seconds, 4)}
        log.info("%s %s", method_label(self._method), handler, extra={"fields": self._notes})
        if self._trace is not None:
            self._trace.end(handler, self._status, cut=not self._is_whole)
        self._meters.in_progress -= 1


def _handler_of(scope: Scope) -> str:
    """Return the route's path as it is declared; "none" where no route was found."""
    path: str = getattr(scope.get("route"), "path", "none")
    return path


def request_id_of(scope: Scope) -> str:
    """Return the client's request id, which both sides' logs then share, or a new one.

    The client's is taken only where it is short and printable: it must not be a way to write headers or fill logs.
    """
    sent = Headers(scope=scope).get("x-request-id", "")
    return sent if 0 < len(sent) <= 128 and sent.isprintable() and sent.isascii() else uuid.uuid4().hex
