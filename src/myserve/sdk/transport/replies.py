"""Reads an HTTP reply: its events as they arrive, its whole body, or its error in the server's own words."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import orjson

from myserve.sdk.errors import AttemptFailed, Failure
from myserve.sdk.transport.http import Reply
from myserve.wire.sse import DONE_DATA, SSEDecoder

__all__ = ["events_of", "failure_in_stream", "failure_of", "object_of", "read_all", "read_json"]

_ERROR_BODY_BYTES = 64 * 2**10
_JSON_BYTES = 16 * 2**20  # of an answer that is not a stream: versions, models, reports of weights
_STREAM_BYTES = 2**30  # where the caller knows no better
_DONE = DONE_DATA.encode()
# What a JSON decoder raises for text from anywhere: ValueError has invalid UTF-8 and numbers of 5,000 digits.
_NOT_JSON = (ValueError, RecursionError)


async def events_of(reply: Reply, max_bytes: int = _STREAM_BYTES) -> AsyncIterator[list[bytes]]:
    """Give the data of each event, read by read; an empty list for a read that completes none.

    Raises `AttemptFailed` for a stream that ends without `[DONE]`, for that was cut, and for one of more than
    `max_bytes`: nothing is held that was not asked for.
    """
    if reply.headers.get("content-type", "").startswith("application/json"):
        yield [
            await read_all(reply, max_bytes)
        ]  # a server that does not stream: its whole answer is one event
        return
    decoder = SSEDecoder()
    is_done = False
    num_bytes = 0
    async for data in reply.chunks():
        num_bytes += len(data)
        if num_bytes > max_bytes:
            raise _too_long(max_bytes)
        events = decoder.feed_data(data)
        if events and (is_done or _DONE in events):
            # Read on to the end all the same: the connection can then be used again.
            if is_done or events.pop() != _DONE or _DONE in events:
                raise AttemptFailed(Failure("protocol", "events came after the end of the stream"))
            is_done = True
        yield events
    if not is_done:
        raise AttemptFailed(Failure("transport", "the stream ended before it was done"))


def object_of(data: bytes) -> dict[str, Any]:
    """Return an event's data as a JSON object; `AttemptFailed` where it is none, or where it holds an error."""
    try:
        chunk = orjson.loads(data)
    except _NOT_JSON:
        chunk = None
    if not isinstance(chunk, dict):
        text = data[:200].decode("utf-8", "replace")
        raise AttemptFailed(Failure("protocol", f"not a JSON object: {text!r}"))
    if chunk.get("error"):
        raise AttemptFailed(failure_in_stream(chunk["error"]))
    return chunk


def failure_in_stream(error: object) -> Failure:
    """Return an error that came after the 200. It has no status of its own unless its `code` is one."""
    code = error.get("code") if isinstance(error, dict) else None
    message = _message(error)
    if isinstance(code, int) and 400 <= code < 600:
        return Failure.of_status(code, message)
    return Failure("server", message)


async def failure_of(reply: Reply) -> Failure:
    """Return an HTTP error with the server's own message, out of OpenAI's error shape, FastAPI's, or plain text."""
    if 300 <= reply.status < 400:
        return Failure.of_status(reply.status, _redirected(reply.headers.get("location", "")))
    raw = await _first_bytes(reply, _ERROR_BODY_BYTES)
    try:
        body = json.loads(raw)
    except _NOT_JSON:
        body = raw.decode("utf-8", "replace")
    if isinstance(body, dict):
        body = body.get("error") or body.get("detail") or body
    return Failure.of_status(reply.status, _message(body) or "(no message)", reply.headers)


def _redirected(location: str) -> str:
    return (
        f"the server redirects to {location[:200]!r}. Redirects are not followed, for the key and the prompt would go "
        "along: if you trust that address, pass it as inference_url"
    )


def _message(error: object) -> str:
    if isinstance(error, dict) and isinstance(error.get("message"), str):
        return str(error["message"])[:2000]
    return error.strip()[:2000] if isinstance(error, str) else json.dumps(error)[:2000]


async def read_all(reply: Reply, max_bytes: int = _JSON_BYTES) -> bytes:
    """Return the whole body; `AttemptFailed` when it is longer than `max_bytes`."""
    body = await _first_bytes(reply, max_bytes)
    if len(body) > max_bytes:
        raise _too_long(max_bytes)
    return body


async def read_json(reply: Reply, url: str) -> Any:
    """Return the whole body as JSON; `AttemptFailed` where it is none."""
    body = await read_all(reply)
    try:
        return json.loads(body)
    except _NOT_JSON as error:
        raise AttemptFailed(Failure("protocol", f"{url} gave no JSON: {error}")) from error


async def _first_bytes(reply: Reply, enough: int) -> bytes:
    body = bytearray()
    async for data in reply.chunks():
        body += data
        if len(body) > enough:
            break
    return bytes(body)


def _too_long(max_bytes: int) -> AttemptFailed:
    return AttemptFailed(
        Failure("protocol", f"the answer has more than {max_bytes:,} bytes: that was not asked for")
    )
