"""The product whose rows do not see each other."""

from __future__ import annotations

import functools

import llvmlite.binding
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from myserve.engine.batch_invariance import linear
from myserve.engine.batch_invariance.linear import JoinedWeights, PackedWeight
from myserve.engine.kernels import gemm, tiles
from myserve.engine.kernels.gemm import linear_kernel
from myserve.engine.kernels.tiles import Unit, bfloat16_unit, has_wide_registers

DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(1024, 1536), (2048, 200), (33, 65), (100, 60), (8, 7), (1, 1)]  # K, N
UNITS: list[Unit] = ["tiles", "pairs", "lanes"]
HERE = UNITS[UNITS.index(bfloat16_unit()) :]  # a CPU has what is worse than its best, too
COUNTS = [1, 2, 3, 4, 5, 6, 7, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 96, 129]


def cancelling(inner: int, columns: int, dtype: torch.dtype, rows: int = 130) -> tuple[Tensor, Tensor]:
    """x [rows, K] and W [N, K] whose products sum to zero: what is left is the rounding of the order of summation.

    Random numbers would hide an order: in bfloat16 nearly every sum rounds to the same value.
    """
    torch.manual_seed(0)
    weight = torch.randn(columns, inner)
    x = torch.randn(rows, inner) * 2.0 ** torch.randint(-6, 7, (rows, inner))
    order, half = torch.randperm(inner), inner // 2
    weight[:, order[half : 2 * half]] = weight[:, order[:half]]
    x[:, order[half : 2 * half]] = -x[:, order[:half]]
    return x.to(dtype), weight.to(dtype)


