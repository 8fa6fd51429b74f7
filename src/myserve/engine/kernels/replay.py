"""Recorded launches one after another, all threads of a team together: what Python did between them is not there."""

from __future__ import annotations

import functools
from typing import Any

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from myserve.engine.kernels.lanes import _I32, _I64, IR, _at, _offset, next_item, next_thread, view
from myserve.engine.kernels.launch import Kernel, fingerprint

__all__ = ["REPLAY", "SPINS", "replay_kernel"]

# `launches` is the address of [count, 4] int64: kernel, record, threads, whether the next one must wait for it. The
# record's own ticket `next_item` counts arrivals at the barriers.
REPLAY = ("launches", "count", "team_size", "give_way")
SPINS = 1 << 10  # some tens of microseconds: then another thread of this machine may have our core

Record = Any


@intrinsic
def _call(ctx: Any, function: Any, argument: Any) -> Any:
    """Call function(argument), both addresses."""

    def codegen(context: Any, b: IR, signature: Any, args: Any) -> IR:
        b.call(_at(b, args[0], ir.FunctionType(ir.VoidType(), [_I64])), [args[1]])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def _ask(ctx: Any, function: Any) -> Any:
    """Return the C int that the function at an address returns."""

    def codegen(context: Any, b: IR, signature: Any, args: Any) -> IR:
        return b.sext(b.call(_at(b, args[0], ir.FunctionType(_I32, [])), []), _I64)

    return types.int64(types.int64), codegen


@intrinsic
def _arrived(ctx: Any, record: Any) -> Any:
    """Return how many threads have arrived, over all barriers so far."""

    def codegen(context: Any, b: IR, signature: Any, args: Any) -> IR:
        address = _offset(b, b.ptrtoint(args[0], _I64), 8)
        if llvmlite.binding.get_default_triple().startswith("x86_64"):
            pause = ir.FunctionType(ir.VoidType(), [])
            b.call(cgutils.get_or_insert_function(b.module, pause, "llvm.x86.sse2.pause"), [])
        return b.load_atomic(_at(b, address, _I64), "acquire", 8)

    return types.int64(record), codegen


@njit(error_model="numpy")
def _wait(a: Record, arrivals: int) -> None:
    spins = 0
    while _arrived(a) < arrivals:
        spins += 1
        if spins > SPINS and a.give_way != 0:
            _ask(a.give_way)


@njit(error_model="numpy")
def _replay(a: Record) -> None:
    team = _ask(a.team_size) if a.team_size != 0 else 1
    me, arrivals = next_thread(a), 0
    launches = carray(view(a.launches, np.int64(0)), (a.count, 4))
    for i in range(a.count):
        if me < launches[i, 2]:
            _call(launches[i, 0], launches[i, 1])
        if team > 1 and launches[i, 3] != 0:
            next_item(a)
            arrivals += team
            _wait(a, arrivals)
        if me == 0:  # for the next time; no thread takes this launch's tickets any more
            tickets = carray(view(launches[i, 1], np.int64(0)), 2)
            tickets[:] = 0


@functools.cache
def replay_kernel() -> Kernel:
    source = fingerprint()

    def replay(p: Any) -> None:
        if source >= 0:
            _replay(carray(p, 1)[0])

    return Kernel(REPLAY, replay)
