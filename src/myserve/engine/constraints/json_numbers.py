"""JSON numbers under a schema are finite: two digits of an exponent at most, and 200 before the point.

JSON bounds no number, and what reads it does: 3E5235 is infinity to most parsers and an error to others. The compiler
of grammars has no bound to give, so the tokens that would lead beyond are taken out of its masks here.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor

__all__ = ["EXPONENT_DIGITS", "INTEGER_DIGITS", "NumberBounds", "NumberState"]

EXPONENT_DIGITS = 2
INTEGER_DIGITS = 200  # with the largest exponent, below 1e300: a float64 holds 1.8e308

_LONG_EXPONENT = re.compile(rb"[eE][+-]?[0-9]{%d}" % (EXPONENT_DIGITS + 1))
_DIGITS = re.compile(rb"[0-9]+")
_SIGNED = re.compile(rb"[+-][0-9]{%d}" % (EXPONENT_DIGITS + 1))


class NumberBounds:
    """The tokens of one vocabulary that may lead a number beyond its bounds; for all completions."""

    def __init__(self, tokens: Sequence[bytes]) -> None:
        self.tokens = tokens
        runs = {i: found.end() for i, data in enumerate(tokens) if (found := _DIGITS.match(data))}
        self.longest_run = max(runs.values(), default=0)
        # Masks to be combined by "and": without the tokens that begin with so many digits or more.
        self.without_digits = {
            count: _all_but(len(tokens), (i for i, run in runs.items() if run >= count))
            for count in range(1, EXPONENT_DIGITS + 2)
        }
        signed = (i for i, data in enumerate(tokens) if _SIGNED.match(data))
        self.without_signed = _all_but(len(tokens), signed)
        # Whole numbers within a token, and the ends of some; few vocabularies have any.
        self.long_exponents = [i for i, data in enumerate(tokens) if _LONG_EXPONENT.search(data)]

    def begin(self) -> NumberState:
        """Return the state before a JSON text."""
        return NumberState(self)


class NumberState:
    """Follows a JSON text: whether it stands in a string, or in which part of a number.

    >>> state = NumberBounds([b"1", b"E", b"5", b"52", b"523", b","]).begin()
    >>> state.feed(b"[1E"); mask = torch.full((1,), 63, dtype=torch.int32)
    >>> state.forbid(mask); f"{int(mask):06b}"
    '101111'
    """

    def __init__(self, bounds: NumberBounds) -> None:
        self._bounds = bounds
        self._in_string = self._is_escaped = False
        self._part: Literal["none", "integer", "fraction", "exponent"] = "none"
        self._digits = 0  # of this part so far
        # an exponent's letter came last: one sign may follow
        self._may_sign = False
        self._is_beyond = False

    def fork(self) -> NumberState:
        """Return a copy that goes its own way."""
        return copy.copy(self)

    def feed(self, data: bytes) -> None:
        """Go on by these bytes of the text."""
        for byte in data:
            self._feed(byte)

    def append(self, token_id: int) -> None:
        """Go on by a token."""
        self.feed(self._bounds.tokens[token_id])

    def forbid(self, mask: Tensor) -> None:
        """Clear what leads beyond, in a mask [words] int32 of what may come next; not where that is all there is."""
        if self._in_string:
            return
        allowed = mask.clone()
        bounds = self._bounds
        if self._part == "exponent":
            allowed &= bounds.without_digits[EXPONENT_DIGITS - self._digits + 1]
            if self._digits == 0:
                allowed &= bounds.without_signed
        elif self._part == "integer" and self._digits + bounds.longest_run > INTEGER_DIGITS:
            allowed &= bounds.without_digits[1]
        as_bytes = allowed.view(torch.uint8)
        for token_id in bounds.long_exponents:
            if as_bytes[token_id >> 3] >> (token_id & 7) & 1 and self._leads_beyond(token_id):
                as_bytes[token_id >> 3] &= 0xFF ^ (1 << (token_id & 7))
        if allowed.any():
            mask.copy_(allowed)

    def _leads_beyond(self, token_id: int) -> bool:
        twin = self.fork()
        twin.append(token_id)
        return twin._is_beyond

    def _feed(self, byte: int) -> None:
        character = chr(byte)
        may_sign, self._may_sign = self._may_sign, False
        if self._in_string:
            self._in_string = self._is_escaped or character != '"'
            self._is_escaped = character == "\\" and not self._is_escaped
        elif character.isdigit() and byte < 128:
            self._part = "integer" if self._part == "none" else self._part
            self._digits += 1
            self._is_beyond |= self._part == "exponent" and self._digits > EXPONENT_DIGITS
        elif character == "." and self._part == "integer":
            self._part, self._digits = "fraction", 0
        elif character in "eE" and self._part in ("integer", "fraction") and self._digits:
            self._part, self._digits, self._may_sign = "exponent", 0, True
        elif not (character in "+-" and may_sign):
            self._part, self._digits = "none", 0
            self._in_string = character == '"'


def _all_but(count: int, token_ids: Iterable[int]) -> Tensor:
    """A mask of `count` ids, int32 words, with all bits but these."""
    bits = torch.ones(-(-count // 32) * 32, dtype=torch.bool)
    bits[list(token_ids)] = False
    weights = 2 ** torch.arange(32, dtype=torch.int64)
    words = (bits.view(-1, 32) * weights).sum(1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()
