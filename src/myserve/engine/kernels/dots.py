"""Products whose sums stay in registers, for Numba: by float32 lanes, or by AVX-512's dot products of bfloat16 pairs.

Every sum is taken in the order of k by one lane, so its bits do not depend on how many rows and columns are taken at
once, nor on where a sum is put down and taken up again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from myserve.engine.kernels.lanes import (
    _F32,
    _I32,
    _I64,
    _IVEC,
    _VEC,
    BFLOAT,
    IR,
    _bytes,
    _const,
    _fma,
    _load,
    _offset,
    _prefetch,
    _splat,
    _store,
    by_pairs,
    is_half,
)  # fmt: skip
from myserve.engine.kernels.tiles import bfloat16_unit

__all__ = ["add_products", "mix", "multiply", "multiply_pairs", "multiply_wide", "multiply_widening"]

_HALVES = ir.VectorType(BFLOAT, 32)


def _dot(b: IR, total: IR, x: IR, w: IR) -> IR:
    """total + x[0] * w[0] + x[1] * w[1] for each pair of bfloat16: vectors of 16 numbers of 32 bits."""
    kind = ir.FunctionType(_VEC, [_VEC, _HALVES, _HALVES])
    dot = cgutils.get_or_insert_function(b.module, kind, "llvm.x86.avx512bf16.dpbf16ps.512")
    return b.call(dot, [total, b.bitcast(x, _HALVES), b.bitcast(w, _HALVES)])


def _load_pair(b: IR, address: IR, row: IR, packed: bool) -> tuple[IR, IR]:
    """Two rows of B that follow each other in the sum.

    In bfloat16 they lie interleaved, so that one load, a shift and a mask widen both; in float32 `row` apart.
    """
    if not packed:
        return _load(b, address), _load(b, b.add(address, row))
    return _widen_pair(b, _load(b, address, _IVEC))


def _widen_pair(b: IR, both: IR) -> tuple[IR, IR]:
    even = b.shl(both, _const(16, _IVEC))
    odd = b.and_(both, _const(-65536, _IVEC))
    return b.bitcast(even, _VEC), b.bitcast(odd, _VEC)


class _Sums:
    """A tile of sums [rows, 16 * groups] in registers: LLVM's mem2reg makes such of these slots."""

    def __init__(self, b: IR, rows: int, groups: int, kind: IR = _VEC) -> None:
        self._b = b
        self._slots = [[cgutils.alloca_once(b, kind) for _ in range(groups)] for _ in range(rows)]

    def each(self) -> Iterator[tuple[int, int, IR]]:
        for r, row in enumerate(self._slots):
            for g, slot in enumerate(row):
                yield r, g, slot

    def add(self, xs: list[IR], columns: list[IR], product: Callable[[IR, IR, IR, IR], IR]) -> None:
        """sums[r, g] = product(sums[r, g], xs[r], columns[g])."""
        for r, g, slot in self.each():
            self._b.store(product(self._b, self._b.load(slot), xs[r], columns[g]), slot)

    def store(self, at: Callable[[int, int], IR]) -> None:
        for r, g, slot in self.each():
            _store(self._b, self._b.load(slot), at(r, g))


def _multiply_and_add(b: IR, total: IR, x: IR, w: IR) -> IR:
    return _fma(b, x, w, total)


def _multiply_and_add_both(b: IR, total: IR, x: IR, w: IR) -> IR:
    """total + x[0] * w[0] + x[1] * w[1] for each pair of bfloat16, rounded after each: `_dot` by float32 lanes."""
    for x_term, w_term in zip(_widen_pair(b, x), _widen_pair(b, w), strict=True):
        total = _fma(b, x_term, w_term, total)
    return total


