"""Controllers on simulated and real servers: they converge, and neither collapse nor swing."""

from __future__ import annotations

import asyncio
import heapq
import random
from collections import deque
from collections.abc import Iterator

import pytest

from myserve.sdk import AdaptiveConcurrencyController, FixedConcurrencyController
from myserve.wire.perf_metrics import PerfMetrics


class SimulatedServer:
    """`slots` samples run at once, each for about `seconds`; the others queue. Virtual time: no clock, no sleep."""

    def __init__(self, slots: int, seconds: float = 4.0, *, tells_service: bool = True) -> None:
        self.slots, self.seconds, self.tells_service = slots, seconds, tells_service
        self.rng = random.Random(7)
        self.now = 0.0

    def run(self, controller: FixedConcurrencyController, samples: int) -> Iterator[tuple[float, int]]:
        """The time and the window as each sample ends."""
        started = 0
        waiting: deque[tuple[float, int]] = deque()  # (arrival, limit_version)
        running: list[tuple[float, float, float, int]] = []  # (end, service, time in queue, limit_version)
        semaphore = controller.semaphore
        for _ in range(samples):
            while semaphore.in_flight < controller.window and started < samples:
                semaphore.in_flight += 1
                semaphore.peak_in_flight = max(semaphore.peak_in_flight, semaphore.in_flight)
                waiting.append((self.now, semaphore.limit_version))
                started += 1
            while waiting and len(running) < self.slots:
                arrival, limit_version = waiting.popleft()
                service = self.seconds * self.rng.uniform(0.5, 1.5)
                heapq.heappush(running, (self.now + service, service, self.now - arrival, limit_version))
            self.now, service, queued, limit_version = heapq.heappop(running)
            semaphore.in_flight -= 1
            metrics = PerfMetrics(
                prefill_queue_duration=queued, generation_duration=service if self.tells_service else None
            )
            controller.observe(metrics, samples=1, limit_version=limit_version)
            yield self.now, controller.window


def second_half(server: SimulatedServer, controller: FixedConcurrencyController) -> tuple[float, list[int]]:
    """Samples a second, and the windows, over the second half of 8000 samples."""
    times, windows = zip(*server.run(controller, 8000), strict=True)
    return 4000 / (times[-1] - times[3999]), list(windows[4000:])


