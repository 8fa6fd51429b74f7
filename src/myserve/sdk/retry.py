"""Decides whether to ask again, and when: the one place of the SDK that does.

A sample that is asked for again keeps its seed, so it is the same sample: drawing a new one would favour short
completions, which are cut less often.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from myserve.sdk.errors import AttemptFailed, Failure

__all__ = ["TOKENS_OF_PROGRESS", "RetryPolicy", "retrying"]

T = TypeVar("T")
log = logging.getLogger("myserve.sdk")
# An attempt that leaves this many tokens more than it began with starts the count anew: a long sample survives any
# number of cuts. Fewer do not, or a server that cuts each stream after its first chunk would be asked max_tokens times.
TOKENS_OF_PROGRESS = 16


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Exponential backoff with jitter; `Retry-After` is honoured, up to ten minutes.

    `max_attempts` counts attempts in a row that left fewer than 16 new tokens: a long stream that is cut again and
    again, but resumes each time, goes on. Pauses are in seconds.

    >>> RetryPolicy(max_attempts=2).pause(1, Failure("refused", "no such model", 404)) is None
    True
    >>> 0.25 <= RetryPolicy(first_pause=0.5).pause(1, Failure("transport", "reset")) <= 0.5
    True
    """

    max_attempts: int = 10
    first_pause: float = 0.5
    longest_pause: float = 30.0

    def pause(self, attempt: int, failure: Failure) -> float | None:
        """Return the seconds to wait after the failure of attempt number `attempt` (from 1); None: it is final."""
        if not failure.retryable or attempt >= self.max_attempts:
            return None
        backoff = min(self.longest_pause, self.first_pause * 2.0 ** min(attempt - 1, 60))
        # Half fixed, half random: spreads a crowd that failed together, yet never asks again at once.
        jittered = backoff * random.uniform(0.5, 1.0)
        return jittered if failure.retry_after is None else failure.retry_after + jittered * 0.1


async def retrying(policy: RetryPolicy, attempt: Callable[[], Awaitable[T]]) -> T:
    """Return what `attempt` returns, tried as often as the policy allows.

    Raises the last attempt's `AttemptFailed` when that was final.
    """
    failures = 0
    while True:
        try:
            return await attempt()
        except AttemptFailed as ended:
            failures += 1
            pause = policy.pause(failures, ended.failure)
            if pause is None:
                raise
            log.info("attempt %d failed, again in %.1f s: %s", failures, pause, ended.failure.message)
        await asyncio.sleep(pause)
