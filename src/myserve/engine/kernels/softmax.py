"""One step of the online softmax (Milakov and Gimelshein, 2018): a partition of scores becomes weights.

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
    _IVEC,
    _VEC,
    BFLOAT,
    IR,
    LANES,
    PARTITION,
    _at,
    _call,
    _const,
    _fma,
    _load,
    _offset,
    _splat,
    _store,
    by_pairs,
    by_tiles,
)

__all__ = ["softmax_step"]


@intrinsic
def softmax_step(ctx: Any, kind: Any, scores: Any, weights: Any, first: Any, last: Any, scale: Any, cap: Any,
                 peak: Any, alpha: Any, total: Any) -> Any:  # fmt: skip
    """Turn one row's PARTITION scores into weights; keys outside [first, last) weigh exactly 0.

    Updates the running maximum `peak` and the 16 partial sums `total`; `alpha` is what earlier sums scale by.
    A partition with no visible key leaves everything as it was: alpha is exactly 1. Weights are float32, or bfloat16
    for tiles and pairs; their sum is taken before they are rounded.
    """
    rounded = by_tiles(kind) or by_pairs(kind)

    def codegen(context: Any, b: IR, signature: Any, args: Any) -> IR:
        _, scores, weights, first, last, scale, cap, peak, alpha, total = args
        first, last = (_splat(b, b.trunc(x, _I32), _IVEC) for x in (first, last))
        slots = _scaled_and_capped(b, scores, _splat(b, scale), cap)
        values, top = _visible(b, slots, first, last)
        new, shift, factor = _raise_peak(b, _load(b, peak, _F32), _largest_lane(b, top))
        running = b.fmul(_load(b, total), b.load(factor))
        for g, s in enumerate(values):
            weight = _exp(b, b.fsub(s, shift))
            if rounded:
                _store_half(b, weight, _offset(b, weights, 32 * g))
            else:
                _store(b, weight, _offset(b, weights, 64 * g))
            running = b.fadd(running, weight)
        _store(b, running, total)
        _store(b, new, peak)
        _store(b, b.extract_element(b.load(factor), ir.Constant(_I32, 0)), alpha)
        return context.get_dummy_value()

    size, f = types.int64, types.float32
    return types.void(kind, size, size, size, size, f, f, size, size, size), codegen


def _scaled_and_capped(b: IR, scores: IR, scale: IR, cap: IR) -> list[IR]:
    """Load a partition's scores times `scale` into slots of 16; where `cap` > 0, as cap * tanh(score / cap)."""
    cap_lanes = _splat(b, cap)
    slots = [cgutils.alloca_once(b, _VEC) for _ in range(PARTITION // LANES)]
    for g, slot in enumerate(slots):
        b.store(b.fmul(_load(b, _offset(b, scores, 64 * g)), scale), slot)
    with b.if_then(b.fcmp_ordered(">", cap, ir.Constant(_F32, 0.0))):
        for slot in slots:  # tanh by the exponential of the negative side
            s = b.load(slot)
            size = _call(b, "llvm.fabs", s)
            e = _exp(b, b.fmul(b.fdiv(size, cap_lanes), _const(-2.0)))
            tanh = b.fdiv(b.fsub(_const(1.0), e), b.fadd(_const(1.0), e))
            b.store(_call(b, "llvm.copysign", b.fmul(tanh, cap_lanes), s), slot)
    return slots


def _visible(b: IR, slots: list[IR], first: IR, last: IR) -> tuple[list[IR], IR]:
    """Mask keys outside [first, last) with -inf; return the scores and each lane's largest."""
    low, values = _const(float("-inf")), []
    top = low
    for g, slot in enumerate(slots):
        index = ir.Constant(_IVEC, [g * LANES + i for i in range(LANES)])
        visible = b.and_(b.icmp_signed(">=", index, first), b.icmp_signed("<", index, last))
        values.append(b.select(visible, b.load(slot), low))
        top = b.select(b.fcmp_ordered(">", values[-1], top), values[-1], top)
    return values, top


def _raise_peak(b: IR, old: IR, partition_peak: IR) -> tuple[IR, IR, IR]:
    """Return the new running maximum, what scores are shifted by, and a slot with the factor of earlier sums."""
    new = b.select(b.fcmp_ordered(">", partition_peak, old), partition_peak, old)
    none = b.fcmp_ordered("==", new, ir.Constant(_F32, float("-inf")))
    shift = _splat(b, b.select(none, ir.Constant(_F32, 0.0), new))
    factor = cgutils.alloca_once_value(b, _const(1.0))
    with b.if_then(b.fcmp_ordered("!=", new, old)):  # seldom, after the first partitions
        b.store(_exp(b, b.fsub(_splat(b, old), shift)), factor)
    return new, shift, factor


def _exp(b: IR, x: IR) -> IR:
    """Return exp(x) for x <= 0, to 1 ulp or so; exactly 1 at 0 and exactly 0 below -87; NaN stays NaN.

    2^n * p(r) with n = round(x / ln 2): the usual Cody-Waite reduction and a Taylor polynomial of degree 7,
    whose error on |r| <= ln(2)/2 is below float32's own rounding.
    """
    # 1.5 * 2^23: adding it rounds to an integer, kept in the low bits; no fptosi of NaN
    magic = _const(12582912.0)
    shifted = b.fadd(b.fmul(x, _const(1.4426950408889634)), magic)
    n = b.fsub(shifted, magic)
    r = _fma(b, n, _const(-0.693359375), x)
    r = _fma(b, n, _const(2.12194440e-4), r)
    p = _const(1 / 5040)
    for coefficient in (1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0, 1.0):
        p = _fma(b, p, r, _const(coefficient))
    exponent = b.shl(b.add(b.bitcast(shifted, _IVEC), _const(127, _IVEC)), _const(23, _IVEC))
    value = b.fmul(p, b.bitcast(exponent, _VEC))
    return b.select(b.fcmp_ordered("<", x, _const(-87.0)), _const(0.0), value)


def _largest_lane(b: IR, vector: IR) -> IR:
    """Take the maximum of lanes that are no NaN: LLVM's own reduction looks for them at every turn."""
    for distance in (8, 4, 2, 1):
        other = ir.Constant(_IVEC, [lane ^ distance for lane in range(LANES)])
        swapped = b.shuffle_vector(vector, ir.Constant(_VEC, ir.Undefined), other)
        vector = b.select(b.fcmp_ordered(">", vector, swapped), vector, swapped)
    return b.extract_element(vector, ir.Constant(_I32, 0))


def _store_half(b: IR, value: IR, target: IR) -> None:
    """Store 16 normal numbers or zeros as bfloat16, by the CPU's own rounding: to nearest, ties to even."""
    half = ir.VectorType(BFLOAT, LANES)
    convert = cgutils.get_or_insert_function(
        b.module, ir.FunctionType(half, [_VEC]), "llvm.x86.avx512bf16.cvtneps2bf16.512"
    )
    b.store(b.call(convert, [value]), _at(b, target, half), align=2)
