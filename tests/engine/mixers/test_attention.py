"""Paged attention: right by definition, and one row's bits whatever is beside it."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from myserve.engine.kernels.attend import BLOCK_SIZE, attend_kernel
from myserve.engine.kernels.tiles import Unit, bfloat16_unit
from myserve.engine.mixers import attention
from myserve.engine.mixers.attention import (
    allocate_layer,
    bytes_per_block,
    dense_attention,
    paged_attention,
    store_kv,
)

UNITS: list[Unit] = ["tiles", "pairs", "lanes"]
HERE = UNITS[UNITS.index(bfloat16_unit()) :]  # a CPU has what is worse than its best, too
DTYPES = [torch.float32, torch.bfloat16]
# heads, KV heads, head_dim
SHAPES = [(16, 8, 128), (4, 4, 16), (6, 2, 40), (7, 1, 64), (3, 3, 8), (5, 1, 200)]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"window": 17},
    {"softcap": 5.0},
    {"sinks": True},
    {"window": 65, "sinks": True},
    {"chunk": 48},
]
CONTEXTS, QUERIES = [1, 5, 64, 133, 200, 31], [1, 1, 64, 50, 1, 7]


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def bits(x: Tensor) -> Tensor:
    """So that -0 is not 0 and a NaN is itself."""
    return x.view(torch.int16 if x.element_size() == 2 else torch.int32)


@dataclass
class Case:
    """Requests with scattered pages in a cache whose every other byte is NaN."""

    query: list[Tensor]  # [q, H, D] each
    keys: list[Tensor]  # [context, Hkv, D] each
    values: list[Tensor]
    cache: tuple[Tensor, Tensor]
    tables: Tensor
    options: dict[str, Any]

    def run(self, which: list[int], counts: list[int] | None = None, ends: list[int] | None = None) -> Tensor:
        """The last `counts` queries of requests `which` in one call, contexts cut at `ends`."""
        contexts = ends or [len(self.keys[r]) for r in which]
        counts = counts or [len(self.query[r]) for r in which]
        rows = []
        for r, count, end in zip(which, counts, contexts, strict=True):
            last = len(self.query[r]) - (len(self.keys[r]) - end)
            rows.append(self.query[r][last - count : last])
        starts = torch.tensor([0, *counts]).cumsum(0).int()
        lens = torch.tensor(contexts, dtype=torch.int32)
        return paged_attention(torch.cat(rows), *self.cache, self.tables[which], starts, lens, **self.options)


def make_case(
    dtype: torch.dtype, shape: tuple[int, int, int], options: dict[str, Any], seed: int = 0
) -> Case:
    heads, kv_heads, dim = shape
    torch.manual_seed(seed)
    blocks = [-(-c // BLOCK_SIZE) for c in CONTEXTS]
    order = torch.randperm(sum(blocks)).split(blocks)
    tables = torch.zeros(len(blocks), max(blocks), dtype=torch.int32)
    cache = allocate_layer(sum(blocks), kv_heads, dim, dtype)
    for tensor in cache:
        tensor.fill_(float("nan"))
    keys, values = ([torch.randn(c, kv_heads, dim).to(dtype) for c in CONTEXTS] for _ in range(2))
    slots = []
    for r, mine in enumerate(order):
        tables[r, : len(mine)] = mine
        position = torch.arange(CONTEXTS[r])
        slots.append(mine[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE)
    store_kv(torch.cat(keys), torch.cat(values), *cache, torch.cat(slots))
    chosen = options | ({"sinks": torch.randn(heads)} if options.get("sinks") else {})
    query = [torch.randn(q, heads, dim).to(dtype) for q in QUERIES]
    return Case(query, keys, values, cache, tables, {"scale": dim**-0.5} | chosen)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_attention(dtype: torch.dtype, shape: tuple[int, int, int], options: dict[str, Any]) -> None:
    case = make_case(dtype, shape, options)
    got = case.run(list(range(len(CONTEXTS))))
    wanted = [
        dense_attention(*(x.double().transpose(0, 1) for x in qkv), **case.options).transpose(0, 1)
        for qkv in zip(case.query, case.keys, case.values, strict=True)
    ]
    tolerance = 4e-6 if dtype == torch.float32 else 0.01
    torch.testing.assert_close(got.double(), torch.cat(wanted), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("causal_window", "chunk"), [(0, 0), (17, 0), (0, 17)])
def test_the_definition_is_pytorchs(causal_window: int, chunk: int) -> None:
    query, key, value = (torch.randn(h, 40, 16, dtype=torch.float64) for h in (6, 2, 2))
    position = torch.arange(40)
    seen = (position[:, None] >= position) & (
        (position[:, None] - position < causal_window) | (not causal_window)
    )
    if chunk:
        seen &= position[:, None] // chunk == position // chunk
    wanted = F.scaled_dot_product_attention(
        query[None], key[None], value[None], attn_mask=seen, enable_gqa=True
    )[0]
    got = dense_attention(query, key, value, scale=0.25, window=causal_window, chunk=chunk)
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_is_the_same_prefilled_decoded_or_in_chunks(
    dtype: torch.dtype, shape: tuple[int, int, int], options: dict[str, Any]
) -> None:
    case = make_case(dtype, shape, options)
    for r in (2, 3):
        whole, context = case.run([r]), CONTEXTS[r]
        first = context - QUERIES[r]
        decoded = [case.run([r], [1], [end]) for end in range(first + 1, context + 1)]
        assert torch.equal(bits(torch.cat(decoded)), bits(whole))
        ends = [first + 3, first + 4, first + 20, first + 37, context]
        chunks = [case.run([r], [b - a], [b]) for a, b in zip([first, *ends], ends, strict=False)]
        assert torch.equal(bits(torch.cat(chunks)), bits(whole))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_is_the_same_alone_and_in_company(dtype: torch.dtype) -> None:
    for options in OPTIONS:
        case = make_case(dtype, (16, 8, 128), options)
        alone = [case.run([r]) for r in range(len(CONTEXTS))]
        for order in ([0, 1, 2, 3, 4, 5], [5, 3, 3, 0, 4, 1, 2]):
            assert torch.equal(bits(case.run(order)), bits(torch.cat([alone[r] for r in order])))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_thread_and_two_give_the_same(dtype: torch.dtype) -> None:
    case = make_case(dtype, (16, 8, 128), {})
    two = case.run(list(range(len(CONTEXTS))))
    torch.set_num_threads(1)
    assert torch.equal(bits(case.run(list(range(len(CONTEXTS))))), bits(two))


@pytest.mark.parametrize("unit", HERE)
def test_bfloat16_is_right_on_every_unit(unit: Unit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "attend_kernel", functools.partial(attend_kernel, unit=unit))
    for shape in SHAPES:
        test_is_attention(torch.bfloat16, shape, {})
        test_a_row_is_the_same_prefilled_decoded_or_in_chunks(torch.bfloat16, shape, {})


def test_control_pytorchs_attention_tells_decode_from_prefill() -> None:
    """Were the kernels above as free in their order as this one, the tests above would fail."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 8, 200, 128) for _ in range(3))
    whole = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    decoded = [
        F.scaled_dot_product_attention(query[:, :, i : i + 1], key[:, :, : i + 1], value[:, :, : i + 1])
        for i in range(150, 200)
    ]
    assert not torch.equal(torch.cat(decoded, dim=2), whole[:, :, 150:])


