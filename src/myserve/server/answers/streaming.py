"""An answer ends when its client disconnects: events as they come, or one body."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from contextlib import aclosing
from typing import Any, Protocol, TypeVar

from fastapi import Request, Response
from starlette.types import Receive, Scope, Send

from myserve.server.errors import TooSlowError, error_body, status_of
from myserve.wire.base import to_json
from myserve.wire.sse import KEEP_ALIVE, encode_event

__all__ = [
    "CONNECTION",
    "KEEP_ALIVE_SECONDS",
    "MOST_UNSENT",
    "WRITTEN_INLINE_BYTES",
    "BodyConnection",
    "ClientGoneError",
    "EventStream",
    "error_event",
    "json_response",
    "to_json",
    "to_json_in_slices",
    "unless_gone",
]

log = logging.getLogger("myserve.server")

T = TypeVar("T")

# Proxies cut what is silent for 60 s: a stream that waits in the queue, or for a long prompt, says that it lives.
KEEP_ALIVE_SECONDS = 15.0
SLICE = 256  # items of a list that are written as JSON at a time
CONNECTION = "myserve.connection"  # where a request's ASGI state has its `BodyConnection`
WRITTEN_INLINE_BYTES = 1 << 17  # a larger answer, or chunk, is written in a thread

MOST_UNSENT = 64 << 20  # bytes of one stream that wait for its client


class ClientGoneError(Exception):
    """The client has disconnected."""


def to_json_in_slices(value: Any, depth: int = 6) -> bytes:
    """Return what `to_json` does, written piece by piece: other threads run in between, however large it is.

    >>> to_json_in_slices({"a": [{"b": [1, 2.5]}] * 2, "c": None})
    b'{"a":[{"b":[1,2.5]},{"b":[1,2.5]}],"c":null}'
    """
    if depth and isinstance(value, dict):
        fields = (to_json(key) + b":" + to_json_in_slices(item, depth - 1) for key, item in value.items())
        return b"{" + b",".join(fields) + b"}"
    if isinstance(value, list) and len(value) > SLICE:
        slices = (value[at : at + SLICE] for at in range(0, len(value), SLICE))
        return b"[" + b",".join(to_json(part)[1:-1] for part in slices) + b"]"
    if depth and isinstance(value, list) and value and isinstance(value[0], dict):
        return b"[" + b",".join(to_json_in_slices(item, depth - 1) for item in value) + b"]"
    return to_json(value)


def json_response(value: Mapping[str, Any] | bytes, headers: Mapping[str, str] | None = None) -> Response:
    body = value if isinstance(value, bytes) else to_json(value)
    return Response(body, headers=headers, media_type="application/json")


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Return the result of `work`, which is cancelled when the client disconnects before it is there."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGoneError
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


class BodyConnection(Protocol):
    """A connection of the server below, which takes parts of an answer's body past the layers of ASGI."""

    def write_body(self, part: bytes) -> bool:
        """Write a part of the running answer's body now; False where that cannot be, and `send` must do it."""
        ...


def error_event(error: Exception) -> bytes:
    """Return an error as an event, in OpenAI's shape."""
    return encode_event(to_json(error_body(error)), event="error")


