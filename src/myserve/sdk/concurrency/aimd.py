"""The arithmetic of an adaptive window: observations in, the next window out. No clock, no lock."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

__all__ = ["AIMD", "Observed"]


@dataclass(frozen=True, slots=True)
class Observed:
    """Hold what one period's samples tell of the server.

    `avg_queue` and `avg_service` (from admission to the last token) are in seconds (None: not known),
    `peak_in_flight` in samples, `kv_usage` a fraction.
    """

    avg_queue: float | None = None
    avg_service: float | None = None
    refused: bool = False  # a 429 or a 503
    peak_in_flight: int = 0
    kv_usage: float | None = None


@dataclass(frozen=True, slots=True)
class AIMD:
    """Compute a window of samples in flight by additive increase and multiplicative decrease (AIMD).

    Below the target the window grows in proportion to the room that is left; above it, it halves.

    >>> law = AIMD()
    >>> law.next_window(16, Observed(avg_queue=0.08, peak_in_flight=16))
    20
    >>> law.next_window(16, Observed(avg_queue=0.9, peak_in_flight=16))
    8
    """

    min_window: int = 1
    max_window: int = 256
    target: float = 0.5  # seconds of prefill queue
    growth: float = 0.25  # of the window, when the queue is empty
    kv_ceiling: float = 0.95

    def next_window(self, window: int, seen: Observed, *, gentle: bool = False) -> int:
        """Return the window after `seen`. `gentle` takes away what queues beyond the target, and no more.

        By Little's law a window is the pace times (service + queue), and while a queue stands the pace is the
        server's own. So the window with the wanted queue is `window * (service + target) / (service + queue)`.
        (Cuts by a fixed share were rejected: where a sample takes thirty seconds, one too many in flight queues
        for twice the target, and a cut of 30 per cent left slots of the server empty.)

        >>> AIMD().next_window(36, Observed(avg_queue=4.0, avg_service=30.0, peak_in_flight=36), gentle=True)
        32
        >>> AIMD().next_window(16, Observed(avg_queue=0.6, peak_in_flight=16), gentle=True)
        15
        >>> AIMD().next_window(16, Observed(avg_queue=0.0, peak_in_flight=3))
        16
        >>> AIMD().next_window(2, Observed(refused=True))
        1
        """
        if self.is_pressed(seen):
            return self._clamp(int(window * (self._cut(seen) if gentle else 0.5)))
        if seen.avg_queue is None or 2 * seen.peak_in_flight < window:
            # nothing was learnt: a window that is not filled tells nothing of a larger one
            return window
        room = 1.0 - seen.avg_queue / self.target
        return self._clamp(window + ceil(self.growth * window * room))

    def is_pressed(self, seen: Observed) -> bool:
        """Return whether the server has more than it should: a queue over the target, a refusal, a full KV cache."""
        too_long = seen.avg_queue is not None and seen.avg_queue > self.target
        too_full = seen.kv_usage is not None and seen.kv_usage > self.kv_ceiling
        return seen.refused or too_long or too_full

    def _cut(self, seen: Observed) -> float:
        if seen.refused or seen.avg_queue is None or seen.avg_queue <= self.target:
            return 0.7
        if seen.avg_service is None:
            excess = seen.avg_queue / self.target - 1.0
            return min(0.95, max(0.7, 1.0 - 0.15 * excess))
        return max(0.5, (seen.avg_service + self.target) / (seen.avg_service + seen.avg_queue))

    def _clamp(self, window: int) -> int:
        return min(self.max_window, max(self.min_window, window))