def test_keys_below_the_window_are_never_read() -> None:
    case = make_case(torch.float32, (4, 4, 16), {"window": 17})
    before = case.run([4])
    for tensor in case.cache:
        # 200 keys: the window starts at 183, in the sixth block
        tensor[case.tables[4, :5].long()] = float("nan")
    assert torch.equal(bits(case.run([4])), bits(before))


def test_a_nan_stays_with_its_request() -> None:
    case = make_case(torch.bfloat16, (4, 2, 16), {})
    clean = case.run([2, 3, 4])
    case.query[3][:] = float("nan")
    got = case.run([2, 3, 4])
    assert got[64:114].isnan().all()
    assert torch.equal(bits(got[:64]), bits(clean[:64])) and torch.equal(bits(got[114:]), bits(clean[114:]))


def test_a_negative_slot_is_not_kept_and_padding_rows_are_zero() -> None:
    cache = allocate_layer(1, 1, 16, torch.float32)
    ones = torch.ones(2, 1, 16)
    store_kv(ones, ones, *cache, torch.tensor([-1, 3]))
    assert all(int(tensor.sum()) == 16 for tensor in cache)
    starts, lens = torch.tensor([0, 1], dtype=torch.int32), torch.tensor([4], dtype=torch.int32)
    out = paged_attention(ones, *cache, torch.tensor([[0]], dtype=torch.int32), starts, lens, scale=1.0)
    assert out[0].any() and not out[1].any()


def test_what_a_block_is_said_to_take_is_what_it_takes() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        layer = allocate_layer(3, 2, 40, dtype)
        assert sum(tensor.nbytes for tensor in layer) == 3 * bytes_per_block(2, 40, dtype)


@pytest.mark.parametrize(
    ("head_dim", "dtype"), [(64, torch.bfloat16), (24, torch.bfloat16), (64, torch.float32)]
)
def test_keys_written_block_by_block_lie_where_keys_written_one_by_one_lie(
    head_dim: int, dtype: torch.dtype
) -> None:
    """Slots of whole blocks, in the middle of ragged ones; keys and values as parts of wider rows."""
    slots = torch.cat(
        [torch.arange(45, 64), torch.arange(128, 224), torch.arange(96, 107), torch.tensor([-1, 7])]
    )
    both = torch.randn(len(slots), 2, 3, head_dim + 4).to(dtype)[..., :head_dim]
    key, value = both[:, 0], both[:, 1]
    at_once = allocate_layer(8, 3, head_dim, dtype)
    store_kv(key, value, *at_once, slots)
    singly = allocate_layer(8, 3, head_dim, dtype)
    for t in range(len(slots)):
        store_kv(key[t : t + 1], value[t : t + 1], *singly, slots[t : t + 1])
    assert all(map(torch.equal, at_once, singly)) and bool(at_once[0].any())


