"""The types of a stream's chunks: JSON is decoded straight into them, and all other fields are skipped.

They are out of the garbage collector's sight (`gc=False`), for nothing here can be part of a cycle: a run makes a
few of them for each token, and looking through those that wait for their sample's end had been half of the time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, Literal, NotRequired, TypedDict

import msgspec

from myserve.sdk.errors import AttemptFailed, Failure
from myserve.sdk.transport.replies import failure_in_stream
from myserve.sdk.types import Alternative

__all__ = ["ChoiceChunk", "Chunk", "Logprobs", "RawOutputChunk", "TokenEntry", "WeightSpan", "chunks_of"]


class TokenEntry(msgspec.Struct, gc=False, kw_only=True):
    """One token's entry in `logprobs`."""

    logprob: float | None
    sampling_logprob: float | None = None
    token_id: int | None = None
    text_offset: int | None = None
    top_logprobs: tuple[Alternative, ...] | None = None
    routing_matrix: str | None = None
    routing_matrix_dtype: Literal["uint8", "uint16"] = "uint8"
    kept: dict[str, Any] | None = None


class Logprobs(msgspec.Struct, gc=False):
    """Chat's form (`content`), or OpenAI's older one: lists, with tokens written as `token_id:7`."""

    content: list[TokenEntry] | None = None
    tokens: list[str] | None = None
    token_logprobs: list[float | None] | None = None
    top_logprobs: list[dict[str, float] | None] | None = None
    text_offset: list[int] | None = None

    def entries(self) -> list[TokenEntry]:
        """Return an entry for each token, whichever form it came in.

        >>> older = Logprobs(tokens=["token_id:7"], token_logprobs=[-0.5], top_logprobs=[{"token_id:9": -0.25}])
        >>> (entry,) = older.entries()
        >>> entry.token_id, entry.logprob, entry.top_logprobs
        (7, -0.5, (Alternative(token_id=9, logprob=-0.25, token='token_id:9'),))
        """
        if self.content is not None:
            return self.content
        tokens, tops, offsets = self.tokens or (), self.top_logprobs or (), self.text_offset or ()
        return [
            TokenEntry(
                logprob=value,
                token_id=_written_id(tokens[row]) if row < len(tokens) else None,
                top_logprobs=_older_alternatives(tops[row]) if row < len(tops) else None,
                text_offset=offsets[row] if row < len(offsets) else None,
            )
            for row, value in enumerate(self.token_logprobs or ())
        ]


class WeightSpan(TypedDict):
    """Tokens [start, end) of the answer, and which weights made them."""

    start: int
    end: int
    weight_version: int
    recomputed: NotRequired[bool]


class RawOutputChunk(msgspec.Struct, gc=False):
    """Ids of the prompt and of the completion, as Fireworks has them."""

    prompt_token_ids: list[int] | None = None
    completion_token_ids: list[int] | None = None


class ChoiceChunk(msgspec.Struct, gc=False, kw_only=True):
    """One sample's part of a chunk."""

    index: Annotated[int, msgspec.Meta(ge=0)] = 0
    text: str | None = None
    token_ids: list[int] | None = None
    logprobs: Logprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    seed: int | None = None
    weight_version: int | None = None
    weight_version_spans: list[WeightSpan] | None = None
    raw_output: RawOutputChunk | None = None
    routing_matrix_shape: list[int] | None = None

    def ids(self) -> list[int]:
        """Return the chunk's token ids: as such, or out of its entries."""
        if self.token_ids is not None:
            return self.token_ids
        entries = self.logprobs.entries() if self.logprobs is not None else ()
        return [entry.token_id for entry in entries if entry.token_id is not None]


class Chunk(msgspec.Struct, gc=False):
    """One event of a completions stream."""

    choices: list[ChoiceChunk] | None = None
    perf_metrics: dict[str, Any] | None = None
    usage: Any = None
    error: Any = None


_decode = msgspec.json.Decoder(Chunk).decode


def chunks_of(events: Iterable[bytes]) -> Iterator[Chunk]:
    """Decode each event's data; `AttemptFailed` with the error that it holds, or with what is wrong about it.

    One at a time: a chunk is freed before the next is made, which takes half of the time of making all first.

    >>> [chunk] = chunks_of([b'{"choices": [{"index": 0, "text": "4", "token_ids": [7]}], "model": "m"}'])
    >>> chunk.choices[0].ids()
    [7]
    """
    for data in events:
        try:
            chunk = _decode(data)
        except (msgspec.DecodeError, ValueError, RecursionError) as error:  # ValueError: invalid UTF-8
            what = "a chunk of another shape" if isinstance(error, msgspec.ValidationError) else "not JSON"
            text = data[:200].decode("utf-8", "replace")
            raise AttemptFailed(Failure("protocol", f"{what}: {error}: {text!r}")) from error
        if chunk.error:
            raise AttemptFailed(failure_in_stream(chunk.error))
        yield chunk


def _written_id(token: str) -> int | None:
    digits = token.removeprefix("token_id:")
    return int(digits) if digits != token and digits.isdecimal() else None


def _older_alternatives(row: Mapping[str, float] | None) -> tuple[Alternative, ...]:
    return tuple(
        Alternative(token_id=_written_id(token), logprob=value, token=token)
        for token, value in (row or {}).items()
    )