@pytest.mark.parametrize("slots", [4, 32, 150])
@pytest.mark.parametrize("initial", [1, 16, 256])
def test_it_comes_within_a_tenth_of_the_best_fixed_window_and_holds_still(slots, initial):
    best, _ = second_half(SimulatedServer(slots), FixedConcurrencyController(2 * slots))
    pace, windows = second_half(SimulatedServer(slots), AdaptiveConcurrencyController(initial_window=initial))
    assert pace >= 0.95 * best
    steady = windows[: len(windows) * 3 // 4]  # the end of the run drains it
    assert min(steady) >= 0.75 * slots  # no collapse
    assert max(steady) <= 2.5 * min(steady)  # no wild swings
    # Control: a window that is too small is told apart.
    narrow, _ = second_half(SimulatedServer(slots), FixedConcurrencyController(max(1, slots // 2)))
    assert narrow < 0.9 * best


def seconds_of_steps(server: SimulatedServer, controller: FixedConcurrencyController) -> float:
    """The time of training steps 2 to 10 of 600 samples each; the first is for finding the window."""
    began = 0.0
    for step in range(10):
        for _ in server.run(controller, 600):
            pass
        controller.step_completed()
        began = server.now if step == 0 else began
    return server.now - began


@pytest.mark.parametrize("slots", [4, 32, 64, 150])
@pytest.mark.parametrize("seconds", [0.5, 4.0, 30.0])
def test_over_the_steps_of_a_training_run_it_loses_little_however_long_a_sample_takes(slots, seconds):
    best = min(
        seconds_of_steps(SimulatedServer(slots, seconds), FixedConcurrencyController(window))
        for window in (slots, 2 * slots, 256)
    )
    adaptive = seconds_of_steps(SimulatedServer(slots, seconds), AdaptiveConcurrencyController())
    assert adaptive <= best / 0.96


def test_without_the_time_of_service_long_samples_make_it_swing():
    """The control of the above: cuts by a share of the window leave slots of a slow server empty."""
    paces = [
        seconds_of_steps(SimulatedServer(32, 30.0, tells_service=told), AdaptiveConcurrencyController())
        for told in (True, False)
    ]
    assert paces[1] > 1.04 * paces[0]


def test_one_burst_of_queueing_shrinks_the_window_once():
    controller = AdaptiveConcurrencyController(initial_window=64)
    limit_version = controller.semaphore.limit_version
    for _ in range(64 * 5):  # five windows' worth of samples that were all admitted before the first move
        controller.observe(PerfMetrics(prefill_queue_duration=5.0), samples=1, limit_version=limit_version)
    assert controller.window == 44  # 30 per cent less, not 0.7 ** 5


def test_it_only_moves_between_steps_if_told_so():
    controller = AdaptiveConcurrencyController(initial_window=4, adapt_within_step=False)
    for _ in range(100):
        controller.observe(
            PerfMetrics(prefill_queue_duration=5.0),
            samples=1,
            limit_version=controller.semaphore.limit_version,
        )
        controller.refused(limit_version=controller.semaphore.limit_version)
    assert controller.window == 4
    assert controller.step_completed()["window"] == 2


def test_the_summary_of_a_step():
    controller = FixedConcurrencyController(8)
    controller.semaphore.peak_in_flight = 5
    metrics = PerfMetrics(
        prefill_queue_duration=0.25, prompt_tokens=100, cached_prompt_tokens=90, kv_cache_usage=0.5
    )
    controller.observe(metrics, samples=3, limit_version=0)
    controller.observe(PerfMetrics(prefill_queue_duration=0.65), samples=1, limit_version=0)
    controller.refused(limit_version=0)
    summary = {"window": 8, "previous_window": 8, "avg_pq": 0.35, "cache_hit_rate": 0.9}
    summary |= {"kv_usage": 0.5}
    assert controller.step_completed() == summary | {"samples": 4, "refused": 1, "peak_in_flight": 5}
    empty = {
        "avg_pq": None,
        "cache_hit_rate": None,
        "kv_usage": None,
        "samples": 0,
        "refused": 0,
        "peak_in_flight": 0,
    }
    assert controller.step_completed() == summary | empty


def test_a_full_kv_cache_shrinks_the_window_though_the_queue_is_empty():
    windows = {}
    for usage in (0.5, 0.99):
        controller = AdaptiveConcurrencyController(initial_window=16)
        controller.semaphore.peak_in_flight = 16
        metrics = PerfMetrics(prefill_queue_duration=0.0, kv_cache_usage=usage)
        controller.observe(metrics, samples=16, limit_version=controller.semaphore.limit_version)
        windows[usage] = controller.window
    assert windows[0.99] < 16 < windows[0.5]


@pytest.mark.parametrize(
    "windows", [{"min_window": 0}, {"initial_window": 300}, {"min_window": 20}, {"prefill_queue_target": 0.0}]
)
def test_impossible_windows_are_refused(windows):
    with pytest.raises(ValueError, match=r"window|target"):
        AdaptiveConcurrencyController(**windows)


@pytest.mark.asyncio
async def test_on_a_saturated_server_the_window_follows_the_queue_down_and_up_and_in_flight_follows_it(
    make_sampler, stub
):
    queue = 5.0
    stub.metrics = lambda: {"prefill-queue-duration": queue}
    controller = AdaptiveConcurrencyController(initial_window=32, max_window=64)
    sampler = make_sampler(concurrency_controller=controller)
    seen: list[tuple[int, int]] = []

    async def watch() -> None:
        while True:
            if controller.semaphore.waiting:  # not before it began, nor while the last ones end
                seen.append((controller.window, controller.in_flight))
            await asyncio.sleep(0.001)

    watcher = asyncio.create_task(watch())
    calls = [
        asyncio.create_task(sampler.sample_with_prompt_tokens([1, i % 256], max_tokens=2)) for i in range(900)
    ]
    async with asyncio.timeout(60):
        while controller.window > 4:
            await asyncio.sleep(0.002)
        queue = 0.0
        while controller.window < 32:
            await asyncio.sleep(0.002)
        await asyncio.gather(*calls)
    watcher.cancel()
    assert controller.in_flight == 0
    # In flight follows: as a rule all of the window is used, whatever it is at the time.
    used = sorted(in_flight / window for window, in_flight in seen)
    assert used[len(used) // 2] >= 0.9
