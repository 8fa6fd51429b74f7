"""A linear layer whose rows do not see each other, by construction, at the speed of the memory.

The libraries' matrix products choose their order of summation by the number of rows: oneDNN's bfloat16 on AMX has one
for up to 32 rows and others above, float32 in `F.linear` changes at 2, 16 and 129. (Random inputs hardly show it: few
results differ after rounding. Sums that cancel show it at once.) Padding to counts that agree was measured and costs
up to three times a prefill; a kernel of our own costs nothing and needs no search.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from myserve.engine.gemm_kernels import LINEAR, PANEL, ROWS, linear_kernel
from myserve.engine.native import filled, launch, threads_for
from myserve.engine.tiles import FULL_TILES, tile_configuration


class PackedWeight:
    """A weight [N, K] and bias [N] in the kernel's order. CPU; bfloat16 stays, all else computes in float32.

    >>> w = PackedWeight(torch.eye(3), torch.ones(3))
    >>> w(torch.tensor([[1.0, 2.0, 3.0]]))
    tensor([[2., 3., 4.]])
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.out_features, self.in_features = weight.shape
        self.load_(weight, bias)

    def load_(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """Takes new values of the same shape."""
        assert weight.shape == (self.out_features, self.in_features)
        self.weight = _packed(weight.detach())
        columns = self.weight.shape[0] * 16
        self.bias = torch.zeros(columns)  # float32, as the sums it is added to
        if bias is not None:
            self.bias[: self.out_features] = bias.detach()

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        return self.weight.dtype

    def __call__(self, x: Tensor) -> Tensor:
        """[..., K] to [..., N], in x's dtype."""
        rows = x.detach().reshape(-1, self.in_features).to(self.dtype)
        out = self._multiply(rows).to(x.dtype)
        return out.view(*x.shape[:-1], self.out_features)

    def _multiply(self, x: Tensor) -> Tensor:  # [M, K] -> [M, N]
        inner = self.weight.shape[1] * (2 if self.dtype == torch.bfloat16 else 1)
        if inner != self.in_features:
            x = F.pad(x, (0, inner - self.in_features))
        if x.stride(-1) != 1:
            x = x.contiguous()
        rows, size = x.shape[0], x.element_size()
        out = torch.empty(rows, self.out_features, dtype=self.dtype)
        if rows == 0:
            return out
        threads = threads_for(rows * self.out_features * inner // 16)
        last_tiles = tile_configuration(rows % 16 or 16)
        scratch_bytes = 64 * (3 + -(-4 * (ROWS * PANEL + 4 * inner) // 64))
        scratch = torch.empty(threads * scratch_bytes + 64, dtype=torch.uint8)
        tickets = torch.zeros(2, dtype=torch.int64)  # thread, panel
        record = filled(
            LINEAR,
            x=x.data_ptr(), x_row=size * x.stride(0), weight=self.weight.data_ptr(), bias=self.bias.data_ptr(),
            out=out.data_ptr(), out_row=size * self.out_features, rows=rows, inner=inner,
            columns=self.out_features, scratch=scratch.data_ptr() + -scratch.data_ptr() % 64,
            scratch_bytes=scratch_bytes, tickets=tickets.data_ptr(),
            full_tiles=FULL_TILES.ctypes.data, last_tiles=last_tiles.ctypes.data,
        )  # fmt: skip
        launch(linear_kernel(self.dtype), record, threads)
        return out


def _packed(weight: Tensor) -> Tensor:
    """[N, K] to groups of 16 columns: float32 [N / 16, K, 16]; bfloat16 [N / 16, K / 2, 16, 2], K in whole tiles."""
    half = weight.dtype == torch.bfloat16
    columns, inner = weight.shape
    weight = weight if half else weight.float()
    padding = (0, -inner % 32 if half else 0, 0, -columns % PANEL)
    if any(padding):
        weight = F.pad(weight, padding)
    groups = weight.view(-1, 16, weight.shape[1])  # [N / 16, 16, K]
    if half:
        return groups.view(len(groups), 16, -1, 2).transpose(1, 2).contiguous()
    return groups.transpose(1, 2).contiguous()
