"""Sixteen float32 lanes for Numba: every sum is taken by one lane, in the order of its index.

Written out as LLVM vectors because the loop vectoriser may not reassociate (`fastmath` would let it, and then
the shape of a tile would change a sum) and because it prefers half-width registers. Nothing here is left to a
compiler's choice: multiply-adds are fused by name, so the same numbers give the same bits in a tile of any shape.
Addresses are plain integers; where a CPU has no 512-bit registers, LLVM splits a vector and the results stay.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

__all__ = [
    "BFLOAT",
    "BLOCK_SIZE",
    "LANES",
    "PARTITION",
    "add_and_round",
    "add_scaled",
    "by_pairs",
    "by_tiles",
    "divide_and_round",
    "is_half",
    "lane_sum",
    "next_item",
    "next_thread",
    "scale_lanes",
    "size_of",
    "stays_half",
    "sum_of_squares",
    "uses_tiles",
    "view",
    "widen",
]

LANES = 16  # 64 bytes: a cache line
PARTITION = 64  # keys per step of the online softmax; the partition always starts at key 0
BLOCK_SIZE = 32  # keys per cache block; a divisor of the partition, a multiple of the lanes

IR = Any  # llvmlite is untyped

_F32 = ir.FloatType()
_I32 = ir.IntType(32)
_I64 = ir.IntType(64)
_VEC = ir.VectorType(_F32, LANES)
_IVEC = ir.VectorType(_I32, LANES)


class _BFloat(ir.types._BaseFloatType):  # type: ignore[misc]  # llvmlite is untyped
    """LLVM's bfloat, which llvmlite does not name."""

    null = "0.0"
    intrinsic_name = "bf16"

    def __str__(self) -> str:
        return "bfloat"


_BFloat._create_instance()
BFLOAT: IR = _BFloat()


# A kernel's `kind`: its element type and what multiplies. Numba compiles a function anew for each type of an argument,
# so each kind is a zero of a type of its own, whose value is never looked at.
FLOAT32 = np.float32(0)
BFLOAT16_BY_LANES = np.uint16(0)  # widened to float32 lanes
BFLOAT16_BY_TILES = np.int16(0)  # AMX
BFLOAT16_BY_PAIRS = np.int8(0)  # AVX-512's dot products of pairs


def is_half(kind: Any) -> bool:
    """Return whether a kind's elements are bfloat16; `kind` is its Numba type, as a kernel is compiled."""
    return bool(kind != types.float32)


def by_pairs(kind: Any) -> bool:
    """Return whether dot products of pairs multiply."""
    return bool(kind == types.int8)


def by_tiles(kind: Any) -> bool:
    """Return whether AMX tiles multiply."""
    return bool(kind == types.int16)


def _at(b: IR, address: IR, kind: IR) -> IR:
    return b.inttoptr(address, kind.as_pointer())


def _load(b: IR, address: IR, kind: IR = _VEC) -> IR:
    return b.load(_at(b, address, kind), align=4)


def _store(b: IR, value: IR, address: IR) -> None:
    b.store(value, _at(b, address, value.type), align=4)


def _splat(b: IR, scalar: IR, kind: IR = _VEC) -> IR:
    one = b.insert_element(ir.Constant(kind, ir.Undefined), scalar, ir.Constant(_I32, 0))
    return b.shuffle_vector(one, ir.Constant(kind, ir.Undefined), ir.Constant(_IVEC, [0] * LANES))


def _const(x: float, kind: IR = _VEC) -> IR:
    if kind is _VEC:  # rounded here: LLVM wants a float32's exact value
        x = struct.unpack("f", struct.pack("f", x))[0]
    return ir.Constant(kind, [x] * LANES)


def _call(b: IR, name: str, *args: IR) -> IR:
    """Call an LLVM intrinsic on vectors of one type."""
    kind = args[0].type
    suffix = "v16f32" if kind is _VEC else "f32"
    fn = cgutils.get_or_insert_function(
        b.module, ir.FunctionType(kind, [a.type for a in args]), f"{name}.{suffix}"
    )
    return b.call(fn, args)


def _fma(b: IR, x: IR, y: IR, z: IR) -> IR:
    # fmuladd, not fma: where a CPU has no fused unit, fma would be a library call a lane
    return _call(b, "llvm.fmuladd", x, y, z)


def _prefetch(b: IR, address: IR, level: int = 2) -> None:
    """Fetch into the second-level cache, where more lines can be on their way: attention reads 26 GB/s so, else 20."""
    byte = ir.IntType(8).as_pointer()
    signature = ir.FunctionType(ir.VoidType(), [byte, _I32, _I32, _I32])
    fn = cgutils.get_or_insert_function(b.module, signature, "llvm.prefetch.p0")
    hints = (0, 4 - level, 1)  # to read, how near, data
    b.call(fn, [b.inttoptr(address, byte), *(ir.Constant(_I32, hint) for hint in hints)])


