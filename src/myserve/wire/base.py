"""JSON's types as request models have them: no coercion, except that 2.0 is the integer 2. And values as JSON."""

from __future__ import annotations

from typing import Annotated, Any

import orjson
from pydantic import BaseModel, BeforeValidator, ConfigDict

__all__ = ["Integer", "WireModel", "to_json"]

_LARGEST_EXACT = 2**53  # from here on neighbouring integers share a float
# that orjson writes
_MOST_WRITTEN = (1 << 64) - 1
_LEAST_WRITTEN = -(1 << 63)


class WireModel(BaseModel):
    """The root of all request models: "1" is no number, 1.5 no integer, true neither, NaN nothing."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False, frozen=True)


def _integral(value: Any) -> Any:
    """Return 2 for 2.0: JSON Schema calls it an integer, and R, Lua and PHP write integers so."""
    if isinstance(value, float) and value.is_integer() and abs(value) <= _LARGEST_EXACT:
        return int(value)
    return value


Integer = Annotated[int, BeforeValidator(_integral)]


def to_json(value: Any) -> bytes:
    """Return compact UTF-8, with null where a number is not finite. orjson: a logprobs chunk takes 1 µs, json's 35.

    >>> to_json({"a": [1.5, 10**20], "b": float("inf")})
    b'{"a":[1.5,100000000000000000000],"b":null}'
    """
    try:
        return orjson.dumps(value)
    except TypeError:
        return orjson.dumps(_with_large_integers(value))


def _with_large_integers(value: Any) -> Any:
    """Return a value with integers that orjson refuses as JSON already."""
    if isinstance(value, dict):
        return {name: _with_large_integers(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_with_large_integers(item) for item in value]
    if isinstance(value, int) and not _LEAST_WRITTEN <= value <= _MOST_WRITTEN:
        return orjson.Fragment(str(value).encode())
    return value
