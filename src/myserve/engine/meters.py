"""The engine's counters, written by its own thread: plain numbers, read without a lock."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Protocol, get_args

from myserve.engine.outputs import FinishReason
from myserve.engine.scheduling.batch import Batch
from myserve.engine.scheduling.request import Request
from myserve.engine.scheduling.speculation import DraftCounts

__all__ = ["SECONDS", "EngineLoad", "EngineMeters", "Histogram", "StepTokens"]

SECONDS = tuple(step * 10.0**power for power in range(-3, 3) for step in (1, 2, 5))  # 1 ms to 500 s
TOKENS = tuple(float(step * 10**power) for power in range(6) for step in (1, 2, 5))

REASONS = get_args(FinishReason)  # counted from 0, so that a first error is seen as a rise


class StepTokens(Protocol):
    """The part of a `StepResult`, which knows torch, that the meters read."""

    @property
    def token_ids(self) -> Sequence[Sequence[int | None]]: ...
    @property
    def sampling_seconds(self) -> float: ...


class Histogram:
    """Count the values at most each bound, and sum them: what Prometheus keeps of a distribution.

    >>> waits = Histogram((0.1, 1.0))
    >>> for seconds in (0.05, 0.1, 7.0): waits.observe(seconds)
    >>> waits.cumulative(), round(waits.sum, 2)
    ([2, 2, 3], 7.15)
    """

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.sum = 0.0
        self._counts = [0] * (len(bounds) + 1)  # the last is for what is over every bound

    def observe(self, value: float, times: int = 1) -> None:
        self._counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times

    def cumulative(self) -> list[int]:
        """At most each bound, and all of them. From one copy, so that it never shrinks along the bounds."""
        return list(accumulate(self._counts.copy()))


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """The load of an engine, now."""

    num_running: int = 0
    num_waiting: int = 0
    kv_cache_usage: float = 0.0  # the fraction of the blocks that running requests hold
    num_preemptions: int = 0


def _seconds() -> Histogram:
    return Histogram(SECONDS)


def _tokens() -> Histogram:
    return Histogram(TOKENS)


@dataclass(slots=True)
class EngineMeters:
    """Everything that only grows. A prompt is counted once, however many choices share its prefill."""

    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    generation_tokens: int = 0
    step_seconds: float = 0.0
    sampling_seconds: float = 0.0  # of step_seconds
    finished: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(REASONS, 0)))
    step_tokens: Histogram = field(default_factory=_tokens)
    time_to_first_token: Histogram = field(default_factory=_seconds)
    inter_token_latency: Histogram = field(default_factory=_seconds)
    queue_time: Histogram = field(default_factory=_seconds)
    prefill_time: Histogram = field(default_factory=_seconds)
    latency: Histogram = field(default_factory=_seconds)
    request_prompt_tokens: Histogram = field(default_factory=_tokens)
    request_generation_tokens: Histogram = field(default_factory=_tokens)
    drafts: DraftCounts = field(default_factory=DraftCounts)

    def add_step(self, batch: Batch, result: StepTokens, seconds: float, now: float) -> None:
        """Count what a step drew.

        To be called before its tokens are taken in, while a request still knows when it had its last.
        """
        self.step_seconds += seconds
        self.sampling_seconds += result.sampling_seconds
        self.step_tokens.observe(batch.num_tokens)
        # requests that decode together waited equally long: one value, not one a request
        gaps: Counter[float] = Counter()
        for (request, _), token_ids in zip(batch.draws, result.token_ids, strict=True):
            count = sum(token_id is not None for token_id in token_ids)
            if not count:
                continue
            self.generation_tokens += count
            if request.times.last_token is None:
                self._add_first_token(request, now)
            else:
                gaps[now - request.times.last_token] += 1
            if count > 1:  # a draft's tokens come at one moment
                gaps[0.0] += count - 1
        for seconds, times in gaps.items():
            self.inter_token_latency.observe(seconds, times)

    def _add_first_token(self, request: Request, now: float) -> None:
        arrived = request.times.arrived
        admitted = now if request.times.admitted is None else request.times.admitted
        self.time_to_first_token.observe(now - arrived)
        self.queue_time.observe(admitted - arrived)
        self.prefill_time.observe(now - admitted)
        # A cached prefix leaves a token to run: a choice that ran none was forked from the one that did.
        if request.num_cached_tokens < request.num_prompt_tokens:
            self.prompt_tokens += request.num_prompt_tokens
            self.cached_prompt_tokens += request.num_cached_tokens

    def add_end(self, request: Request, reason: str, now: float) -> None:
        """A choice ended: "stop", "length", "abort" or "error"."""
        self.finished[reason] += 1
        self.latency.observe(now - request.times.arrived)
        self.request_prompt_tokens.observe(request.num_prompt_tokens)
        self.request_generation_tokens.observe(request.num_output_tokens)
