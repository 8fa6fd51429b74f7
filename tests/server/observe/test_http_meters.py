"""Labels come from a closed set, and a blocked loop shows as one long lag."""

from __future__ import annotations

import asyncio
import logging
import time

import pytest

from myserve.server.observe.http_meters import METHODS, HttpMeters, LoopWatchdog


def test_invented_methods_are_one_series() -> None:
    meters = HttpMeters()
    for number in range(2000):
        meters.add(f"BREW{number}", "none", 405, 0.0)
    for method in METHODS:
        meters.add(method, "none", 405, 0.0)
    assert len(meters.requests) == len(METHODS) + 1
    assert meters.requests["_OTHER", "none", 405] == 2000


def measured(block: float) -> LoopWatchdog:
    async def run() -> LoopWatchdog:
        watchdog = LoopWatchdog()
        watchdog.start()
        await asyncio.sleep(0.12)
        time.sleep(block)  # the thing that must not be done
        await asyncio.sleep(0.12)
        watchdog.stop()
        return watchdog

    return asyncio.run(run())


def test_a_blocked_loop_is_a_lag_as_long_as_the_block(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "myserve.server"):
        assert measured(1.5).longest > 1.4
    assert "the event loop was blocked for 1." in caplog.text


def test_a_free_loop_is_looked_at_all_the_time() -> None:
    """The control: without the block there is no long lag, and there are values."""
    watchdog = measured(0.0)
    assert watchdog.longest < 1.0
    assert watchdog.lag.cumulative()[-1] >= 2


def test_a_moment_that_has_passed_already_is_looked_at_on_uvloop(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pause between two lines of ours: uvloop returns a handle there that knows no time."""
    uvloop = pytest.importorskip("uvloop")
    monkeypatch.setattr(LoopWatchdog, "INTERVAL_SECONDS", -1.0)
    errors: list[object] = []

    async def run() -> LoopWatchdog:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: errors.append(context))
        watchdog = LoopWatchdog()
        watchdog.start()
        await asyncio.sleep(0.05)
        watchdog.stop()
        return watchdog

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        watchdog = runner.run(run())
    assert not errors and watchdog.lag.cumulative()[-1] > 1
