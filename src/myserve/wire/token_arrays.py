"""The numbers of many tokens as base64 of little-endian arrays: a tenth of JSON entries, in bytes and in work."""

from __future__ import annotations

import struct
from base64 import b64decode, b64encode
from collections.abc import Sequence
from typing import NotRequired

from typing_extensions import TypedDict  # pydantic reads no other before Python 3.12

__all__ = [
    "Alternatives",
    "TokenArrays",
    "decode_floats",
    "decode_ints",
    "encode_floats",
    "encode_ints",
    "encode_rows",
]

NO_TOKEN = -1  # pads a row of alternatives; its logprob is NaN

Alternatives = Sequence[tuple[int, float]]


class TokenArrays(TypedDict):
    """`count` tokens. Ids are int32, logprobs float32 with NaN where there is none (a prompt's tokens were not drawn).

    Alternatives are [count, k], row by row, best first; routing [count, moe layers, experts per token], in its own
    dtype.
    """

    count: int
    token_id: str
    logprob: str
    sampling_logprob: str
    top_token_id: NotRequired[str]
    top_logprob: NotRequired[str]
    routing_matrix: NotRequired[str]


def encode_ints(values: Sequence[int]) -> str:
    """int32, base64.

    >>> decode_ints(encode_ints([1, 2**31 - 1, -1]))
    (1, 2147483647, -1)
    """
    return b64encode(struct.pack(f"<{len(values)}i", *values)).decode()


def encode_floats(values: Sequence[float]) -> str:
    """float32, base64. Logprobs are float32 numbers, so nothing is lost.

    >>> decode_floats(encode_floats([-0.5, -1.3862943649291992]))
    (-0.5, -1.3862943649291992)
    """
    return b64encode(struct.pack(f"<{len(values)}f", *values)).decode()


def decode_ints(text: str) -> tuple[int, ...]:
    """Return what `encode_ints` wrote; `numpy.frombuffer(b64decode(text), "<i4")` is the same."""
    data = b64decode(text, validate=True)
    return struct.unpack(f"<{len(data) // 4}i", data)


def decode_floats(text: str) -> tuple[float, ...]:
    """Return what `encode_floats` wrote; `numpy.frombuffer(b64decode(text), "<f4")` is the same."""
    data = b64decode(text, validate=True)
    return struct.unpack(f"<{len(data) // 4}f", data)


def encode_rows(rows: Sequence[Alternatives], k: int) -> tuple[str, str]:
    """Ids and logprobs of `rows`, each filled up to `k`.

    >>> ids, logprobs = encode_rows([[(7, -0.5), (8, -1.0)], [(9, -0.25)]], 2)
    >>> decode_ints(ids), decode_floats(logprobs)
    ((7, 8, 9, -1), (-0.5, -1.0, -0.25, nan))
    """
    padding = ((NO_TOKEN, float("nan")),) * k
    filled = [pair for row in rows for pair in (*row, *padding[len(row) :])]
    return encode_ints([i for i, _ in filled]), encode_floats([value for _, value in filled])
