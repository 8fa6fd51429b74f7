"""A request's body, bounded in size and parsed as what the route takes; the models that it may name."""

from __future__ import annotations

import asyncio
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel

from myserve.server.errors import BodyTooLargeError, TooSlowError
from myserve.server.models import Models
from myserve.server.settings import Settings
from myserve.wire.parse import parse_request

R = TypeVar("R", bound=BaseModel)

SCHEMAS = "#/components/schemas/"


def settings_of(request: Request) -> Settings:
    settings: Settings = request.app.state.settings
    return settings


def models_of(request: Request) -> Models:
    models: Models = request.app.state.models
    return models


async def read_request(request: Request, kind: type[R]) -> R:
    """The body as a `kind`, whatever its content type says. Raises RequestError."""
    settings = settings_of(request)
    try:
        async with asyncio.timeout(settings.client_timeout):
            body = await _body(request, settings.max_body_bytes)
    except TimeoutError:
        raise TooSlowError(
            f"the body did not come within {settings.client_timeout:g} s", code="request_timeout"
        ) from None
    return parse_request(kind, body, strict=settings.strict)


async def _body(request: Request, limit: int) -> bytes:
    """Read nothing of a body that says it is too large, and no further than the limit of one that does not."""
    parts: list[bytes] = []
    said = request.headers.get("content-length", "")
    size = int(said) if said.isdigit() else 0
    if size <= limit:
        size = 0
        async for part in request.stream():
            size += len(part)
            if size > limit:
                break
            parts.append(part)
    if size > limit:
        raise BodyTooLargeError(f"the body is larger than {limit} bytes", code="body_too_large")
    return b"".join(parts)


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
