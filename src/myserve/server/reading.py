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
    """Read no further than the limit: a body need not say its length, or say it truly."""
    parts: list[bytes] = []
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise BodyTooLargeError(f"the body is larger than {limit} bytes", code="body_too_large")
        parts.append(part)
    return b"".join(parts)


def documented(kind: type[BaseModel]) -> dict[str, Any]:
    """The body's schema for /openapi.json: the routes parse for themselves, so FastAPI does not know it."""
    schema = {"$ref": SCHEMAS + kind.__name__}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
