"""Failures in a dialect's own shape, with ours beside it."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import Response

from myserve.errors import MyserveError
from myserve.server.answers.streaming import to_json
from myserve.server.errors import error_body, error_response

__all__ = ["failing_as"]

Route = Callable[..., Awaitable[Response]]


def failing_as(shape: Callable[[str], dict[str, Any]]) -> Callable[[Route], Route]:
    """Have a route's failures answered with `shape(message)`, and our own `error` beside it."""

    def decorate(route: Route) -> Route:
        @functools.wraps(route)
        async def told(*arguments: Any, **named: Any) -> Response:
            try:
                return await route(*arguments, **named)
            except MyserveError as error:
                answer, body = error_response(error), error_body(error)
                content = {**shape(body["error"]["message"]), **body}
                headers = {
                    k: v for k, v in answer.headers.items() if k not in ("content-length", "content-type")
                }
                return Response(to_json(content), answer.status_code, headers, media_type="application/json")

        return told

    return decorate
