"""One attempt at some samples of a group: an HTTP request, its stream read into them, and how it ended."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

from myserve.sdk.concurrency.semaphore import Permit
from myserve.sdk.errors import AttemptFailed, Failure, SamplingError
from myserve.sdk.request import SampleRequest
from myserve.sdk.sampling.bounds import max_stream_bytes
from myserve.sdk.sampling.sample import Decode, Sample
from myserve.sdk.transport.chunks import chunks_of
from myserve.sdk.transport.dialects import Dialect
from myserve.sdk.transport.pool import ServerPool
from myserve.sdk.types import SampledCompletion, SampleDelta
from myserve.wire.perf_metrics import PerfMetrics

__all__ = ["Attempt", "Surroundings"]

# While no token has come, a request may stand in the server's queue, and comments say that it does. They are taken for
# life for this many stall timeouts, and from the first token on not at all.
STALL_TIMEOUTS_IN_A_QUEUE = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """Hold what the attempts of a group share."""

    request: SampleRequest
    backend: ServerPool
    request_id: str
    started: float  # time.monotonic of the group's start
    first_token: asyncio.Event  # of the whole group
    decode: Decode | None
    on_delta: Callable[[SampleDelta], None] | None
    on_end: Callable[[SampledCompletion | SamplingError], None] | None


class Attempt:
    """One HTTP request for samples of consecutive indices; `permit` has a place for each."""

    def __init__(self, around: Surroundings, dialect: Dialect, samples: list[Sample], permit: Permit) -> None:
        self._around = around
        self._dialect = dialect
        self._samples = samples
        self._permit = permit
        self._resumes = dialect.resumes and len(samples) == 1
        self._last_progress = time.monotonic()
        self._has_tokens = False

    async def run(self) -> Failure | None:
        """Send the request and read its stream to the end. Returns None when every sample is whole.

        Otherwise every unfinished sample has the failure counted. Releases the permit in any case.
        """
        around = self._around
        body = self._body()
        samples = len(self._samples)
        limit = max_stream_bytes(around.request, samples)
        with self._permit:
            try:
                async with around.backend.stream(
                    self._dialect, body, around.request_id, around.request.prompt_token_ids, limit
                ) as reads:
                    await self._read(reads)
                    self._end()
                return None
            except AttemptFailed as ended:
                if ended.failure.kind == "busy":
                    around.backend.refused(self._permit)
                for sample in self._samples:
                    sample.count_failure(ended.failure, resumes=self._dialect.resumes)
                return ended.failure
            finally:
                around.first_token.set()

    def _body(self) -> dict[str, Any]:
        first = self._samples[0]
        self._around.backend.stats.resumed += bool(self._resumes and first.ids)
        seed = self._dialect.seed_of(self._around.request.seed, first.index)
        prior, *_ = [self._begin(sample, seed) for sample in self._samples]
        return self._dialect.body(self._around.request, first.index, len(self._samples), prior)

    def _begin(self, sample: Sample, seed: int) -> list[int]:
        had = len(sample.ids)
        prior = sample.begin(seed=seed, resume=self._resumes)
        if had and not prior and self._around.on_delta is not None:
            self._around.on_delta(SampleDelta(sample.index, restarted=True))
        return prior

    async def _read(self, reads: AsyncIterator[list[bytes]]) -> None:
        # One function, with its names bound outside of the loop: it runs for every token.
        around, samples = self._around, self._samples
        on_delta, num_samples = around.on_delta, len(samples)
        metrics: dict[str, Any] | None = None
        try:
            async for events in reads:
                now = time.monotonic()
                elapsed = now - around.started
                has_progress = False
                for chunk in chunks_of(events):
                    if chunk.perf_metrics is not None:
                        metrics = chunk.perf_metrics
                    for choice in chunk.choices or ():
                        if choice.index >= num_samples:
                            raise _broken(f"a chunk for choice {choice.index} of {num_samples}")
                        sample = samples[choice.index]
                        if sample.feed(choice, elapsed):
                            has_progress = True
                        if on_delta is not None:
                            on_delta(sample.delta(choice))
                        # Alone, a sample waits for its stream's end: its ids may come after its finish reason.
                        if num_samples > 1 and sample.finish_reason is not None and sample.is_whole:
                            self._complete(sample)
                if has_progress:
                    around.first_token.set()
                    self._last_progress, self._has_tokens = now, True
                else:
                    self._check_stall(now)
        finally:
            if metrics is not None:
                around.backend.observe(PerfMetrics.from_mapping(metrics), num_samples, self._permit)

    def _check_stall(self, now: float) -> None:
        limit = self._around.backend.stall_timeout * (1 if self._has_tokens else STALL_TIMEOUTS_IN_A_QUEUE)
        if now - self._last_progress > limit:
            message = f"the stream brought bytes, but no token, for more than {limit:g} s (stall_timeout)"
            raise AttemptFailed(Failure("transport", message))

    def _end(self) -> None:
        """Complete what the end of the stream makes whole."""
        for sample in self._samples:
            if not sample.is_done and sample.finish_reason is None:
                raise _broken(f"the stream ended without a finish reason for sample {sample.index}")
            self._complete(sample)

    def _complete(self, sample: Sample) -> None:
        if sample.is_done:
            return
        completion = sample.complete(self._around.request_id, self._around.decode)
        stats = self._around.backend.stats
        stats.samples += 1
        stats.completion_tokens += completion.completion_len
        self._permit.release()
        if self._around.on_end is not None:
            self._around.on_end(completion)


def _broken(what: str) -> AttemptFailed:
    return AttemptFailed(Failure("protocol", what))
