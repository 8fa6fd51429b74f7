"""A sample's answer in Tinker's protobuf: arrays of little-endian int32 and float32."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from myserve.engine.outputs import Delta
from myserve.errors import EngineError
from myserve.server.answers.answer import ActiveAnswer, finish_reason_of
from myserve.server.answers.writer import AnswerWriter
from myserve.server.choice import Choice
from myserve.wire.completions import CompletionRequest
from myserve.wire.dialects import tinker_protobuf as protobuf
from myserve.wire.dialects.tinker import NO_ID, TinkerSample

__all__ = ["AbortedError", "TinkerWriter"]

NO_LOGPROB = -99999.0  # with id 0: a place among the alternatives that has none

Pairs = Sequence[tuple[int, float]]


class AbortedError(EngineError):
    """A sample was ended by a control plane before its end; Tinker's answer has no word for what it has."""


class TinkerWriter(AnswerWriter[CompletionRequest]):
    """Write a SampleResponse. There are no streams in this dialect."""

    def __init__(self, answer: ActiveAnswer[CompletionRequest], asked: TinkerSample) -> None:
        super().__init__(answer)
        self._asked = asked

    def whole(self, choices: Sequence[Choice]) -> bytes:
        """Return the message, with the prompt's scores beside the sequences. Raises AbortedError."""
        first = choices[0]
        return protobuf.sample_response(
            map(self._sequence, choices),
            prompt_logprobs=self._prompt_logprobs(first) if self._asked.prompt_logprobs else b"",
            topk_prompt_logprobs=self._topk_prompt(first) if self._asked.topk_prompt_logprobs else None,
            target_prompt_logprobs=self._target(first),
            prompt_cache_hit_tokens=first.metrics.cached_tokens,
        )

    def gained(self, choice: Choice, delta: Delta) -> Iterable[bytes]:
        """Return nothing."""
        return ()

    def ended(self, choices: Sequence[Choice]) -> Iterable[bytes]:
        """Return nothing."""
        return ()

    def _sequence(self, choice: Choice) -> bytes:
        reason = finish_reason_of(choice)
        if reason == "abort":
            raise AbortedError("the sample was aborted by the server's control plane; ask again")
        sampled, k = choice.sampled, self._asked.topk_sample_logprobs
        return protobuf.sampled_sequence(
            "length" if reason == "length" else "stop",
            _int32([token.token_id for token in sampled]),
            _float32([token.sampling_logprob for token in sampled]),
            _alternatives([token.top_logprobs for token in sampled], k) if k else None,
        )

    def _prompt_logprobs(self, choice: Choice) -> bytes:
        """Return float32 [P], NaN where nothing was asked for, or nothing comes before."""
        first = self._asked.first_scored or 0
        scored = choice.prompt_logprobs or ()
        values = [
            math.nan if at < first or token.logprob is None else token.logprob
            for at, token in enumerate(scored)
        ]
        return _float32(values)

    def _topk_prompt(self, choice: Choice) -> bytes:
        first, k = self._asked.first_scored or 0, self._asked.topk_prompt_logprobs
        scored = choice.prompt_logprobs or ()
        return _alternatives(
            [token.top_logprobs if at >= first else () for at, token in enumerate(scored)], k
        )

    def _target(self, choice: Choice) -> bytes | None:
        """Return float32 in the layout of the ids that were named: a logprob for each, 0.0 where a cell named none."""
        target, scored = self._asked.target_prompt_logprobs, choice.prompt_logprobs
        if target is None or scored is None:
            return None
        values: list[float] = []
        for row, token in zip(target.rows, scored[1:], strict=True):
            # before the first row that names an id nothing is scored
            found = token.token_id_logprobs or ((0, None),) * len(row)
            values += [
                0.0 if asked == NO_ID else -math.inf if value is None else value
                for asked, (_, value) in zip(row, found, strict=False)
            ]
        crow, col = target.sparse_crow_indices, target.sparse_col_indices
        return protobuf.tensor(
            _float32(values),
            protobuf.FLOAT32,
            target.shape,
            crow_indices=None if crow is None else _int64(crow),
            col_indices=None if col is None else _int64(col),
        )


def _alternatives(rows: Sequence[Pairs], k: int) -> bytes:
    """Return a TopkLogprobs [len(rows), k]; what has no probability is no alternative."""
    token_ids = np.zeros((len(rows), k), "<i4")
    logprobs = np.full((len(rows), k), NO_LOGPROB, "<f4")
    for at, row in enumerate(rows):
        possible = [(token_id, value) for token_id, value in row[:k] if math.isfinite(value)]
        if possible:
            token_ids[at, : len(possible)], logprobs[at, : len(possible)] = zip(*possible, strict=True)
    return protobuf.topk_logprobs(token_ids.tobytes(), logprobs.tobytes(), length=len(rows), k=k)


def _int32(values: Sequence[int]) -> bytes:
    return np.asarray(values, "<i4").tobytes()


def _int64(values: Sequence[int]) -> bytes:
    return np.asarray(values, "<i8").tobytes()


def _float32(values: Sequence[float]) -> bytes:
    numbers: np.ndarray[Any, Any] = np.asarray(values, "<f4")
    return numbers.tobytes()
