"""Compiled twins of `numerics.exp`, `numerics.neg_log1m` and `noise.philox`: one number at a time, the same bits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar, cast

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from myserve.core import noise, numerics

__all__ = [
    "ATANH",
    "BLOCK",
    "HALF_BITS",
    "HALF_WORD",
    "INFINITY_BITS",
    "LARGEST_UNIFORM",
    "ROUNDS",
    "UNDERFLOW",
    "WORD",
    "Function",
    "block_between",
    "compiled",
    "exp",
    "largest_of_block",
    "lowest_bit",
    "neg_log1m",
    "philox",
    "power_of_two",
    "uniform",
]

Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(function: Function) -> Function:
    """Compile on first call, without the interpreter's lock. What is kept on disk: see `entry_points`."""
    return cast("Function", njit(nogil=True, error_model="numpy")(function))


BLOCK = noise.BLOCK
WORD = np.uint64(noise.WORD)
M0, M1 = np.uint64(noise.PHILOX_M0), np.uint64(noise.PHILOX_M1)
W0, W1 = np.uint64(noise.PHILOX_W0), np.uint64(noise.PHILOX_W1)
HALF_WORD = np.uint64(32)
ROUNDS = noise.PHILOX_ROUNDS
LARGEST_UNIFORM = noise.LARGEST_UNIFORM

LOG2_E, ROUND_TO_INTEGER = np.float32(numerics.LOG2_E), np.float32(numerics.ROUND_TO_INTEGER)
LN2_HIGH, LN2_LOW = np.float32(numerics.LN2_HIGH), np.float32(numerics.LN2_LOW)
UNDERFLOW = np.float32(numerics.EXP_UNDERFLOW)
C7, C6, C5, C4, C3, C2, C1, C0 = (np.float32(c) for c in numerics.EXP_COEFFICIENTS)
ZERO, MASS_ONE, INFINITY = np.float32(0.0), np.float32(numerics.MASS_ONE), np.float32(math.inf)
LN2, SQRT_HALF = numerics.LN2, numerics.SQRT_HALF
ATANH = np.array(numerics.ATANH_COEFFICIENTS)
INFINITY_BITS = 0x7F800000
HALF_BITS = np.int32(16)
LOWEST_KEY, MAGNITUDE, SIGN_SHIFT = np.int32(-(2**31)), np.int32(0x7FFFFFFF), np.int32(31)


@intrinsic  # type: ignore[untyped-decorator]  # Numba has no types
def power_of_two(typing_context: Any, shifted: Any) -> Any:
    """Return 2**n of the float32 n + ROUND_TO_INTEGER, whose lowest bits are n's."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        word = ir.IntType(32)
        n = builder.shl(builder.bitcast(args[0], word), ir.Constant(word, 23))
        return builder.bitcast(builder.add(n, ir.Constant(word, 127 << 23)), ir.FloatType())

    return types.float32(types.float32), codegen


def _block(context: Any, builder: Any, kind: Any, values: Any, start: Any, element: Any) -> Any:
    """Load BLOCK numbers of an array as one vector. LLVM unrolls a loop of this length instead: six times as slow."""
    array = context.make_array(kind)(context, builder, values)
    lanes = ir.VectorType(element, BLOCK)
    return builder.load(builder.bitcast(builder.gep(array.data, [start]), lanes.as_pointer()), align=4)


@intrinsic  # type: ignore[untyped-decorator]  # Numba has no types
def largest_of_block(typing_context: Any, all_bits: Any, start: Any) -> Any:
    """Return the largest of BLOCK floats from `start`, as an integer of the same order; `all_bits` is int32."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        word = ir.IntType(32)
        lanes = ir.VectorType(word, BLOCK)
        bits = _block(context, builder, signature.args[0], args[0], args[1], word)
        sign = builder.ashr(bits, ir.Constant(lanes, [31] * BLOCK))
        keys = builder.xor(bits, builder.and_(sign, ir.Constant(lanes, [0x7FFFFFFF] * BLOCK)))
        kind = ir.FunctionType(word, [lanes])
        reduce = cgutils.get_or_insert_function(builder.module, kind, f"llvm.vector.reduce.smax.v{BLOCK}i32")
        return builder.call(reduce, [keys])

    return types.int32(all_bits, types.intp), codegen


