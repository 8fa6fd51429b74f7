"""Rows of numbers become rows of int8 and one float32 scale each: symmetric, to nearest, ties to even.

A row's scale is max|x| / 127, and q = round(x * (127 / max|x|)). A maximum of bits has no order and every element is
rounded alone, so that a row's integers depend on nothing else. Weights [N, K] and activations [T, K] take the same way.
"""

from __future__ import annotations

import functools
import struct
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from myserve.engine.kernels.elements.pointwise import as_float, element_kind
from myserve.engine.kernels.lanes import (
    _F32,
    _I32,
    _I64,
    IR,
    LANES,
    _at,
    _bytes,
    _load_wide,
    is_half,
    next_item,
    view,
)
from myserve.engine.kernels.launch import Kernel, fingerprint

__all__ = ["LARGEST", "QUANTIZE", "SMALLEST", "quantize_kernel"]

LARGEST = 127  # -128 stays unused: the range is symmetric
SMALLEST = 2.0**-100  # a row whose maximum is below has the scale 0; 127 / maximum would come to infinity

# `flip` is XORed to each byte: 0 for int8, 0x80 for uint8 with 128 added. `sums`: of each row's int8, as int32.
QUANTIZE = ("x", "x_row", "out", "out_row", "scales", "sums", "rows", "width", "inner", "flip")

_MAGIC = 12582912.0  # 1.5 * 2^23: what is added to it is rounded to an integer, which stands in the low bits
_INFINITE = 0x7F800000
_SMALLEST_BITS = struct.unpack("i", struct.pack("f", SMALLEST))[0]


def _vector(kind: IR, lanes: int) -> IR:
    return ir.VectorType(kind, lanes)


def _all(kind: IR, value: float, lanes: int) -> IR:
    return ir.Constant(_vector(kind, lanes), [value] * lanes)


def _each(b: IR, count: IR, step: Any) -> None:
    """Emit step(first element, lanes) for 16 elements at a time, then for one at a time."""
    whole = b.lshr(count, ir.Constant(_I64, 4))
    with cgutils.for_range(b, whole) as loop:
        step(b.shl(loop.index, ir.Constant(_I64, 4)), LANES)
    done = b.shl(whole, ir.Constant(_I64, 4))
    with cgutils.for_range(b, b.sub(count, done)) as loop:
        step(b.add(done, loop.index), 1)


def _reduced(b: IR, name: str, vector: IR) -> IR:
    signature = ir.FunctionType(_I32, [vector.type])
    intrinsic_name = f"llvm.vector.reduce.{name}.v{vector.type.count}i32"
    return b.call(cgutils.get_or_insert_function(b.module, signature, intrinsic_name), [vector])


@intrinsic
def _largest_bits(ctx: Any, kind: Any, source: Any, count: Any) -> Any:
    """Return the bits of max|x| over `count` elements; NaN and infinity have the largest of all."""
    packed = is_half(kind)
    size = 2 if packed else 4

    def codegen(context: Any, b: IR, signature: Any, args: Any) -> IR:
        _, source, count = args
        slots = {lanes: cgutils.alloca_once_value(b, _all(_I32, 0, lanes)) for lanes in (LANES, 1)}

        def step(first: IR, lanes: int) -> None:
            x = _load_wide(b, b.add(source, _bytes(b, first, size)), packed, lanes)
            bits = b.and_(b.bitcast(x, _vector(_I32, lanes)), _all(_I32, 0x7FFFFFFF, lanes))
            old = b.load(slots[lanes])
            b.store(b.select(b.icmp_unsigned(">", bits, old), bits, old), slots[lanes])

        _each(b, count, step)
        most = _reduced(b, "umax", b.load(slots[LANES]))
        last = b.extract_element(b.load(slots[1]), ir.Constant(_I32, 0))
        return b.select(b.icmp_unsigned(">", last, most), last, most)

    return types.int32(kind, types.int64, types.int64), codegen


@intrinsic
def _round_row(ctx: Any, kind: Any, source: Any, target: Any, count: Any, inverse: Any, flip: Any) -> Any:
    """Store round(x * inverse) of `count` elements as bytes, each XOR `flip`; return the integers' sum."""
    packed = is_half(kind)
    size = 2 if packed else 4
    byte = ir.IntType(8)

    def codegen(context: Any, b: IR, signature: Any, args: Any) -> IR:
        _, source, target, count, inverse, flip = args
        flip = b.trunc(flip, byte)
        slots = {lanes: cgutils.alloca_once_value(b, _all(_I32, 0, lanes)) for lanes in (LANES, 1)}

        def same(scalar: IR, lanes: int) -> IR:
            kind = _vector(scalar.type, lanes)
            one = b.insert_element(ir.Constant(kind, ir.Undefined), scalar, ir.Constant(_I32, 0))
            return b.shuffle_vector(one, ir.Constant(kind, ir.Undefined), _all(_I32, 0, lanes))

        def step(first: IR, lanes: int) -> None:
            x = _load_wide(b, b.add(source, _bytes(b, first, size)), packed, lanes)
            shifted = b.fadd(b.fmul(x, same(inverse, lanes)), _all(_F32, _MAGIC, lanes))
            whole = b.trunc(b.bitcast(shifted, _vector(_I32, lanes)), _vector(byte, lanes))
            wide = b.sext(whole, _vector(_I32, lanes))
            b.store(b.add(b.load(slots[lanes]), wide), slots[lanes])
            flipped = b.xor(whole, same(flip, lanes))
            b.store(flipped, _at(b, b.add(target, first), flipped.type), align=1)

        _each(b, count, step)
        last = b.extract_element(b.load(slots[1]), ir.Constant(_I32, 0))
        return b.add(_reduced(b, "add", b.load(slots[LANES])), last)

    return types.int32(kind, types.int64, types.int64, types.int64, types.float32, types.int64), codegen


@njit(error_model="numpy")
def _quantize(a: Any, kind: Any) -> None:
    """out[r, :width] = round(x[r] / scale[r]), and zeros up to `inner`; a row that is not finite has the scale NaN."""
    scales = carray(view(a.scales, np.float32(0)), a.rows)
    sums = carray(view(a.sums, np.int32(0)), a.rows)
    row = next_item(a)
    while row < a.rows:
        source, target = a.x + row * a.x_row, a.out + row * a.out_row
        bits = _largest_bits(kind, source, a.width)
        largest, inverse = as_float(np.uint32(bits)), np.float32(0.0)
        scale = np.float32(0.0)
        if bits >= _INFINITE:
            scale = np.float32(np.nan)
        elif bits >= _SMALLEST_BITS:
            scale, inverse = largest / np.float32(LARGEST), np.float32(LARGEST) / largest
        scales[row] = scale
        total = _round_row(kind, source, target, a.width, inverse, a.flip)
        if a.sums != 0:
            sums[row] = total
        if a.inner > a.width:
            carray(view(target + a.width, np.uint8(0)), a.inner - a.width)[:] = np.uint8(a.flip)
        row = next_item(a)


@functools.cache
def quantize_kernel(dtype: torch.dtype) -> Kernel:
    """Return the entry point for rows of one element type, bfloat16 or float32."""
    source, kind = fingerprint(), element_kind(dtype)

    def quantize(p: Any) -> None:
        if source >= 0:
            _quantize(carray(p, 1)[0], kind)

    return Kernel(QUANTIZE, quantize)
