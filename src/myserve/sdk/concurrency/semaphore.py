"""A semaphore over samples in flight: first come, first served, its limit may move, any number of event loops.

In-flight samples are counted against a limit. (Shrinking by taking free slots off a plain semaphore was rejected: a
saturated semaphore has none, so it never shrinks.)
"""

from __future__ import annotations

import asyncio
import threading
from collections import OrderedDict
from types import TracebackType

from myserve.sdk.concurrency.fork import reset_after_fork

__all__ = ["Permit", "ResizableSemaphore", "Waiter"]


class ResizableSemaphore:
    """Admit at most `limit` samples at a time; None admits all.

    A waiter asks for n; the first in the queue takes what is free, in as many permits as that needs, and is never
    overtaken. The limit may fall below what is in flight: nothing is admitted until enough has ended.

    >>> semaphore = ResizableSemaphore(2)
    >>> semaphore.limit, semaphore.in_flight, semaphore.waiting
    (2, 0, 0)
    """

    def __init__(self, limit: int | None) -> None:
        self._limit = limit
        # counts the changes of the limit: a permit carries the version that it was given under
        self.limit_version = 0
        self._after_fork()
        reset_after_fork(self)

    def _after_fork(self) -> None:
        self._lock = threading.RLock()
        # ordered, and quick to leave from the middle
        self._queue: OrderedDict[Waiter, None] = OrderedDict()
        self.in_flight = 0
        self.peak_in_flight = 0  # since the last `restart_peak`

    @property
    def limit(self) -> int | None:
        """Return how many samples may be in flight; None means no limit. Setting it admits what has room now."""
        return self._limit

    @limit.setter
    def limit(self, limit: int | None) -> None:
        with self._lock:
            self._limit = limit
            self.limit_version += 1
            self._admit()

    @property
    def waiting(self) -> int:
        """Samples that wait for admission."""
        return sum(waiter.due for waiter in self._queue)

    def waiter(self, n: int) -> Waiter:
        """Return a place in the queue for n samples; enter it with `async with`."""
        assert n > 0, "a waiter for no samples would block the queue for ever"
        return Waiter(self, n)

    def restart_peak(self) -> None:
        """Begin a new period for `peak_in_flight`."""
        self.peak_in_flight = self.in_flight

    def _join(self, waiter: Waiter) -> None:
        with self._lock:
            self._queue[waiter] = None
            self._admit()

    def _leave(self, waiter: Waiter) -> None:
        with self._lock:
            self._queue.pop(waiter, None)
            self._release(waiter.untaken)
            waiter.untaken = waiter.due = 0
            self._admit()

    def _release(self, count: int) -> None:
        with self._lock:
            self.in_flight -= count
            assert self.in_flight >= 0, "a permit was released twice"
            self._admit()

    def _admit(self) -> None:
        while self._queue:
            head = next(iter(self._queue))
            free = head.due if self._limit is None else min(head.due, self._limit - self.in_flight)
            if head.is_abandoned:  # its event loop was closed: what it is granted would never be taken
                del self._queue[head]
                continue
            if free <= 0:
                return
            self.in_flight += free
            self.peak_in_flight = max(self.peak_in_flight, self.in_flight)
            head._grant(free)
            if head.due == 0:
                del self._queue[head]


class Waiter:
    """A place in the semaphore's queue: `await take()` until `due` and `untaken` are both 0."""

    def __init__(self, semaphore: ResizableSemaphore, n: int) -> None:
        self._semaphore = semaphore
        self._loop = asyncio.get_running_loop()
        self._granted = asyncio.Event()
        self.due = n  # not granted yet
        self.untaken = 0  # granted, not taken yet

    async def __aenter__(self) -> Waiter:
        self._semaphore._join(self)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # A waiter that is cancelled between grant and take gives back what it was granted: no lost wake-up.
        self._semaphore._leave(self)

    @property
    def is_abandoned(self) -> bool:
        """Return whether its event loop was closed."""
        return self._loop.is_closed()

    async def take(self) -> Permit:
        """Wait until something is granted, and take all of it."""
        while not self.untaken:
            self._granted.clear()
            await self._granted.wait()
        with self._semaphore._lock:
            count, self.untaken = self.untaken, 0
            return Permit(self._semaphore, count)

    def _grant(self, count: int) -> None:
        self.due -= count
        self.untaken += count
        if _running_loop() is self._loop:
            self._granted.set()
        else:
            self._loop.call_soon_threadsafe(self._granted.set)


class Permit:
    """The right to have `count` samples in flight; each is released once, the rest by `release_all`."""

    def __init__(self, semaphore: ResizableSemaphore, count: int) -> None:
        self._semaphore = semaphore
        self.count = count
        self.limit_version = semaphore.limit_version

    def split(self, count: int) -> Permit:
        """Move `count` of this permit's samples into a permit of their own."""
        assert count <= self.count
        self.count -= count
        part = Permit(self._semaphore, count)
        part.limit_version = self.limit_version
        return part

    def release(self, count: int = 1) -> None:
        """Give back `count` places."""
        assert count <= self.count, "a permit was released twice"
        self.count -= count
        self._semaphore._release(count)

    def release_all(self) -> None:
        """Give back what is left of it."""
        self.release(self.count)

    def __enter__(self) -> Permit:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release_all()


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None