def rows_that_differ(product: object, x: Tensor) -> int:
    """Over many row counts, at the start and at the end of x: rows unlike those of the whole."""
    assert callable(product)
    whole = product(x)
    return sum(
        int((got != want).any(1).sum())
        for m in COUNTS
        for got, want in ((product(x[:m]), whole[:m]), (product(x[-m:]), whole[-m:]))
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_the_product(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    inner, columns = shape
    x, weight, bias = torch.randn(3, 7, inner), torch.randn(columns, inner), torch.randn(columns)
    x, weight, bias = (t.to(dtype) for t in (x, weight, bias))
    wanted = F.linear(x.double(), weight.double(), bias.double())
    tolerance = 1e-5 if dtype == torch.float32 else 8e-3
    got = PackedWeight(weight, bias)(x)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), wanted, rtol=tolerance, atol=tolerance * inner**0.5)
    torch.testing.assert_close(
        PackedWeight(weight)(x).double(), wanted - bias.double(), rtol=tolerance, atol=tolerance * inner**0.5
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_is_the_same_in_any_number_of_rows(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    x, weight = cancelling(*shape, dtype)
    assert rows_that_differ(PackedWeight(weight), x) == 0


@pytest.mark.parametrize("unit", HERE)
def test_bfloat16_is_right_on_every_unit(unit: Unit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "linear_kernel", functools.partial(linear_kernel, unit=unit))
    for shape in SHAPES:
        x, weight = cancelling(*shape, torch.bfloat16)
        assert rows_that_differ(PackedWeight(weight), x) == 0
        plain = torch.randn(19, shape[0]).bfloat16()
        wanted = F.linear(plain.double(), weight.double())
        torch.testing.assert_close(
            PackedWeight(weight)(plain).double(), wanted, rtol=8e-3, atol=8e-3 * shape[0] ** 0.5
        )


@pytest.mark.skipif(not has_wide_registers(), reason="one way alone multiplies by lanes here")
def test_a_chunk_that_is_widened_once_has_the_bits_of_plain_lanes(monkeypatch: pytest.MonkeyPatch) -> None:
    """So machines without AVX-512 have them too."""
    widening = linear_kernel(torch.bfloat16, "lanes")
    monkeypatch.setattr(gemm, "has_wide_registers", lambda: False)
    plain = linear_kernel.__wrapped__(torch.bfloat16, "lanes")
    assert plain.address != widening.address
    for shape in SHAPES:
        x, weight = cancelling(*shape, torch.bfloat16)
        for rows in COUNTS:
            both = []
            for kernel in (plain, widening):
                monkeypatch.setattr(linear, "linear_kernel", lambda dtype, kernel=kernel: kernel)
                both.append(PackedWeight(weight)(x[:rows]))
            assert torch.equal(*both), (shape, rows)


def test_weights_are_multiplied_by_pairs_where_these_are_no_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "bfloat16_unit", lambda: "pairs")
    monkeypatch.setattr(tiles, "has_wide_registers", lambda: True)
    for name, unit in (("znver4", "pairs"), ("znver5", "pairs"), ("sapphirerapids", "lanes")):
        monkeypatch.setattr(llvmlite.binding, "get_host_cpu_name", lambda name=name: name)
        assert tiles.product_unit.__wrapped__() == unit
    monkeypatch.setattr(tiles, "bfloat16_unit", lambda: "tiles")
    assert tiles.product_unit.__wrapped__() == "tiles"


def test_control_pytorchs_product_tells_how_many_rows_there_are() -> None:
    x, weight = cancelling(1024, 1536, torch.float32)
    assert rows_that_differ(lambda rows: F.linear(rows, weight), x) > 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_rows_bits_do_not_depend_on_the_other_rows_or_the_threads(dtype: torch.dtype) -> None:
    x, weight = cancelling(512, 1024, dtype, rows=40)
    product = PackedWeight(weight)
    before = product(x)
    assert torch.equal(product(x.flip(0)).flip(0), before)
    company = x.clone()
    company[1:] = float("nan")
    assert torch.equal(product(company)[0], before[0])
    threads = torch.get_num_threads()
    torch.set_num_threads(3 - min(threads, 2))
    assert torch.equal(product(x), before)
    torch.set_num_threads(threads)


def test_what_pytorch_multiplies_between_two_of_ours_is_right() -> None:
    """Tiles are set for a thread, and oneDNN expects to find its own setting again."""
    x, weight = torch.randn(64, 256).bfloat16(), torch.randn(512, 256).bfloat16()
    wanted = F.linear(x, weight)
    ours = PackedWeight(weight)
    for rows in (1, 64, 3, 33):
        ours(x[:rows])
        assert torch.equal(F.linear(x, weight), wanted)


def test_takes_a_new_bias_and_any_layout_of_x() -> None:
    weight, bias, x = torch.randn(5, 6), torch.randn(5), torch.randn(6, 4).T
    product = PackedWeight(weight, torch.zeros(5)).with_bias(bias)
    torch.testing.assert_close(product(x), F.linear(x, weight, bias))
    assert product(torch.empty(2, 0, 6)).shape == (2, 0, 5)


def test_float16_computes_in_float32() -> None:
    x, weight = torch.randn(3, 64).half(), torch.randn(7, 64).half()
    got = PackedWeight(weight)(x)
    assert got.dtype == torch.float16
    torch.testing.assert_close(got, F.linear(x.float(), weight.float()).half())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_joined_products_are_those_of_the_parts_also_after_new_values(dtype: torch.dtype) -> None:
    weights: list[tuple[Tensor, Tensor | None]]
    weights = [(torch.randn(n, 96).to(dtype), torch.randn(n)) for n in (70, 64, 5)]
    x = torch.randn(3, 96).to(dtype)
    joined = JoinedWeights(weights)
    parts = joined.parts
    assert all(map(torch.equal, joined(x), [part(x) for part in parts]))
    assert all(map(torch.equal, joined(x), [PackedWeight(*weight)(x) for weight in weights]))
    before = parts[1](x)
    parts[1].copy_(PackedWeight(torch.randn(64, 96).to(dtype)))
    assert torch.equal(joined(x)[1], parts[1](x)) and not torch.equal(parts[1](x), before)
