"""Tinker's SampleResponse in protobuf: a writer of its five message kinds, by the numbers of `tinker_public.proto`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

__all__ = ["FLOAT32", "sample_response", "sampled_sequence", "tensor", "topk_logprobs"]

STOP_REASONS = {"stop": 0, "length": 1}
FLOAT32 = 1  # of DType

VARINT, BYTES = 0, 2  # protobuf's wire types


def sample_response(
    sequences: Iterable[bytes],
    *,
    prompt_logprobs: bytes = b"",
    topk_prompt_logprobs: bytes | None = None,
    target_prompt_logprobs: bytes | None = None,
    prompt_cache_hit_tokens: int = 0,
) -> bytes:
    """Return a SampleResponse; messages in it come from the functions below, arrays are little-endian.

    >>> sample_response([sampled_sequence("length", b"", b"")], prompt_cache_hit_tokens=300).hex(" ")
    '0a 06 08 01 12 00 1a 00 20 ac 02'
    """
    fields = [_bytes(1, each) for each in sequences]
    fields += [_bytes(2, prompt_logprobs)] if prompt_logprobs else []
    fields += [] if topk_prompt_logprobs is None else [_bytes(3, topk_prompt_logprobs)]
    fields += [_int(4, prompt_cache_hit_tokens)]
    fields += [] if target_prompt_logprobs is None else [_bytes(5, target_prompt_logprobs)]
    return b"".join(fields)


def sampled_sequence(
    stop_reason: Literal["stop", "length"], tokens: bytes, logprobs: bytes, topk: bytes | None = None
) -> bytes:
    """Return a SampledSequence: tokens are int32 [C], logprobs float32 [C]."""
    fields = [_int(1, STOP_REASONS[stop_reason]), _bytes(2, tokens), _bytes(3, logprobs)]
    fields += [] if topk is None else [_bytes(4, topk)]
    return b"".join(fields)


def topk_logprobs(token_ids: bytes, logprobs: bytes, *, length: int, k: int) -> bytes:
    """Return a TopkLogprobs: ids are int32 [length, k], logprobs float32 [length, k]."""
    return _bytes(1, token_ids) + _bytes(2, logprobs) + _int(3, k) + _int(4, length)


def tensor(
    values: bytes,
    dtype: int,
    shape: Iterable[int],
    *,
    crow_indices: bytes | None = None,
    col_indices: bytes | None = None,
) -> bytes:
    """Return a Tensor: dense, or CSR where there are indices, which are int64."""
    if crow_indices is None or col_indices is None:
        data = _bytes(1, values)
    else:
        data = _bytes(2, _bytes(1, values) + _bytes(2, crow_indices) + _bytes(3, col_indices))
    return data + _int(3, dtype) + _bytes(4, b"".join(map(_varint, shape)))


def _bytes(number: int, value: bytes) -> bytes:
    return _varint(number << 3 | BYTES) + _varint(len(value)) + value


def _int(number: int, value: int) -> bytes:
    """Return a field of a number; 0 is what a field has that is not there."""
    return _varint(number << 3 | VARINT) + _varint(value) if value else b""


def _varint(value: int) -> bytes:
    """Return seven bits a byte, the lowest first; all but the last byte have the eighth bit. `value` >= 0."""
    written = bytearray()
    while value > 0x7F:
        written.append(value & 0x7F | 0x80)
        value >>= 7
    written.append(value)
    return bytes(written)
