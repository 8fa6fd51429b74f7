"""Paged attention in one fixed order, for prefill and decode alike.

On a CPU it is our own kernel (`kernels`); elsewhere PyTorch's, over plain pages (`pages`).
transformers calls `paged_forward`, which finds what it needs in a keyword of the model's own call:

    register_attention()
    model.set_attn_implementation(ATTENTION_NAME)
    model(input_ids, position_ids=position_ids, use_cache=False, paged=context)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface

from myserve.engine.kernels.attend import BLOCK_SIZE, TILE_ROWS, attend_kernel, padded_head_dim
from myserve.engine.kernels.lanes import LANES, PARTITION
from myserve.engine.kernels.launch import this_thread, threads_for
from myserve.engine.kernels.store import store_kernel
from myserve.engine.kernels.tiles import tile_configuration
from myserve.engine.memory import huge_pages

ATTENTION_NAME = "myserve_paged"  # what a model's `attn_implementation` says


@dataclass(frozen=True, slots=True)
class PagedContext:
    """Where the packed tokens of one step lie in the cache: the same for every layer but the tensors.

    Rows of different requests follow each other without padding, and a request's rows are the last positions of its
    context. Rows behind the last request's belong to nobody; on a CPU they come out as zeros.
    """

    layers: Sequence[tuple[Tensor, Tensor]]  # (K, V) of each layer, as `allocate_layer` or `pages` makes them
    slot_mapping: Tensor  # [T] int64: block * block size + offset of each token; -1: not kept
    block_tables: Tensor  # [R, max_blocks] int32
    query_start: Tensor  # [R + 1] int32: request r owns the rows query_start[r] .. query_start[r + 1]
    context_lens: Tensor  # [R] int32: keys of each request, its new ones included
    pages: Pages | None = None  # who stores and attends; None: our CPU kernels
    # of a context on a device: the same numbers, to be looked at without waiting
    on_host: PagedContext | None = None


class Pages(Protocol):
    """A cache that is not our kernels': see `pages.DevicePages`."""

    def store(
        self, key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor
    ) -> None: ...

    def attend(
        self, query: Tensor, key_cache: Tensor, value_cache: Tensor, context: PagedContext, *, scale: float,
        window: int, softcap: float, sinks: Tensor | None,
    ) -> Tensor: ...  # fmt: skip


def allocate_layer(
    num_blocks: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """K and V of one layer, zeroed, [num_blocks, ...]: `cache[b]` is block b, so that a block is copied as a row.

    A block is [num_kv_heads, BLOCK_SIZE * dim] in the kernel's own order, dim in whole tiles; bfloat16 stays, all else
    is kept in float32.

    >>> [tuple(t.shape) for t in allocate_layer(10, 2, 8, torch.bfloat16)]
    [(10, 2, 1024), (10, 2, 1024)]
    """
    shape = (num_blocks, num_kv_heads, BLOCK_SIZE * padded_head_dim(head_dim))
    return huge_pages.zeros(shape, _cpu_cache_dtype(dtype)), huge_pages.zeros(shape, _cpu_cache_dtype(dtype))


def bytes_per_block(num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
    """What a block of one layer takes, K and V together, in bytes.

    >>> bytes_per_block(8, 128, torch.bfloat16) // 1024
    128
    """
    return 2 * num_kv_heads * BLOCK_SIZE * padded_head_dim(head_dim) * _cpu_cache_dtype(dtype).itemsize


def _cpu_cache_dtype(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.bfloat16 else torch.float32


def store_kv(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor
) -> None:
    """Writes new keys and values [T, Hkv, D] to their slots [T]."""
    key, value = (_rows(x, key_cache.dtype) for x in (key, value))
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
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """softmax(scale * q k^T) v over each request's own pages, causal; query and result [T, H, D], sums in float32.

    `window`: a query sees its own position and the `window - 1` before it (0: all). `softcap` c: scores become
    c * tanh(score / c) (Gemma 2). `sinks` [H]: a score a head that takes weight and gives none (gpt-oss).
    A row's bits depend on its query and its keys alone: not on the other rows, on how its context came into the
    cache, on `context_lens` of others, nor on the number of threads.
    """
    rows = _rows(query, key_cache.dtype)
    tokens, heads, head_dim = rows.shape
    kv_heads, size = key_cache.shape[1], rows.element_size()
    group = heads // kv_heads
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
        window=window, tiles=tiles.ctypes.data, scale=scale, softcap=softcap,
    )  # fmt: skip
    return out.to(query.dtype)


def _rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """In the cache's element type, each [D] contiguous: all that the kernel asks of strides."""
    x = x.detach().to(dtype)
    return x if x.stride(-1) == 1 else x.contiguous()


def _scratch_bytes(group: int, head_dim: int) -> int:
    """What a thread needs: addresses; a row's peak, alpha, 16 sums, query, out, weights, scores; a block of V."""
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
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention by its definition, in the inputs' own precision: query [H, Q, D], the last Q of key [Hkv, K, D].

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
    distance = position[keys - queries :, None] - position
    hidden = (distance < 0) | (distance >= window) if window else distance < 0
    scores = scores.masked_fill(hidden, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(scores.dtype)[:, None, None].expand(-1, queries, 1)], dim=-1)
    weights = F.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    return weights[..., :keys].to(value.dtype) @ value


def paged_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    paged: PagedContext,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: stores this layer's keys and values, then attends.

    query [1, H, T, D], key and value [1, Hkv, T, D]; gives [1, T, H, D].
    """
    key_cache, value_cache = paged.layers[_layer_index(module)]
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))  # [T, heads, D]
    options: dict[str, Any] = {
        "scale": query.shape[-1] ** -0.5 if scaling is None else scaling,
        "window": sliding_window or 0,
        "softcap": softcap or 0.0,
        "sinks": s_aux,
    }
    if paged.pages is not None:
        paged.pages.store(key, value, key_cache, value_cache, paged.slot_mapping)
        return paged.pages.attend(query, key_cache, value_cache, paged, **options)[None], None
    store_kv(key, value, key_cache, value_cache, paged.slot_mapping)
    tables, starts, lens = paged.block_tables, paged.query_start, paged.context_lens
    return paged_attention(query, key_cache, value_cache, tables, starts, lens, **options)[None], None


def _layer_index(module: torch.nn.Module) -> int:
    index = module.layer_idx
    assert isinstance(index, int), f"{type(module).__name__} does not know its layer"
    return index


def register_attention() -> None:
    """Makes `attn_implementation="myserve_paged"` known to transformers; no mask is built for it."""
    AttentionInterface.register(ATTENTION_NAME, paged_forward)
    AttentionMaskInterface.register(ATTENTION_NAME, lambda *args, **kwargs: None)
