"""Bounds on what a server may send for a request, known before it is asked: no answer fills the client's memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from myserve.sdk.request import SampleRequest

__all__ = ["max_rows", "max_stream_bytes"]

_BASE_BYTES = 4 * 2**20
# A token's chunk: text, names, ids, logprobs in two forms, its routing (128 layers of 16 experts are 5.5 kB).
_BYTES_PER_ROW = 16 * 2**10
_BYTES_PER_ALTERNATIVE = 512
# The support of an untruncated draw is the vocabulary: 262,144 ids of seven characters.
_BYTES_PER_SUPPORT = 2 * 2**20


def max_rows(request: SampleRequest) -> int:
    """Return how many rows of one sample may come: its tokens, and with echo the prompt's."""
    return request.max_tokens + 1 + (len(request.prompt_token_ids) if request.echo else 0)


def max_stream_bytes(request: SampleRequest, n: int) -> int:
    """Return the most bytes that a stream of `n` samples may have.

    >>> request = SampleRequest(prompt_token_ids=(1,), model="m", seed=7, max_tokens=8)
    >>> max_stream_bytes(request, 1) // 1024
    4240
    """
    alternatives = max(request.top_logprobs or 0, _count(request.extra, "logprobs"))
    per_row = _BYTES_PER_ROW + _BYTES_PER_ALTERNATIVE * alternatives
    if request.extra.get("kept") or request.extra.get("sampling_mask"):
        per_row += _BYTES_PER_SUPPORT
    scored = len(request.prompt_token_ids) * (1 + _count(request.extra, "prompt_logprobs"))
    prompt = _BYTES_PER_ALTERNATIVE * scored if "prompt_logprobs" in request.extra else 0
    return _BASE_BYTES + n * (max_rows(request) * per_row + prompt + 16 * len(request.prompt_token_ids))


def _count(extra: Mapping[str, Any], name: str) -> int:
    value = extra.get(name)
    return max(0, value) if isinstance(value, int) else 0
