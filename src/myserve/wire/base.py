"""JSON's types as request models have them: no coercion, except that 2.0 is the integer 2."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict

__all__ = ["Integer", "WireModel"]

_LARGEST_EXACT = 2**53  # from here on neighbouring integers share a float


class WireModel(BaseModel):
    """The root of all request models: "1" is no number, 1.5 no integer, true neither, NaN nothing."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False, frozen=True)


def _integral(value: Any) -> Any:
    """Return 2 for 2.0: JSON Schema calls it an integer, and R, Lua and PHP write integers so."""
    if isinstance(value, float) and value.is_integer() and abs(value) <= _LARGEST_EXACT:
        return int(value)
    return value


Integer = Annotated[int, BeforeValidator(_integral)]
