"""A pause: no step is run until it ends, and requests in flight are kept, preempted or waited for first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from myserve.engine.scheduling.scheduler import Scheduler

__all__ = ["PAUSE_MODES", "PauseMode", "Pausing"]

PauseMode = Literal["keep", "retract", "wait"]
PAUSE_MODES = ("keep", "retract", "wait")

# called once a pause has begun: True, or False where it ended before that
Paused = Callable[[bool], None]


class Pausing:
    """Begins and ends the pauses of one scheduler. Used by the engine's thread alone, between two steps.

    "keep": requests keep their blocks and go on from there. "retract": they are preempted, so that nothing holds a
    block, and are computed again. "wait": requests in flight finish first, while new ones wait.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._awaited: list[Paused] = []  # of pauses that wait for requests in flight

    def begin(self, mode: PauseMode, paused: Paused) -> None:
        """Pause; `paused` is called when no further step will run. A pause that is there already may be deepened."""
        if mode == "wait":
            self._scheduler.is_paused = False
            self._scheduler.drain("pause")
            self._awaited.append(paused)
            self.advance()
            return
        if mode == "retract":
            self._scheduler.preempt_all()
        self._settle(is_paused=True)
        paused(True)

    def advance(self) -> None:
        """Pause once the requests that were waited for have finished."""
        if self._awaited and self._scheduler.is_drained("pause"):
            self._settle(is_paused=True)

    def end(self) -> None:
        """Let steps run again. Harmless where nothing is paused."""
        self._settle(is_paused=False)

    def _settle(self, *, is_paused: bool) -> None:
        self._scheduler.is_paused = is_paused
        self._scheduler.end_drain("pause")
        awaited, self._awaited = self._awaited, []
        for paused in awaited:
            paused(is_paused)
