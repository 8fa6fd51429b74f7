"""The bound on completions that are open at once, and an estimate of the time until there is room again."""

from __future__ import annotations

from myserve.errors import OverloadedError

__all__ = ["QueueBound"]


class QueueBound:
    """Counts the choices that wait or run. Not locked: its owner does that.

    >>> queue = QueueBound(limit=4, side_by_side=2)
    >>> queue.enter(4); queue.leave(seconds=20.0)
    >>> queue.enter(2)
    Traceback (most recent call last):
    ...
    myserve.errors.OverloadedError: 3 completions wait or run, and no more than 4 may; try again later
    """

    def __init__(self, limit: int, side_by_side: int) -> None:
        self.num_open = 0
        self._limit = limit
        self._side_by_side = side_by_side
        self._mean_duration = 0.0  # seconds from arrival to end, a moving average

    def check(self, n: int) -> None:
        """Raise OverloadedError where `n` choices are too many, with the seconds in which enough others will end."""
        surplus = self.num_open + n - self._limit
        if surplus > 0:
            raise OverloadedError(
                f"{self.num_open} completions wait or run, and no more than {self._limit} may; try again later",
                retry_after=max(1.0, surplus / self._side_by_side * self._mean_duration),
            )

    def enter(self, n: int) -> None:
        """Count `n` choices in. Raises OverloadedError."""
        self.check(n)
        self.num_open += n

    def leave(self, seconds: float) -> None:
        """Count one choice out that has ended, so many seconds after it came."""
        self.num_open -= 1
        self._mean_duration += 0.1 * (seconds - self._mean_duration)