class EventStream(Response):
    """Sends each burst of events as it comes; a failure on the way is an `error` event.

    A burst is whole events, framed, that are ready together: the choices of a step are one write. When the client
    disconnects, the iterator of bursts is closed at once, whatever it waits for.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        bursts: AsyncGenerator[bytes, None],
        abort: Callable[[], None],
        failed: Callable[[Exception], bytes] = error_event,
    ) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]  # the empty body's
        self._bursts = _with_error(bursts, failed)
        self._failed = failed
        self._abort = abort  # for the bursts that were never begun: nothing in them can clean up

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        connection: BodyConnection | None = scope.get("state", {}).get(CONNECTION)
        sending = asyncio.ensure_future(self._send_all(send, connection))
        gone = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait({sending, gone}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        finally:
            for each in (sending, gone):
                each.cancel()
            await asyncio.gather(sending, gone, return_exceptions=True)
            self._abort()

    async def _send_all(self, send: Send, connection: BodyConnection | None) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with aclosing(self._bursts) as bursts:
            unwritten = b"" if connection is None else await _write_all(bursts, connection)
            if unwritten is not None:
                await self._send_rest(unwritten, bursts, send)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_rest(self, first: bytes, bursts: AsyncGenerator[bytes, None], send: Send) -> None:
        async with aclosing(_collected(first, bursts, self._failed)) as collected:
            async for burst in collected:
                await send({"type": "http.response.body", "body": burst, "more_body": True})


async def _write_all(bursts: AsyncGenerator[bytes, None], connection: BodyConnection) -> bytes | None:
    """Write bursts as long as the client takes them; return the first that it does not, None when all are out.

    One task and one write a burst. Through `send` a burst is made in a task and sent by another, passes four layers
    and h11's states, and costs three times as much.
    """
    write = connection.write_body
    silence = _Silence(write)
    try:
        async for burst in bursts:
            if not write(burst):
                return burst
            silence.broken()
        return None
    finally:
        silence.end()


class _Silence:
    """Writes a comment whenever nothing was written for KEEP_ALIVE_SECONDS. One timer a stream, not one a burst."""

    def __init__(self, write: Callable[[bytes], bool]) -> None:
        self._write = write
        self._now = asyncio.get_running_loop().time
        self.broken()
        self._wait()

    def broken(self) -> None:
        """Note that something was written now."""
        self._since = self._now()

    def end(self) -> None:
        """Stop the timer."""
        self._timer.cancel()

    def _wait(self) -> None:
        self._timer = asyncio.get_running_loop().call_at(self._since + KEEP_ALIVE_SECONDS, self._look)

    def _look(self) -> None:
        if self._now() - self._since >= KEEP_ALIVE_SECONDS:
            self._write(KEEP_ALIVE)
            self.broken()
        self._wait()


async def _collected(
    first: bytes, source: AsyncGenerator[bytes, None], failed: Callable[[Exception], bytes]
) -> AsyncGenerator[bytes, None]:
    """Yield `first` and the bursts behind it, all that is ready as one, while another task makes the next.

    So what waits for a slow client is counted in bytes, and ends its stream where it is too much.
    """
    ready = [first] if first else []
    unsent = len(first)
    woken = asyncio.Event()

    async def collect() -> None:
        nonlocal unsent
        async with aclosing(source) as bursts:
            async for burst in bursts:
                unsent += len(burst)
                ready.append(burst if unsent <= MOST_UNSENT else failed(_too_slow()))
                woken.set()
                if unsent > MOST_UNSENT:  # leaving closes the bursts, and so ends what makes them
                    return

    collecting = asyncio.ensure_future(collect())
    collecting.add_done_callback(lambda _: woken.set())
    try:
        while ready or not collecting.done():
            if ready:
                burst = b"".join(ready)
                ready.clear()
                unsent = 0
                yield burst
            else:
                woken.clear()
                try:
                    async with asyncio.timeout(KEEP_ALIVE_SECONDS):
                        await woken.wait()
                except TimeoutError:
                    yield KEEP_ALIVE
        await collecting
    finally:
        collecting.cancel()
        await asyncio.gather(collecting, return_exceptions=True)


async def _with_error(
    bursts: AsyncGenerator[bytes, None], failed: Callable[[Exception], bytes]
) -> AsyncGenerator[bytes, None]:
    """Yield the bursts; where they fail, an error event behind them."""
    try:
        async with aclosing(bursts):
            async for burst in bursts:
                yield burst
    except Exception as error:
        if status_of(error) >= 500:
            log.error("a stream failed", exc_info=error)
        yield failed(error)


def _too_slow() -> TooSlowError:
    return TooSlowError(
        f"{MOST_UNSENT >> 10} KiB of this stream wait to be read; it was ended", code="reading_too_slowly"
    )


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
