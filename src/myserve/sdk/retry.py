"""The only retry loop of the SDK, and the one place that decides whether to ask again and when.

A sample that is asked for again keeps its seed, so it is the same sample: drawing a new one would favour
short completions, which are cut less often.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from myserve.sdk.errors import AttemptFailed, Failure

log = logging.getLogger("myserve.sdk")


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Exponential backoff with jitter; `Retry-After` is honoured.

    `max_attempts` counts attempts in a row without a new token: a stream that is cut again and again, but
    resumes each time, goes on. Pauses are in seconds.

    >>> RetryPolicy(max_attempts=2).pause(1, Failure("refused", "no such model", 404)) is None
    True
    >>> 0.25 <= RetryPolicy(first_pause=0.5).pause(1, Failure("transport", "reset")) <= 0.5
    True
    """

    max_attempts: int = 10
    first_pause: float = 0.5
    longest_pause: float = 30.0

    def pause(self, attempt: int, failure: Failure) -> float | None:
        """Seconds to wait after the failure of attempt number `attempt` (from 1); None: it is final."""
        if not failure.retryable or attempt >= self.max_attempts:
            return None
        backoff = min(self.longest_pause, self.first_pause * 2.0 ** (attempt - 1))
        # Half fixed, half random: spreads a crowd that failed together, yet never asks again at once.
        jittered = backoff * random.uniform(0.5, 1.0)
        return jittered if failure.retry_after is None else failure.retry_after + jittered * 0.1


async def retrying(
    policy: RetryPolicy,
    attempt: Callable[[], Awaitable[None]],
    progress: Callable[[], int],
) -> tuple[Failure, int] | None:
    """Runs `attempt` until it returns, or fails for good: then the last failure and the number of attempts.

    `progress` is any number that grows when something was gained; a gain starts the count anew.
    The caller holds nothing while this waits: permits are taken and given back inside `attempt`.
    """
    total = in_a_row = 0
    while True:
        before = progress()
        try:
            await attempt()
            return None
        except AttemptFailed as ended:
            total += 1
            in_a_row = 1 if progress() > before else in_a_row + 1
            pause = policy.pause(in_a_row, ended.failure)
            if pause is None:
                return ended.failure, total
            log.info("attempt %d failed, again in %.1f s: %s", total, pause, ended.failure.message)
            await asyncio.sleep(pause)
