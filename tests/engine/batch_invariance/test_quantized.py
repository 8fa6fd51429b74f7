"""Int8 products are exact integers, scaled in one order: the same in any company, on every unit."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from myserve.engine.batch_invariance import quantized
from myserve.engine.batch_invariance.linear import JoinedWeights, multiply_each
from myserve.engine.batch_invariance.quantized import Int8Values, QuantizedWeight, can_quantize, quantize
from myserve.engine.kernels.int8.dots import Int8Unit, int8_unit
from myserve.engine.kernels.int8.gemm import MOST_INNER, linear_int8_kernel

DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(1024, 200), (2048, 65), (33, 65), (100, 60), (8, 7), (1, 1)]  # K, N
COUNTS = [1, 2, 3, 4, 5, 6, 7, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 96, 129]
UNITS: list[Int8Unit] = ["tiles", "dots", "lanes"]
HERE = UNITS[UNITS.index(int8_unit()) :]  # a CPU has what is worse than its best, too


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def by_definition(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 and scales of the rows of x, in tensor operations."""
    largest = x.float().abs().amax(-1, keepdim=True)
    factor = torch.where(largest > 0, torch.tensor(127.0) / largest, 0.0)
    return (x.float() * factor).round().to(torch.int8), (largest / 127)[..., 0]


