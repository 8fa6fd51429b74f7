"""Sixteen lanes as functions of addresses: sums in a fixed order, bfloat16 rounded to nearest even, NaN kept."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numba import njit

from myserve.engine.kernels.lanes import (
    BFLOAT16_BY_LANES,
    FLOAT32,
    LANES,
    add_and_round,
    divide_and_round,
    lane_sum,
    scale_lanes,
    sum_of_squares,
    widen,
)

Array = np.ndarray[Any, Any]


@njit(error_model="numpy")
def _sum(source: int) -> Any:
    return lane_sum(source)


@njit(error_model="numpy")
def _scale(target: int, factor: int) -> None:
    scale_lanes(target, factor)


@njit(error_model="numpy")
def _squares(kind: Any, source: int, count: int) -> Any:
    return sum_of_squares(kind, source, count)


@njit(error_model="numpy")
def _widen(kind: Any, source: int, target: int) -> None:
    widen(kind, 16, source, target)


@njit(error_model="numpy")
def _divide(kind: Any, source: int, divisor: float, target: int) -> None:
    divide_and_round(kind, 16, source, np.float32(divisor), target)


@njit(error_model="numpy")
def _add(kind: Any, source: int, bias: int, target: int) -> None:
    add_and_round(kind, 16, source, bias, target)


def floats(seed: int, count: int = LANES) -> Array:
    return np.random.default_rng(seed).normal(size=count).astype(np.float32)


def as_bfloat16(values: Array) -> Array:
    """PyTorch's rounding, as 16 bits a number."""
    return torch.from_numpy(values).bfloat16().view(torch.int16).numpy()


def test_a_sum_goes_from_the_first_lane_to_the_last() -> None:
    values = np.array([1e8, 1.0, -1e8, *[0.0] * 13], np.float32)
    assert _sum(values.ctypes.data) == 0.0, "1 is lost beside 1e8, in this order"
    assert _sum(np.roll(values, 1)[[0, 1, 3, 2, *range(4, 16)]].copy().ctypes.data) == 1.0


def test_lanes_are_scaled_in_place() -> None:
    values, factor = floats(0), np.array([0.3], np.float32)
    expected = values * factor[0]
    _scale(values.ctypes.data, factor.ctypes.data)
    assert values.tobytes() == expected.tobytes()


@pytest.mark.parametrize("count", [1, 15, 16, 37, 128])
def test_squares_of_any_number_of_elements(count: int) -> None:
    values = floats(1, count)
    found = _squares(FLOAT32, values.ctypes.data, count)
    assert np.isclose(found, (values.astype(np.float64) ** 2).sum(), rtol=1e-6)
    half = as_bfloat16(values)
    wide = torch.from_numpy(half).view(torch.bfloat16).double()
    assert np.isclose(_squares(BFLOAT16_BY_LANES, half.ctypes.data, count), float((wide**2).sum()), rtol=1e-6)


def test_bfloat16_widens_to_the_same_numbers() -> None:
    half, wide = as_bfloat16(floats(2)), np.empty(LANES, np.float32)
    _widen(BFLOAT16_BY_LANES, half.ctypes.data, wide.ctypes.data)
    assert wide.tobytes() == torch.from_numpy(half).view(torch.bfloat16).float().numpy().tobytes()


def test_sums_are_rounded_as_pytorch_rounds() -> None:
    """Ties between two bfloat16, NaN of any payload and infinities among them."""
    source = floats(3)
    source.view(np.uint32)[:6] = [0x3F808000, 0x3F818000, 0x7FC00001, 0xFFFFFFFF, 0x7F800000, 0x7F7FFFFF]
    bias, out = np.zeros(LANES, np.float32), np.empty(LANES, np.int16)
    _add(BFLOAT16_BY_LANES, source.ctypes.data, bias.ctypes.data, out.ctypes.data)
    expected, found = (torch.from_numpy(x).view(torch.bfloat16) for x in (as_bfloat16(source), out))
    assert torch.equal(expected.isnan(), found.isnan()) and int(found.isnan().sum()) == 2
    assert torch.equal(expected.nan_to_num(7.0), found.nan_to_num(7.0))


def test_a_quotient_is_one_division_and_zero_has_no_sign() -> None:
    source, out = floats(4), np.empty(LANES, np.float32)
    source[3] = -0.0
    expected = source / np.float32(3.0) + np.float32(0.0)
    _divide(FLOAT32, source.ctypes.data, 3.0, out.ctypes.data)
    assert out.tobytes() == expected.tobytes() and not np.signbit(out[3])
