"""Bytes to a request, or a `RequestError` that names the field, what was found there and what is wanted."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from functools import cache
from itertools import islice
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, from_json

from myserve.errors import RequestError
from myserve.wire.peers import HARMLESS, Refused

__all__ = ["count_values", "parse_request"]

R = TypeVar("R", bound=BaseModel)

_HARMLESS = frozenset[str]().union(*HARMLESS.values())

# Parsing holds Python's lock: 30 to 110 ns a value, 500 ns a field, 600 ns a list or object. So it takes 60 ms at most.
MAX_VALUES = 500_000
MAX_STRINGS = 131_072  # names of fields are strings too
MAX_CONTAINERS = 65_536
COUNTED_FROM_BYTES = MAX_CONTAINERS
_COUNT_BYTES = 1 << 20  # counted at a time

_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)


def parse_request(kind: type[R], body: bytes | bytearray, *, strict: bool = False) -> R:
    """The body as a `kind`. Known but unsupported fields are refused; unknown ones only when `strict`.

    >>> from myserve.wire.chat import ChatCompletionRequest
    >>> parse_request(ChatCompletionRequest, b'{"model": "m", "messages": []}')
    Traceback (most recent call last):
    ...
    myserve.errors.RequestError: messages: the list should have at least 1 item, not 0; got []
    """
    if len(body) > COUNTED_FROM_BYTES:
        count_values(body)
    try:
        request = kind.model_validate_json(body)
    except ValidationError as error:
        raise _as_request_error(error, body) from None
    _refuse_unsupported(request)
    if (check := getattr(request, "check", None)) is not None:
        check()
    if strict:
        _refuse_unknown(request)
    return request


def count_values(body: bytes | bytearray) -> None:
    """Raise RequestError when the body has more values, strings, or lists and objects than are parsed.

    >>> count_values(b'{"prompt": ["' + b",[{" * 200_000 + b'"]}')
    >>> count_values(b'{"prompt": [' + b"[1]," * 100_000 + b"]}")
    Traceback (most recent call last):
    ...
    myserve.errors.RequestError: the body has more than 65536 lists and objects; send fewer prompts or messages at once
    """
    _check("strings", (_count(body, b'"') - _count(body, b'\\"')) // 2, MAX_STRINGS)
    if _count(body, b",") <= MAX_VALUES and _count_containers(body) <= MAX_CONTAINERS:
        return  # with the marks inside strings, even
    values = containers = start = 0
    for string in _STRING.finditer(body):
        between = body[start : string.start()]
        values, containers = values + _count(between, b","), containers + _count_containers(between)
        start = string.end()
    _check("lists and objects", containers + _count_containers(body[start:]), MAX_CONTAINERS)
    _check("values", values + _count(body[start:], b","), MAX_VALUES)


def _check(what: str, count: int, limit: int) -> None:
    if count > limit:
        raise RequestError(
            f"the body has more than {limit} {what}; send fewer prompts or messages at once",
            code="too_many_values",
        )


def _count_containers(text: bytes | bytearray) -> int:
    return _count(text, b"[") + _count(text, b"{")


def _count(text: bytes | bytearray, mark: bytes) -> int:
    """Return how often `mark` occurs; other threads run in between."""
    return sum(text.count(mark, at, at + _COUNT_BYTES) for at in range(0, len(text), _COUNT_BYTES))


def _refuse_unsupported(request: BaseModel) -> None:
    for path, model in _models_in(request):
        if not model.model_extra:
            continue
        refused: Mapping[str, Refused] = getattr(type(model), "REFUSED", {})
        for name, value in model.model_extra.items():
            if name in refused and value is not None and value not in refused[name].idle:
                instead = refused[name].instead
                raise RequestError(
                    f"{path}{name} is not supported by this server"
                    + (f"; send {instead}" if instead else ""),
                    param=path + name,
                    code="unsupported_parameter",
                )


def _refuse_unknown(request: BaseModel) -> None:
    for path, model in _models_in(request):
        if not model.model_extra:
            continue
        kind = type(model)
        known = _HARMLESS | getattr(kind, "HINTS", frozenset()) | getattr(kind, "REFUSED", {}).keys()
        for name, value in model.model_extra.items():
            if name not in known and value is not None:
                raise RequestError(
                    f"{path}{name} is no field of this request", param=path + name, code="unknown_parameter"
                )


def _models_in(model: BaseModel, path: str = "") -> Iterator[tuple[str, BaseModel]]:
    """The request and every model inside it, each with what its fields' names begin with."""
    yield path, model
    for name in _fields_of_models(type(model)):
        value = getattr(model, name)
        if isinstance(value, BaseModel):
            yield from _models_in(value, f"{path}{name}.")
        elif isinstance(value, tuple) and value and isinstance(value[0], BaseModel):
            for position, item in enumerate(value):
                yield from _models_in(item, f"{path}{name}[{position}].")


@cache
def _fields_of_models(kind: type[BaseModel]) -> tuple[str, ...]:
    """Return the fields that can hold models: most fields of thousands of messages are texts, and a look costs."""

    def holds(annotation: Any) -> bool:
        origin, parts = get_origin(annotation), get_args(annotation)
        if origin is Literal:
            return False
        if origin is Annotated:
            return holds(parts[0])
        if parts:
            return any(holds(part) for part in parts if part is not Ellipsis)
        # what an alias stands for is not looked up: it may
        return not isinstance(annotation, type) or issubclass(annotation, BaseModel)

    return tuple(name for name, field in kind.model_fields.items() if holds(field.annotation))


def _as_request_error(error: ValidationError, body: bytes | bytearray) -> RequestError:
    # Of a union's complaints the deepest are about the form that the caller meant.
    complaints = error.errors(include_url=False)
    depth = max(len(detail["loc"]) for detail in complaints)
    details, *others = [detail for detail in complaints if len(detail["loc"]) == depth]
    if details["type"] == "json_invalid":
        return RequestError(f"the body is not valid JSON: {details['ctx']['error']}", code="invalid_json")
    value = from_json(body, allow_inf_nan=True)
    path = _path(details, value)
    same_place = [details, *(other for other in others if _path(other, value) == path)]
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
    shown = json.dumps(_beginning(details["input"]), default=str)
    return shown if len(shown) <= 80 else shown[:77] + "..."


def _beginning(value: Any) -> Any:
    """Return as much of a value as a message shows: to write out all of it could take a second."""
    if isinstance(value, str):
        return value[:80]
    if isinstance(value, list):
        return [_beginning(item) for item in value[:40]]
    if isinstance(value, dict):
        return {key[:80]: _beginning(item) for key, item in islice(value.items(), 40)}
    return value


def _path(details: ErrorDetails, value: Any) -> str:
    """`messages[0].content`: the steps in the body, and a field that is missing there; tags of unions are neither."""
    loc, is_missing = details["loc"], details["type"] == "missing"
    path = ""
    for depth, step in enumerate(loc):
        inside = (isinstance(step, str) and isinstance(value, dict)) or (
            isinstance(step, int) and isinstance(value, list)
        )
        last = is_missing and depth == len(loc) - 1
        if not inside or (isinstance(value, dict) and step not in value and not last):
            continue
        path += f"[{step}]" if isinstance(step, int) else f".{step}" if path else step
        if isinstance(value, dict) and step not in value:
            break  # the field that is missing
        value = value[step]
    return path
