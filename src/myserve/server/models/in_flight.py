"""The generations that are being answered, so that each can be cut: at its deadline, or because the server ends."""

from __future__ import annotations

import asyncio
from typing import Protocol

from myserve.errors import MyserveError
from myserve.server import caller
from myserve.server.errors import DeadlineError, ShuttingDownError


class Cuttable(Protocol):
    """A `Generation`, which imports this module's users."""

    def cut(self, error: MyserveError) -> None: ...


class InFlight:
    """Who is in flight on one model. Lives on the event loop, as generations do."""

    def __init__(self, timeout: float | None = None) -> None:
        self._timeout = timeout  # seconds for one generation; None: as long as it takes
        self._timers: dict[Cuttable, asyncio.TimerHandle | None] = {}
        self._closed = False

    def __len__(self) -> int:
        return len(self._timers)

    def add(self, generation: Cuttable, timeout: float | None = None) -> None:
        """Count it in. It is cut so many seconds after its request came, or the server's, whichever are fewer.

        Raises DeadlineError where they are over before it begins, ShuttingDownError once `close` was called.
        """
        if self._closed:
            raise ShuttingDownError
        limits = [seconds for seconds in (timeout, self._timeout) if seconds is not None]
        self._timers[generation] = self._timer(generation, min(limits)) if limits else None

    def _timer(self, generation: Cuttable, limit: float) -> asyncio.TimerHandle:
        whose = "this server's" if limit == self._timeout else "the request's own"
        error = DeadlineError(f"not done after {limit:g} s, which is {whose} limit")
        loop = asyncio.get_running_loop()
        left = caller.current(loop.time()).arrived + limit - loop.time()
        if left <= 0:
            raise error
        return loop.call_later(left, generation.cut, error)

    def remove(self, generation: Cuttable) -> None:
        """It has ended. Idempotent."""
        if (timer := self._timers.pop(generation, None)) is not None:
            timer.cancel()

    def close(self) -> None:
        """Take no more; who is in goes on."""
        self._closed = True

    def cut_all(self) -> None:
        """End whoever still runs, with an error that says why."""
        for generation in list(self._timers):
            generation.cut(ShuttingDownError())
