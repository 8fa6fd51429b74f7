"""The taps of a convolution, sixteen channels at a time: laid out one behind another, and added to sums.

Written out as LLVM vectors for the reasons that `lanes` gives.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from myserve.engine.kernels.lanes import (
    _F32,
    _I32,
    _I64,
    IR,
    LANES,
    _at,
    _bytes,
    _fma,
    _load,
    _load_wide,
    _store,
    _widened,
    is_half,
)

__all__ = ["add_tap", "spread_taps", "sum_taps"]


@intrinsic
def add_tap(ctx: Any, kind: Any, groups: Any, weights: Any, x: Any, sums: Any) -> Any:
    """Add weights * x to sums, fused, for 16 channels of each of `groups`; x in `kind`, the others float32."""
    packed = is_half(kind)

    def codegen(context: Any, b: IR, signature: Any, args: Any) -> IR:
        _, groups, weights, x, sums = args
        with cgutils.for_range(b, groups) as loop:
            at = _bytes(b, loop.index, 4 * LANES)
            wide = _load_wide(b, b.add(x, _bytes(b, loop.index, (2 if packed else 4) * LANES)), packed, LANES)
            target = b.add(sums, at)
            _store(b, _fma(b, _load(b, b.add(weights, at)), wide, _load(b, target)), target)
        return context.get_dummy_value()

    return types.void(kind, *[types.int64] * 4), codegen


@intrinsic(prefer_literal=True)
def sum_taps(
    ctx: Any, kind: Any, taps: Any, groups: Any, weights: Any, stride: Any, rows: Any, biases: Any, sums: Any
) -> Any:
    """Store bias + all taps, added as `add_tap` adds them one after another, at `sums`.

    `rows` [taps] int64: the addresses of the rows that the taps meet; a tap's weights lie `stride` bytes apart.
    """
    packed, count = is_half(kind), taps.literal_value

    def codegen(context: Any, b: IR, signature: Any, args: Any) -> IR:
        _, _, groups, weights, stride, rows, biases, sums = args
        xs = [_load(b, b.add(rows, ir.Constant(_I64, 8 * tap)), _I64) for tap in range(count)]
        ws = [b.add(weights, _bytes(b, stride, tap)) for tap in range(count)]
        with cgutils.for_range(b, groups) as loop:
            at, at_x = (_bytes(b, loop.index, size * LANES) for size in (4, 2 if packed else 4))
            total = _load(b, b.add(biases, at))
            for w, x in zip(ws, xs, strict=True):
                total = _fma(b, _load(b, b.add(w, at)), _load_wide(b, b.add(x, at_x), packed, LANES), total)
            _store(b, total, b.add(sums, at))
        return context.get_dummy_value()

    return types.void(kind, taps, *[types.int64] * 6), codegen


@intrinsic(prefer_literal=True)
def spread_taps(ctx: Any, kind: Any, taps: Any, groups: Any, source: Any, target: Any, stride: Any) -> Any:
    """Store the weights [16 * groups, taps] of `kind` as float32, tap by tap, `stride` bytes apart."""
    packed, count = is_half(kind), taps.literal_value
    element = ir.IntType(16) if packed else _F32
    size = (2 if packed else 4) * count * LANES

    def codegen(context: Any, b: IR, signature: Any, args: Any) -> IR:
        _, _, groups, source, target, stride = args
        with cgutils.for_range(b, groups) as loop:
            whole_type = ir.VectorType(element, count * LANES)
            whole = b.load(_at(b, b.add(source, _bytes(b, loop.index, size)), whole_type), align=2)
            place = b.add(target, _bytes(b, loop.index, 4 * LANES))
            for tap in range(count):
                lanes = ir.Constant(ir.VectorType(_I32, LANES), [tap + count * lane for lane in range(LANES)])
                part = b.shuffle_vector(whole, ir.Constant(whole_type, ir.Undefined), lanes)
                _store(b, _widened(b, part, packed), b.add(place, _bytes(b, stride, tap)))
        return context.get_dummy_value()

    return types.void(kind, taps, *[types.int64] * 4), codegen
