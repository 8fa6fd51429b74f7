"""Dot products of bytes for Numba: four terms at a time into each of 16 sums of int32, exact and so without an order.

x is uint8 and W int8, as AVX-512 VNNI and AMX have it. VNNI's instruction adds four products to a sum of 32 bits and
saturates nowhere (AVX2's `vpmaddubsw`, which does at 16 bits, is not used); the plain way gives the same integers.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from myserve.engine.kernels.dots import add_products
from myserve.engine.kernels.lanes import _F32, _I32, _IVEC, IR, LANES, _at, _const, _round_and_store, is_half
from myserve.engine.kernels.tiles import bfloat16_unit

__all__ = ["BY_DOTS", "BY_LANES", "Int8Unit", "int8_unit", "multiply_bytes", "scale_and_round"]

Int8Unit = Literal["tiles", "dots", "lanes"]

# What multiplies, as a zero of a type of its own: Numba compiles a function anew for each type of an argument.
BY_DOTS = np.int8(0)
BY_LANES = np.uint16(0)

_SHORTS = ir.VectorType(ir.IntType(16), 2 * LANES)
_WIDE_SHORTS = ir.VectorType(_I32, 2 * LANES)


@functools.cache
def int8_unit() -> Int8Unit:
    """Return what multiplies bytes here: AMX tiles, AVX-512 VNNI's dot products, or plain lanes of 16 bits."""
    features = llvmlite.binding.get_host_cpu_features()
    if bfloat16_unit() == "tiles" and features.get("amx-int8"):
        return "tiles"
    return "dots" if features.get("avx512vnni") else "lanes"


def _dot(b: IR, total: IR, x: IR, w: IR) -> IR:
    kind = ir.FunctionType(_IVEC, [_IVEC] * 3)  # LLVM 22 names the bytes, and still reads this form
    dot = cgutils.get_or_insert_function(b.module, kind, "llvm.x86.avx512.vpdpbusd.512")
    return b.call(dot, [total, x, w])


def _dot_by_lanes(b: IR, total: IR, x: IR, w: IR) -> IR:
    """Even bytes and odd bytes as 16 bits, whose products' pairs are summed: LLVM makes `pmaddwd` of it."""
    eight = ir.Constant(_SHORTS, [8] * 2 * LANES)
    low = _const(0x00FF00FF, _IVEC)
    shorts = b.bitcast(w, _SHORTS)
    pairs = (
        (b.and_(x, low), b.ashr(b.shl(shorts, eight), eight)),
        (b.and_(b.lshr(x, _const(8, _IVEC)), low), b.ashr(shorts, eight)),
    )
    for xs, ws in pairs:
        products = b.mul(b.sext(b.bitcast(xs, _SHORTS), _WIDE_SHORTS), b.sext(ws, _WIDE_SHORTS))
        even, odd = (
            b.shuffle_vector(
                products,
                ir.Constant(_WIDE_SHORTS, ir.Undefined),
                ir.Constant(_IVEC, list(range(first, 2 * LANES, 2))),
            )
            for first in (0, 1)
        )
        total = b.add(total, b.add(even, odd))
    return total


@intrinsic(prefer_literal=True)
def multiply_bytes(ctx: Any, unit: Any, rows: Any, x: Any, x_row: Any, w: Any, w_group: Any, fours: Any, c: Any,
                   ahead: Any, stride: Any) -> Any:  # fmt: skip
    """c[r, :64] += sum over fours of x[r, 4k : 4k + 4] . W[4k : 4k + 4, :]; c is int32 [rows, 64].

    x is uint8, `x_row` bytes a row; W is four groups of 16 columns, [fours, 16, 4] int8, `w_group` bytes apart. What
    lies `ahead` bytes from each group is fetched on the way, `stride` bytes for each four.
    """
    R = rows.literal_value
    product = _dot if unit == types.int8 else _dot_by_lanes

    def codegen(context: Any, b: IR, signature: Any, args: Any) -> IR:
        add_products(b, R, args[2:], product, _IVEC)
        return context.get_dummy_value()

    return types.void(unit, rows, *[types.int64] * 8), codegen


@intrinsic(prefer_literal=True)
def scale_and_round(ctx: Any, kind: Any, lanes: Any, sums: Any, starts: Any, x_scale: Any, scales: Any, bias: Any,
                    target: Any) -> Any:  # fmt: skip
    """Store float32(sum + start) * (x_scale * scale) + bias of 1 or 16 columns, rounded to `kind`'s element."""
    packed, count = is_half(kind), lanes.literal_value

    def codegen(context: Any, b: IR, signature: Any, args: Any) -> IR:
        _, _, sums, starts, x_scale, scales, bias, target = args
        floats, ints = ir.VectorType(_F32, count), ir.VectorType(_I32, count)
        both = ir.Constant(floats, ir.Undefined)
        for lane in range(count):
            both = b.insert_element(both, x_scale, ir.Constant(_I32, lane))
        whole = b.add(b.load(_at(b, sums, ints), align=4), b.load(_at(b, starts, ints), align=4))
        scale = b.fmul(both, b.load(_at(b, scales, floats), align=4))
        value = b.fmul(b.sitofp(whole, floats), scale)
        value = b.fadd(value, b.load(_at(b, bias, floats), align=4))
        _round_and_store(b, value, target, packed)
        return context.get_dummy_value()

    size = types.int64
    return types.void(kind, lanes, size, size, types.float32, size, size, size), codegen
