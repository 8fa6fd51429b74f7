"""The cache's writing loops: new keys and values go to the slots of their tokens, in the order that attention reads."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from numba import carray, njit

from myserve.engine.kernels.attend import BLOCK_SIZE, padded
from myserve.engine.kernels.lanes import next_item, size_of, view
from myserve.engine.kernels.launch import Kernel, fingerprint

__all__ = ["STORE", "TOKENS", "store_kernel"]

TOKENS = 256  # that one work item writes

Kind = Any  # a value whose type is an element's: uint16 (bfloat16's bits) or float32
Record = Any  # STORE

# Addresses; strides in bytes; counts. The caches are as `kernels.ATTEND` has them.
STORE = (
    "source_keys", "key_token", "key_head", "source_values", "value_token", "value_head", "slots", "keys",
    "values", "tokens", "kv_heads", "head_dim",
)  # fmt: skip


@njit(error_model="numpy")
def _store_token(a: Record, element: Kind, head: int, token: int, slot: int) -> None:
    dim, pair, size, width = padded(a.head_dim), 4 // size_of(element), size_of(element), a.head_dim
    at = (slot // BLOCK_SIZE * a.kv_heads + head) * BLOCK_SIZE * dim
    offset = slot % BLOCK_SIZE
    k = carray(view(a.keys + at * size, element), BLOCK_SIZE * dim)
    v = carray(view(a.values + at * size, element), BLOCK_SIZE * dim)
    key = carray(view(a.source_keys + token * a.key_token + head * a.key_head, element), width)
    value = carray(view(a.source_values + token * a.value_token + head * a.value_head, element), width)
    for d in range(dim):
        inside = d < width
        k[d // pair * BLOCK_SIZE * pair + offset * pair + d % pair] = key[d] if inside else 0
        v[offset // pair * dim * pair + d * pair + offset % pair] = value[d] if inside else 0


@njit(error_model="numpy")
def _store_block(a: Record, head: int, token: int, block: int) -> None:
    """`_store_token` of a block's 32 tokens at once, two bfloat16 at a time; the head dimension is whole tiles."""
    width, half = a.head_dim, a.head_dim // 2
    at = 2 * (block * a.kv_heads + head) * BLOCK_SIZE * width
    k = carray(view(a.keys + at, np.uint32(0)), BLOCK_SIZE * half)
    v = carray(view(a.values + at, np.uint32(0)), half * BLOCK_SIZE)
    for offset in range(BLOCK_SIZE):
        key = carray(
            view(a.source_keys + (token + offset) * a.key_token + head * a.key_head, np.uint32(0)), half
        )
        for d in range(half):
            k[d * BLOCK_SIZE + offset] = key[d]
    for pair in range(BLOCK_SIZE // 2):
        source = a.source_values + (token + 2 * pair) * a.value_token + head * a.value_head
        even = carray(view(source, np.uint16(0)), width)
        odd = carray(view(source + a.value_token, np.uint16(0)), width)
        for d in range(width):
            v[pair * width + d] = np.uint32(even[d]) | np.uint32(odd[d]) << np.uint32(16)


@njit(error_model="numpy")
def _is_block(slots: Any, token: int, end: int) -> bool:
    """Return whether the slots from `token` on are those of one block, first to last."""
    if token + BLOCK_SIZE > end or slots[token] < 0 or slots[token] % BLOCK_SIZE != 0:
        return False
    follows = True
    for offset in range(1, BLOCK_SIZE):
        follows &= slots[token + offset] == slots[token] + offset
    return follows


@njit(error_model="numpy")
def _store(a: Record, element: Kind) -> None:
    """One thread's share of (head, some tokens): keys and values to their slots; negative ones are padding rows'."""
    slots = carray(view(a.slots, np.int64(0)), a.tokens)
    shares = (a.tokens + TOKENS - 1) // TOKENS
    whole = size_of(element) == 2 and a.head_dim % 32 == 0 and (a.key_token | a.key_head) % 4 == 0
    item = next_item(a)
    while item < shares * a.kv_heads:
        head, token = item // shares, item % shares * TOKENS
        end = min(a.tokens, token + TOKENS)
        while token < end:
            if whole and _is_block(slots, token, end):
                _store_block(a, head, token, slots[token] // BLOCK_SIZE)
                token += BLOCK_SIZE
            else:
                if slots[token] >= 0:
                    _store_token(a, element, head, token, slots[token])
                token += 1
        item = next_item(a)


@functools.cache
def store_kernel(dtype: torch.dtype) -> Kernel:
    """The entry point for caches of one element type."""
    source = fingerprint()

    def store_bfloat16(p: Any) -> None:
        if source >= 0:
            _store(carray(p, 1)[0], np.uint16(0))

    def store_float32(p: Any) -> None:
        if source >= 0:
            _store(carray(p, 1)[0], np.float32(0))

    return Kernel(STORE, store_bfloat16 if dtype == torch.bfloat16 else store_float32)
