"""The generations that are being answered, so that each can be cut: at its deadline, or because the server ends."""

from __future__ import annotations

import asyncio
from typing import Protocol

from myserve.errors import MyserveError
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

    def add(self, generation: Cuttable) -> None:
        """Raises ShuttingDownError once `close` was called."""
        if self._closed:
            raise ShuttingDownError
        timer = None
        if self._timeout is not None:
            error = DeadlineError(f"not done after {self._timeout:g} s, which is this server's limit")
            timer = asyncio.get_running_loop().call_later(self._timeout, generation.cut, error)
        self._timers[generation] = timer

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
