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

import torch
from torch import Tensor
from torch.nn import functional as F

from myserve.engine.kernels.gemm import PANEL, ROWS, linear_kernel
from myserve.engine.kernels.launch import this_thread, threads_for
from myserve.engine.kernels.tiles import tile_configuration
from myserve.engine.memory import huge_pages
from myserve.engine.memory.prefault import Reserve

__all__ = ["JoinedWeights", "PackedWeight", "multiply_each", "packed_shape"]

_TILES = [tile_configuration(rows) for rows in range(1, 17)]
_TILE_ADDRESSES = [tiles.ctypes.data for tiles in _TILES]


class PackedWeight:
    """A weight [N, K] and bias [N] in the kernel's order. CPU; bfloat16 stays, all else computes in float32.

    >>> w = PackedWeight(torch.eye(3), torch.ones(3))
    >>> w(torch.tensor([[1.0, 2.0, 3.0]]))
    tensor([[2., 3., 4.]])
    """

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
        self.weight = _packed(weight.detach(), place, reserve)
        self._inner = self.weight.shape[1] * (2 if self.dtype == torch.bfloat16 else 1)
        self._scratch_bytes = 64 * (3 + -(-4 * (ROWS * PANEL + 4 * self._inner) // 64))
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
        self.weight.copy_(other.weight)
        self.bias.copy_(other.bias)

    @property
    def dtype(self) -> torch.dtype:
        """The type of the packed weight, in which it is multiplied: bfloat16 or float32."""
        return self.weight.dtype

    def __call__(self, x: Tensor) -> Tensor:
        """Multiply x [..., K]; gives [..., N], in x's dtype."""
        out = torch.empty((*x.shape[:-1], self.out_features), dtype=self.dtype)
        self._multiply(self._rows(x), out)
        return out if out.dtype == x.dtype else out.to(x.dtype)

    def _rows(self, x: Tensor) -> Tensor:
        """x as the kernel reads it: of our dtype, rows behind one another, K in whole tiles."""
        if x.dtype != self.dtype:
            x = x.to(self.dtype)
        if self._inner != self.in_features:
            x = F.pad(x, (0, self._inner - self.in_features))
        return x if x.is_contiguous() else x.contiguous()

    def _multiply(self, x: Tensor, out: Tensor) -> None:  # [..., K] -> [..., N]
        rows, size = x.numel() // self._inner, out.element_size()
        if rows == 0:
            return
        threads = threads_for(rows * self.out_features * self._inner // 16)
        self._kernel(
            threads, x=x.data_ptr(), x_row=size * self._inner, weight=self.weight.data_ptr(),
            bias=self.bias.data_ptr(), out=out.data_ptr(), out_row=size * self.out_features, rows=rows,
            inner=self._inner, columns=self.out_features,
            scratch=this_thread().scratch(threads * self._scratch_bytes), scratch_bytes=self._scratch_bytes,
            full_tiles=_TILE_ADDRESSES[15], last_tiles=_TILE_ADDRESSES[(rows - 1) % 16],
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

    def __init__(self, weights: list[tuple[Tensor, Tensor | None]], reserve: Reserve | None = None) -> None:
        shapes = [packed_shape(weight) for weight, _ in weights]
        groups = [shape[0] for shape in shapes]
        whole = huge_pages.zeros((sum(groups), *shapes[0][1:]), _packed_dtype(weights[0][0]), reserve)
        places = torch.split(whole, groups)
        self.parts = [
            PackedWeight(weight, bias, place=place)
            for (weight, bias), place in zip(weights, places, strict=True)
        ]
        joined = copy(self.parts[0])
        joined.weight, joined.bias = whole, torch.cat([part.bias for part in self.parts])
        joined.out_features = len(joined.bias)  # each part's columns end with a whole panel
        self._joined, self._widths = joined, [part.out_features for part in self.parts]
        columns = [16 * count for count in groups]
        self._starts = [0, *accumulate(columns)][:-1]
        for part, bias in zip(self.parts, torch.split(joined.bias, columns), strict=True):
            part.bias = bias  # a view, so that a new value of one is a new value of all

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
            weight._multiply(rows.narrow(0, start, count), out.narrow(0, start, count))
        start += count
    return out if out.dtype == x.dtype else out.to(x.dtype)


def packed_shape(weight: Tensor) -> tuple[int, ...]:
    """Return the shape of a packed [N, K]: float32 [N / 16, K, 16]; bfloat16 [N / 16, K / 2, 16, 2], K in whole tiles.

    >>> packed_shape(torch.zeros(70, 40)), packed_shape(torch.zeros(70, 40, dtype=torch.bfloat16))
    ((8, 40, 16), (8, 32, 16, 2))
    """
    columns, inner = weight.shape
    groups = -(-columns // PANEL) * PANEL // 16
    if weight.dtype == torch.bfloat16:
        return groups, -(-inner // 32) * 16, 16, 2
    return groups, inner, 16


def _packed_dtype(weight: Tensor) -> torch.dtype:
    return torch.bfloat16 if weight.dtype == torch.bfloat16 else torch.float32


def _packed(
    weight: Tensor, place: Tensor | None, reserve: Reserve | None
) -> Tensor:  # [N, K] -> packed_shape
    shape, half = packed_shape(weight), weight.dtype == torch.bfloat16
    packed = huge_pages.zeros(shape, _packed_dtype(weight), reserve) if place is None else place
    weight = weight if half else weight.float()
    groups, inner = shape[0], shape[1] * (2 if half else 1)
    padding = (0, inner - weight.shape[1], 0, 16 * groups - weight.shape[0])
    if any(padding):
        weight = F.pad(weight, padding)
    if half:  # pairs move as one number of 32 bits: twice as fast
        pairs = weight.contiguous().view(torch.int32).view(groups, 16, inner // 2)
        packed.view(torch.int32).view(groups, inner // 2, 16).copy_(pairs.mT)
    else:
        packed.copy_(weight.reshape(groups, 16, inner).mT)
    return packed
