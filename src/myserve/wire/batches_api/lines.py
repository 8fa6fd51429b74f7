"""Lines of batch files in OpenAI's form: one request each, and for each an answer or an error."""

from __future__ import annotations

import uuid
from typing import Any

import msgspec
import orjson

from myserve.errors import RequestError

__all__ = ["BatchLine", "answer_line", "error_line", "read_batch_line"]

MAX_CUSTOM_ID = 512  # characters


class BatchLine(msgspec.Struct, frozen=True):
    """One request of a batch: `body` is the JSON of it, byte for byte."""

    custom_id: str
    url: str
    body: msgspec.Raw
    method: str = "POST"


class _Body(msgspec.Struct):
    """The fields of a body that say whether its answer is one line."""

    stream: Any = None
    background: Any = None


_LINE = msgspec.json.Decoder(BatchLine)
_BODY = msgspec.json.Decoder(_Body)


def read_batch_line(raw: bytes) -> BatchLine:
    r"""Return a line's request. Raises RequestError, whose code is OpenAI's word for the fault.

    >>> read_batch_line(b'{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"model": "m"}}').url
    '/v1/completions'
    >>> read_batch_line(b'{"custom_id": "a"}')
    Traceback (most recent call last):
    ...
    myserve.errors.RequestError: Object missing required field `url`
    """
    try:
        line = _LINE.decode(raw)
        asked = _BODY.decode(line.body)
    except msgspec.ValidationError as error:
        missing = "missing required field" in str(error)
        raise RequestError(
            str(error), code="missing_required_parameter" if missing else "invalid_value"
        ) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RequestError(f"no JSON: {error}", code="invalid_json_line") from None
    if not 0 < len(line.custom_id) <= MAX_CUSTOM_ID:
        raise RequestError(
            f"custom_id must have 1 to {MAX_CUSTOM_ID} characters", param="custom_id", code="invalid_value"
        )
    if line.method != "POST":
        raise RequestError(
            f"method must be POST, got {line.method[:20]!r}", param="method", code="invalid_method"
        )
    for name in ("stream", "background"):
        if getattr(asked, name):
            raise RequestError(
                f"body.{name} must be false in a batch: an answer is one line",
                param=f"body.{name}",
                code="unsupported_parameter",
            )
    return line


def answer_line(custom_id: str, status: int, request_id: str, body: bytes) -> bytes:
    """Return the output line of an answer, without its line feed; `body` is JSON and stays as it is.

    >>> orjson.loads(answer_line("a", 200, "r", b'{"x": 1}'))["response"]
    {'status_code': 200, 'request_id': 'r', 'body': {'x': 1}}
    """
    response = {"status_code": status, "request_id": request_id, "body": orjson.Fragment(body)}
    return _written(custom_id, response, None)


def error_line(custom_id: str, code: str, message: str) -> bytes:
    """Return the line of a request that no route has answered."""
    return _written(custom_id, None, {"code": code, "message": message})


def _written(custom_id: str, response: Any, error: Any) -> bytes:
    line = {
        "id": f"batch_req_{uuid.uuid4().hex}",
        "custom_id": custom_id,
        "response": response,
        "error": error,
    }
    return orjson.dumps(line)
