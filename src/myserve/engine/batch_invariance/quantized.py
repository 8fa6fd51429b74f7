"""An int8 linear layer: weights symmetric per output channel, activations per token, and sums that are exact.

A token's integers and scale come from its own row alone, and a sum of integers has no order: the product is
batch-invariant whatever the number of rows and threads, and the same on every CPU. The trainer's `exact_forward` and
the server quantise by the same function, `quantize`, so that they have the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from myserve.engine.batch_invariance.linear import TILE_ADDRESSES, PackedWeight
from myserve.engine.kernels.gemm import PANEL, ROWS
from myserve.engine.kernels.int8.gemm import INNER_STEP, MOST_INNER, linear_int8_kernel
from myserve.engine.kernels.int8.rounding import LARGEST, quantize_kernel
from myserve.engine.kernels.launch import this_thread, threads_for
from myserve.engine.memory import huge_pages
from myserve.engine.memory.prefault import Reserve

__all__ = ["Int8Values", "QuantizedWeight", "can_quantize", "hold_stored", "quantize", "stored", "values_of"]

_FLIP = 0x80  # XORed to an int8: uint8, 128 above it


@dataclass(frozen=True, slots=True)
class Int8Values:
    """A quantised weight [N, K]: int8 values [N, K], a float32 scale for each output channel [N], the dtype it serves.

    Of experts [E, N, K], one is taken by its index.
    """

    values: Tensor
    scales: Tensor
    dtype: torch.dtype

    def __getitem__(self, expert: int) -> Int8Values:
        return Int8Values(self.values[expert], self.scales[expert], self.dtype)

    def __len__(self) -> int:
        return len(self.values)

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    def dequantized(self) -> Tensor:
        """Return the float32 weight [N, K] that these stand for."""
        return self.values.float() * self.scales[:, None]


def can_quantize(inner: int) -> bool:
    """Return whether a sum over K = `inner` terms fits 32 bits."""
    return inner <= MOST_INNER


def quantize(weight: Tensor | Int8Values) -> Int8Values:
    """Quantise a weight [N, K]: scale = max|w| / 127 of each row, q = round(w * (127 / max|w|)), ties to even.

    A row with NaN or infinity has the scale NaN; one whose maximum is below 2^-100 is zeros.

    >>> q = quantize(torch.tensor([[1.0, -2.0], [0.0, 0.0]]))
    >>> q.values.tolist(), q.scales.tolist() == [torch.tensor(2.0).div(127).item(), 0.0]
    ([[64, -127], [0, 0]], True)
    """
    if isinstance(weight, Int8Values):
        return weight
    values, scales = _quantized(weight, weight.shape[1], 0)
    return Int8Values(values.view(torch.int8), scales, weight.dtype)


def hold_stored(parameter: Any, read: Callable[[], Int8Values]) -> None:
    """Have a parameter stand for int8 values that its checkpoint stores: `read` gives them when they are packed."""
    parameter.stored_int8 = read


def stored(parameter: Tensor) -> bool:
    """Return whether a parameter's values are int8 in its checkpoint."""
    return hasattr(parameter, "stored_int8")


def values_of(parameter: Any, *, is_transposed: bool = False) -> Any:
    """Return the weight [..., N, K] of a parameter that may lie [..., K, N]: stored int8, or itself."""
    if stored(parameter):
        return parameter.stored_int8()
    return parameter.transpose(-1, -2) if is_transposed else parameter


def _quantized(x: Tensor, inner: int, flip: int) -> tuple[Tensor, Tensor]:
    """x [..., K] as bytes [..., inner], with zeros behind K, and scales [...]."""
    if x.dtype not in (torch.bfloat16, torch.float32):
        x = x.float()
    x = x.detach()
    x = x if x.is_contiguous() else x.contiguous()
    width = x.shape[-1]
    out = torch.empty((*x.shape[:-1], inner), dtype=torch.uint8)
    scales = torch.empty(x.shape[:-1], dtype=torch.float32)
    rows = x.numel() // max(width, 1)
    if rows:
        quantize_kernel(x.dtype)(
            threads_for(x.numel()) if rows > 1 else 1,
            x=x.data_ptr(), x_row=x.element_size() * width, out=out.data_ptr(), out_row=inner,
            scales=scales.data_ptr(), sums=0, rows=rows, width=width, inner=inner, flip=flip,
        )  # fmt: skip
    return out, scales


