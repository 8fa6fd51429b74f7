"""Attention alone, at the shape of Qwen3-0.6B: our kernel beside PyTorch's, in one run; medians.

    python -m benchmarks.micro.attention [--threads 2]

Decode reads every key and value once, from memory: each layer has a cache of its own, as in a model, and the figure
that counts is GB/s. Prefill computes: GFLOP/s over the causal half. PyTorch attends over contiguous tensors of equal
length, which a server does not have; that is in its favour. Ratios above 1 are ours.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from myserve.engine.kernels.attend import BLOCK_SIZE
from myserve.engine.mixers.attention import allocate_layer, paged_attention, store_kv

HEADS, KV_HEADS, DIM, LAYERS, CONTEXT = 16, 8, 128, 28, 192


def median_seconds(run: Callable[[], object], repeats: int = 9) -> float:
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


class Paged:
    """`streams` contexts in scattered pages, in `layers` caches."""

    def __init__(self, streams: int, context: int, layers: int, dtype: torch.dtype) -> None:
        pages = -(-context // BLOCK_SIZE)
        self.tables = torch.randperm(streams * pages).view(streams, pages).int()
        self.lens = torch.full((streams,), context, dtype=torch.int32)
        position = torch.arange(context)
        slots = (self.tables[:, position // BLOCK_SIZE].long() * BLOCK_SIZE + position % BLOCK_SIZE).flatten()
        self.caches = [allocate_layer(streams * pages, KV_HEADS, DIM, dtype) for _ in range(layers)]
        for cache in self.caches:
            store_kv(*(torch.randn(len(slots), KV_HEADS, DIM).to(dtype) for _ in range(2)), *cache, slots)

    def attend(self, query: Tensor, rows: int) -> None:
        """Attend with `rows` queries a stream, in every layer."""
        starts = torch.arange(0, len(self.lens) * rows + 1, rows).int()
        for cache in self.caches:
            paged_attention(query, *cache, self.tables, starts, self.lens, scale=DIM**-0.5)


def decode(streams: int, dtype: torch.dtype) -> None:
    paged = Paged(streams, CONTEXT, LAYERS, dtype)
    query = torch.randn(streams, HEADS, DIM).to(dtype)
    ours = median_seconds(lambda: paged.attend(query, 1))
    keys = [torch.randn(streams, KV_HEADS, CONTEXT, DIM).to(dtype) for _ in range(2 * LAYERS)]

    def library(gqa: bool) -> None:
        shape = (streams, HEADS, 1, DIM) if gqa else (streams, KV_HEADS, HEADS // KV_HEADS, DIM)
        for key, value in zip(keys[::2], keys[1::2], strict=True):
            F.scaled_dot_product_attention(query.view(shape), key, value, enable_gqa=gqa)

    gqa, grouped = (median_seconds(lambda gqa=gqa: library(gqa)) for gqa in (True, False))
    size = 2 * streams * CONTEXT * KV_HEADS * DIM * dtype.itemsize * LAYERS
    print(
        f"{dtype} decode, {streams:2} streams: ours {ours * 1e3:7.2f} ms {size / ours / 1e9:5.1f} GB/s"
        f" | sdpa {gqa * 1e3:7.2f} ms, {gqa / ours:5.2f}x | sdpa, group as rows {grouped * 1e3:7.2f} ms,"
        f" {grouped / ours:5.2f}x"
    )


def prefill(length: int, dtype: torch.dtype) -> None:
    paged = Paged(1, length, 1, dtype)
    query, key, value = (
        torch.randn(1, heads, length, DIM).to(dtype) for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    packed = query[0].transpose(0, 1).contiguous()
    ours = median_seconds(lambda: paged.attend(packed, length), 5)
    library = median_seconds(
        lambda: F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True), 5
    )
    flops = 2 * length * length * HEADS * DIM
    print(
        f"{dtype} prefill, {length:4} tokens: ours {ours * 1e3:7.2f} ms {flops / ours / 1e9:5.0f} GFLOP/s"
        f" | sdpa {library * 1e3:7.2f} ms, {library / ours:5.2f}x   (one layer)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    torch.set_num_threads(parser.parse_args().threads)
    for dtype in (torch.bfloat16, torch.float32):
        for streams in (1, 8, 32):
            decode(streams, dtype)
        for length in (512, 2048):
            prefill(length, dtype)


if __name__ == "__main__":
    main()
