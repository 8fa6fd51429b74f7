"""An HTTP reply, read: its events as they arrive, its whole body, or its error in the server's own words."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import orjson

from myserve.sdk.errors import AttemptFailed, Failure
from myserve.sdk.transport.http import Reply
from myserve.wire.sse import DONE_DATA, SSEDecoder

_ERROR_BODY_BYTES = 64 * 1024
_DONE = DONE_DATA.encode()


async def events_of(reply: Reply) -> AsyncIterator[list[bytes]]:
    """The data of each event, read by read. A stream that ends without `[DONE]` was cut: `AttemptFailed`."""
    if reply.headers.get("content-type", "").startswith("application/json"):
        yield [await read_all(reply)]  # a server that does not stream: its whole answer is one event
        return
    decoder = SSEDecoder()
    is_done = False
    async for data in reply.chunks():
        events = decoder.feed_data(data)
        if events and events[-1] == _DONE:
            is_done = True  # read on to the end all the same: the connection can then be used again
            events.pop()
        if events:
            yield events
    if not is_done:
        raise AttemptFailed(Failure("transport", "the stream ended before it was done"))


def object_of(data: bytes) -> dict[str, Any]:
    """An event's data as a JSON object; `AttemptFailed` where it is none, or where it holds an error."""
    try:
        chunk = orjson.loads(data)
    except ValueError:
        chunk = None
    if not isinstance(chunk, dict):
        text = data[:200].decode("utf-8", "replace")
        raise AttemptFailed(Failure("protocol", f"not a JSON object: {text!r}"))
    if chunk.get("error"):
        raise AttemptFailed(failure_in_stream(chunk["error"]))
    return chunk


def failure_in_stream(error: object) -> Failure:
    """An error after the 200. It has no status of its own unless its `code` is one."""
    code = error.get("code") if isinstance(error, dict) else None
    message = _message(error)
    return Failure.of_status(code, message) if isinstance(code, int) else Failure("server", message)


async def failure_of(reply: Reply) -> Failure:
    """An HTTP error with the server's own message, out of OpenAI's error shape, FastAPI's, or plain text."""
    raw = await read_all(reply, _ERROR_BODY_BYTES)
    try:
        body = json.loads(raw)
    except ValueError:
        body = raw.decode("utf-8", "replace")
    if isinstance(body, dict):
        body = body.get("error") or body.get("detail") or body
    return Failure.of_status(reply.status, _message(body) or "(no message)", reply.headers)


def _message(error: object) -> str:
    if isinstance(error, dict) and isinstance(error.get("message"), str):
        return str(error["message"])
    return error.strip()[:2000] if isinstance(error, str) else json.dumps(error)[:2000]


async def read_all(reply: Reply, limit: int | None = None) -> bytes:
    """The body, or its first bytes until they are more than `limit`."""
    body = bytearray()
    async for data in reply.chunks():
        body += data
        if limit is not None and len(body) > limit:
            break
    return bytes(body)
