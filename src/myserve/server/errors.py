"""Every exception becomes an HTTP status and OpenAI's error shape here, and nowhere else."""

from __future__ import annotations

import json
from http import HTTPStatus

from fastapi import Response

from myserve.errors import (
    EngineDeadError,
    EngineError,
    ModelNotFoundError,
    NotEnoughMemoryError,
    OverloadedError,
    RequestError,
    WeightsLoadingError,
)
from myserve.wire.messages_api.answer import MessagesError, MessagesErrorBody
from myserve.wire.responses import ErrorResponse

# where errors have Anthropic's shape, and below
MESSAGES = "/v1/messages"

# Anthropic's names of errors, by status
_ANTHROPIC = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
INTERNAL = "an error inside the server; it is ours, not the request's"


class BodyTooLargeError(RequestError):
    """The request's body is over the operator's limit."""


class UnauthorizedError(RequestError):
    """A key is missing or unknown."""

    def __init__(self, message: str) -> None:
        super().__init__(message, code="invalid_api_key")


class NotFoundError(RequestError):
    """The request names something that is not kept here, or is another caller's."""


class ForbiddenError(RequestError):
    """A key that may not do this, or a page or host name that may not use this server."""

    def __init__(self, message: str) -> None:
        super().__init__(message, code="forbidden")


class TooSlowError(RequestError):
    """The client took longer to send its request, or to read its answer, than the operator allows."""


class DeadlineError(EngineError):
    """The answer took longer than the operator, or the request itself, allows."""


class ShuttingDownError(EngineError):
    """The server shuts down. Another one, or this one restarted, gives the same tokens for the same seed."""

    retry_after = 1.0  # seconds

    def __init__(self) -> None:
        super().__init__("the server is shutting down; ask again")


class EngineRestartingError(EngineDeadError):
    """The engine has stopped and is loaded again with the same weights: the same seed will give the same tokens."""

    retry_after = 2.0  # seconds

    def __init__(self) -> None:
        super().__init__("the engine has stopped and is loaded again; ask again")


class ModelLoadError(EngineError):
    """A model that the operator serves did not load."""


class EchoHasNoModelError(RequestError):
    """The echo backend was asked for something that needs a model."""


def status_of(error: Exception) -> int:
    """Return an exception's HTTP status: 4xx the caller's fault, 429 and 503 try again, 500 ours.

    >>> status_of(RequestError("top_k ...")), status_of(OverloadedError("full", retry_after=1))
    (400, 429)
    >>> status_of(KeyError("ours"))
    500
    """
    match error:
        case ModelNotFoundError() | NotFoundError():
            return 404
        case UnauthorizedError():
            return 401
        case ForbiddenError():
            return 403
        case TooSlowError():
            return 408
        case BodyTooLargeError():
            return 413
        case RequestError():
            return 400
        case WeightsLoadingError():
            return 425
        case OverloadedError():
            return 429
        case ModelLoadError() | EngineDeadError() | NotEnoughMemoryError() | ShuttingDownError():
            return 503
        case DeadlineError():
            return 504
    return 500


def error_body(error: Exception) -> ErrorResponse:
    """Return OpenAI's error shape. Only errors raised on purpose show their message; others are for the log.

    >>> error_body(RequestError("n must be at least 1, got 0", param="n"))["error"]["param"]
    'n'
    >>> error_body(KeyError("secret"))["error"]["message"]
    "an error inside the server; it is ours, not the request's"
    """
    if isinstance(error, RequestError):
        is_missing = isinstance(error, ModelNotFoundError | NotFoundError)
        kind = "not_found_error" if is_missing else "invalid_request_error"
        return _shape(error.message, kind, error.param, error.code)
    if isinstance(error, OverloadedError):
        return _shape(str(error), "rate_limit_error", None, "overloaded")
    if isinstance(error, WeightsLoadingError):
        return _shape(str(error), "server_error", None, "weights_loading")
    if isinstance(error, DeadlineError):
        return _shape(str(error), "server_error", None, "deadline_exceeded")
    if isinstance(error, EngineError):
        code = "service_unavailable" if status_of(error) == 503 else "engine_error"
        return _shape(str(error), "server_error", None, code)
    return _shape(INTERNAL, "server_error", None, "internal_error")


def messages_error_body(error: Exception) -> MessagesError:
    """Return Anthropic's error shape.

    >>> messages_error_body(RequestError("no", param="model"))["error"]["type"]
    'invalid_request_error'
    """
    return _as_anthropic(error_body(error), status_of(error))


def _as_anthropic(body: ErrorResponse, status: int) -> MessagesError:
    said = body["error"]
    kind = _ANTHROPIC.get(status, "api_error" if status >= 500 else "invalid_request_error")
    error: MessagesErrorBody = {
        "type": kind,
        "message": said["message"],
        "param": said["param"],
        "code": said["code"],
    }
    if said["code"] is not None:
        error["details"] = {"error_code": said["code"]}
    return {"type": "error", "error": error}


def has_anthropic_shape(path: str) -> bool:
    """Return whether a route's errors have Anthropic's shape.

    >>> has_anthropic_shape("/v1/messages/count_tokens"), has_anthropic_shape("/v1/models")
    (True, False)
    """
    return path == MESSAGES or path.startswith(MESSAGES + "/")


def error_response(error: Exception, path: str = "") -> Response:
    """Return the whole answer, with `Retry-After` where it helps, in the shape that the route's clients read."""
    headers = {}
    if isinstance(error, OverloadedError | WeightsLoadingError | ShuttingDownError | EngineRestartingError):
        headers["retry-after"] = f"{max(1, round(error.retry_after))}"
    if isinstance(error, TooSlowError | BodyTooLargeError):
        # or the rest of the body would be read, to be thrown away
        headers["connection"] = "close"
    if isinstance(error, UnauthorizedError):
        headers["www-authenticate"] = "Bearer"
    return _json(error_body(error), status_of(error), headers, path)


def http_error_response(status: int, detail: str, headers: dict[str, str], path: str = "") -> Response:
    """Return the answer to what never reached a route: an unknown path, a wrong method."""
    return _json(http_error_body(status, detail), status, headers, path)


def http_error_body(status: int, detail: str) -> ErrorResponse:
    """Return OpenAI's shape for an error of HTTP itself; its code is the status' phrase.

    >>> http_error_body(404, "there is no GET /x here")["error"]["code"]
    'not_found'
    """
    code = HTTPStatus(status).phrase.lower().replace(" ", "_")
    return _shape(detail, "invalid_request_error", None, code)


def _shape(message: str, kind: str, param: str | None, code: str | None) -> ErrorResponse:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _json(body: ErrorResponse, status: int, headers: dict[str, str], path: str) -> Response:
    shaped = _as_anthropic(body, status) if has_anthropic_shape(path) else body
    return Response(json.dumps(shaped), status, headers, media_type="application/json")