def _accumulate(
    b: IR, kind: Any, sums: _Sums, a_rows: list[IR], bases: list[IR], b_row: IR, terms: IR, ahead: IR
) -> None:
    """sums[r, g] += sum over k < terms of a[r, k] * B[k, g], k ascending; `bases`: of B's rows, for each 16 columns."""
    packed, dots = is_half(kind), by_pairs(kind)

    def terms_of(pair: IR, half: int) -> list[IR]:
        at = [_offset(b, b.add(row, _bytes(b, pair, 8)), 4 * half) for row in a_rows]
        return [_splat(b, _load(b, address, _F32)) for address in at]

    def pairs_of(pair: IR) -> list[IR]:
        at = [b.add(row, _bytes(b, pair, 4)) for row in a_rows]
        return [_splat(b, _load(b, address, _I32), _IVEC) for address in at]

    pairs = b.lshr(terms, ir.Constant(_I64, 1))
    pair_bytes = b_row if packed else _bytes(b, b_row, 2)
    with cgutils.for_range(b, pairs) as loop:
        at = [b.add(base, b.mul(loop.index, pair_bytes)) for base in bases]
        for address in at:
            _prefetch(b, b.add(address, ahead))
            if not packed:
                _prefetch(b, b.add(b.add(address, ahead), b_row))
        if dots:
            sums.add(pairs_of(loop.index), [_load(b, address, _IVEC) for address in at], _dot)
        else:
            both = [_load_pair(b, address, b_row, packed) for address in at]
            sums.add(terms_of(loop.index, 0), [even for even, _ in both], _multiply_and_add)
            sums.add(terms_of(loop.index, 1), [odd for _, odd in both], _multiply_and_add)
    # An odd last term has no partner: what lies there is another request's past and may be NaN.
    with b.if_then(b.trunc(terms, ir.IntType(1))):
        at = [b.add(base, b.mul(pairs, pair_bytes)) for base in bases]
        if dots:
            alone = [b.and_(_load(b, address, _IVEC), _const(0xFFFF, _IVEC)) for address in at]
            sums.add(pairs_of(pairs), alone, _dot)
        else:
            both = [_load_pair(b, address, ir.Constant(_I64, 0), packed) for address in at]
            sums.add(terms_of(pairs, 0), [even for even, _ in both], _multiply_and_add)


def _cannot_run(kind: Any) -> bool:
    """Compiled with the rest, never run: LLVM must not meet what it cannot emit."""
    return by_pairs(kind) and bfloat16_unit() == "lanes"


@intrinsic(prefer_literal=True)
def multiply(ctx: Any, kind: Any, rows: Any, groups: Any, a: Any, a_row: Any, b: Any, b_row: Any, terms: Any,
             ahead: Any, c: Any, c_row: Any) -> Any:  # fmt: skip
    """c[r, :] = sum over k < terms of a[r, k] * B[k, :], k ascending, 16 * groups columns.

    `b` is the address of `groups` addresses, one for each 16 columns of B. Sizes are in bytes, but for `terms`. `kind`
    tells B's element type and what multiplies (`lanes.is_half`); `a` is float32, or bfloat16 for dot products of pairs.
    What lies `ahead` bytes from B is fetched into the cache on the way: pages are scattered, so no hardware prefetcher
    knows where the next one is.
    """
    R, G = rows.literal_value, groups.literal_value

    def codegen(context: Any, b: IR, signature: Any, args: Any) -> IR:
        _, _, _, a, a_row, base, b_row, terms, ahead, c, c_row = args
        if _cannot_run(kind):
            return context.get_dummy_value()
        bases = [_load(b, _offset(b, base, 8 * g), _I64) for g in range(G)]
        sums = _Sums(b, R, G)
        for _, _, slot in sums.each():
            b.store(_const(0.0), slot)
        a_rows = [b.add(a, _bytes(b, a_row, r)) for r in range(R)]
        _accumulate(b, kind, sums, a_rows, bases, b_row, terms, ahead)
        sums.store(lambda r, g: _offset(b, b.add(c, _bytes(b, c_row, r)), 64 * g))
        return context.get_dummy_value()

    size = types.int64
    return types.void(kind, rows, groups, *[size] * 8), codegen


