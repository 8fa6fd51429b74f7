"""Bytes to a request, or a `RequestError` that names the field, what was found there and what is wanted."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from myserve.errors import RequestError
from myserve.wire.fields import HINTS

R = TypeVar("R", bound=BaseModel)


def parse_request(kind: type[R], body: bytes, *, strict: bool = False) -> R:
    """The body as a `kind`. Known but unsupported fields are refused; unknown ones only when `strict`.

    >>> from myserve.wire.chat import ChatCompletionRequest
    >>> parse_request(ChatCompletionRequest, b'{"model": "m", "messages": []}')
    Traceback (most recent call last):
    ...
    myserve.errors.RequestError: messages: the list should have at least 1 item, not 0; got []
    """
    try:
        request = kind.model_validate_json(body)
    except ValidationError as error:
        raise _as_request_error(error, body) from None
    _refuse_unsupported(request)
    if strict:
        _refuse_unknown(request)
    return request


def _refuse_unsupported(request: BaseModel) -> None:
    for path, model in _models_in(request):
        harmless = getattr(model, "UNSUPPORTED", {})
        for name, value in (model.model_extra or {}).items():
            if name in harmless and value is not None and value not in harmless[name]:
                raise RequestError(
                    f"{path}{name} is not supported by this server",
                    param=path + name,
                    code="unsupported_parameter",
                )


def _refuse_unknown(request: BaseModel) -> None:
    for path, model in _models_in(request):
        known = HINTS | getattr(model, "HINTS", frozenset()) | getattr(model, "UNSUPPORTED", {}).keys()
        for name, value in (model.model_extra or {}).items():
            if name not in known and value is not None:
                raise RequestError(
                    f"{path}{name} is no field of this request", param=path + name, code="unknown_parameter"
                )


def _models_in(model: BaseModel, path: str = "") -> Iterator[tuple[str, BaseModel]]:
    """The request and every model inside it, each with what its fields' names begin with."""
    yield path, model
    for name in type(model).model_fields:
        value = getattr(model, name)
        if isinstance(value, BaseModel):
            yield from _models_in(value, f"{path}{name}.")
        elif isinstance(value, tuple) and value and isinstance(value[0], BaseModel):
            for position, item in enumerate(value):
                yield from _models_in(item, f"{path}{name}[{position}].")


def _as_request_error(error: ValidationError, body: bytes) -> RequestError:
    # Of a union's complaints the deepest are about the form that the caller meant.
    complaints = error.errors(include_url=False)
    depth = max(len(detail["loc"]) for detail in complaints)
    details, *others = [detail for detail in complaints if len(detail["loc"]) == depth]
    if details["type"] == "json_invalid":
        return RequestError(f"the body is not valid JSON: {details['ctx']['error']}", code="invalid_json")
    value = json.loads(body)
    path = _path(details["loc"], value)
    same_place = [details, *(other for other in others if _path(other["loc"], value) == path)]
    reason = ", or ".join(dict.fromkeys(_reason(detail) for detail in same_place))
    if not path:
        return RequestError(f"the body must be a JSON object: {reason}")
    found = "" if details["type"] in ("missing", "value_error") else f"; got {_shown(details)}"
    return RequestError(f"{path}: {reason}{found}", param=path, code=_code(details))


def _reason(details: ErrorDetails) -> str:
    message = details["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return message.replace("Tuple", "the list").replace(" after validation", "")


def _code(details: ErrorDetails) -> str:
    return "missing_required_parameter" if details["type"] == "missing" else "invalid_value"


def _shown(details: ErrorDetails) -> str:
    shown = json.dumps(details["input"], default=str)
    return shown if len(shown) <= 80 else shown[:77] + "..."


def _path(loc: tuple[int | str, ...], value: Any) -> str:
    """`messages[0].content`: the steps of `loc` that are in the body; pydantic's tags for unions are not."""
    path = ""
    for depth, step in enumerate(loc):
        inside = (isinstance(step, str) and isinstance(value, dict)) or (
            isinstance(step, int) and isinstance(value, list)
        )
        last = depth == len(loc) - 1
        if not inside or (isinstance(value, dict) and step not in value and not last):
            continue
        path += f"[{step}]" if isinstance(step, int) else f".{step}" if path else step
        if isinstance(value, dict) and step not in value:
            break  # the field that is missing
        value = value[step]
    return path