def _reduce(b: IR, name: str, vector: IR, *start: IR) -> IR:
    signature = ir.FunctionType(_F32, [*(s.type for s in start), _VEC])
    fn = cgutils.get_or_insert_function(b.module, signature, f"llvm.vector.reduce.{name}.v16f32")
    return b.call(fn, [*start, vector])


def _bytes(b: IR, count: IR, scale: int) -> IR:
    return b.mul(count, ir.Constant(_I64, scale))


def _offset(b: IR, address: IR, scale: int) -> IR:
    return b.add(address, ir.Constant(_I64, scale))


@intrinsic
def scale_lanes(ctx: Any, target: Any, factor: Any) -> Any:
    """Scale 16 floats in place by the float at `factor`."""

    def codegen(context: Any, b: IR, signature: Any, args: Any) -> IR:
        target, factor = args
        _store(b, b.fmul(_load(b, target), _splat(b, _load(b, factor, _F32))), target)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def lane_sum(ctx: Any, address: Any) -> Any:
    """Return the sum of 16 floats, first to last."""

    def codegen(context: Any, b: IR, signature: Any, args: Any) -> IR:
        return _reduce(b, "fadd", _load(b, args[0]), ir.Constant(_F32, 0.0))

    return types.float32(types.int64), codegen


def _ticket(name: str, offset: int, documentation: str) -> Any:
    def take(ctx: Any, record: Any) -> Any:
        def codegen(context: Any, b: IR, signature: Any, args: Any) -> IR:
            address = _offset(b, b.ptrtoint(args[0], _I64), offset)
            return b.atomic_rmw("add", _at(b, address, _I64), ir.Constant(_I64, 1), "acq_rel")

        return types.int64(record), codegen

    take.__name__, take.__doc__ = name, documentation
    return intrinsic(take)


next_thread = _ticket(
    "next_thread", 0, "Return this thread's number: a kernel's threads are counted as they come in."
)
next_item = _ticket("next_item", 8, "Take the record's next item of work that no thread has taken.")


def _question(name: str, answer: Callable[[Any], bool], documentation: str) -> Any:
    def ask(ctx: Any, kind: Any) -> Any:
        def codegen(context: Any, b: IR, signature: Any, args: Any) -> IR:
            return ir.Constant(ir.IntType(1), int(answer(kind)))

        return types.boolean(kind), codegen

    ask.__name__, ask.__doc__ = name, documentation
    return intrinsic(ask)


uses_tiles = _question("uses_tiles", by_tiles, "Return whether AMX tiles multiply.")
stays_half = _question(
    "stays_half", lambda kind: by_tiles(kind) or by_pairs(kind), "Return whether both factors stay bfloat16."
)


@intrinsic
def view(ctx: Any, address: Any, kind: Any) -> Any:
    """Return the address as a pointer to `kind`'s type."""

    def codegen(context: Any, b: IR, signature: Any, args: Any) -> IR:
        return b.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(kind)(types.int64, kind), codegen


@intrinsic
def size_of(ctx: Any, kind: Any) -> Any:
    """Return the bytes of an element."""

    def codegen(context: Any, b: IR, signature: Any, args: Any) -> IR:
        return ir.Constant(_I64, 2 if is_half(kind) else 4)

    return types.int64(kind), codegen


def _load_wide(b: IR, source: IR, packed: bool, count: int) -> IR:
    """Load `count` elements at `source` as float32."""
    kind = ir.VectorType(ir.IntType(16) if packed else _F32, count)
    return _widened(b, b.load(_at(b, source, kind), align=2 if packed else 4), packed)


def _widened(b: IR, elements: IR, packed: bool) -> IR:
    """Return a vector of elements, bfloat16 where `packed`, as float32."""
    if not packed:
        return elements
    wide = ir.VectorType(_I32, elements.type.count)
    bits = b.shl(b.zext(elements, wide), ir.Constant(wide, [16] * wide.count))
    return b.bitcast(bits, ir.VectorType(_F32, wide.count))


@intrinsic(prefer_literal=True)
def widen(ctx: Any, kind: Any, lanes: Any, source: Any, target: Any) -> Any:
    """Widen 1 or 16 elements at `source` to float32 at `target`."""
    packed, count = is_half(kind), lanes.literal_value

    def codegen(context: Any, b: IR, signature: Any, args: Any) -> IR:
        _, _, source, target = args
        _store(b, _load_wide(b, source, packed, count), target)
        return context.get_dummy_value()

    return types.void(kind, lanes, types.int64, types.int64), codegen


