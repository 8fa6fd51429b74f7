"""One wake-up of a loop for a whole step; a loop that is gone, and a stream that fails, are no one else's affair."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

from myserve.engine.requests.dispatch import Dispatcher
from myserve.engine.requests.stream import StepOutcome


class Stream:
    """What a stream is to the dispatcher: it takes outcomes, in order."""

    def __init__(self, breaks_at: int | None = None) -> None:
        self.taken: list[int] = []
        self.failed: list[int] = []
        self._breaks_at = breaks_at

    def receive(self, outcome: StepOutcome) -> None:
        if outcome.index == self._breaks_at:
            raise ValueError("a choice of its own trouble")
        self.taken.append(outcome.index)

    def fail(self, index: int, error: Exception) -> None:
        self.failed.append(index)


def owner(loop: asyncio.AbstractEventLoop, stream: Stream) -> Any:
    return SimpleNamespace(loop=loop, stream=stream)


async def wake_ups_of(send: Any) -> int:
    loop = asyncio.get_running_loop()
    count, original = 0, loop.call_soon_threadsafe

    def counted(*args: Any) -> Any:
        nonlocal count
        count += 1
        return original(*args)

    loop.call_soon_threadsafe = counted  # type: ignore[method-assign]
    try:
        send()
        await asyncio.sleep(0)
    finally:
        del loop.call_soon_threadsafe
    return count


def test_a_step_wakes_a_loop_once_and_keeps_the_order() -> None:
    first, second = Stream(), Stream()

    async def run() -> int:
        dispatcher, loop = Dispatcher(), asyncio.get_running_loop()
        for index in range(3):
            dispatcher.add(owner(loop, first), StepOutcome(index))
            dispatcher.add(owner(loop, second), StepOutcome(index))
        return await wake_ups_of(lambda: dispatcher.send(lambda loop: None))

    assert asyncio.run(run()) == 1
    assert first.taken == second.taken == [0, 1, 2]


def test_a_stream_that_fails_fails_alone() -> None:
    broken, sound = Stream(breaks_at=1), Stream()

    async def run() -> None:
        dispatcher, loop = Dispatcher(), asyncio.get_running_loop()
        for index in range(3):
            dispatcher.add(owner(loop, broken), StepOutcome(index))
            dispatcher.add(owner(loop, sound), StepOutcome(index))
        dispatcher.send(lambda loop: None)
        await asyncio.sleep(0)

    asyncio.run(run())
    assert (broken.taken, broken.failed) == ([0, 2], [1])
    assert (sound.taken, sound.failed) == ([0, 1, 2], [])


def test_a_closed_loop_is_reported_and_the_others_are_woken() -> None:
    closed = asyncio.new_event_loop()
    closed.close()
    gone: list[asyncio.AbstractEventLoop] = []
    sound = Stream()

    async def run() -> None:
        dispatcher = Dispatcher()
        dispatcher.add(owner(closed, Stream()), StepOutcome(0))
        dispatcher.add(owner(asyncio.get_running_loop(), sound), StepOutcome(0))
        dispatcher.send(gone.append)
        await asyncio.sleep(0)

    asyncio.run(run())
    assert gone == [closed] and sound.taken == [0]