@intrinsic(prefer_literal=True)
def mix(ctx: Any, kind: Any, rows: Any, groups: Any, a: Any, a_row: Any, b: Any, terms: Any, ahead: Any, b2: Any,
        terms2: Any, ahead2: Any, b_row: Any, c: Any, c_row: Any, alpha: Any) -> Any:  # fmt: skip
    """c[r, :] = alpha[r] * c[r, :] + sum over k of a[r, k] * B[k, :]: `multiply` onto sums that are there.

    B's rows lie in two places, `terms` of them at `b` and the next at `b2`.
    """
    R, G = rows.literal_value, groups.literal_value

    def codegen(context: Any, b: IR, signature: Any, args: Any) -> IR:
        _, _, _, a, a_row, first, terms, ahead, second, terms2, ahead2, b_row, c, c_row, alpha = args
        if _cannot_run(kind):
            return context.get_dummy_value()

        def c_at(r: int, g: int) -> IR:
            return _offset(b, b.add(c, _bytes(b, c_row, r)), 64 * g)

        sums = _Sums(b, R, G)
        factors = [_splat(b, _load(b, _offset(b, alpha, 4 * r), _F32)) for r in range(R)]
        for r, g, slot in sums.each():
            b.store(b.fmul(_load(b, c_at(r, g)), factors[r]), slot)
        behind = _bytes(b, terms, 2 if by_pairs(kind) else 4)  # of a: where its terms for `b2` begin
        for base, count, fetched, start in ((first, terms, ahead, None), (second, terms2, ahead2, behind)):
            at = a if start is None else b.add(a, start)
            a_rows = [b.add(at, _bytes(b, a_row, r)) for r in range(R)]
            bases = [_offset(b, base, 64 * g) for g in range(G)]
            _accumulate(b, kind, sums, a_rows, bases, b_row, count, fetched)
        sums.store(c_at)
        return context.get_dummy_value()

    size = types.int64
    return types.void(kind, rows, groups, *[size] * 12), codegen


@intrinsic(prefer_literal=True)
def multiply_pairs(ctx: Any, kind: Any, rows: Any, groups: Any, x: Any, x_row: Any, w: Any, w_group: Any, pairs: Any,
                   c: Any, ahead: Any, stride: Any) -> Any:  # fmt: skip
    """c[r, :n] += sum over pairs of x[r, 2k] * W[2k, :] + x[r, 2k + 1] * W[2k + 1, :], k ascending; c is [rows, 64].

    `kind`: by dot products, or in float32 one term after the other. x is bfloat16, `x_row` bytes a row; W is up to four
    groups of 16 columns, [pairs, 16, 2], `w_group` bytes apart, and n = 16 * groups. What lies `ahead` bytes from each
    group is fetched on the way, `stride` bytes a pair.
    """
    R, G = rows.literal_value, groups.literal_value

    def codegen(context: Any, b: IR, signature: Any, args: Any) -> IR:
        add_products(b, R, args[3:], _dot if by_pairs(kind) else _multiply_and_add_both, _VEC, G)
        return context.get_dummy_value()

    return types.void(kind, rows, groups, *[types.int64] * 8), codegen


@intrinsic(prefer_literal=True)
def multiply_widening(ctx: Any, rows: Any, keeps: Any, x: Any, x_row: Any, w: Any, w_group: Any, pairs: Any, c: Any,
                      ahead: Any, stride: Any, wide: Any) -> Any:  # fmt: skip
    """Do as `multiply_pairs` with 64 columns, in float32, one term after the other: x is float32, W is widened here.

    `keeps` 1: the widened W is left at `wide`, [pairs, 2, 64], for `multiply_wide`.
    """
    R, kept = rows.literal_value, bool(keeps.literal_value)

    def codegen(context: Any, b: IR, signature: Any, args: Any) -> IR:
        _, _, x, x_row, w, w_group, pairs, c, ahead, stride, wide = args
        groups = [b.add(w, _bytes(b, w_group, g)) for g in range(4)]

        def columns(pair: IR) -> tuple[list[IR], list[IR]]:
            fetched = b.add(ahead, b.mul(pair, stride))
            for group in groups:
                _prefetch(b, b.add(group, fetched))
            both = [
                _load_pair(b, b.add(group, _bytes(b, pair, 64)), ir.Constant(_I64, 0), True)
                for group in groups
            ]
            place = b.add(wide, _bytes(b, pair, 512))
            for g, (even, odd) in enumerate(both if kept else ()):
                _store(b, even, _offset(b, place, 64 * g))
                _store(b, odd, _offset(b, place, 256 + 64 * g))
            return [even for even, _ in both], [odd for _, odd in both]

        _add_terms(b, R, x, x_row, pairs, c, columns)
        return context.get_dummy_value()

    return types.void(rows, keeps, *[types.int64] * 9), codegen


