"""RMSNorm, RoPE, sums and row lookup: each row is computed from its own operands alone, in one pass.

Plain loops: the compiler makes vectors of them, and may, for each result comes from its own operands alone. The one sum
there is, a norm's, is written out in lanes. Every operation rounds as the model's own sequence of tensor operations
does, so that fusing changes no bit. Activations are `activations`.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from myserve.engine.kernels.lanes import _F32, _I32, IR, next_item, size_of, sum_of_squares, view
from myserve.engine.kernels.launch import Kernel, fingerprint

__all__ = [
    "ADD",
    "GATHER",
    "NORM",
    "ROTATE",
    "ROWS",
    "add_kernel",
    "as_bits",
    "as_float",
    "element_kind",
    "fused",
    "gather_kernel",
    "norm_kernel",
    "rotate_kernel",
    "rounded",
    "warm",
    "wide",
]

ROWS = 4  # of an item of work

NORM = ("x", "x_row", "x_group", "weight", "out", "rows", "groups", "width", "rounds_first", "eps", "offset")
ROTATE = (
    "query", "query_token", "query_head", "key", "key_token", "key_head", "cosine", "sine", "angle_row",
    "query_out", "key_out", "tokens", "query_heads", "key_heads", "head_dim", "rotary_dim",
)  # fmt: skip
ADD = ("a", "b", "out", "rows", "width")
GATHER = ("table", "table_rows", "indices", "out", "rows", "row_bytes")

Kind = Any  # a value whose type is an element's: uint16 (bfloat16's bits) or float32
Record = Any


def _bitcast(name: str, source: Any, target: Any, kind: IR) -> Any:
    def cast(ctx: Any, value: Any) -> Any:
        def codegen(context: Any, b: IR, signature: Any, args: Any) -> IR:
            return b.bitcast(args[0], kind)

        return target(source), codegen

    cast.__name__ = name
    return intrinsic(cast)


as_float = _bitcast("as_float", types.uint32, types.float32, _F32)
as_bits = _bitcast("as_bits", types.float32, types.uint32, _I32)


@intrinsic
def wide(ctx: Any, element: Any) -> Any:
    """An element as float32."""

    def codegen(context: Any, b: IR, signature: Any, args: Any) -> IR:
        if element == types.float32:
            return args[0]
        return b.bitcast(b.shl(b.zext(args[0], _I32), ir.Constant(_I32, 16)), _F32)

    return types.float32(element), codegen


@intrinsic
def fused(ctx: Any, x: Any, y: Any, z: Any) -> Any:
    """x * y + z, rounded once where the CPU has a fused unit: in a vector and alone, for it is fused by name."""

    def codegen(context: Any, b: IR, signature: Any, args: Any) -> IR:
        kind = ir.FunctionType(_F32, [_F32] * 3)
        return b.call(cgutils.get_or_insert_function(b.module, kind, "llvm.fmuladd.f32"), args)

    return types.float32(types.float32, types.float32, types.float32), codegen


@intrinsic
def rounded(ctx: Any, kind: Any, value: Any) -> Any:
    """A float32 as an element: bfloat16 to nearest, ties to even, NaN kept."""

    def codegen(context: Any, b: IR, signature: Any, args: Any) -> IR:
        if kind == types.float32:
            return args[1]
        bits = b.bitcast(args[1], _I32)
        tie = b.and_(b.lshr(bits, ir.Constant(_I32, 16)), ir.Constant(_I32, 1))
        nearest = b.lshr(b.add(bits, b.add(tie, ir.Constant(_I32, 0x7FFF))), ir.Constant(_I32, 16))
        kept = b.select(b.fcmp_unordered("uno", args[1], args[1]), ir.Constant(_I32, 0x7FC0), nearest)
        return b.trunc(kept, ir.IntType(16))

    return kind(kind, types.float32), codegen


@njit(error_model="numpy")
def _norm_row(
    kind: Kind,
    x: Any,
    weight: Any,
    out: Any,
    width: int,
    scale: np.float32,
    offset: np.float32,
    rounds_first: bool,
) -> None:
    if rounds_first:
        for d in range(width):
            normed = wide(rounded(kind, wide(x[d]) * scale))
            out[d] = rounded(kind, normed * (wide(weight[d]) + offset))
    else:
        for d in range(width):
            out[d] = rounded(kind, wide(x[d]) * scale * (wide(weight[d]) + offset))


@njit(error_model="numpy")
def _norm(a: Record, kind: Kind) -> None:
    """out[r, g] = x[r, g] / sqrt(mean(x[r, g]^2) + eps) * (weight + offset); a row has `groups` parts."""
    # a bound that is read anew in a loop would keep it from being vectors
    size, width = (size_of(kind), a.width)
    weight = carray(view(a.weight, kind), width)
    item = next_item(a)
    while item * ROWS < a.rows:
        for row in range(item * ROWS, min(a.rows, item * ROWS + ROWS)):
            for group in range(a.groups):
                source = a.x + row * a.x_row + group * a.x_group
                x = carray(view(source, kind), width)
                out = carray(view(a.out + (row * a.groups + group) * width * size, kind), width)
                mean = sum_of_squares(kind, source, width) / np.float32(width)
                scale = np.float32(1.0) / np.sqrt(mean + a.eps)
                _norm_row(kind, x, weight, out, width, scale, a.offset, a.rounds_first != 0)
        item = next_item(a)


@njit(error_model="numpy")
def _rotate_head(kind: Kind, x: Any, cosine: Any, sine: Any, out: Any, half: int, width: int) -> None:
    for d in range(half):
        low, high = wide(x[d]), wide(x[d + half])
        turned = wide(rounded(kind, low * wide(cosine[d])))
        out[d] = rounded(kind, turned + wide(rounded(kind, -high * wide(sine[d]))))
    for d in range(half):
        low, high = wide(x[d]), wide(x[d + half])
        turned = wide(rounded(kind, high * wide(cosine[d + half])))
        out[d + half] = rounded(kind, turned + wide(rounded(kind, low * wide(sine[d + half]))))
    for d in range(2 * half, width):
        out[d] = x[d]


@njit(error_model="numpy")
def _rotate(a: Record, kind: Kind) -> None:
    """out = x * cos + (-x[half:], x[:half]) * sin for every head of queries and keys; out is [tokens, heads, dim].

    What a head has beyond `rotary_dim` stays.
    """
    size, dim, turned = size_of(kind), a.head_dim, a.rotary_dim
    item = next_item(a)
    while item * ROWS < a.tokens:
        for t in range(item * ROWS, min(a.tokens, item * ROWS + ROWS)):
            cosine = carray(view(a.cosine + t * a.angle_row, kind), turned)
            sine = carray(view(a.sine + t * a.angle_row, kind), turned)
            for h in range(a.query_heads):
                x = carray(view(a.query + t * a.query_token + h * a.query_head, kind), dim)
                out = carray(view(a.query_out + (t * a.query_heads + h) * dim * size, kind), dim)
                _rotate_head(kind, x, cosine, sine, out, turned // 2, dim)
            for h in range(a.key_heads):
                x = carray(view(a.key + t * a.key_token + h * a.key_head, kind), dim)
                out = carray(view(a.key_out + (t * a.key_heads + h) * dim * size, kind), dim)
                _rotate_head(kind, x, cosine, sine, out, turned // 2, dim)
        item = next_item(a)


@njit(error_model="numpy")
def _add(a: Record, kind: Kind) -> None:
    size = size_of(kind)
    item = next_item(a)
    while item * ROWS < a.rows:
        begin = item * ROWS * a.width
        count = min(a.rows * a.width - begin, ROWS * a.width)
        x, y = carray(view(a.a + begin * size, kind), count), carray(view(a.b + begin * size, kind), count)
        out = carray(view(a.out + begin * size, kind), count)
        for d in range(count):
            out[d] = rounded(kind, wide(x[d]) + wide(y[d]))
        item = next_item(a)


@njit(error_model="numpy")
def _gather(a: Record) -> None:
    """Rows by their index; one that the table does not have is all NaN, in every type, and so found as any other is."""
    indices = carray(view(a.indices, np.int64(0)), a.rows)
    item = next_item(a)
    while item * ROWS < a.rows:
        for row in range(item * ROWS, min(a.rows, (item + 1) * ROWS)):
            index = indices[row]
            out = carray(view(a.out + row * a.row_bytes, np.uint8(0)), a.row_bytes)
            if 0 <= index < a.table_rows:
                out[:] = carray(view(a.table + index * a.row_bytes, np.uint8(0)), a.row_bytes)
            else:
                out[:] = np.uint8(0xFF)
        item = next_item(a)


def element_kind(dtype: torch.dtype) -> Kind:
    return np.uint16(0) if dtype == torch.bfloat16 else np.float32(0)


# One entry each, written out: a loop that came in as a variable would have another name in Numba's cache every time.


@functools.cache
def norm_kernel(dtype: torch.dtype) -> Kernel:
    source, kind = fingerprint(), element_kind(dtype)

    def norm(p: Any) -> None:
        if source >= 0:
            _norm(carray(p, 1)[0], kind)

    return Kernel(NORM, norm)


@functools.cache
def rotate_kernel(dtype: torch.dtype) -> Kernel:
    source, kind = fingerprint(), element_kind(dtype)

    def rotate(p: Any) -> None:
        if source >= 0:
            _rotate(carray(p, 1)[0], kind)

    return Kernel(ROTATE, rotate)


@functools.cache
def add_kernel(dtype: torch.dtype) -> Kernel:
    source, kind = fingerprint(), element_kind(dtype)

    def add(p: Any) -> None:
        if source >= 0:
            _add(carray(p, 1)[0], kind)

    return Kernel(ADD, add)


@functools.cache
def gather_kernel() -> Kernel:
    source = fingerprint()

    def gather(p: Any) -> None:
        if source >= 0:
            _gather(carray(p, 1)[0])

    return Kernel(GATHER, gather)


def warm(dtype: torch.dtype) -> None:
    gather_kernel()
    for kernel in (norm_kernel, rotate_kernel, add_kernel):
        kernel(dtype)
