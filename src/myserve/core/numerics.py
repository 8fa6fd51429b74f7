"""Arithmetic whose bits depend on the numbers alone: not on batch, threads, order, device or library version.

Two means. `exp` and `log` are built of IEEE additions, multiplications and divisions, which every device
rounds alike, while libraries' own differ in the last bit. Sums are taken over integers, which associate: a
float sum changes with the number of rows and threads (measured: `sum` and `logsumexp` do at two threads).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = [
    "ATANH_COEFFICIENTS",
    "EXP_COEFFICIENTS",
    "EXP_UNDERFLOW",
    "LN2",
    "LN2_HIGH",
    "LN2_LOW",
    "LOG2_E",
    "MASS_ONE",
    "ROUND_TO_INTEGER",
    "SQRT_HALF",
    "exp",
    "log_mass",
    "neg_log1m",
    "quanta",
    "weights_of",
]

MASS_BITS = 44
"""A weight of 1 counts 2**44 quanta: 2**19 such tokens fit an int64, and a probability of 1e-13 still counts.
A sum over V tokens is short by at most V * 2**-44 (1e-8 for 152k), below what float32 can show."""
MASS_ONE = float(1 << MASS_BITS)

LOG2_E = 1.4426950408889634
LN2 = 0.6931471805599453
LN2_HIGH = 0.693359375  # 355/512: few bits, so that n * LN2_HIGH is exact for every exponent n of a float32
LN2_LOW = LN2 - LN2_HIGH
# 1.5 * 2**23: adding and subtracting it rounds a float32 to the nearest integer
ROUND_TO_INTEGER = 12582912.0
EXP_UNDERFLOW = -87.0  # below it a float32 result would be subnormal, and devices disagree on those
EXP_COEFFICIENTS = tuple(1.0 / math.factorial(k) for k in range(7, -1, -1))  # of r**7 ... r**0
SQRT_HALF = 0.7071067811865476
ATANH_COEFFICIENTS = tuple(1.0 / (2 * k + 1) for k in range(11, -1, -1))  # of s**22 ... s**0


def exp(x: Tensor) -> Tensor:
    """e**x for float32 `x` <= 0, within 2 units in the last place; 0 below -87.

    Taylor's polynomial on |r| <= ln(2)/2 after taking out the power of two.

    >>> exp(torch.tensor([0.0, -1.0, -torch.inf])).tolist()
    [1.0, 0.3678794503211975, 0.0]
    """
    y = x.clamp(min=EXP_UNDERFLOW)
    n = (y * LOG2_E + ROUND_TO_INTEGER) - ROUND_TO_INTEGER
    r = (y - n * LN2_HIGH) - n * LN2_LOW
    poly = torch.full_like(r, EXP_COEFFICIENTS[0])
    for coefficient in EXP_COEFFICIENTS[1:]:
        poly = poly * r + coefficient
    power_of_two = ((n.to(torch.int32) + 127) << 23).view(torch.float32)
    return torch.where(x < EXP_UNDERFLOW, 0.0, poly * power_of_two)


def neg_log1m(v: Tensor) -> Tensor:
    """-log(1 - v) for float64 `v` in [0, 1 - 2**-53]: accurate in both tails.

    >>> neg_log1m(torch.tensor([0.5, 1e-18], dtype=torch.float64)).tolist()
    [0.6931471805599453, 1e-18]
    """
    # log(x) = k ln 2 + 2 atanh((m - 1) / (m + 1)), x = m * 2**k. A small v never becomes 1 - v, which would
    # round its digits away: there m - 1 is -v and m + 1 is 2 - v.
    small = v < 1.0 - SQRT_HALF
    mantissa, exponent = torch.frexp(1.0 - v)
    below = mantissa < SQRT_HALF
    mantissa = torch.where(below, mantissa * 2.0, mantissa)
    k = torch.where(small, 0, exponent - below.to(torch.int32)).to(torch.float64)
    s = torch.where(small, -v, mantissa - 1.0) / torch.where(small, 2.0 - v, mantissa + 1.0)
    square = s * s
    poly = torch.full_like(s, ATANH_COEFFICIENTS[0])
    for coefficient in ATANH_COEFFICIENTS[1:]:
        poly = poly * square + coefficient
    return -(k * LN2 + (s * 2.0) * poly)


def quanta(weights: Tensor) -> Tensor:
    """float32 weights in [0, 1] as whole quanta, int64, rounded down."""
    return (weights * MASS_ONE).to(torch.int64)  # a power of two: the product is exact


def log_mass(total: int) -> float:
    """The natural log of a mass counted in quanta.

    >>> log_mass(1 << MASS_BITS)
    0.0
    """
    # one Python float at a time: a vectorised log may round its tail lanes differently from the others
    return math.log(total / MASS_ONE)


def weights_of(scores: Tensor) -> tuple[Tensor, Tensor]:
    """(max [R, 1], exp(scores - max) [R, V]) of float32 scores that have a finite maximum in every row."""
    largest = scores.amax(-1, keepdim=True)
    return largest, exp(scores - largest)
