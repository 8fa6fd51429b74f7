"""Admission: at most `limit` samples in flight, first come first served, through any number of event loops.

The law: in-flight is counted against a limit that may move. (Shrinking by taking free slots off a semaphore
was rejected: a saturated semaphore has none, so it never shrinks.)
"""

from __future__ import annotations

import asyncio
import threading
from collections import OrderedDict
from types import TracebackType


class Gate:
    """Lets `limit` samples through at a time; None lets all through.

    A ticket asks for n; the head of the queue takes what is free, in as many permits as that needs, and
    nobody overtakes it. The limit may fall below what is in flight: nothing enters until enough has left.

    >>> gate = Gate(2)
    >>> gate.limit, gate.in_flight, gate.waiting
    (2, 0, 0)
    """

    def __init__(self, limit: int | None) -> None:
        self._lock = threading.RLock()
        self._limit = limit
        self._queue: OrderedDict[Ticket, None] = OrderedDict()  # in order, and quick to leave from the middle
        self.in_flight = 0
        self.peak_in_flight = 0  # since the last `restart_peak`
        self.epoch = 0  # counts the changes of the limit: a permit carries the one that it was given under

    @property
    def limit(self) -> int | None:
        return self._limit

    @limit.setter
    def limit(self, limit: int | None) -> None:
        with self._lock:
            self._limit = limit
            self.epoch += 1
            self._admit()

    @property
    def waiting(self) -> int:
        """Samples that wait for admission."""
        return sum(ticket.due for ticket in self._queue)

    def ticket(self, n: int) -> Ticket:
        """A place in the queue for n samples; enter it with `async with`."""
        assert n > 0, "a ticket for nothing would wait for ever, and everyone behind it"
        return Ticket(self, n)

    def restart_peak(self) -> None:
        self.peak_in_flight = self.in_flight

    def _join(self, ticket: Ticket) -> None:
        with self._lock:
            self._queue[ticket] = None
            self._admit()

    def _leave(self, ticket: Ticket) -> None:
        with self._lock:
            self._queue.pop(ticket, None)
            self._release(ticket.untaken)
            ticket.untaken = ticket.due = 0
            self._admit()

    def _release(self, count: int) -> None:
        with self._lock:
            self.in_flight -= count
            assert self.in_flight >= 0, "a permit was given back twice"
            self._admit()

    def _admit(self) -> None:
        while self._queue:
            head = next(iter(self._queue))
            free = head.due if self._limit is None else min(head.due, self._limit - self.in_flight)
            if head.is_abandoned:  # its loop was closed under it: nobody will ever take
                del self._queue[head]
                continue
            if free <= 0:
                return
            self.in_flight += free
            self.peak_in_flight = max(self.peak_in_flight, self.in_flight)
            head.grant(free)
            if head.due == 0:
                del self._queue[head]


class Ticket:
    """A place in the gate's queue: `await take()` until `due` and `untaken` are both 0."""

    def __init__(self, gate: Gate, n: int) -> None:
        self._gate = gate
        self._loop = asyncio.get_running_loop()
        self._granted = asyncio.Event()
        self.due = n  # not granted yet
        self.untaken = 0  # granted, not taken yet

    async def __aenter__(self) -> Ticket:
        self._gate._join(self)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # A waiter that is cancelled between grant and take gives back what it was granted: no lost wake-up.
        self._gate._leave(self)

    @property
    def is_abandoned(self) -> bool:
        return self._loop.is_closed()

    async def take(self) -> Permit:
        """Waits until something is granted, and takes all of it."""
        while not self.untaken:
            self._granted.clear()
            await self._granted.wait()
        with self._gate._lock:
            count, self.untaken = self.untaken, 0
            return Permit(self._gate, count)

    def grant(self, count: int) -> None:
        self.due -= count
        self.untaken += count
        if _running_loop() is self._loop:
            self._granted.set()
        else:
            self._loop.call_soon_threadsafe(self._granted.set)


class Permit:
    """The right to have `count` samples in flight; each is given back once, the rest by `release_all`."""

    def __init__(self, gate: Gate, count: int) -> None:
        self._gate = gate
        self.count = count
        self.epoch = gate.epoch

    def split(self, count: int) -> Permit:
        """Moves `count` of this permit's samples into a permit of their own."""
        assert count <= self.count
        self.count -= count
        part = Permit(self._gate, count)
        part.epoch = self.epoch
        return part

    def release(self, count: int = 1) -> None:
        assert count <= self.count, "a permit was given back twice"
        self.count -= count
        self._gate._release(count)

    def release_all(self) -> None:
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