def product_by_definition(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x W^T + bias by sums of float64, which are exact: none comes near 2^53."""
    (xq, x_scales), (wq, w_scales) = by_definition(x), by_definition(weight)
    sums = (xq.double() @ wq.double().T).float()
    return (sums * (x_scales[..., None] * w_scales) + bias.float()).to(x.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounds_by_definition(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = (torch.randn(70, 333) * 10.0 ** torch.randint(-9, 9, (70, 1))).to(dtype)
    weight[3] = 0
    got = quantize(weight)
    assert (got.values.dtype, got.scales.dtype, got.dtype) == (torch.int8, torch.float32, dtype)
    for ours, wanted in zip((got.values, got.scales), by_definition(weight), strict=True):
        assert torch.equal(ours, wanted)
    assert got.values.abs().amax(1)[4:].eq(127).all() and int(got.values.min()) == -127
    error = (got.dequantized() - weight.float()).abs() / weight.float().abs().amax(1, keepdim=True).clamp_min(
        1e-30
    )
    assert error.max() < 0.51 / 127


def test_halves_go_to_even() -> None:
    row = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5]])
    assert quantize(row).values.tolist() == [[127, 0, 2, 2, 0, -2, -2]]


def test_rows_without_a_scale() -> None:
    """Zeros and what is next to zero; what is not finite stays a fault that shows, in its own row alone."""
    rows = torch.randn(5, 40)
    rows[0], rows[1], rows[2, 7], rows[3, 39] = 0.0, 1e-38, float("nan"), float("inf")
    scales = quantize(rows).scales
    assert scales[:2].tolist() == [0.0, 0.0] and scales[2:4].isnan().all() and scales[4] > 0
    out = QuantizedWeight(torch.randn(9, 40), torch.ones(9))(rows)
    assert out[:2].eq(1).all() and out[2:4].isnan().all() and out[4].isfinite().all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("unit", HERE)
def test_is_the_product_of_the_integers_on_every_unit(
    unit: Int8Unit, dtype: torch.dtype, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantized, "linear_int8_kernel", functools.partial(linear_int8_kernel, unit=unit))
    torch.manual_seed(0)
    inner, columns = shape
    x, weight, bias = torch.randn(130, inner), torch.randn(columns, inner), torch.randn(columns)
    x, weight = x.to(dtype), weight.to(dtype)
    wanted = product_by_definition(x, weight, bias)
    product = QuantizedWeight(weight, bias)
    for count in COUNTS:
        assert torch.equal(product(x[:count]), wanted[:count]), count
        assert torch.equal(product(x[-count:]), wanted[-count:]), count


@pytest.mark.parametrize("unit", HERE)
def test_the_largest_sums_do_not_saturate(unit: Int8Unit, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes of 127 and of -128 in whole rows: where four products are summed at 16 bits, these come out wrong."""
    monkeypatch.setattr(quantized, "linear_int8_kernel", functools.partial(linear_int8_kernel, unit=unit))
    inner = MOST_INNER // 64 * 64
    values = torch.full((2, inner), 127, dtype=torch.int8)
    values[1] = -128
    product = QuantizedWeight(Int8Values(values, torch.ones(2), torch.float32))
    for sign in (1.0, -1.0):
        x = torch.full((1, inner), sign * 127.0)
        wanted = [sign * 127 * 127 * inner, -sign * 127 * 128 * inner]
        assert product(x).tolist() == torch.tensor([wanted], dtype=torch.float64).float().tolist()
    assert can_quantize(MOST_INNER) and not can_quantize(MOST_INNER + 1)
    assert (MOST_INNER + 1) * 127 * 128 > 2**31 - 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_rows_bits_do_not_depend_on_the_other_rows_or_the_threads(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, product = torch.randn(40, 512).to(dtype), QuantizedWeight(torch.randn(1024, 512).to(dtype))
    before = product(x)
    assert torch.equal(product(x.flip(0)).flip(0), before)
    company = x.clone()
    company[1:] = float("nan")
    assert torch.equal(product(company)[0], before[0])
    for threads in (1, 2, 3, 5, 6):
        torch.set_num_threads(threads)
        assert torch.equal(product(x), before), threads


def test_control_a_scale_of_the_whole_batch_shows_the_company() -> None:
    """Activations quantised per tensor, as cheaper formats do it, make a row depend on the others."""
    torch.manual_seed(0)
    x, weight = torch.randn(40, 512), torch.randn(64, 512)

    def per_tensor(rows: Tensor) -> Tensor:
        values, scales = by_definition(rows.reshape(1, -1))
        wq, w_scales = by_definition(weight)
        return (values.reshape(rows.shape).double() @ wq.double().T).float() * (scales * w_scales)

    assert not torch.equal(per_tensor(x)[:1], per_tensor(x[:1]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_read_back(dtype: torch.dtype) -> None:
    weight = torch.randn(70, 100).to(dtype)
    assert torch.equal(QuantizedWeight(weight).unpacked(), quantize(weight).dequantized().to(dtype))


def test_takes_a_new_bias_any_layout_and_float16() -> None:
    weight, bias, x = torch.randn(5, 6), torch.randn(5), torch.randn(6, 4).T
    product = QuantizedWeight(weight, torch.zeros(5)).with_bias(bias)
    assert torch.equal(product(x), product_by_definition(x.contiguous(), weight, bias))
    assert product(torch.empty(2, 0, 6)).shape == (2, 0, 5)
    half = QuantizedWeight(weight.half())(x.half())
    wanted = product_by_definition(x.half().float(), weight.half().float(), torch.zeros(5))
    assert half.dtype == torch.float16 and torch.equal(half, wanted.half())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_joined_products_are_those_of_the_parts_also_after_new_values(dtype: torch.dtype) -> None:
    weights = [(torch.randn(n, 96).to(dtype), torch.randn(n)) for n in (70, 64, 5)]
    x = torch.randn(3, 96).to(dtype)
    joined = JoinedWeights(weights, kind=QuantizedWeight)
    parts = joined.parts
    assert all(map(torch.equal, joined(x), [part(x) for part in parts]))
    assert all(map(torch.equal, joined(x), [QuantizedWeight(*weight)(x) for weight in weights]))
    new = QuantizedWeight(torch.randn(64, 96).to(dtype), torch.randn(64))
    before = parts[1](x)
    parts[1].copy_(new)
    assert torch.equal(joined(x)[1], new(x)) and not torch.equal(new(x), before)


def test_experts_take_their_own_rows() -> None:
    weights = [QuantizedWeight(torch.randn(7, 50).bfloat16()) for _ in range(4)]
    x = torch.randn(12, 50).bfloat16()
    counts = [3, 0, 8, 1]
    wanted = [w(rows) for w, rows in zip(weights, x.split(counts), strict=True)]
    assert torch.equal(multiply_each(weights, x, counts), torch.cat(wanted))
