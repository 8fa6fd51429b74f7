"""The samples of one prompt, from admission to the last token.

An attempt is one HTTP request: samples of consecutive indices that start from the same tokens. Each sample releases
its place when it ends; an attempt that fails releases the rest, and the unfinished samples are admitted anew.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Literal

from myserve.sdk.concurrency.semaphore import Permit
from myserve.sdk.errors import Failure, SamplingDeadlineError, SamplingError
from myserve.sdk.request import SampleRequest
from myserve.sdk.retry import log
from myserve.sdk.sampling.after_failure import after_failure, requests_for
from myserve.sdk.sampling.attempt import Attempt, Surroundings
from myserve.sdk.sampling.sample import Decode, Sample
from myserve.sdk.transport.pool import ServerPool, new_request_id
from myserve.sdk.types import SampledCompletion, SampleDelta

__all__ = ["Group", "OnError"]

OnError = Literal["raise", "keep", "refill"]
REFILL_ROUNDS = 3


class Group:
    """Draw the given sample indices of one request.

    `on_delta` is called with every chunk of a sample, `on_end` with every sample that is whole or failed for good.
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
        self.samples = [Sample(request, index) for index in indices]
        self._request = request
        self._backend = backend
        self._on_error = on_error
        self._on_end = on_end
        self._permits: set[Permit] = set()
        self._surroundings = Surroundings(
            request=request,
            backend=backend,
            request_id=new_request_id(),  # kept over retries, so that a server's log shows them as one
            started=time.monotonic(),
            first_token=asyncio.Event(),
            decode=decode,
            on_delta=on_delta,
            on_end=on_end,
        )

    async def run(self, timeout: float | None = None) -> None:
        """Return when every sample has its completion or its error. `timeout`: seconds for all of it.

        Raises the first `SamplingError`, unless `on_error` is "keep".
        """
        try:
            async with asyncio.timeout(timeout) as scope:
                await self._round(self.samples)
                for _ in range(REFILL_ROUNDS if self._on_error == "refill" else 0):
                    await self._refill()
        except TimeoutError:
            if not scope.expired():
                raise
            self._expire(timeout or 0.0)
        if self._on_error != "keep":
            for sample in self.samples:
                if sample.error is not None:
                    raise sample.error

    async def _refill(self) -> None:
        failed = [sample for sample in self.samples if sample.error is not None and sample.error.retryable]
        self._backend.stats.failed -= len(failed)
        for sample in failed:
            sample.revive()
        if failed:
            await self._round(failed)

    async def _round(self, samples: list[Sample]) -> None:
        self._dialect = await self._backend.dialect()
        try:
            async with asyncio.TaskGroup() as self._tasks:
                # Where each sample is a request, one goes ahead and warms the prefix for the others.
                leads = len(samples) if self._dialect.max_n > 1 else 1
                await self._admit(samples[:leads])
                if samples[leads:]:
                    await self._surroundings.first_token.wait()
                    await self._admit(samples[leads:])
        except BaseExceptionGroup as failures:
            raise _first_of(failures) from None
        finally:
            for permit in self._permits:  # those of tasks that were cancelled before their first step
                permit.release_all()
            self._permits.clear()

    async def _admit(self, samples: Sequence[Sample]) -> None:
        """Start attempts as the semaphore grants permits, in order; what is granted together goes together."""
        if not samples:
            return
        async with self._backend.semaphore.waiter(len(samples)) as waiter:
            while samples:
                permit = await waiter.take()
                granted, samples = samples[: permit.count], samples[permit.count :]
                for part in requests_for(granted, self._dialect):
                    own = permit.split(len(part))
                    self._permits.add(own)
                    self._tasks.create_task(self._try(part, own))

    async def _try(self, samples: list[Sample], permit: Permit) -> None:
        """Make one attempt at these samples, then do what its end asks for."""
        try:
            failure = await Attempt(self._surroundings, self._dialect, samples, permit).run()
        finally:
            self._permits.discard(permit)  # released by now
        if failure is None:
            return
        step = after_failure(samples, failure, self._backend.retry)
        for sample in step.failed:
            self._fail(sample, failure)
        if step.again:
            log.info("%d samples again in %.1f s: %s", len(step.again), step.pause, failure.message)
            await asyncio.sleep(step.pause)
            await self._admit(step.again)

    def _fail(self, sample: Sample, failure: Failure) -> None:
        kind = SamplingDeadlineError if failure.kind == "deadline" else SamplingError
        sample.error = kind(failure, index=sample.index, attempts=sample.requests)
        self._backend.stats.failed += 1
        if self._on_end is not None:
            self._on_end(sample.error)
        if self._on_error == "raise" or (not sample.error.retryable and self._on_error == "refill"):
            raise sample.error

    def _expire(self, timeout: float) -> None:
        for sample in self.samples:
            if not sample.is_done:
                self._fail(sample, sample.deadline_failure(timeout))


def _first_of(failures: BaseExceptionGroup[BaseException]) -> BaseException:
    """Return the first failure of a task group: its siblings were cancelled because of it."""
    first = failures.exceptions[0]
    return _first_of(first) if isinstance(first, BaseExceptionGroup) else first
