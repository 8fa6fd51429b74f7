"""The pause between contenders: it is kept, it ends when the machine is idle, and it has an end."""

from __future__ import annotations

import pytest

from benchmarks import idle


@pytest.fixture
def shares(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Shares of CPU in use, in per cent, that are measured one after the other."""
    left: list[float] = []
    monkeypatch.setattr(
        idle.psutil, "cpu_percent", lambda interval: left.pop(0) if len(left) > 1 else left[0]
    )
    return left


def test_it_waits_until_the_machine_is_idle(shares: list[float]) -> None:
    shares += [90.0, 40.0, 5.0, 70.0]
    assert idle.wait_until_idle(pause=0, patience=60) == 0.05
    assert shares == [70.0]


def test_a_machine_that_others_use_is_not_waited_for_for_ever(shares: list[float]) -> None:
    shares += [90.0]
    assert idle.wait_until_idle(pause=0, patience=0.01) == 0.9


def test_the_pause_is_kept_on_an_idle_machine_too(
    shares: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(idle.time, "sleep", slept.append)
    shares += [0.0]
    idle.wait_until_idle()
    assert slept == [idle.PAUSE_S] and idle.PAUSE_S >= 1.5
