"""Each number of a request has one range, declared where the field is; nothing outside it gets past the constructor.

The range is the field's metadata: checks, error messages and the fuzzer of `benchmarks` read the same object, and so
no number reaches a tensor unbounded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any

from myserve.errors import RequestError

__all__ = ["MAX_ID", "MAX_TOKENS", "Range", "check_ranges", "ranged", "ranges_of", "shown"]

MAX_ID = 2**31 - 1  # a token id: int32 in tables and masks
MAX_TOKENS = 2**31 - 1  # a count of tokens

_SHOWN_BITS = 128  # integers of more bits are described, not written out


@dataclass(frozen=True, slots=True)
class Range:
    """The numbers that a field may have: [low, high], or (low, high] where it is `open_low`.

    Floats as limits admit integers too; integers as limits admit integers alone. NaN is in no range.

    >>> Range(0.0, 1.0, open_low=True).check("typical_p", 0)
    Traceback (most recent call last):
    ...
    myserve.errors.RequestError: typical_p must be in (0, 1], got 0
    >>> str(Range(-1, 2**31 - 1))
    '[-1, 2147483647]'
    """

    low: float
    high: float
    open_low: bool = False

    @property
    def is_integer(self) -> bool:
        """True where only integers are in it."""
        return isinstance(self.low, int)

    def __str__(self) -> str:
        low, high = (str(x) if self.is_integer else f"{x:g}" for x in (self.low, self.high))
        return f"{'(' if self.open_low else '['}{low}, {high}]"

    def __contains__(self, value: float) -> bool:
        # written so that NaN fails: every comparison with it is false
        return self.low <= value <= self.high and not (self.open_low and value == self.low)

    def check(self, name: str, value: object) -> None:
        """Raise `RequestError` with the field's name, the value and the range, unless `value` is a number in it."""
        # bool is an int to Python; `"n": true` is a mistake to everybody else
        kinds = (int,) if self.is_integer else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds):
            kind = "an integer" if self.is_integer else "a number"
            raise RequestError(f"{name} must be {kind}, got {shown(value)}", param=name)
        assert isinstance(value, int | float)
        if value not in self:
            raise RequestError(f"{name} must be in {self}, got {shown(value)}", param=name)


def shown(value: object) -> str:
    """Return a short text of a value for a message. Python refuses to write integers of thousands of digits.

    >>> shown(2**63), shown(10**5000)
    ('9223372036854775808', 'an integer of 16610 bits')
    """
    if isinstance(value, int) and value.bit_length() > _SHOWN_BITS:
        return f"an integer of {value.bit_length()} bits"
    return str(value) if isinstance(value, int | float) else f"{value!r:.80}"


def ranged(default: float | None, low: float, high: float, *, open_low: bool = False) -> Any:
    """Return a dataclass field with this default and range; None as the default means that None is allowed too."""
    return field(default=default, metadata={"range": Range(low, high, open_low)})


@cache
def ranges_of(cls: type) -> Mapping[str, Range]:
    """Return the ranges that the fields of a dataclass declare, by name."""
    return {f.name: f.metadata["range"] for f in fields(cls) if "range" in f.metadata}


def check_ranges(instance: Any) -> None:
    """Raise `RequestError` for the first field of a dataclass instance whose number is outside its range.

    None passes where it is the field's default: it stands for "not given".
    """
    cls: Any = type(instance)
    may_be_none = _optional(cls)
    for name, allowed in ranges_of(cls).items():
        value = getattr(instance, name)
        if value is not None or name not in may_be_none:
            allowed.check(name, value)


@cache
def _optional(cls: type) -> frozenset[str]:
    return frozenset(f.name for f in fields(cls) if f.default is None)