@intrinsic  # type: ignore[untyped-decorator]  # Numba has no types
def block_between(typing_context: Any, scores: Any, start: Any, low: Any, high: Any) -> Any:
    """Return a bit for each of BLOCK floats from `start`, the first one the lowest: set if it is in [low, high)."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        values = _block(context, builder, signature.args[0], args[0], args[1], ir.FloatType())
        none = ir.Constant(values.type, ir.Undefined)
        first = ir.Constant(ir.VectorType(ir.IntType(32), BLOCK), [0] * BLOCK)

        def all_of(number: Any) -> Any:
            one = builder.insert_element(none, number, ir.Constant(ir.IntType(32), 0))
            return builder.shuffle_vector(one, none, first)

        inside = builder.and_(
            builder.fcmp_ordered(">=", values, all_of(args[2])),
            builder.fcmp_ordered("<", values, all_of(args[3])),
        )
        return builder.bitcast(inside, ir.IntType(BLOCK))

    return types.uint64(scores, types.intp, types.float32, types.float32), codegen


@intrinsic  # type: ignore[untyped-decorator]  # Numba has no types
def lowest_bit(typing_context: Any, bits: Any) -> Any:
    """Return the index of the lowest bit that is set."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.uint64), codegen


@compiled
def exp(x: Any) -> Any:
    """Return exp(x) with the bits of `numerics.exp`."""
    y = max(UNDERFLOW, x)
    shifted = y * LOG2_E + ROUND_TO_INTEGER
    n = shifted - ROUND_TO_INTEGER
    r = (y - n * LN2_HIGH) - n * LN2_LOW
    poly = ((((((C7 * r + C6) * r + C5) * r + C4) * r + C3) * r + C2) * r + C1) * r + C0
    weight = poly * power_of_two(shifted)
    return ZERO if x < UNDERFLOW else weight


@compiled
def neg_log1m(v: float) -> float:
    """Return -log(1 - v) with the bits of `numerics.neg_log1m`."""
    k = 0
    if v < 1.0 - SQRT_HALF:
        s = -v / (2.0 - v)
    else:
        mantissa, k = math.frexp(1.0 - v)
        if mantissa < SQRT_HALF:
            mantissa, k = mantissa * 2.0, k - 1
        s = (mantissa - 1.0) / (mantissa + 1.0)
    square = s * s
    poly = ATANH[0]
    for i in range(1, len(ATANH)):
        poly = poly * square + ATANH[i]
    return float(-(k * LN2 + (s * 2.0) * poly))


@compiled
def philox(x0: Any, x1: Any, x2: Any, x3: Any, k0: Any, k1: Any) -> Any:
    """Return the first three words of `noise.philox`, as uint64 that hold 32 bits."""
    for _ in range(ROUNDS):
        product0, product1 = x0 * M0, x2 * M1
        x0, x1, x2, x3 = (
            (product1 >> HALF_WORD) ^ x1 ^ k0,
            product1 & WORD,
            (product0 >> HALF_WORD) ^ x3 ^ k1,
            product0 & WORD,
        )
        k0, k1 = (k0 + W0) & WORD, (k1 + W1) & WORD
    return x0, x1, x2


@compiled
def uniform(w0: Any, w1: Any) -> Any:
    """Return the uniform number of two random words, as `noise.exponential` makes it."""
    v = np.float64(w0) * 2.0**-32 + (np.float64(w1) + 0.5) * 2.0**-64
    return min(LARGEST_UNIFORM, v)
