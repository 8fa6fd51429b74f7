"""Generations in flight can be ended early: each at its deadline, all of them when the server shuts down."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from typing import Protocol

from myserve.errors import MyserveError
from myserve.server import caller
from myserve.server.errors import DeadlineError, ShuttingDownError

__all__ = ["Cuttable", "InFlight"]


class Cuttable(Protocol):
    """The part of a `Generation` that is used here."""

    def cut(self, error: MyserveError) -> None: ...
    def abort_requests(self, request_ids: Collection[str] | None) -> int: ...


class InFlight:
    """The generations in flight on one model. Used on the event loop alone."""

    def __init__(self, timeout: float | None = None) -> None:
        # seconds for one generation; None: as long as it takes
        self._timeout = timeout
        self._timers: dict[Cuttable, asyncio.TimerHandle | None] = {}
        self._closed = False

    def __len__(self) -> int:
        return len(self._timers)

    def add(self, generation: Cuttable, timeout: float | None = None) -> None:
        """Add a generation, and cut it `timeout` seconds (or the server's, if fewer) after its request came.

        Raises DeadlineError where that time is over before it begins, ShuttingDownError once `close` was called.
        """
        if self._closed:
            raise ShuttingDownError
        # the server's is for those who wait for their answers: a batch has its own
        own = None if caller.current(0.0).is_batch else self._timeout
        limits = [seconds for seconds in (timeout, own) if seconds is not None]
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
        """Remove a generation that has ended. Idempotent."""
        if (timer := self._timers.pop(generation, None)) is not None:
            timer.cancel()

    def abort(self, request_ids: Collection[str] | None = None) -> int:
        """End the requests of these ids, or all, with the tokens that they have; return how many there were."""
        return sum(generation.abort_requests(request_ids) for generation in list(self._timers))

    def close(self) -> None:
        """Take no more generations; those in flight go on."""
        self._closed = True

    def cut_all(self) -> None:
        """Cut every generation in flight, with an error that says why."""
        for generation in list(self._timers):
            generation.cut(ShuttingDownError())
