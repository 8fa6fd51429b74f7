"""From the engine's thread to the event loops of its callers: one message a loop, whatever a step has to tell."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable

from myserve.engine.requests.admission import Submission
from myserve.engine.requests.stream import RequestStream, StepOutcome

Letters = list[tuple[RequestStream, StepOutcome]]


class Dispatcher:
    """Outcomes for the requests of several callers. A loop wakes once for all of its own, not once a token."""

    def __init__(self) -> None:
        self._letters: defaultdict[asyncio.AbstractEventLoop, Letters] = defaultdict(list)

    def add(self, owner: Submission, outcome: StepOutcome) -> None:
        self._letters[owner.loop].append((owner.stream, outcome))

    def send(self, nobody_left: Callable[[asyncio.AbstractEventLoop], None]) -> None:
        """Tells every loop, in the order of adding; `nobody_left` hears of one that is closed."""
        for loop, letters in self._letters.items():
            try:
                loop.call_soon_threadsafe(_deliver, letters)
            except RuntimeError:
                nobody_left(loop)


def _deliver(letters: Letters) -> None:
    for stream, outcome in letters:
        stream.receive(outcome)
