"""AMX tiles for Numba, and which unit multiplies bfloat16 on this machine.

All take the products of a row in the order of k, so a row's bits do not depend on the rows beside it; they differ from
each other in how they round, so a machine uses one of them for everything.
"""

from __future__ import annotations

import ctypes
import functools
import platform
from typing import Any, Literal

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from myserve.engine.kernels.lanes import _I64, IR, _at, _bytes, _prefetch

__all__ = [
    "Unit",
    "bfloat16_unit",
    "get_tiles",
    "has_wide_registers",
    "multiply_byte_tiles",
    "multiply_tiles",
    "product_unit",
    "set_tiles",
    "tile_configuration",
]

_I8 = ir.IntType(8)

Unit = Literal["tiles", "pairs", "lanes"]


@functools.cache
def bfloat16_unit() -> Unit:
    """Return the unit that multiplies bfloat16 here: AMX tiles, AVX-512 dot products of pairs, or float32 lanes."""
    features = llvmlite.binding.get_host_cpu_features()
    if features.get("amx-bf16") and features.get("amx-tile") and _may_use_tiles():
        return "tiles"
    return "pairs" if features.get("avx512bf16") else "lanes"


@functools.cache
def product_unit() -> Unit:
    """Return the unit that multiplies weights in bfloat16 here: `bfloat16_unit`, but lanes where pairs are slower.

    An Intel core takes two cycles for a dot product of 32 terms, and has 64 by float32 in the same time.
    A Zen 4 takes as long for either, and need not widen its weights for pairs. Attention stays: it waits for memory.
    """
    name = llvmlite.binding.get_host_cpu_name()
    slow = bfloat16_unit() == "pairs" and not name.startswith("znver")
    return "lanes" if slow and has_wide_registers() else bfloat16_unit()


@functools.cache
def has_wide_registers() -> bool:
    """Return whether there are AVX-512's 32 registers of 16 floats."""
    return bool(llvmlite.binding.get_host_cpu_features().get("avx512f"))


def _may_use_tiles() -> bool:
    """Ask Linux for the tiles' large state, which it gives a process only then; return whether it is granted."""
    if platform.system() != "Linux":
        return False
    arch_prctl, req_xcomp_perm, xtiledata = 158, 0x1023, 18
    return int(ctypes.CDLL(None).syscall(arch_prctl, req_xcomp_perm, xtiledata)) == 0


def _emit_tiles(instruction: str, blocks: int, start_new: bool) -> Any:
    """Return the code of `multiply_tiles` with one of the instructions that multiply two tiles."""

    def codegen(context: Any, b: IR, signature: Any, args: Any) -> IR:
        _, x, x_row, w0, w1, w_row, w_step, steps, c, c_row, ahead, _ = args
        # compiled with the rest, never run: LLVM must not meet what it cannot emit
        if bfloat16_unit() != "tiles":
            return context.get_dummy_value()

        def tile(name: str, *operands: IR) -> None:
            kinds = [operand.type for operand in operands]
            fn = cgutils.get_or_insert_function(
                b.module, ir.FunctionType(ir.VoidType(), kinds), f"llvm.x86.{name}"
            )
            b.call(fn, operands)

        def number(index: int) -> IR:
            return ir.Constant(_I8, index)

        sums = [
            (2 * i + g, b.add(c, b.add(_bytes(b, c_row, 16 * i), ir.Constant(_I64, 64 * g))))
            for i in range(blocks)
            for g in range(2)
        ]
        for index, address in sums:
            if start_new:
                tile("tilezero", number(index))
            else:
                tile("tileloadd64", number(index), _at(b, address, _I8), c_row)
        with cgutils.for_range(b, steps) as loop:
            for g, group in enumerate((w0, w1)):
                address = b.add(group, b.mul(loop.index, w_step))
                tile("tileloadd64", number(6 + g), _at(b, address, _I8), w_row)
                for line in range(16):
                    _prefetch(b, b.add(b.add(address, ahead), _bytes(b, w_row, line)), level=1)
            for i in range(blocks):
                address = b.add(b.add(x, _bytes(b, x_row, 16 * i)), _bytes(b, loop.index, 64))
                tile("tileloadd64", number(4 + i), _at(b, address, _I8), x_row)
            for i in range(blocks):
                for g in range(2):
                    tile(instruction, number(2 * i + g), number(4 + i), number(6 + g))
        for index, address in sums:
            tile("tilestored64", number(index), _at(b, address, _I8), c_row)
        return context.get_dummy_value()

    return codegen


def _tiles_type(blocks: Any, fresh: Any) -> Any:
    size = types.int64
    return types.void(blocks, size, size, size, size, size, size, size, size, size, size, fresh)


@intrinsic(prefer_literal=True)
def multiply_tiles(ctx: Any, blocks: Any, x: Any, x_row: Any, w0: Any, w1: Any, w_row: Any, w_step: Any, steps: Any,
                   c: Any, c_row: Any, ahead: Any, fresh: Any) -> Any:  # fmt: skip
    """c[:16 * blocks, :32] = x @ W (`fresh` 1) or += x @ W (0), 32 terms a step, k ascending; c is float32.

    x is bfloat16; w0 and w1 are two groups of 16 columns, pairs of terms `w_row` bytes apart and steps `w_step`; what
    lies `ahead` of them is fetched on the way. The thread's tiles must be set by `set_tiles`.
    """
    code = _emit_tiles("tdpbf16ps", blocks.literal_value, bool(fresh.literal_value))
    return _tiles_type(blocks, fresh), code


@intrinsic(prefer_literal=True)
def multiply_byte_tiles(ctx: Any, blocks: Any, x: Any, x_row: Any, w0: Any, w1: Any, w_row: Any, w_step: Any,
                        steps: Any, c: Any, c_row: Any, ahead: Any, fresh: Any) -> Any:  # fmt: skip
    """`multiply_tiles` of bytes: x is uint8, W int8 in fours of terms, 64 terms a step; c is int32."""
    code = _emit_tiles("tdpbusd", blocks.literal_value, bool(fresh.literal_value))
    return _tiles_type(blocks, fresh), code


def _tile_call(name: str, documentation: str) -> Any:
    def call(ctx: Any, config: Any) -> Any:
        def codegen(context: Any, b: IR, signature: Any, args: Any) -> IR:
            if bfloat16_unit() != "tiles":
                return context.get_dummy_value()
            address = _at(b, args[0], _I8)
            kind = ir.FunctionType(ir.VoidType(), [address.type])
            b.call(cgutils.get_or_insert_function(b.module, kind, f"llvm.x86.{name}"), [address])
            return context.get_dummy_value()

        return types.void(types.int64), codegen

    call.__name__, call.__doc__ = name, documentation
    return intrinsic(call)


set_tiles = _tile_call("ldtilecfg", "Sets the thread's tiles from a 64-byte configuration.")
get_tiles = _tile_call(
    "sttilecfg", "Stores the thread's tile configuration: oneDNN relies on finding its own again."
)


@functools.cache
def tile_configuration(rows: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Eight tiles of 64 bytes a row: sums and x of `rows` rows, W of 16."""
    config = np.zeros(64, np.uint8)
    config[0] = 1  # the palette
    config[16:32:2] = 64  # bytes a row
    config[48:54] = rows
    config[54:56] = 16
    return config
