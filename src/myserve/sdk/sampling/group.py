"""The samples of one prompt, from admission to the last token.

A flight is one HTTP request: samples of consecutive indices that start from the same tokens. Each sample
gives its permit back when it ends; a flight that fails gives back the rest, and the unfinished fly again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Literal

from myserve.sdk.concurrency.gate import Permit
from myserve.sdk.errors import AttemptFailed, Failure, SamplingDeadlineError, SamplingError
from myserve.sdk.request import SampleRequest
from myserve.sdk.retry import retrying
from myserve.sdk.sampling.track import Decode, Track
from myserve.sdk.transport.chunks import chunks_of
from myserve.sdk.transport.pool import ServerPool, new_request_id
from myserve.sdk.types import SampledCompletion, SampleDelta
from myserve.wire.perf_metrics import PerfMetrics

OnError = Literal["raise", "keep", "refill"]
REFILL_ROUNDS = 3


class Group:
    """Draws the given sample indices of one request.

    `on_delta` hears every chunk of a sample, `on_end` every sample that is whole or failed for good.
    """

    def __init__(
        self,
        request: SampleRequest,
        indices: Sequence[int],
        backend: ServerPool,
        *,
        on_error: OnError = "raise",
        decode: Decode | None = None,
        on_delta: Callable[[SampleDelta], None] | None = None,
        on_end: Callable[[SampledCompletion | SamplingError], None] | None = None,
    ) -> None:
        self.tracks = [Track(request, index) for index in indices]
        self._request = request
        self._backend = backend
        self._on_error = on_error
        self._decode = decode
        self._on_delta = on_delta
        self._on_end = on_end
        self._request_id = new_request_id()  # kept over retries, so that a server's log shows them as one
        self._started = time.monotonic()
        self._permits: list[Permit] = []
        self._first_token = asyncio.Event()

    async def run(self, timeout: float | None = None) -> None:
        """Until every track has its completion or its error. `timeout`: seconds for all of it."""
        try:
            async with asyncio.timeout(timeout) as scope:
                await self._round(self.tracks)
                for _ in range(REFILL_ROUNDS if self._on_error == "refill" else 0):
                    await self._refill()
        except TimeoutError:
            if not scope.expired():
                raise
            self._expire(timeout or 0.0)
        if self._on_error != "keep":
            for track in self.tracks:
                if track.error is not None:
                    raise track.error

    async def _refill(self) -> None:
        failed = [track for track in self.tracks if track.error is not None and track.error.retryable]
        self._backend.stats.failed -= len(failed)
        for track in failed:
            track.error = None
        if failed:
            await self._round(failed)

    async def _round(self, tracks: list[Track]) -> None:
        self._dialect = await self._backend.dialect()
        try:
            async with asyncio.TaskGroup() as self._tasks:
                # Where each sample is a request, one goes ahead and warms the prefix for the others.
                leads = len(tracks) if self._dialect.batches_n else 1
                await self._admit(tracks[:leads])
                if tracks[leads:]:
                    await self._first_token.wait()
                    await self._admit(tracks[leads:])
        except BaseExceptionGroup as failures:
            raise _first_of(failures) from None
        finally:
            for permit in self._permits:  # those of tasks that were cancelled before their first step
                permit.release_all()
            self._permits.clear()

    async def _admit(self, tracks: list[Track]) -> None:
        """Lets tracks fly as the gate grants permits, in order; what is granted together flies together."""
        if not tracks:
            return
        async with self._backend.gate.ticket(len(tracks)) as ticket:
            while tracks:
                permit = await ticket.take()
                granted, tracks = tracks[: permit.count], tracks[permit.count :]
                for flight in self._flights(granted):
                    part = permit.split(len(flight))
                    self._permits.append(part)
                    self._tasks.create_task(self._pursue(flight, part))

    def _flights(self, tracks: list[Track]) -> list[list[Track]]:
        """Runs of consecutive indices without tokens; a track that has some goes on alone."""
        flights: list[list[Track]] = []
        for track in tracks:
            last = flights[-1][-1] if flights else None
            joins = last is not None and last.index == track.index - 1 and not (last.ids or track.ids)
            if joins and self._dialect.batches_n:
                flights[-1].append(track)
            else:
                flights.append([track])
        return flights

    async def _pursue(self, tracks: list[Track], permit: Permit) -> None:
        """Flies these tracks until each is done. The permit is for the first attempt alone."""
        held = [permit]

        async def attempt() -> None:
            if held:
                return await self._fly(tracks, held.pop())
            left = [track for track in tracks if not track.is_done]
            if not left:
                return None  # the stream was cut behind its last sample: nothing was lost
            if len(self._flights(left)) > 1:  # something was gained: each goes on from what it has
                tracks.clear()
                self._tasks.create_task(self._admit(left))
                return None
            async with self._backend.gate.ticket(len(left)) as ticket:
                again = await ticket.take()
            tracks[:] = left[: again.count]
            self._permits.append(again)
            if left[again.count :]:
                self._tasks.create_task(self._admit(left[again.count :]))
            return await self._fly(tracks, again)

        failed = await retrying(self._backend.retry, attempt, lambda: sum(len(track.ids) for track in tracks))
        if failed is not None:
            for track in tracks:
                if not track.is_done:
                    self._fail(track, *failed)

    async def _fly(self, tracks: list[Track], permit: Permit) -> None:
        """One HTTP request for these tracks."""
        resumes = self._dialect.resumes and len(tracks) == 1
        self._backend.stats.resumed += bool(resumes and tracks[0].ids)
        prior, *_ = [self._begin(track, resume=resumes) for track in tracks]
        body = self._dialect.body(self._request, tracks[0].index, len(tracks), prior)
        prompt = self._request.prompt_token_ids
        with permit:
            try:
                async with self._backend.stream(
                    self._dialect.path, body, self._request_id, prompt, len(tracks)
                ) as reads:
                    await self._read(reads, tracks, permit)
            except AttemptFailed as ended:
                if ended.failure.kind == "busy":
                    self._backend.refused(permit)
                raise
            finally:
                self._first_token.set()

    def _begin(self, track: Track, *, resume: bool) -> list[int]:
        had = len(track.ids)
        prior = track.begin(resume=resume)
        if had and not prior and self._on_delta is not None:
            self._on_delta(SampleDelta(track.index, restarted=True))
        return prior

    async def _read(self, reads: AsyncIterator[list[bytes]], tracks: list[Track], permit: Permit) -> None:
        samples = len(tracks)
        on_delta = self._on_delta
        metrics: dict[str, Any] | None = None
        try:
            async for events in reads:
                now = time.monotonic() - self._started
                self._first_token.set()
                for chunk in chunks_of(events):
                    metrics = chunk.perf_metrics or metrics
                    for choice in chunk.choices or ():
                        track = tracks[choice.index]
                        track.feed(choice, now)
                        if on_delta is not None:
                            on_delta(track.delta(choice))
                        # Alone, a sample waits for its stream's end: its ids may come after its finish reason.
                        if samples > 1 and track.finish_reason is not None and track.is_whole:
                            self._complete(track, permit)
        except IndexError as error:
            raise _broken(f"a chunk for choice {choice.index} of {samples}") from error
        finally:
            if metrics is not None:
                self._backend.observe(PerfMetrics.from_mapping(metrics), samples, permit)
        for track in tracks:
            if not track.is_done and track.finish_reason is None:
                raise _broken(f"the stream ended without a word on sample {track.index}")
            self._complete(track, permit)

    def _complete(self, track: Track, permit: Permit) -> None:
        if track.is_done:
            return
        completion = track.complete(self._request_id, self._decode)
        self._backend.stats.samples += 1
        self._backend.stats.completion_tokens += completion.completion_len
        permit.release()
        if self._on_end is not None:
            self._on_end(completion)

    def _fail(self, track: Track, failure: Failure, attempts: int) -> None:
        kind = SamplingDeadlineError if failure.kind == "deadline" else SamplingError
        track.error = kind(failure, index=track.index, attempts=attempts)
        self._backend.stats.failed += 1
        if self._on_end is not None:
            self._on_end(track.error)
        if self._on_error == "raise" or (not track.error.retryable and self._on_error == "refill"):
            raise track.error

    def _expire(self, timeout: float) -> None:
        for track in self.tracks:
            if not track.is_done:
                tokens = f"it had {len(track.ids)} of up to {self._request.max_tokens} tokens"
                failure = Failure("deadline", f"{timeout:g} s were not enough; {tokens}")
                self._fail(track, failure, track.requests)


def _broken(what: str) -> AttemptFailed:
    return AttemptFailed(Failure("protocol", what))


def _first_of(failures: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first failure of a task group: its siblings were cancelled because of it."""
    first = failures.exceptions[0]
    return _first_of(first) if isinstance(first, BaseExceptionGroup) else first
