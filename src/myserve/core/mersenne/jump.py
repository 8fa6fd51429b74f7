"""Jumps in the sequence of MT19937 (Matsumoto and Nishimura, 1998), by any number of words in about the same time.

The sequence is linear over GF(2): word k + n is the sum of words k + i over the coefficients of x^n modulo the
characteristic polynomial, of degree 19937. So a jump is some thirty squarings of polynomials, which are integers here,
and one sum over 20,000 words (Haramoto et al., 2008).
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

__all__ = ["WORDS", "block_ahead"]

WORDS = 624  # of the state
_MIDDLE = 397
_DEGREE = 19937
_LOW_BITS = 31  # of a word, that are taken from the next one
_MATRIX = 0x9908B0DF
_UPPER, _LOWER = 0x80000000, 0x7FFFFFFF
_INDEPENDENT = WORDS - _MIDDLE  # words that can be made at once
_ADDED_AT_ONCE = 500

Block = NDArray[np.uint32]  # [624], as the recurrence makes them, not tempered


def block_ahead(block: Block, blocks: int) -> Block:
    """Return the block of words that stands so many blocks behind this one.

    >>> block_ahead(np.arange(624, dtype=np.uint32), 3).shape
    (624,)
    """
    if blocks == 0:
        return block.copy()
    power = _power_of_x(blocks * WORDS - 1)
    bits = np.frombuffer(power.to_bytes(_DEGREE // 8 + 1, "little"), np.uint8)
    coefficients = np.flatnonzero(np.unpackbits(bits, bitorder="little"))
    windows = sliding_window_view(_sequence(block, _DEGREE // WORDS + 1), WORDS)  # [i, j]: word i + j
    found = np.zeros(
        WORDS, np.uint32
    )  # one word before the block: of its first word the upper bit alone is known
    for start in range(0, len(coefficients), _ADDED_AT_ONCE):
        found ^= np.bitwise_xor.reduce(windows[coefficients[start : start + _ADDED_AT_ONCE]], axis=0)
    last = _twisted(found[:1], found[1:2]) ^ found[_MIDDLE : _MIDDLE + 1]
    return np.concatenate([found[1:], last])


def _sequence(block: Block, blocks: int) -> NDArray[np.uint32]:
    """Return a block and so many behind it, made one after the other."""
    words = np.empty(WORDS * (blocks + 1), np.uint32)
    words[:WORDS] = block
    for start in range(0, WORDS * blocks, WORDS):
        for first in range(start, start + WORDS, _INDEPENDENT):
            end = min(first + _INDEPENDENT, start + WORDS)
            twisted = _twisted(words[first:end], words[first + 1 : end + 1])
            words[first + WORDS : end + WORDS] = words[first + _MIDDLE : end + _MIDDLE] ^ twisted
    return words


def _twisted(upper: Block, lower: Block) -> Block:
    joined = (upper & np.uint32(_UPPER)) | (lower & np.uint32(_LOWER))
    return (joined >> np.uint32(1)) ^ (joined & np.uint32(1)) * np.uint32(_MATRIX)


# ---- polynomials over GF(2), as integers: bit i is the coefficient of x^i


@lru_cache(maxsize=64)
def _power_of_x(exponent: int) -> int:
    """Return x^exponent modulo the characteristic polynomial."""
    power = 1
    for bit in f"{exponent:b}":
        power = _reduced(_squared(power))
        if bit == "1":
            power = _reduced(power << 1)
    return power


def _squared(polynomial: int) -> int:
    """Return a square, whose coefficients stand twice as far apart."""
    data = polynomial.to_bytes(polynomial.bit_length() // 8 + 1, "little")
    return int.from_bytes(b"".join(map(_SPREAD.__getitem__, data)), "little")


_SPREAD = [int("".join(f"0{bit}" for bit in f"{byte:08b}"), 2).to_bytes(2, "little") for byte in range(256)]


def _reduced(polynomial: int) -> int:
    lower_terms = _lower_terms()
    while high := polynomial >> _DEGREE:
        polynomial &= (1 << _DEGREE) - 1
        for exponent in lower_terms:
            polynomial ^= high << exponent
    return polynomial


@lru_cache(maxsize=1)
def _lower_terms() -> tuple[int, ...]:
    """Return the exponents of the characteristic polynomial but its highest, by the paper's formula."""

    def times_first(p: int) -> int:  # x^n + x^m
        return (p << WORDS) ^ (p << _MIDDLE)

    def times_second(p: int) -> int:  # x^(n-1) + x^(m-1)
        return (p << (WORDS - 1)) ^ (p << (_MIDDLE - 1))

    rising = [times_first(1)]
    for _ in range(_LOW_BITS):
        rising.append(times_second(rising[-1]))
    whole = rising[_LOW_BITS]
    for i in range(_LOW_BITS):
        if _MATRIX >> i & 1:
            whole ^= rising[_LOW_BITS - 1 - i]
    whole ^= _MATRIX >> _LOW_BITS & 1
    return tuple(i for i in range(_DEGREE) if whole >> i & 1)
