"""Tensor operations that a recording makes by kernels of ours: they have PyTorch's bits, and replay without Python.

What a model writes between its products is small: at one token, calling PyTorch for it costs more than computing it,
and each call parts the launches around it, which one team of threads would make in one go.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from myserve.engine.batch_invariance import pointwise
from myserve.engine.kernels.elements import elementwise
from myserve.engine.kernels.elements.elementwise import DIMENSIONS, OPERATIONS, elementwise_kernel
from myserve.engine.kernels.launch import this_thread, threads_for

__all__ = ["launch_instead", "launch_like"]

_aten = torch.ops.aten
_KINDS = {
    torch.bfloat16: elementwise.BFLOAT16,
    torch.float32: elementwise.FLOAT32,
    torch.bool: elementwise.BOOL,
}
_ARITHMETIC = {
    _aten.neg.default: "neg",
    _aten.add.Tensor: "add",
    _aten.sub.Tensor: "sub",
    _aten.mul.Tensor: "mul",
    _aten.div.Tensor: "div",
}
_COMPARISONS = {
    getattr(packet, overload): name
    for name in ("gt", "ge", "lt", "le")
    for packet in (getattr(_aten, name),)
    for overload in ("Scalar", "Tensor")
}
# Where they do not return what they are given, or a view of it
_COPIES = {
    _aten.to.dtype, _aten._to_copy.default, _aten.reshape.default, _aten.clone.default, _aten.contiguous.default,
}  # fmt: skip


def launch_instead(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Run an operation by a kernel and return its result; None where there is none that does it whole."""
    if func is _aten.add.Tensor and not kwargs and _adds_like_with_like(*args):
        return pointwise.add(*args)
    if func is _aten.embedding.default and _has_rows(*args[:2]):
        return pointwise.gather(*args[:2])
    if func is _aten.index.Tensor and args[0].shape[0] == 1 and len(args[1]) == 2 and args[1][0] is None:
        table, indices = args[0][0], args[1][1]  # x[:, indices]
        if _has_rows(table, indices):
            return pointwise.gather(table, indices)[None]
    return None


def _has_rows(table: Tensor, indices: Tensor) -> bool:
    return (
        table.dim() == 2 and table.is_contiguous() and pointwise.is_ours(table)
        and indices.dtype == torch.int64 and indices.is_contiguous()
    )  # fmt: skip


def _adds_like_with_like(a: Any, b: Any) -> bool:
    tensors = isinstance(a, Tensor) and isinstance(b, Tensor)
    return (
        tensors and a.shape == b.shape and a.dim() > 0 and a.is_contiguous() and b.is_contiguous()
        and pointwise.is_ours(a, b)
    )  # fmt: skip


