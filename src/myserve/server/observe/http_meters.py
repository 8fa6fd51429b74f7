"""What the event loop counts of HTTP: answers by route and status, and how long each took."""

from __future__ import annotations

from collections import Counter, defaultdict

from myserve.engine.meters import SECONDS, Histogram


class HttpMeters:
    """`handler` is a route's path as it is declared, never as it was sent: a scanner must not make series.

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
        self.requests[method, handler, status] += 1
        self.durations[handler].observe(seconds)