@pytest.mark.parametrize(("key_dim", "value_dim"), [(24, 12), (12, 24), (40, 70), (96, 64)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_keys_and_values_of_different_widths(key_dim: int, value_dim: int, dtype: torch.dtype) -> None:
    """As multi-head latent attention has them; beside a request whose pages are NaN."""
    torch.manual_seed(0)
    key, value = torch.randn(50, 2, key_dim).to(dtype), torch.randn(50, 2, value_dim).to(dtype)
    query = torch.randn(50, 4, key_dim).to(dtype)
    cache = allocate_layer(3, 2, max(key_dim, value_dim), dtype)
    for tensor in cache:
        tensor.fill_(float("nan"))
    store_kv(key, value, *cache, torch.cat([torch.arange(64, 96), torch.arange(18)]))
    tables, starts = ints([[2, 0]]), ints([0, 50])
    got = paged_attention(
        query, *cache, tables, starts, ints([50]), scale=0.2, window=20, value_dim=value_dim
    )
    wide = [x.double().transpose(0, 1) for x in (query, key, value)]
    wanted = dense_attention(*wide, scale=0.2, window=20).transpose(0, 1)
    assert got.shape == (50, 4, value_dim)
    assert (got.double() - wanted).abs().max() < (1e-5 if dtype == torch.float32 else 2e-2)


def ints(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def some(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(shape, dtype=dtype)


STORED: dict[str, Tensor] = {
    "key": some(5, 2, 24),
    "value": some(5, 2, 12),
    "key_cache": some(3, 2, BLOCK_SIZE * 32),
    "value_cache": some(3, 2, BLOCK_SIZE * 32),
    "slot_mapping": torch.arange(5),
}
ATTENDED: dict[str, Any] = {
    "query": some(5, 4, 24),
    "key_cache": STORED["key_cache"],
    "value_cache": STORED["value_cache"],
    "block_tables": ints([[0, 1], [2, 0]]),
    "query_start": ints([0, 2, 5]),
    "context_lens": ints([9, 3]),
    "sinks": some(4),
    "value_dim": 12,
}


@pytest.mark.parametrize(
    "wrong",
    [
        {"key": some(5, 3, 24)},  # more heads than the cache has
        {"key": some(4, 2, 24)},  # fewer keys than values
        {"key": some(2, 24)},
        {"value": some(5, 1, 12)},
        {"value": some(5, 2, 33)},  # wider than the cache
        {"key": some(5, 2, 40)},
        {"key_cache": some(3, 2, BLOCK_SIZE * 16)},
        {"value_cache": some(3, 2, BLOCK_SIZE * 64)},
        {"value_cache": some(2, 2, BLOCK_SIZE * 32)},
        {"value_cache": some(3, 2, BLOCK_SIZE * 32, dtype=torch.bfloat16)},
        {"key_cache": some(3, 2, BLOCK_SIZE * 32, dtype=torch.float64)},
        {"key_cache": some(2, 3, BLOCK_SIZE * 32).transpose(0, 1)},
        {"slot_mapping": torch.arange(4)},
        {"slot_mapping": ints([0, 1, 2, 3, 4])},
        {"slot_mapping": torch.arange(10)[::2]},
        {"key": some(5, 2, 24).to("meta")},
    ],
    ids=lambda wrong: "-".join(f"{k}{tuple(v.shape)}" for k, v in wrong.items()),
)
def test_what_the_storing_kernel_would_write_amiss_raises(wrong: dict[str, Tensor]) -> None:
    store_kv(**STORED)
    with pytest.raises(ValueError, match=r"."):
        store_kv(**STORED | wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        {"query": some(5, 3, 24)},  # three heads cannot share two
        {"query": some(5, 4, 40)},  # wider than the cache
        {"query": some(5, 96)},
        {"value_dim": 33},
        {"key_cache": some(3, 2, BLOCK_SIZE * 64)},
        {"value_cache": some(3, 4, BLOCK_SIZE * 32)},
        {"block_tables": ints([[0, 1]])},  # fewer requests than context_lens has
        {"block_tables": torch.tensor([[0, 1], [2, 0]])},
        {"block_tables": ints([[0, 9, 1, 9], [2, 9, 0, 9]])[:, ::2]},
        {"block_tables": ints([0, 1])},
        {"query_start": ints([0, 2])},
        {"query_start": torch.tensor([0, 2, 5])},
        {"context_lens": ints([9])},
        {"context_lens": torch.tensor([9, 3])},
        {"sinks": some(3)},
        {"query": some(5, 4, 24).to("meta")},
    ],
    ids=lambda wrong: "-".join(map(str, wrong)),
)
def test_what_the_attending_kernel_would_read_amiss_raises(wrong: dict[str, Any]) -> None:
    assert paged_attention(**ATTENDED, scale=1.0).shape == (5, 4, 12)
    with pytest.raises(ValueError, match=r"."):
        paged_attention(**ATTENDED | wrong, scale=1.0)
