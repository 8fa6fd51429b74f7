"""Paged attention in one fixed order, for prefill and decode alike: the door to kernels that work on raw memory.

A kernel is given addresses, and cannot know what lies there. So every tensor is compared here with what the kernel will
read and write of it: device, dtype, shape and strides. What does not fit raises ValueError.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from myserve.engine.kernels.attend import BLOCK_SIZE, TILE_ROWS, attend_kernel, padded_head_dim
from myserve.engine.kernels.lanes import LANES, PARTITION
from myserve.engine.kernels.launch import this_thread, threads_for
from myserve.engine.kernels.store import store_kernel
from myserve.engine.kernels.tiles import tile_configuration
from myserve.engine.memory import huge_pages
from myserve.engine.mixers.recurrent import StateRows

__all__ = [
    "PagedContext", "Pages", "Reach", "allocate_layer", "bytes_per_block", "dense_attention", "paged_attention",
    "store_kv",
]  # fmt: skip


class Reach(NamedTuple):
    """The reach of a query: how far back it sees; 0: all that is before it."""

    window: int = 0  # so many positions, its own included
    chunk: int = 0  # those of its own chunk: contexts are cut at every multiple of it (Llama 4)


@dataclass(frozen=True, slots=True)
class PagedContext:
    """Hold where the packed tokens of one step lie in the cache.

    Rows of different requests follow each other without padding, and a request's rows are the last positions of its
    context. Rows behind the last request's are padding rows; on a CPU they come out as zeros.
    """

    # (K, V) for each call of attention in a forward pass, as `allocate_layer` or `DevicePages.allocate` makes them
    layers: Sequence[tuple[Tensor, Tensor]]
    slot_mapping: Tensor  # [T] int64: block * block size + offset of each token; -1: not kept
    block_tables: Tensor  # [R, max_blocks] int32
    query_start: Tensor  # [R + 1] int32: request r owns the rows query_start[r] .. query_start[r + 1]
    context_lens: Tensor  # [R] int32: keys of each request, its new ones included
    pages: Pages | None = None  # stores and attends; None: our CPU kernels
    # the states of all slots, for each call of a recurrent function in a forward pass; and where the rows' are
    states: Sequence[Tensor] = ()
    state_rows: StateRows | None = None
    # of a context on a device: the same numbers, to be looked at without waiting
    on_host: PagedContext | None = None


class Pages(Protocol):
    """A cache that is not our kernels': see `device_pages.DevicePages`."""

    def store(
        self, key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor
    ) -> None: ...

    def attend(
        self, query: Tensor, key_cache: Tensor, value_cache: Tensor, context: PagedContext, *, scale: float,
        window: int, chunk: int, softcap: float, sinks: Tensor | None, value_dim: int | None = None,
    ) -> Tensor: ...  # fmt: skip


