"""A request's body is bounded in size, and parsed as the model that its route takes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel

from myserve.engine.memory.available import free_host_memory
from myserve.errors import RequestError
from myserve.server.errors import BodyTooLargeError, TooSlowError
from myserve.server.models.models import Models
from myserve.server.settings import Settings
from myserve.wire.parse import parse_request

__all__ = [
    "SCHEMAS",
    "documented",
    "made_of",
    "models_of",
    "query_choice",
    "read_bytes",
    "read_request",
    "settings_of",
]

R = TypeVar("R", bound=BaseModel)
T = TypeVar("T")

# Bytes that a byte of JSON may take while it is parsed: measured 24, for a list of one-digit ids.
PARSE_BYTES_PER_BODY_BYTE = 32
MEMORY_CHECKED_FROM_BYTES = 1 << 20  # from here on, free memory is looked at
PARSED_INLINE_BYTES = 1 << 16  # up to here, parsing takes less than a thread switch is worth
READ_INLINE_ITEMS = 512  # likewise: of a conversation that becomes a chat, 15 to 50 µs each

SCHEMAS = "#/components/schemas/"


def settings_of(request: Request) -> Settings:
    settings: Settings = request.app.state.settings
    return settings


def models_of(request: Request) -> Models:
    models: Models = request.app.state.models
    return models


async def read_request(request: Request, kind: type[R], *, may_be_empty: bool = False) -> R:
    """Return the body as a `kind`, whatever its content type; an empty one as `{}` where it may be. RequestError."""
    settings = settings_of(request)
    body = await read_bytes(request)
    if may_be_empty and not body:
        body += b"{}"
    if len(body) <= PARSED_INLINE_BYTES:
        return parse_request(kind, body, strict=settings.strict)
    return await asyncio.to_thread(parse_request, kind, body, strict=settings.strict)


async def made_of(num_items: int, make: Callable[[], T]) -> T:
    """Return what `make` makes of so many items; of many in a thread, so that other requests are answered meanwhile."""
    return make() if num_items <= READ_INLINE_ITEMS else await asyncio.to_thread(make)


def query_choice(request: Request, name: str, choices: Sequence[str], default: str) -> str:
    """Return what the query says for `name`. Raises RequestError for anything else than one of `choices`."""
    value = request.query_params.get(name, default)
    if value not in choices:
        raise RequestError(f"{name} must be one of {', '.join(choices)}, got {value[:80]!r}", param=name)
    return value


async def read_bytes(request: Request, memory_factor: int = PARSE_BYTES_PER_BODY_BYTE) -> bytearray:
    """Return the body. Raises BodyTooLargeError, TooSlowError. `memory_factor`: bytes that one of them may take."""
    settings = settings_of(request)
    try:
        async with asyncio.timeout(settings.client_timeout):
            return await _body(request, settings.max_body_bytes, memory_factor)
    except TimeoutError:
        raise TooSlowError(
            f"the body did not come within {settings.client_timeout:g} s", code="request_timeout"
        ) from None


async def _body(request: Request, limit: int, memory_factor: int) -> bytearray:
    """Read nothing of a body that says it is too large, and no further than the limit of one that does not.

    A bytearray grows as the parts come. To join them at the end would touch all of its memory at once: of 64 MiB that
    took 0.5 s, in which the event loop did nothing else.
    """
    said = request.headers.get("content-length", "")
    _check_size(int(said) if said.isdigit() else 0, limit, memory_factor)
    body = bytearray()
    checked = 0
    async for part in request.stream():
        body += part
        if len(body) > limit or len(body) - checked >= MEMORY_CHECKED_FROM_BYTES:
            _check_size(len(body), limit, memory_factor)
            checked = len(body)
    return body


def _check_size(size: int, limit: int, memory_factor: int) -> None:
    """Several large bodies at once must not end the server, so each may take what the others leave."""
    if size > limit:
        raise BodyTooLargeError(f"the body is larger than {limit} bytes", code="body_too_large")
    if size >= MEMORY_CHECKED_FROM_BYTES and size * memory_factor > (free := free_host_memory()):
        raise BodyTooLargeError(
            f"the body has {size} bytes or more, and the server's memory now has room for "
            f"{free // memory_factor}",
            code="body_too_large",
        )


def documented(
    body: type[BaseModel] | None = None, answer: type | None = None, event: type | None = None
) -> dict[str, Any]:
    """Schemas for /openapi.json: routes parse and shape for themselves, so FastAPI does not know them.

    `event` is what a stream's events are, where there may be a stream.
    """
    said: dict[str, Any] = {}
    if body is not None:
        said["requestBody"] = {"required": True, "content": {"application/json": _schema(body)}}
    answers = {"application/json": answer, "text/event-stream": event}
    content = {media: _schema(kind) for media, kind in answers.items() if kind is not None}
    if content:
        said["responses"] = {"200": {"content": content}}
    return said


def _schema(kind: type) -> dict[str, Any]:
    return {"schema": {"$ref": SCHEMAS + kind.__name__}}
