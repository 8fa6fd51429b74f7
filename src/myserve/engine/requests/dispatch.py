"""From the engine's thread to the event loops of its callers: one wake-up of a loop for all that a step brought it."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable
from typing import Protocol

from myserve.engine.requests.stream import OutcomeReceiver, StepOutcome

__all__ = ["Dispatcher"]


class Owner(Protocol):
    """Owns outcomes: a `Submission`, or what stands for one in a fleet."""

    @property
    def loop(self) -> asyncio.AbstractEventLoop: ...
    @property
    def stream(self) -> OutcomeReceiver: ...


_Outcomes = list[tuple[OutcomeReceiver, StepOutcome]]


class Dispatcher:
    """Collect the outcomes of one step and hand each to its caller's event loop, in the order of adding."""

    def __init__(self) -> None:
        self._outcomes: defaultdict[asyncio.AbstractEventLoop, _Outcomes] = defaultdict(list)

    def add(self, owner: Owner, outcome: StepOutcome) -> None:
        """Keep an outcome for the stream of `owner`."""
        self._outcomes[owner.loop].append((owner.stream, outcome))

    def send(self, on_closed_loop: Callable[[asyncio.AbstractEventLoop], None]) -> None:
        """Wake every loop once; `on_closed_loop` is called for one that has been closed."""
        for loop, outcomes in self._outcomes.items():
            try:
                loop.call_soon_threadsafe(_deliver, outcomes)
            except RuntimeError:
                on_closed_loop(loop)


def _deliver(outcomes: _Outcomes) -> None:
    for stream, outcome in outcomes:
        try:
            stream.receive(outcome)
        except Exception as error:  # that choice's own: the others have still to be delivered
            stream.fail(outcome.index, error)
