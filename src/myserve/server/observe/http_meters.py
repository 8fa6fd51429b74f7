"""The event loop counts HTTP answers by route, method and status, and measures how late it runs itself."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, defaultdict

from myserve.engine.meters import SECONDS, Histogram

__all__ = ["METHODS", "HttpMeters", "LoopWatchdog", "method_label"]

METHODS = frozenset({"GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH"})

log = logging.getLogger("myserve.server")


def method_label(method: str) -> str:
    """Return an HTTP method as a label: clients may invent methods, and must not make series.

    >>> method_label("GET"), method_label("BREW")
    ('GET', '_OTHER')
    """
    return method if method in METHODS else "_OTHER"


class HttpMeters:
    """Counts of answers. Each label is from a closed set: `handler` is a route's path as it is declared.

    >>> meters = HttpMeters()
    >>> meters.add("GET", "none", 404, 0.01)
    >>> meters.requests
    Counter({('GET', 'none', 404): 1})
    """

    def __init__(self) -> None:
        self.in_progress = 0
        self.requests: Counter[tuple[str, str, int]] = Counter()  # (method, handler, status)
        self.durations: defaultdict[str, Histogram] = defaultdict(lambda: Histogram(SECONDS))  # by handler

    def add(self, method: str, handler: str, status: int, seconds: float) -> None:
        """Count one answer."""
        self.requests[method_label(method), handler, status] += 1
        self.durations[handler].observe(seconds)


class LoopWatchdog:
    """Measures how late the event loop runs what is due: while something blocks it, no request is answered.

    Every 50 ms a callback is due, and its lateness in seconds goes into `lag`. A block of 3 s is one value of 3 s.
    """

    INTERVAL_SECONDS = 0.05
    NOTICE_SECONDS = 1.0

    def __init__(self) -> None:
        self.lag = Histogram(SECONDS)
        self.longest = 0.0
        self._timer: asyncio.Handle | None = None
        self._due = 0.0

    def start(self) -> None:
        """Begin to measure the running loop."""
        self._look_later(asyncio.get_running_loop())

    def stop(self) -> None:
        """End the measurement. Idempotent."""
        if self._timer is not None:
            self._timer.cancel()

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        late = max(0.0, loop.time() - self._due)
        self.lag.observe(late)
        self.longest = max(self.longest, late)
        if late > self.NOTICE_SECONDS:
            log.warning("the event loop was blocked for %.1f s: no request was answered meanwhile", late)
        self._look_later(loop)

    def _look_later(self, loop: asyncio.AbstractEventLoop) -> None:
        # kept here: what uvloop returns for a moment that has passed meanwhile does not know it
        self._due = loop.time() + self.INTERVAL_SECONDS
        self._timer = loop.call_at(self._due, self._look, loop)
