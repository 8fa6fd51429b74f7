"""A line of a batch is answered by the route that it names, in the process: the same code, and so the same bits."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Awaitable, Callable
from typing import NamedTuple

from fastapi import FastAPI, Request, Response
from starlette.types import Message

from myserve.errors import EngineDeadError, OverloadedError, WeightsLoadingError
from myserve.server import caller
from myserve.server.errors import MESSAGES, ShuttingDownError, error_response, status_of
from myserve.server.observe import logs, traces
from myserve.server.routes.chat import create_chat_completion
from myserve.server.routes.completions import create_completion
from myserve.server.routes.decisions import decide_as_openai, decide_as_system_one
from myserve.server.routes.dialects.sglang_generate import generate_natively
from myserve.server.routes.generate import generate
from myserve.server.routes.messages_api.routes import create_message
from myserve.server.routes.responses_api.routes import create_response
from myserve.wire.batches_api.lines import BatchLine

__all__ = ["ROUTES", "CalledLine", "call_route", "comes_back"]

log = logging.getLogger("myserve.server")

ROUTES: dict[str, Callable[[Request], Awaitable[Response]]] = {
    "/v1/chat/completions": create_chat_completion,
    "/v1/completions": create_completion,
    "/v1/responses": create_response,
    MESSAGES: create_message,
    "/v1/decisions": decide_as_openai,
    "/v1/systemone": decide_as_system_one,
    "/inference/v1/generate": generate,
    "/generate": generate_natively,
}


class CalledLine(NamedTuple):
    """A route's answer to a line."""

    status: int
    request_id: str
    body: bytes


async def call_route(app: FastAPI, owner: str, line: BatchLine) -> CalledLine:
    """Return what the line's route answers to its owner.

    Errors are answers, in the route's own shape; raises what `comes_back` says will pass by itself.
    """
    request_id = uuid.uuid4().hex
    logs.begin(request_id)
    traces.follow(None)
    caller.begin_batch(asyncio.get_running_loop().time(), owner)
    try:
        response = await ROUTES[line.url](_request(app, line))
    except Exception as error:
        if comes_back(error):
            raise
        if status_of(error) >= 500:
            log.error("a line of a batch failed", exc_info=error)
        response = error_response(error, line.url)
    return CalledLine(response.status_code, request_id, bytes(response.body))


def comes_back(error: Exception) -> bool:
    """Return whether an error is about the server's state, which changes, and not about the request.

    >>> comes_back(OverloadedError("full", retry_after=1)), comes_back(KeyError("ours"))
    (True, False)
    """
    return isinstance(error, OverloadedError | WeightsLoadingError | EngineDeadError | ShuttingDownError)


def _request(app: FastAPI, line: BatchLine) -> Request:
    body = bytes(line.body)
    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": "POST",
        "path": line.url,
        "query_string": b"",
        "headers": [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))],
        "app": app,
        "state": {},
    }
    parts: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        # the client is the batch, which never leaves
        return parts.pop() if parts else await asyncio.get_running_loop().create_future()

    return Request(scope, receive)
