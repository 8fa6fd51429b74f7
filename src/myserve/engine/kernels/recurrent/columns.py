"""One token's passes over the columns of a recurrent state: a column's sums are one lane's, first row to last.

A column of a state [K, V] never meets another: what it holds follows from the rows before it alone. So the order of
every sum is that of the rows, however many columns a register, a tile or a thread has. Written out as LLVM vectors for
the reasons that `lanes` gives.
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
    _VEC,
    IR,
    LANES,
    _at,
    _bytes,
    _const,
    _fma,
    _load,
    _offset,
    _splat,
    _store,
)

__all__ = ["read_columns", "scan_columns", "stream_columns", "write_columns"]

_WIDTH = 4 * LANES  # bytes of a register


@intrinsic(prefer_literal=True)
def read_columns(ctx: Any, groups: Any, state: Any, rows: Any, factors: Any, out: Any) -> Any:
    """Store the sums over `rows` of a state's rows times `factors`: 16 columns for each of `groups`.

    `state` [rows, 16 * groups] and `factors` [rows] are float32, `out` [16 * groups] too.
    """
    count = groups.literal_value

    def codegen(context: Any, b: IR, signature: Any, args: Any) -> IR:
        _, state, rows, factors, out = args
        sums = _zeros(b, count)
        with cgutils.for_range(b, rows) as loop:
            row = b.add(state, _bytes(b, loop.index, count * _WIDTH))
            factor = _splat(b, _load(b, b.add(factors, _bytes(b, loop.index, 4)), _F32))
            for group, total in enumerate(sums):
                column = _load(b, _offset(b, row, group * _WIDTH))
                b.store(_fma(b, column, factor, b.load(total)), total)
        _store_all(b, sums, out)
        return context.get_dummy_value()

    return types.void(groups, *[types.int64] * 4), codegen


@intrinsic(prefer_literal=True)
def write_columns(ctx: Any, groups: Any, source: Any, target: Any, rows: Any, decays: Any, keys: Any, deltas: Any,
                  queries: Any, out: Any) -> Any:  # fmt: skip
    """Store source * decay + key * delta at `target`, and the sums of what was stored times `queries` at `out`.

    `source` and `target` [rows, 16 * groups], which may be one; `decays`, `keys` and `queries` [rows]; `deltas` and
    `out` [16 * groups]; all float32.
    """
    return _writing(groups, one_decay=True)


@intrinsic(prefer_literal=True)
def stream_columns(ctx: Any, groups: Any, source: Any, target: Any, rows: Any, decays: Any, keys: Any, deltas: Any,
                   queries: Any, out: Any) -> Any:  # fmt: skip
    """Do as `write_columns`, past the caches, where nothing reads `target` soon; it lies at a cache line.

    A line that is written whole need not be read first: three transfers of a state become two. What another thread
    reads of it afterwards is there, for both have met at a ticket, an atomic addition, in between.
    """
    return _writing(groups, one_decay=True, streams=True)


@intrinsic(prefer_literal=True)
def scan_columns(ctx: Any, groups: Any, source: Any, target: Any, rows: Any, decays: Any, keys: Any, deltas: Any,
                 queries: Any, out: Any) -> Any:  # fmt: skip
    """Do as `write_columns`, with a decay for each row and column: `decays` [rows, 16 * groups]."""
    return _writing(groups, one_decay=False)


def _writing(groups: Any, *, one_decay: bool, streams: bool = False) -> Any:
    """Return signature and code: `one_decay` for a whole row, or each column has its own; `streams` past the caches."""
    count = groups.literal_value
    store = _stream if streams else _store

    def codegen(context: Any, b: IR, signature: Any, args: Any) -> IR:
        _, source, target, rows, decays, keys, deltas, queries, out = args
        news = [_load(b, _offset(b, deltas, group * _WIDTH)) for group in range(count)]
        sums = _zeros(b, count)
        with cgutils.for_range(b, rows) as loop:
            at = _bytes(b, loop.index, count * _WIDTH)
            key, query = (
                _splat(b, _load(b, b.add(array, _bytes(b, loop.index, 4)), _F32)) for array in (keys, queries)
            )
            whole = _splat(b, _load(b, b.add(decays, _bytes(b, loop.index, 4)), _F32)) if one_decay else None
            for group, total in enumerate(sums):
                place = _offset(b, at, group * _WIDTH)
                decay = _load(b, b.add(decays, place)) if whole is None else whole
                kept = b.fmul(_load(b, b.add(source, place)), decay)
                column = _fma(b, key, news[group], kept)
                store(b, column, b.add(target, place))
                b.store(_fma(b, column, query, b.load(total)), total)
        _store_all(b, sums, out)
        return context.get_dummy_value()

    return types.void(groups, *[types.int64] * 8), codegen


def _stream(b: IR, value: IR, address: IR) -> None:
    stored = b.store(value, _at(b, address, value.type), align=64)
    stored.set_metadata("nontemporal", b.module.add_metadata([ir.Constant(_I32, 1)]))


def _zeros(b: IR, count: int) -> list[IR]:
    """Return slots of 16 zeros each, which LLVM keeps in registers."""
    slots = [cgutils.alloca_once(b, _VEC) for _ in range(count)]
    for slot in slots:
        b.store(_const(0.0), slot)
    return slots


def _store_all(b: IR, slots: list[IR], out: IR) -> None:
    for group, slot in enumerate(slots):
        _store(b, b.load(slot), b.add(out, ir.Constant(_I64, group * _WIDTH)))