def allocate_layer(
    num_blocks: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return K and V of one layer, zeroed, [num_blocks, ...]: `cache[b]` is block b, so a block is copied as a row.

    A block is [num_kv_heads, BLOCK_SIZE * dim] in the kernel's own order, dim in whole tiles; bfloat16 stays, all else
    is kept in float32. `head_dim`: the wider of keys and values (`store_kv`).

    >>> [tuple(t.shape) for t in allocate_layer(10, 2, 8, torch.bfloat16)]
    [(10, 2, 1024), (10, 2, 1024)]
    """
    shape = (num_blocks, num_kv_heads, BLOCK_SIZE * padded_head_dim(head_dim))
    return huge_pages.zeros(shape, _cpu_cache_dtype(dtype)), huge_pages.zeros(shape, _cpu_cache_dtype(dtype))


def bytes_per_block(num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
    """Return what a block of one layer takes, K and V together, in bytes.

    >>> bytes_per_block(8, 128, torch.bfloat16) // 1024
    128
    """
    return 2 * num_kv_heads * BLOCK_SIZE * padded_head_dim(head_dim) * _cpu_cache_dtype(dtype).itemsize


def _cpu_cache_dtype(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.bfloat16 else torch.float32


def store_kv(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor
) -> None:
    """Write new keys [T, Hkv, Dk] and values [T, Hkv, Dv] to their slots [T] int64; slot -1 is not written.

    Where keys and values differ in width (multi-head latent attention), the narrower is filled with zeros: they add
    nothing to a score, and `paged_attention` drops their columns. Raises ValueError for what does not fit the cache.
    """
    if key.dim() != 3 or value.dim() != 3 or key.shape[:2] != value.shape[:2]:
        raise ValueError(
            f"keys {tuple(key.shape)} and values {tuple(value.shape)} must be [T, Hkv, D] of the same T and Hkv"
        )
    width = max(key.shape[2], value.shape[2])
    _check_cache(key_cache, value_cache, key.shape[1], width)
    _check_ints("slot_mapping", slot_mapping, torch.int64, (key.shape[0],))
    key, value = (_rows(x, width, key_cache.dtype) for x in (key, value))
    tokens, heads, head_dim = key.shape
    size = key.element_size()
    store_kernel(key.dtype)(
        threads_for(key.numel()),
        source_keys=key.data_ptr(), key_token=size * key.stride(0), key_head=size * key.stride(1),
        source_values=value.data_ptr(), value_token=size * value.stride(0), value_head=size * value.stride(1),
        slots=slot_mapping.data_ptr(), keys=key_cache.data_ptr(), values=value_cache.data_ptr(),
        tokens=tokens, kv_heads=heads, head_dim=head_dim,
    )  # fmt: skip


def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    *,
    scale: float,
    window: int = 0,
    chunk: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    value_dim: int | None = None,
) -> Tensor:
    """Return softmax(scale * q k^T) v over each request's own pages, causal; query [T, H, Dk], result [T, H, Dv].

    Sums are in float32. `window`: a query sees its own position and the `window - 1` before it (0: all). `chunk`: none
    before the last multiple of it (0: all), as Llama 4 cuts its contexts. `softcap` c: scores become
    c * tanh(score / c) (Gemma 2). `sinks` [H]: a score a head that takes weight and gives none (gpt-oss).
    `value_dim`: Dv, where it is not Dk. block_tables [R, max_blocks], query_start [R + 1] and context_lens [R] are
    int32. A row's bits depend on its query and its keys alone: not on the other rows, on how its context came into the
    cache, on `context_lens` of others, nor on the number of threads.
    Raises ValueError for what the kernel would read or write amiss.
    """
    if query.dim() != 3 or block_tables.dim() != 2:
        raise ValueError(f"query {tuple(query.shape)} must be [T, H, D], block_tables [R, max_blocks]")
    value_dim = query.shape[2] if value_dim is None else value_dim
    width, requests = max(query.shape[2], value_dim), block_tables.shape[0]
    kv_heads = key_cache.shape[1]
    _check_cache(key_cache, value_cache, kv_heads, width)
    _check_ints("block_tables", block_tables[:1], torch.int32, (min(1, requests), block_tables.shape[1]))
    _check_ints("query_start", query_start, torch.int32, (requests + 1,))
    _check_ints("context_lens", context_lens, torch.int32, (requests,))
    rows = _rows(query, width, key_cache.dtype)
    tokens, heads, head_dim = rows.shape
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads cannot share {kv_heads} key heads")
    if sinks is not None and sinks.shape != (heads,):
        raise ValueError(f"sinks must be [{heads}], one for each head, and are {tuple(sinks.shape)}")
    group, size = heads // kv_heads, rows.element_size()
    out = torch.empty(tokens, heads, head_dim, dtype=rows.dtype)
    sinks = None if sinks is None else sinks.detach().float().contiguous()
    work = tokens * heads * head_dim * block_tables.shape[1] * BLOCK_SIZE  # at most
    threads = threads_for(work)
    scratch_bytes = _scratch_bytes(group, head_dim)
    decodes = tokens == len(context_lens)  # they fill no whole tile
    tiles = tile_configuration(min(16, group) if decodes else 16)
    attend_kernel(rows.dtype)(
        threads,
        query=rows.data_ptr(), query_token=size * rows.stride(0), query_head=size * rows.stride(1),
        out=out.data_ptr(), keys=key_cache.data_ptr(), values=value_cache.data_ptr(),
        tables=block_tables.data_ptr(), table_row=4 * block_tables.stride(0), query_start=query_start.data_ptr(),
        context_lens=context_lens.data_ptr(), sinks=0 if sinks is None else sinks.data_ptr(),
        scratch=this_thread().scratch(threads * scratch_bytes), scratch_bytes=scratch_bytes, tokens=tokens,
        requests=len(context_lens), kv_heads=kv_heads, group=group, head_dim=head_dim,
        window=window, chunk=chunk, tiles=tiles.ctypes.data, scale=scale, softcap=softcap,
    )  # fmt: skip
    return out[..., :value_dim].to(query.dtype)


def _check_cache(key_cache: Tensor, value_cache: Tensor, kv_heads: int, width: int) -> None:
    """Raise ValueError unless both are the cache of a layer of so many heads of that width."""
    block = BLOCK_SIZE * padded_head_dim(width)
    for name, cache in (("key_cache", key_cache), ("value_cache", value_cache)):
        if cache.dim() != 3 or cache.shape[1:] != (kv_heads, block) or not cache.is_contiguous():
            raise ValueError(
                f"{name} is {tuple(cache.shape)}, and {kv_heads} heads of {width} need [blocks, {kv_heads}, {block}]"
            )
        if cache.device.type != "cpu" or cache.dtype not in (torch.bfloat16, torch.float32):
            raise ValueError(
                f"{name} is {cache.dtype} on {cache.device}; kernels read bfloat16 or float32 on a CPU"
            )
    if key_cache.dtype != value_cache.dtype or key_cache.shape != value_cache.shape:
        raise ValueError(f"key_cache is {key_cache.dtype} {tuple(key_cache.shape)}, value_cache another")


def _check_ints(name: str, x: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if x.dtype != dtype or x.shape != shape or not x.is_contiguous() or x.device.type != "cpu":
        wanted = str(dtype).removeprefix("torch.")
        raise ValueError(
            f"{name} is {x.dtype} {tuple(x.shape)} on {x.device}; {wanted} {shape} side by side is read"
        )


def _rows(x: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """In the cache's element type and width, each [D] contiguous: all that the kernel asks of strides."""
    if x.device.type != "cpu":
        raise ValueError(f"rows on {x.device} cannot be read by a kernel of the CPU")
    x = x.detach().to(dtype)
    if x.shape[-1] != width:
        return F.pad(x, (0, width - x.shape[-1]))
    return x if x.stride(-1) == 1 else x.contiguous()


def _scratch_bytes(group: int, head_dim: int) -> int:
    """Return the bytes of a thread: addresses; peaks, alphas, 16 sums, query, out, weights, scores; a block of V."""
    rows = -(-max(1, TILE_ROWS // group) * group // 16) * 16
    dim = padded_head_dim(head_dim)
    floats = rows * (2 + LANES + 2 * dim + PARTITION // 2 + PARTITION) + 16 * dim
    return 64 * (2 + -(-4 * floats // 64))


def dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    window: int = 0,
    chunk: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """Compute attention by its definition, in the inputs' precision: query [H, Q, D], the last Q of key [Hkv, K, D].

    >>> x = torch.eye(2).reshape(1, 2, 2)
    >>> dense_attention(x, x, x, scale=1.0)[0, 0]
    tensor([1., 0.])
    """
    group, (queries, keys) = query.shape[0] // key.shape[0], (query.shape[1], key.shape[1])
    key, value = (x.repeat_interleave(group, dim=0) for x in (key, value))
    scores = (query @ key.transpose(1, 2)) * scale  # [H, Q, K]
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    position = torch.arange(keys, device=query.device)
    own = position[keys - queries :, None]
    hidden = own < position
    if window:
        hidden |= own - position >= window
    if chunk:
        hidden |= position < own // chunk * chunk
    scores = scores.masked_fill(hidden, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(scores.dtype)[:, None, None].expand(-1, queries, 1)], dim=-1)
    weights = F.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    return weights[..., :keys].to(value.dtype) @ value