@intrinsic(prefer_literal=True)
def multiply_wide(ctx: Any, rows: Any, x: Any, x_row: Any, wide: Any, pairs: Any, c: Any) -> Any:
    """Do as `multiply_widening`, with the columns that it has left."""
    R = rows.literal_value

    def codegen(context: Any, b: IR, signature: Any, args: Any) -> IR:
        _, x, x_row, wide, pairs, c = args

        def columns(pair: IR) -> tuple[list[IR], list[IR]]:
            place = b.add(wide, _bytes(b, pair, 512))
            even, odd = ([_load(b, _offset(b, place, half + 64 * g)) for g in range(4)] for half in (0, 256))
            return even, odd

        _add_terms(b, R, x, x_row, pairs, c, columns)
        return context.get_dummy_value()

    return types.void(rows, *[types.int64] * 5), codegen


def _add_terms(
    b: IR, rows: int, x: IR, x_row: IR, pairs: IR, c: IR, columns: Callable[[IR], tuple[list[IR], list[IR]]]
) -> None:
    """Emit c[r, :64] += x[r, 2k] * even + x[r, 2k + 1] * odd for each pair's two rows of columns; c is [rows, 64]."""
    x_rows = [b.add(x, _bytes(b, x_row, r)) for r in range(rows)]

    def c_at(r: int, g: int) -> IR:
        return _offset(b, c, 256 * r + 64 * g)

    sums = _Sums(b, rows, 4)
    for r, g, slot in sums.each():
        b.store(_load(b, c_at(r, g)), slot)
    with cgutils.for_range(b, pairs) as loop:
        for half, terms in enumerate(columns(loop.index)):
            at = [_offset(b, b.add(row, _bytes(b, loop.index, 8)), 4 * half) for row in x_rows]
            sums.add([_splat(b, _load(b, address, _F32)) for address in at], terms, _multiply_and_add)
    sums.store(c_at)


def add_products(
    b: IR, rows: int, args: Any, product: Callable[[IR, IR, IR, IR], IR], kind: IR, num_groups: int = 4
) -> None:
    """Emit c[r, :64] += the products of x[r] and W: 32 bits of x times four vectors of W at each of `steps`.

    `args`: the addresses and sizes of `multiply_pairs`; `kind`: the vector of sums that `product` adds to.
    """
    x, x_row, w, w_group, steps, c, ahead, stride = args
    x_rows = [b.add(x, _bytes(b, x_row, r)) for r in range(rows)]
    groups = [b.add(w, _bytes(b, w_group, g)) for g in range(num_groups)]

    def c_at(r: int, g: int) -> IR:
        return _offset(b, c, 256 * r + 64 * g)

    sums = _Sums(b, rows, num_groups, kind)
    for r, g, slot in sums.each():
        b.store(_load(b, c_at(r, g), kind), slot)
    with cgutils.for_range(b, steps) as loop:
        fetched = b.add(ahead, b.mul(loop.index, stride))
        for group in groups:
            _prefetch(b, b.add(group, fetched))
        columns = [_load(b, b.add(group, _bytes(b, loop.index, 64)), _IVEC) for group in groups]
        xs = [_load(b, b.add(row, _bytes(b, loop.index, 4)), _I32) for row in x_rows]
        sums.add([_splat(b, x, _IVEC) for x in xs], columns, product)
    sums.store(c_at)