@intrinsic
def sum_of_squares(ctx: Any, kind: Any, source: Any, count: Any) -> Any:
    """Sum the squares of `count` elements: lane by lane, the lanes first to last, then what is left over."""
    packed = is_half(kind)
    size = 2 if packed else 4

    def codegen(context: Any, b: IR, signature: Any, args: Any) -> IR:
        _, source, count = args
        lanes, total = cgutils.alloca_once(b, _VEC), cgutils.alloca_once(b, _F32)
        b.store(_const(0.0), lanes)
        whole = b.lshr(count, ir.Constant(_I64, 4))
        with cgutils.for_range(b, whole) as loop:
            x = _load_wide(b, b.add(source, _bytes(b, loop.index, size * LANES)), packed, LANES)
            b.store(_fma(b, x, x, b.load(lanes)), lanes)
        b.store(_reduce(b, "fadd", b.load(lanes), ir.Constant(_F32, 0.0)), total)
        done = b.shl(whole, ir.Constant(_I64, 4))
        with cgutils.for_range(b, b.sub(count, done)) as loop:
            one = _load_wide(b, b.add(source, _bytes(b, b.add(done, loop.index), size)), packed, 1)
            x = b.extract_element(one, ir.Constant(_I32, 0))
            b.store(b.fadd(b.load(total), b.fmul(x, x)), total)
        return b.load(total)

    return types.float32(kind, types.int64, types.int64), codegen


def _half_bits(b: IR, value: IR) -> IR:
    """Return float32 as the bits of bfloat16, in 32: to nearest, ties to even, NaN kept."""
    count = value.type.count
    wide = ir.VectorType(_I32, count)

    def const(x: int) -> IR:
        return ir.Constant(wide, [x] * count)

    bits = b.bitcast(value, wide)
    tie = b.and_(b.lshr(bits, const(16)), const(1))
    rounded = b.lshr(b.add(bits, b.add(tie, const(0x7FFF))), const(16))
    return b.select(b.fcmp_unordered("uno", value, value), const(0x7FC0), rounded)


def _round_and_store(b: IR, value: IR, target: IR, packed: bool) -> None:
    """Store as float32, or rounded to bfloat16."""
    if packed:
        value = b.trunc(_half_bits(b, value), ir.VectorType(ir.IntType(16), value.type.count))
    b.store(value, _at(b, target, value.type), align=2)


@intrinsic(prefer_literal=True)
def divide_and_round(ctx: Any, kind: Any, lanes: Any, source: Any, divisor: Any, target: Any) -> Any:
    """Divide 1 or 16 float32 by one number and store them in `kind`."""
    packed, count = is_half(kind), lanes.literal_value

    def codegen(context: Any, b: IR, signature: Any, args: Any) -> IR:
        _, _, source, divisor, target = args
        floats = ir.VectorType(_F32, count)
        total = ir.Constant(floats, ir.Undefined)
        for lane in range(count):
            total = b.insert_element(total, divisor, ir.Constant(_I32, lane))
        value = b.fdiv(b.load(_at(b, source, floats), align=4), total)
        # + 0: a key of weight 0 may have turned -0 into +0, or not, by the tile; now it never shows
        value = b.fadd(value, ir.Constant(floats, [0.0] * count))
        _round_and_store(b, value, target, packed)
        return context.get_dummy_value()

    return types.void(kind, lanes, types.int64, types.float32, types.int64), codegen


@intrinsic(prefer_literal=True)
def add_and_round(ctx: Any, kind: Any, lanes: Any, source: Any, bias: Any, target: Any) -> Any:
    """Store the sums of 1 or 16 float32 and as many of a bias."""
    packed, count = is_half(kind), lanes.literal_value

    def codegen(context: Any, b: IR, signature: Any, args: Any) -> IR:
        _, _, source, bias, target = args
        floats = ir.VectorType(_F32, count)
        value = b.fadd(b.load(_at(b, source, floats), align=4), b.load(_at(b, bias, floats), align=4))
        _round_and_store(b, value, target, packed)
        return context.get_dummy_value()

    return types.void(kind, lanes, types.int64, types.int64, types.int64), codegen


@intrinsic(prefer_literal=True)
def add_scaled(ctx: Any, kind: Any, lanes: Any, source: Any, factor: Any, target: Any) -> Any:
    """Add 1 or 16 elements at `source`, times the float at `factor` and rounded, to those at `target`."""
    packed, count = is_half(kind), lanes.literal_value

    def codegen(context: Any, b: IR, signature: Any, args: Any) -> IR:
        _, _, source, factor, target = args
        floats, wide = ir.VectorType(_F32, count), ir.VectorType(_I32, count)
        scale, one = ir.Constant(floats, ir.Undefined), _load(b, factor, _F32)
        for lane in range(count):
            scale = b.insert_element(scale, one, ir.Constant(_I32, lane))
        product = b.fmul(_load_wide(b, source, packed, count), scale)
        if packed:
            shift = ir.Constant(wide, [16] * count)
            product = b.bitcast(b.shl(_half_bits(b, product), shift), floats)
        _round_and_store(b, b.fadd(_load_wide(b, target, packed, count), product), target, packed)
        return context.get_dummy_value()

    return types.void(kind, lanes, types.int64, types.int64, types.int64), codegen