class QuantizedWeight(PackedWeight):
    """An int8 weight [N, K] and bias [N] in the kernel's order. CPU; what it takes and gives is the model's dtype.

    >>> w = QuantizedWeight(torch.eye(3), torch.ones(3))
    >>> w(torch.tensor([[1.0, 2.0, 127.0]]))
    tensor([[  2.,   3., 128.]])
    """

    per_column = ("bias", "scales", "starts")

    def __init__(
        self,
        weight: Tensor | Int8Values,
        bias: Tensor | None = None,
        *,
        place: Tensor | None = None,
        reserve: Reserve | None = None,
    ) -> None:
        """`place`: where the packed weight goes, of `packed_shape`; None: memory of `reserve`, or new."""
        quantized = quantize(weight)
        self.out_features, self.in_features = quantized.shape
        self._dtype = torch.bfloat16 if quantized.dtype == torch.bfloat16 else torch.float32
        shape = self.packed_shape(quantized)
        self.weight = huge_pages.zeros(shape, torch.int8, reserve) if place is None else place
        _pack(quantized.values, self.weight)
        self._inner = 4 * shape[1]
        self._scratch_bytes = 64 * (1 + 4 * ROWS * PANEL // 64)
        self._kernel = linear_int8_kernel(self._dtype)
        columns = 16 * shape[0]
        self.scales = torch.zeros(columns, dtype=torch.float32)
        self.scales[: self.out_features] = quantized.scales
        self.starts = torch.zeros(columns, dtype=torch.int32)
        self.starts[: self.out_features] = -128 * quantized.values.sum(1, dtype=torch.int32)
        self.bias = self._padded_bias(bias)

    @staticmethod
    def packed_shape(weight: Tensor | Int8Values) -> tuple[int, ...]:
        """Return the shape of a packed [N, K]: int8 [N / 16, K / 4, 16, 4], K in whole tiles.

        >>> QuantizedWeight.packed_shape(torch.zeros(70, 40))
        (8, 16, 16, 4)
        """
        columns, inner = weight.shape
        return -(-columns // PANEL) * PANEL // 16, -(-inner // INNER_STEP) * INNER_STEP // 4, 16, 4

    @staticmethod
    def packed_dtype(weight: Tensor | Int8Values) -> torch.dtype:
        return torch.int8

    @property
    def dtype(self) -> torch.dtype:
        """The type of what it takes and gives: bfloat16 or float32."""
        return self._dtype

    def unpacked(self) -> Tensor:
        """Return the weight [N, K] that the integers stand for, rounded to our dtype.

        >>> QuantizedWeight(torch.tensor([[127.0, -3.2]])).unpacked()
        tensor([[127.,  -3.]])
        """
        values = self._integers(len(self.weight))[: self.out_features]
        return (values * self.scales[: self.out_features, None]).to(self.dtype)

    def _integers(self, groups: int) -> Tensor:  # of 16 columns: [16 * groups, K], int8
        lines = self.weight[:groups].permute(0, 2, 1, 3)
        return lines.reshape(16 * groups, self._inner)[:, : self.in_features]

    def by_definition(self, x: Tensor, columns: int) -> Tensor:
        """Return the first `columns` of the product, a multiple of 16, by tensor operations: x [T, K] of our dtype.

        >>> w, x = QuantizedWeight(torch.randn(16, 40)), torch.randn(3, 40)
        >>> torch.equal(w.by_definition(x, 16), w(x))
        True
        """
        values = self._integers(columns // 16)
        largest = x.float().abs().amax(-1, keepdim=True)
        rounded = (x.float() * (torch.tensor(float(LARGEST)) / largest)).round()
        sums = (rounded.double() @ values.double().T).float()  # exact: no sum comes near 2^53
        scaled = sums * (largest / LARGEST * self.scales[:columns]) + self.bias[:columns]
        return scaled[:, : self.out_features].to(x.dtype)

    def _rows(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x as bytes [..., K], 128 above their int8, and their scales [...]."""
        return _quantized(x if x.dtype == self.dtype else x.to(self.dtype), self._inner, _FLIP)

    def _multiply(self, x: tuple[Tensor, ...], out: Tensor) -> None:
        values, scales = x
        rows = scales.numel()
        if rows == 0:
            return
        # a few rows wait for memory: 256 KiB of weights take one thread 20 µs
        threads = threads_for(max(rows, 16) * self.out_features * self._inner // 32)
        self._kernel(
            threads, x=values.data_ptr(), x_row=self._inner, x_scales=scales.data_ptr(),
            weight=self.weight.data_ptr(), starts=self.starts.data_ptr(), scales=self.scales.data_ptr(),
            bias=self.bias.data_ptr(), out=out.data_ptr(), out_row=out.element_size() * self.out_features,
            rows=rows, inner=self._inner, columns=self.out_features,
            scratch=this_thread().scratch(threads * self._scratch_bytes), scratch_bytes=self._scratch_bytes,
            full_tiles=TILE_ADDRESSES[15], last_tiles=TILE_ADDRESSES[(rows - 1) % 16],
        )  # fmt: skip


def _pack(values: Tensor, packed: Tensor) -> None:  # [N, K] -> [N / 16, K / 4, 16, 4]
    (columns, inner), (groups, fours) = values.shape, packed.shape[:2]
    padding = (0, 4 * fours - inner, 0, 16 * groups - columns)
    if any(padding):
        values = torch.nn.functional.pad(values, padding)
    # fours move as one number of 32 bits
    packed.view(torch.int32).view(groups, fours, 16).copy_(
        values.contiguous().view(torch.int32).view(groups, 16, fours).mT
    )
