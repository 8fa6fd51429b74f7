"""A linear layer is batch-invariant by construction: a row's sums do not depend on how many rows there are.

The libraries' matrix products choose their order of summation by the number of rows: oneDNN's bfloat16 on AMX has one
for up to 32 rows and others above, float32 in `F.linear` changes at 2, 16 and 129. (Random inputs hardly show it: few
results differ after rounding. Sums that cancel show it at once.) Padding to counts that agree was measured and costs
up to three times a prefill; a kernel of our own costs nothing and needs no search.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from itertools import accumulate
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from myserve.engine.kernels.gemm import PANEL, linear_kernel, scratch_bytes
from myserve.engine.kernels.launch import this_thread, threads_for
from myserve.engine.kernels.tiles import tile_configuration
from myserve.engine.memory import huge_pages
from myserve.engine.memory.prefault import Reserve

__all__ = ["TILES", "TILE_ADDRESSES", "JoinedWeights", "PackedWeight", "multiply_each", "pack_into"]

TILES = np.stack([tile_configuration(rows) for rows in range(1, 17)])  # [16, 64]
TILE_ADDRESSES = [tiles.ctypes.data for tiles in TILES]


class PackedWeight:
    """A weight [N, K] and bias [N] in the kernel's order. CPU; bfloat16 stays, all else computes in float32.

    >>> w = PackedWeight(torch.eye(3), torch.ones(3))
    >>> w(torch.tensor([[1.0, 2.0, 3.0]]))
    tensor([[2., 3., 4.]])
    """

    per_column: ClassVar[tuple[str, ...]] = (
        "bias",
    )  # its tensors beside the weight, a number for each column

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        place: Tensor | None = None,
        reserve: Reserve | None = None,
    ) -> None:
        """`place`: where the packed weight goes, of `packed_shape` and its type; None: memory of `reserve`, or new."""
        self.out_features, self.in_features = weight.shape
        if place is None:
            place = huge_pages.zeros(self.packed_shape(weight), self.packed_dtype(weight), reserve)
        self.weight = pack_into(weight.detach(), place)
        self._inner = self.weight.shape[1] * (2 if self.dtype == torch.bfloat16 else 1)
        self._scratch_bytes = scratch_bytes(self._inner)
        self._kernel = linear_kernel(self.dtype)
        self.bias = self._padded_bias(bias)

    def with_bias(self, bias: Tensor) -> PackedWeight:
        """Return a product with this weight, shared, and another bias [N]."""
        other = copy(self)
        other.bias = self._padded_bias(bias)
        return other

    def _padded_bias(self, bias: Tensor | None) -> Tensor:
        columns = torch.zeros(self.weight.shape[0] * 16, dtype=torch.float32)  # as the sums it is added to
        if bias is not None:
            columns[: self.out_features] = bias.detach()
        return columns

    def copy_(self, other: PackedWeight) -> None:
        """Take the values of another of equal shape, in place: a joined product that holds this weight has them too."""
        for name in ("weight", *self.per_column):
            getattr(self, name).copy_(getattr(other, name))

    @staticmethod
    def packed_shape(weight: Tensor) -> tuple[int, ...]:
        """Return the shape of a packed [N, K]: float32 [N / 16, K, 16]; bfloat16 [N / 16, K / 2, 16, 2].

        K is padded to whole tiles in bfloat16, N to whole panels.

        >>> PackedWeight.packed_shape(torch.zeros(70, 40))
        (8, 40, 16)
        >>> PackedWeight.packed_shape(torch.zeros(70, 40, dtype=torch.bfloat16))
        (8, 32, 16, 2)
        """
        groups = -(-weight.shape[0] // PANEL) * PANEL // 16
        inner = PackedWeight.packed_inner(weight.shape[1], weight.dtype)
        return (groups, inner // 2, 16, 2) if weight.dtype == torch.bfloat16 else (groups, inner, 16)

    @staticmethod
    def packed_inner(inner: int, dtype: torch.dtype) -> int:
        """Return K as a packed weight has it: in bfloat16 in whole tiles."""
        return -(-inner // 32) * 32 if dtype == torch.bfloat16 else inner

    @staticmethod
    def packed_dtype(weight: Tensor) -> torch.dtype:
        """Return the element type of a packed weight: bfloat16 stays, all else is float32."""
        return torch.bfloat16 if weight.dtype == torch.bfloat16 else torch.float32

    def unpacked(self) -> Tensor:
        """Return the weight [N, K] as it lies in memory now, in a tensor of its own.

        >>> PackedWeight(torch.arange(6.0).view(2, 3)).unpacked()
        tensor([[0., 1., 2.],
                [3., 4., 5.]])
        """
        if self.dtype == torch.bfloat16:
            groups, halves = self.weight.shape[0], self.weight.shape[1]
            pairs = self.weight.view(torch.int32).view(groups, halves, 16).mT.contiguous()
            whole = pairs.view(groups * 16, halves).view(torch.bfloat16)
        else:
            whole = self.weight.mT.reshape(-1, self.weight.shape[1])
        return whole[: self.out_features, : self.in_features].contiguous()

    @property
    def inner(self) -> int:
        """K as the kernel has it: in bfloat16 in whole tiles."""
        return self._inner

    @property
    def dtype(self) -> torch.dtype:
        """The type of the packed weight, in which it is multiplied: bfloat16 or float32."""
        return self.weight.dtype

    def __call__(self, x: Tensor) -> Tensor:
        """Multiply x [..., K]; gives [..., N], in x's dtype."""
        out = torch.empty((*x.shape[:-1], self.out_features), dtype=self.dtype)
        self._multiply(self._rows(x), out)
        return out if out.dtype == x.dtype else out.to(x.dtype)

    def _rows(self, x: Tensor) -> tuple[Tensor, ...]:
        """x as the kernel reads it, [..., K] first: of our dtype, rows behind one another, K in whole tiles."""
        if x.dtype != self.dtype:
            x = x.to(self.dtype)
        if self._inner != self.in_features:
            x = F.pad(x, (0, self._inner - self.in_features))
        return (x if x.is_contiguous() else x.contiguous(),)

    def _multiply(self, x: tuple[Tensor, ...], out: Tensor) -> None:  # `_rows` -> [..., N]
        (values,) = x
        rows, size = values.numel() // self._inner, out.element_size()
        if rows == 0:
            return
        # a few rows take what reading the weights takes: 8, as long as one
        threads = threads_for(max(rows, 8) * self.out_features * self._inner // 16)
        self._kernel(
            threads, x=values.data_ptr(), x_row=size * self._inner, weight=self.weight.data_ptr(),
            bias=self.bias.data_ptr(), out=out.data_ptr(), out_row=size * self.out_features, rows=rows,
            inner=self._inner, columns=self.out_features,
            scratch=this_thread().scratch(threads * self._scratch_bytes), scratch_bytes=self._scratch_bytes,
            full_tiles=TILE_ADDRESSES[15], last_tiles=TILE_ADDRESSES[(rows - 1) % 16],
        )  # fmt: skip


class JoinedWeights:
    """Several weights [N, K] and biases that multiply the same x: one product, one call. `parts` are views of it.

    Each is packed where it will lie: memory that a system has never handed out costs more to touch than to fill.

    >>> joined = JoinedWeights([(torch.eye(2), None), (torch.ones(3, 2), None)])
    >>> joined(torch.tensor([[1.0, 2.0]]))
    [tensor([[1., 2.]]), tensor([[3., 3., 3.]])]
    >>> joined.parts[1](torch.tensor([[1.0, 2.0]]))
    tensor([[3., 3., 3.]])
    """

    def __init__(
        self,
        weights: Sequence[tuple[Any, Tensor | None]],
        reserve: Reserve | None = None,
        kind: type[PackedWeight] = PackedWeight,
    ) -> None:
        """`kind`: what each becomes, of a weight as that takes it."""
        shapes = [kind.packed_shape(weight) for weight, _ in weights]
        groups = [shape[0] for shape in shapes]
        whole = huge_pages.zeros((sum(groups), *shapes[0][1:]), kind.packed_dtype(weights[0][0]), reserve)
        places = torch.split(whole, groups)
        self.parts = [
            kind(weight, bias, place=place) for (weight, bias), place in zip(weights, places, strict=True)
        ]
        joined = copy(self.parts[0])
        joined.weight, columns = whole, [16 * count for count in groups]
        for name in kind.per_column:
            both = torch.cat([getattr(part, name) for part in self.parts])
            setattr(joined, name, both)
            for part, view in zip(self.parts, torch.split(both, columns), strict=True):
                setattr(part, name, view)  # so that a new value of one is a new value of all
        joined.out_features = sum(columns)  # each part's columns end with a whole panel
        self._joined, self._widths = joined, [part.out_features for part in self.parts]
        self._starts = [0, *accumulate(columns)][:-1]

    def __call__(self, x: Tensor) -> list[Tensor]:
        """Multiply x [..., K]; gives one [..., N] for each part, in x's dtype: views into the rows of the whole."""
        out = self._joined(x)
        return [out.narrow(-1, s, n) for s, n in zip(self._starts, self._widths, strict=True)]


def multiply_each(weights: Sequence[PackedWeight], x: Tensor, counts: Sequence[int]) -> Tensor:
    """Multiply the first counts[0] rows of x [R, K] by the first weight, the next by the next: [R, N], in x's dtype.

    >>> weights = [PackedWeight(torch.eye(2)), PackedWeight(2 * torch.eye(2))]
    >>> multiply_each(weights, torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), [1, 2])
    tensor([[ 1.,  2.],
            [ 6.,  8.],
            [10., 12.]])
    """
    rows = weights[0]._rows(x)
    out = torch.empty(len(x), weights[0].out_features, dtype=weights[0].dtype)
    start = 0
    for weight, count in zip(weights, counts, strict=True):
        if count:
            own = tuple(part.narrow(0, start, count) for part in rows)
            weight._multiply(own, out.narrow(0, start, count))
        start += count
    return out if out.dtype == x.dtype else out.to(x.dtype)


def pack_into(weight: Tensor, place: Tensor) -> Tensor:
    """Write a weight [N, K] in the kernel's order, with zeros around it; return `place`.

    `place`: float32 [groups, K, 16] or bfloat16 [groups, K / 2, 16, 2], of at least as many columns and terms.
    """
    half = place.dtype == torch.bfloat16
    groups, inner = place.shape[0], place.shape[1] * (2 if half else 1)
    weight = weight if half else weight.float()
    padding = (0, inner - weight.shape[1], 0, 16 * groups - weight.shape[0])
    if any(padding):
        weight = F.pad(weight, padding)
    if half:  # pairs move as one number of 32 bits: twice as fast
        pairs = weight.contiguous().view(torch.int32).view(groups, 16, inner // 2)
        place.view(torch.int32).view(groups, inner // 2, 16).copy_(pairs.mT)
    else:
        place.copy_(weight.reshape(groups, 16, inner).mT)
    return place
