"""An answer ends when its client disconnects: events as they come, or one body."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from contextlib import aclosing
from typing import Any, TypeVar

import orjson
from fastapi import Request, Response
from starlette.types import Receive, Scope, Send

from myserve.server.errors import TooSlowError, error_body, status_of
from myserve.wire.sse import DONE, KEEP_ALIVE, encode_event

__all__ = [
    "KEEP_ALIVE_SECONDS",
    "LOOP_SECONDS",
    "MOST_UNSENT",
    "WRITTEN_INLINE_BYTES",
    "Chunk",
    "ClientGoneError",
    "EventStream",
    "json_response",
    "to_json",
    "to_json_in_slices",
    "unless_gone",
]

log = logging.getLogger("myserve.server")

T = TypeVar("T")

# An event's value, or its JSON where it was large and was written elsewhere.
Chunk = Mapping[str, Any] | bytes

# Proxies cut what is silent for 60 s: a stream that waits in the queue, or for a long prompt, says that it lives.
KEEP_ALIVE_SECONDS = 15.0
LOOP_SECONDS = 0.02  # that a stream keeps the event loop at a time
SLICE = 256  # items of a list that are written as JSON at a time
WRITTEN_INLINE_BYTES = 1 << 17  # a larger answer, or chunk, is written in a thread

MOST_UNSENT = 64 << 20  # bytes of one stream that wait for its client


class ClientGoneError(Exception):
    """The client has disconnected."""


def to_json(value: Mapping[str, Any]) -> bytes:
    """Return compact UTF-8, with null where a number is not finite. orjson: a logprobs chunk takes 1 µs, json's 35."""
    return orjson.dumps(value)


def to_json_in_slices(value: Any, depth: int = 6) -> bytes:
    """Return what `to_json` does, written piece by piece: other threads run in between, however large it is.

    >>> to_json_in_slices({"a": [{"b": [1, 2.5]}] * 2, "c": None})
    b'{"a":[{"b":[1,2.5]},{"b":[1,2.5]}],"c":null}'
    """
    if depth and isinstance(value, dict):
        fields = (
            orjson.dumps(key) + b":" + to_json_in_slices(item, depth - 1) for key, item in value.items()
        )
        return b"{" + b",".join(fields) + b"}"
    if isinstance(value, list) and len(value) > SLICE:
        slices = (value[at : at + SLICE] for at in range(0, len(value), SLICE))
        return b"[" + b",".join(orjson.dumps(part)[1:-1] for part in slices) + b"]"
    if depth and isinstance(value, list) and value and isinstance(value[0], dict):
        return b"[" + b",".join(to_json_in_slices(item, depth - 1) for item in value) + b"]"
    return orjson.dumps(value)


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


class EventStream(Response):
    """Sends each chunk as one event, then `[DONE]`; a failure on the way is an `error` event and no `[DONE]`.

    When the client disconnects, the iterator of chunks is closed at once, whatever it waits for.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        chunks: AsyncGenerator[Chunk, None],
        abort: Callable[[], None],
        encode: Callable[[bytes], bytes] = encode_event,
        done: bytes = DONE,
    ) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]  # the empty body's
        self._events = _encoded(chunks, encode, done)
        self._abort = abort  # for the chunks that were never begun: nothing in them can clean up

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.ensure_future(self._send_all(send))
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

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with aclosing(_bursts(self._events)) as bursts:
            async for burst in bursts:
                await send({"type": "http.response.body", "body": burst, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _bursts(source: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    """Yield the events, those that come at the same time as one: a step of n choices is one write, not n."""
    ready: list[bytes] = []
    unsent = 0
    woken = asyncio.Event()

    async def collect() -> None:
        nonlocal unsent
        async with aclosing(source) as events:
            async for event in events:
                unsent += len(event)
                ready.append(event if unsent <= MOST_UNSENT else _error_event(_too_slow()))
                woken.set()
                if unsent > MOST_UNSENT:  # leaving closes the chunks, and so ends what makes them
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


async def _encoded(
    chunks: AsyncGenerator[Chunk, None], encode: Callable[[bytes], bytes], done: bytes
) -> AsyncGenerator[bytes, None]:
    loop = asyncio.get_running_loop()
    had_loop, is_marked = loop.time(), False

    def mark() -> None:
        nonlocal had_loop, is_marked
        had_loop, is_marked = loop.time(), False

    try:
        async with aclosing(chunks):
            async for chunk in chunks:
                yield encode(chunk if isinstance(chunk, bytes) else to_json(chunk))
                # All choices of a step may be there at once: then nothing here would wait for anything.
                if not is_marked:
                    loop.call_soon(mark)
                    is_marked = True
                if loop.time() - had_loop > LOOP_SECONDS:
                    await asyncio.sleep(0)
    except Exception as error:
        if status_of(error) >= 500:
            log.error("a stream failed", exc_info=error)
        yield _error_event(error)
    else:
        yield done


def _error_event(error: Exception) -> bytes:
    return encode_event(to_json(error_body(error)), event="error")


def _too_slow() -> TooSlowError:
    return TooSlowError(
        f"{MOST_UNSENT >> 10} KiB of this stream wait to be read; it was ended", code="reading_too_slowly"
    )


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
