"""The semaphore: first come first served, never over its limit, and no permit is ever lost."""

from __future__ import annotations

import asyncio
import threading

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, precondition, rule

from myserve.sdk.concurrency.semaphore import Permit, ResizableSemaphore, Waiter


class SemaphoreMachine(RuleBasedStateMachine):
    """Random lives of waiters: they join, take, leave early, give back; the limit moves under them."""

    waiters = Bundle("waiters")
    permits = Bundle("permits")

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.semaphore = ResizableSemaphore(4)
        self.queue: list[tuple[Waiter, int]] = []  # the model: who waits, for how many, in order
        self.in_flight = 0
        self.was_over = 0  # in flight beyond the limit because the limit fell: allowed, but it must not grow

    def teardown(self) -> None:
        self.loop.close()

    def run(self, work):
        return self.loop.run_until_complete(work)

    @rule(target=waiters, n=st.integers(1, 6))
    def join(self, n):
        async def enter() -> Waiter:
            return await self.semaphore.waiter(n).__aenter__()

        waiter = self.run(enter())
        self.queue.append((waiter, n))
        self.admit()
        return waiter

    @rule(target=permits, waiter=waiters)
    def take(self, waiter):
        if not waiter.untaken:
            return Permit(self.semaphore, 0)
        count = waiter.untaken
        permit = self.run(waiter.take())
        assert permit.count == count
        return permit

    @rule(waiter=consumes(waiters))
    def leave(self, waiter):
        """As a cancelled task does: what it was granted and did not take goes back."""
        self.in_flight -= waiter.untaken
        self.queue = [(waiting, due) for waiting, due in self.queue if waiting is not waiter]
        self.run(waiter.__aexit__(None, None, None))
        self.admit()

    @rule(permit=permits)
    def release_one(self, permit):
        if permit.count:
            permit.release()
            self.in_flight -= 1
            self.admit()

    @rule(permit=consumes(permits))
    def release_all(self, permit):
        self.in_flight -= permit.count
        permit.release_all()
        self.admit()

    @rule(limit=st.integers(1, 8))
    def move_the_limit(self, limit):
        self.semaphore.limit = limit
        self.admit()

    def admit(self) -> None:
        """The rule, written down a second time: the head takes what is free and is never overtaken."""
        while self.queue and self.in_flight < self.semaphore.limit:
            waiter, due = self.queue.pop(0)
            granted = min(due, self.semaphore.limit - self.in_flight)
            self.in_flight += granted
            if due > granted:
                self.queue.insert(0, (waiter, due - granted))

    @invariant()
    def the_gate_is_as_the_law_says(self):
        assert self.semaphore.in_flight == self.in_flight
        assert self.semaphore.waiting == sum(due for _, due in self.queue)
        for waiter, due in self.queue:
            assert waiter.due == due

    @precondition(lambda self: self.queue)
    @invariant()
    def no_sample_waits_while_there_is_room(self):
        assert self.semaphore.in_flight >= self.semaphore.limit


TestSemaphore = SemaphoreMachine.TestCase
TestSemaphore.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@pytest.mark.asyncio
async def test_a_saturated_window_shrinks_and_in_flight_follows():
    semaphore = ResizableSemaphore(64)
    async with semaphore.waiter(64) as waiter:
        permit = await waiter.take()
    semaphore.limit = 16
    assert (semaphore.limit, semaphore.in_flight) == (16, 64)
    async with semaphore.waiter(1) as late:
        permit.release(48)
        assert (semaphore.in_flight, late.untaken) == (16, 0)  # full still: the newcomer waits
        permit.release()
        assert (await late.take()).count == 1


@pytest.mark.asyncio
async def test_in_flight_fills_a_window_that_grows():
    semaphore = ResizableSemaphore(1)
    peak = 0

    async def work() -> None:
        nonlocal peak
        async with semaphore.waiter(1) as waiter:
            with await waiter.take():
                peak = max(peak, semaphore.in_flight)
                await asyncio.sleep(0)

    tasks = [asyncio.create_task(work()) for _ in range(200)]
    await asyncio.sleep(0)
    semaphore.limit = 96
    await asyncio.gather(*tasks)
    assert peak == 96


@pytest.mark.asyncio
async def test_a_waiter_cancelled_as_it_is_granted_does_not_take_the_wake_up_with_it():
    semaphore = ResizableSemaphore(1)

    async def work() -> None:
        async with semaphore.waiter(1) as waiter:
            with await waiter.take():
                await asyncio.sleep(0)

    async with semaphore.waiter(1) as first:
        permit = await first.take()
    second, third = asyncio.create_task(work()), asyncio.create_task(work())
    await asyncio.sleep(0)
    permit.release()  # grants the second, which has not run yet …
    second.cancel()  # … and never will
    await asyncio.wait_for(third, 1)
    assert semaphore.in_flight == 0


def test_one_gate_for_several_threads_each_with_its_loop():
    semaphore = ResizableSemaphore(3)
    over = []

    async def work() -> None:
        async with semaphore.waiter(2) as waiter:
            left = 2
            while left:
                with await waiter.take() as permit:
                    left -= permit.count
                    over.append(semaphore.in_flight > 3)
                    await asyncio.sleep(0)

    async def many() -> None:
        await asyncio.gather(*(work() for _ in range(100)))

    threads = [threading.Thread(target=lambda: asyncio.run(many())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert not any(thread.is_alive() for thread in threads)
    assert (semaphore.in_flight, semaphore.waiting, any(over)) == (0, 0, False)
