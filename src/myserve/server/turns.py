"""Work that is long on the whole gives the event loop to other tasks now and then."""

from __future__ import annotations

import asyncio

__all__ = ["LOOP_SECONDS", "LoopTurns"]

LOOP_SECONDS = 0.02  # that one request keeps the event loop at a time


class LoopTurns:
    """Measures how long the current task has had the event loop, between two calls of `take`.

    >>> async def work() -> int:
    ...     turns = LoopTurns(seconds=0.0)
    ...     others = asyncio.ensure_future(asyncio.sleep(0, result=1))
    ...     await turns.take()
    ...     await turns.take()
    ...     return int(others.done())
    >>> asyncio.run(work())
    1
    """

    def __init__(self, seconds: float = LOOP_SECONDS) -> None:
        self._seconds = seconds
        self._loop = asyncio.get_running_loop()
        self._began = self._loop.time()

    async def take(self) -> None:
        """Go on at once, or let the other tasks run first where this one has had its time."""
        if self._loop.time() - self._began >= self._seconds:
            await asyncio.sleep(0)
            self._began = self._loop.time()