def launch_like(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> Tensor | None:
    """Make what an operation has just returned in memory of our own, element by element, by kernels.

    `out`: no view of what the operation was given. None where no kernel computes it with PyTorch's bits.
    """
    if func in _ARITHMETIC and not kwargs and _computes(args, out):
        return _fill(_ARITHMETIC[func], args, out)
    if func in _COMPARISONS and _compares(args):
        return _fill(_COMPARISONS[func], args, out)
    if func is _aten.where.self and _chooses(args, out):
        return _fill("where", (args[1], args[2], args[0]), out)
    if func in _COPIES and _is_known(args[0]) and (args[0].numel() == out.numel()):
        source = args[0] if args[0].shape == out.shape else None
        return _reshaped(args[0], out) if source is None else _fill("copy", (source,), out)
    if func is _aten.cat.default and all(x.dtype == out.dtype and _is_known(x) for x in args[0]):
        return _joined(args[0], args[1] if len(args) > 1 else 0, out)
    return None


def _is_known(x: Tensor) -> bool:
    return x.dtype in _KINDS and x.device.type == "cpu" and x.numel() > 0


def _computes(args: tuple[Any, ...], out: Tensor) -> bool:
    """Numbers are of float32 alone, and a tensor that is one number has the others' type: PyTorch rounds it else."""
    tensors = [x for x in args if isinstance(x, Tensor)]
    if out.dtype not in (torch.float32, torch.bfloat16) or not all(map(_is_known, tensors)):
        return False
    if any(x.dtype == torch.bool or (x.dim() == 0 and x.dtype != out.dtype) for x in tensors):
        return False
    return len(tensors) == len(args) or (out.dtype == torch.float32 and isinstance(args[0], Tensor))


def _compares(args: tuple[Any, ...]) -> bool:
    return all(not isinstance(x, Tensor) or (x.dtype == torch.float32 and _is_known(x)) for x in args)


def _chooses(args: tuple[Any, ...], out: Tensor) -> bool:
    where, x, y = args
    return where.dtype == torch.bool and x.dtype == y.dtype == out.dtype and all(map(_is_known, args))


def _reshaped(x: Tensor, out: Tensor) -> Tensor | None:
    """A copy of x in its own shape, contiguous, seen in another."""
    like = torch.empty(x.shape, dtype=out.dtype)
    made = _fill("copy", (x,), like)
    return None if made is None else made.view(out.shape)


def _joined(parts: list[Tensor], dim: int, out: Tensor) -> Tensor | None:
    """The parts copied behind one another."""
    if not out.is_contiguous() or out.dim() > DIMENSIONS:
        return None
    made, start = torch.empty(out.shape, dtype=out.dtype), 0
    for part in parts:
        size = part.shape[dim]
        _launch("copy", (part,), made.narrow(dim, start, size))
        start += size
    return made


def _fill(name: str, operands: tuple[Any, ...], out: Tensor) -> Tensor | None:
    """`name` of the operands in new memory, of out's shape and type; None where that has too many dimensions."""
    if not out.is_contiguous() or not _is_known(out):
        return None
    made = torch.empty(out.shape, dtype=out.dtype)
    return made if _launch(name, operands, made) else None


def _launch(name: str, operands: tuple[Any, ...], out: Tensor) -> bool:
    tensors = [x.expand(out.shape) if isinstance(x, Tensor) else None for x in operands]
    tensors += [None] * (3 - len(tensors))
    numbers = [float(x) for x in operands if not isinstance(x, Tensor)]
    dimensions = _merged(out.shape, [() if x is None else x.stride() for x in (out, *tensors)])
    if len(dimensions) > DIMENSIONS:
        return False
    dimensions = [(1, (0, 0, 0, 0))] * (DIMENSIONS - len(dimensions)) + dimensions
    fields: dict[str, float] = {}
    for place, (operand, x) in enumerate(zip(("out", "x", "y", "z"), (out, *tensors), strict=True)):
        fields[operand] = 0 if x is None else x.data_ptr()
        fields[f"{operand}_kind"] = elementwise.NUMBER if x is None else _KINDS[x.dtype]
        size = 0 if x is None else x.element_size()
        fields |= {f"{operand}_stride{d}": size * strides[place] for d, (_, strides) in enumerate(dimensions)}
    threads = threads_for(16 * out.numel())
    elementwise_kernel()(
        threads, operation=OPERATIONS.index(name), **fields, **{f"size{d}": n for d, (n, _) in enumerate(dimensions)},
        scratch=this_thread().scratch(elementwise.SCRATCH_BYTES * threads),
        scratch_thread=elementwise.SCRATCH_BYTES, offset=numbers[0] if numbers else 0.0,
    )  # fmt: skip
    return True


def _merged(shape: torch.Size, strides: list[tuple[int, ...]]) -> list[tuple[int, tuple[int, ...]]]:
    """Return sizes and strides of every operand with as few dimensions as say the same; () has strides of 0.

    >>> _merged(torch.Size([2, 1, 3, 4]), [(12, 12, 4, 1), (12, 12, 4, 1)])
    [(24, (1, 1))]
    >>> _merged(torch.Size([2, 3]), [(3, 1), (0, 1)])
    [(2, (3, 0)), (3, (1, 1))]
    """
    made: list[tuple[int, tuple[int, ...]]] = []
    for d, size in enumerate(shape):
        own = tuple(each[d] if each else 0 for each in strides)
        if size == 1:
            continue
        if made and all(outer == inner * size for outer, inner in zip(made[-1][1], own, strict=True)):
            made[-1] = (made[-1][0] * size, own)
        else:
            made.append((size, own))
    return made or [(1, (0,) * len(strides))]
