"""A recipe is one weight of a quantised checkpoint: its shape, the tensors that it is made of, and the formula."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from myserve.engine.weights.snapshot import TensorInfo
from myserve.errors import BadCheckpointError

__all__ = [
    "FP4",
    "Read",
    "Recipe",
    "Recipes",
    "finite",
    "info_of",
    "part_of",
    "siblings",
    "unpack_bits",
    "unpack_fp4",
]

Read = Callable[[str], Tensor]
# e2m1: a sign, two bits of exponent, one of mantissa
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


@dataclass(frozen=True, slots=True)
class Recipe:
    """Make one weight of the tensors `sources`; `decode` returns its values in float32 or in the type it is given."""

    shape: tuple[int, ...]
    sources: tuple[str, ...]
    decode: Callable[[Read, torch.dtype], Tensor]


# By the weight's name as an unquantised checkpoint has it.
Recipes = dict[str, Recipe]


def part_of(tensors: Mapping[str, TensorInfo], name: str, whole: str) -> TensorInfo:
    """Return what `name` is, a tensor that `whole` is made of. Raises BadCheckpointError where it is missing."""
    if name not in tensors:
        raise BadCheckpointError(f"{whole} has no {name}, without which it cannot be read")
    return tensors[name]


def info_of(
    tensors: Mapping[str, TensorInfo],
    name: str,
    whole: str,
    dtypes: Sequence[torch.dtype],
    *shapes: Sequence[int],
) -> TensorInfo:
    """Return what `name` is, which must have one of these types and shapes. Raises BadCheckpointError."""
    info = part_of(tensors, name, whole)
    if info.dtype not in dtypes:
        listed = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise BadCheckpointError(f"{name} is {str(info.dtype).removeprefix('torch.')}, not {listed}")
    if shapes and info.shape not in [tuple(shape) for shape in shapes]:
        listed = " or ".join(str(tuple(shape)) for shape in shapes)
        raise BadCheckpointError(f"{name} has the shape {info.shape}, not {listed}")
    return info


def siblings(tensors: Mapping[str, TensorInfo], suffix: str) -> Iterator[str]:
    """Yield the modules that have a tensor of this last name.

    >>> list(siblings({"model.q.qweight": TensorInfo(torch.int32, (8, 8))}, "qweight"))
    ['model.q']
    """
    for name in tensors:
        module, _, last = name.rpartition(".")
        if last == suffix:
            yield module


def finite(read: Read, name: str) -> Tensor:
    """Read scales, in float32. Raises BadCheckpointError where one is NaN or infinite."""
    scales = read(name)
    if scales.dtype == torch.uint8:  # e8m0: the exponent of a power of two; 255 is NaN
        scales = scales.view(torch.float8_e8m0fnu)
    scales = scales.float()
    if not scales.isfinite().all():
        raise BadCheckpointError(f"{name} has values that are not finite")
    return scales


def unpack_bits(words: Tensor, bits: int, count: int) -> Tensor:
    """Return the first `count` unsigned integers of `bits` bits of rows of int32 words, lowest bits first. [R, count]

    >>> unpack_bits(torch.tensor([[0x76543210]], dtype=torch.int32), 4, 8).tolist()
    [[0, 1, 2, 3, 4, 5, 6, 7]]
    """
    start = torch.arange(count) * bits
    word, offset = start // 32, start % 32
    unsigned = words.long() & 0xFFFFFFFF
    low = unsigned[:, word] >> offset
    # of those that lie in two words, the rest; a shift by 32 is taken for the others, whose bits are masked away
    high = unsigned[:, (word + 1).clamp(max=words.shape[1] - 1)] << (32 - offset)
    return (low | high) & ((1 << bits) - 1)


def unpack_fp4(packed: Tensor) -> Tensor:
    """Return the values of bytes that hold two FP4 numbers each, the lower half first. [..., n] -> float32 [..., 2n]

    >>> unpack_fp4(torch.tensor([0x21, 0xF7], dtype=torch.uint8)).tolist()
    [0.5, 1.0, 6.0, -6.0]
    """
    halves = torch.stack((packed & 0xF, packed >> 4), dim=-1)
    return torch.tensor(FP4)[halves.flatten(-2).int()]
