"""Controllers on simulated and real servers: they converge, and neither collapse nor swing."""

from __future__ import annotations

import asyncio
import heapq
import random
from collections import deque

import pytest

from myserve.sdk import AdaptiveConcurrencyController, FixedConcurrencyController
from myserve.wire.perf_metrics import PerfMetrics


class SimulatedServer:
    """`slots` samples run at once, each for about `seconds`; the others queue. Virtual time: no clock, no sleep."""

    def __init__(self, slots: int, seconds: float = 4.0, seed: int = 7) -> None:
        self.slots, self.seconds, self.rng = slots, seconds, random.Random(seed)

    def run(self, controller: FixedConcurrencyController, samples: int) -> tuple[float, list[int]]:
        """Samples a second over the second half of `samples`, and the window over that time."""
        now, done, started, half_time = 0.0, 0, 0, 0.0
        waiting: deque[tuple[float, int]] = deque()  # (arrival, epoch)
        running: list[tuple[float, float, int]] = []  # (end, time in queue, epoch)
        gate, windows = controller.gate, []
        while done < samples:
            while gate.in_flight < controller.window and started < samples:
                gate.in_flight += 1
                gate.peak_in_flight = max(gate.peak_in_flight, gate.in_flight)
                waiting.append((now, gate.epoch))
                started += 1
            while waiting and len(running) < self.slots:
                arrival, epoch = waiting.popleft()
                end = now + self.seconds * self.rng.uniform(0.5, 1.5)
                heapq.heappush(running, (end, now - arrival, epoch))
            now, queued, epoch = heapq.heappop(running)
            gate.in_flight -= 1
            done += 1
            controller.observe(PerfMetrics(prefill_queue_duration=queued), samples=1, epoch=epoch)
            if done == samples // 2:
                half_time = now
            if done > samples // 2:
                windows.append(controller.window)
        return (samples - samples // 2) / (now - half_time), windows


@pytest.mark.parametrize("slots", [4, 32, 150])
@pytest.mark.parametrize("initial", [1, 16, 256])
def test_it_comes_within_a_tenth_of_the_best_fixed_window_and_holds_still(slots, initial):
    best, _ = SimulatedServer(slots).run(FixedConcurrencyController(2 * slots), 8000)
    adaptive = AdaptiveConcurrencyController(initial_window=initial)
    pace, windows = SimulatedServer(slots).run(adaptive, 8000)
    assert pace >= 0.9 * best
    steady = windows[: len(windows) * 3 // 4]  # the end of the run drains it
    assert min(steady) >= 0.75 * slots  # no collapse
    assert max(steady) <= 2.5 * min(steady)  # no wild swings
    # Control: a window that is too small is told apart.
    narrow, _ = SimulatedServer(slots).run(FixedConcurrencyController(max(1, slots // 2)), 8000)
    assert narrow < 0.9 * best


def test_one_burst_of_queueing_shrinks_the_window_once():
    controller = AdaptiveConcurrencyController(initial_window=64)
    epoch = controller.gate.epoch
    for _ in range(64 * 5):  # five windows' worth of samples that were all admitted before the first move
        controller.observe(PerfMetrics(prefill_queue_duration=5.0), samples=1, epoch=epoch)
    assert controller.window == 44  # 30 per cent less, not 0.7 ** 5


def test_it_only_moves_between_steps_if_told_so():
    controller = AdaptiveConcurrencyController(initial_window=4, adapt_within_step=False)
    for _ in range(100):
        controller.observe(PerfMetrics(prefill_queue_duration=5.0), samples=1, epoch=controller.gate.epoch)
        controller.refused(epoch=controller.gate.epoch)
    assert controller.window == 4
    assert controller.step_completed()["window"] == 2


def test_the_summary_of_a_step():
    controller = FixedConcurrencyController(8)
    controller.gate.peak_in_flight = 5
    metrics = PerfMetrics(
        prefill_queue_duration=0.25, prompt_tokens=100, cached_prompt_tokens=90, kv_cache_usage=0.5
    )
    controller.observe(metrics, samples=3, epoch=0)
    controller.observe(PerfMetrics(prefill_queue_duration=0.65), samples=1, epoch=0)
    controller.refused(epoch=0)
    summary = {"window": 8, "previous_window": 8, "avg_pq": 0.35, "cache_hit_rate": 0.9}
    summary |= {"kv_usage": 0.5}
    assert controller.step_completed() == summary | {"samples": 4, "refused": 1, "peak_in_flight": 5}
    empty = {"avg_pq": None, "cache_hit_rate": None, "kv_usage": None, "samples": 0, "refused": 0, "peak_in_flight": 0}
    assert controller.step_completed() == summary | empty


def test_a_full_kv_cache_shrinks_the_window_though_nobody_queues():
    windows = {}
    for usage in (0.5, 0.99):
        controller = AdaptiveConcurrencyController(initial_window=16)
        controller.gate.peak_in_flight = 16
        metrics = PerfMetrics(prefill_queue_duration=0.0, kv_cache_usage=usage)
        controller.observe(metrics, samples=16, epoch=controller.gate.epoch)
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
            if controller.gate.waiting:  # not before it began, nor while the last ones end
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
