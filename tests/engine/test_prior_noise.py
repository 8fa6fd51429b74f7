"""Torch noise behind prior tokens is made off the engine's thread: nobody waits for it, and it may be aborted."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest

from myserve.core.noise import TorchNoise
from myserve.core.params import SamplingParams
from myserve.engine.engine import Engine
from myserve.engine.requests.admission import Submission
from myserve.engine.requests.options import SubmitOptions
from runs import collect, run_one

PROMPT = [5, 7, 100, 200, 33, 41, 90, 12]
MakeEngine = Callable[..., Engine]
SKIP = TorchNoise.skip


def asked(n: int = 1, **fields: Any) -> tuple[list[int], SamplingParams, SubmitOptions]:
    params = SamplingParams(max_tokens=6, seed=4, noise="torch", ignore_eos=True, **fields)
    return PROMPT, params, SubmitOptions(num_prior_tokens=5, n=n)


@pytest.fixture
def skipping(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the threads that skip draws."""
    names: list[str] = []

    def skip(noise: TorchNoise, draws: int, vocab_size: int) -> None:
        names.append(threading.current_thread().name.partition("_")[0])
        SKIP(noise, draws, vocab_size)

    monkeypatch.setattr(TorchNoise, "skip", skip)
    return names


def draw(engine: Engine, n: int = 1) -> list[Any]:
    async def drawn() -> list[Any]:
        return await collect(engine.submit(*asked(n)))

    return asyncio.run(drawn())


def test_the_engine_s_thread_does_not_skip(make_engine: MakeEngine, skipping: list[str]) -> None:
    assert [len(one.ids) for one in draw(make_engine(), n=3)] == [6, 6, 6]
    assert skipping == ["myserve-noise"] * 3


def test_control_made_at_once_the_bits_are_the_same_and_the_thread_is_the_engine_s(
    make_engine: MakeEngine, skipping: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine()
    elsewhere = draw(engine, n=2)
    monkeypatch.setattr(Submission, "skips_noise", False)
    at_once = draw(engine, n=2)
    assert [one.numbers for one in at_once] == [one.numbers for one in elsewhere]
    assert skipping == ["myserve-noise"] * 2 + ["myserve-engine"] * 2


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Draws are skipped when this is set, and not before."""
    released = threading.Event()

    def skip(noise: TorchNoise, draws: int, vocab_size: int) -> None:
        if draws:
            assert released.wait(60)
        SKIP(noise, draws, vocab_size)

    monkeypatch.setattr(TorchNoise, "skip", skip)
    return released


def test_others_are_drawn_meanwhile_and_an_abort_ends_it(
    make_engine: MakeEngine, held: threading.Event
) -> None:
    engine = make_engine()

    async def all_of_them() -> tuple[list[Any], list[Any], list[Any]]:
        waiting, aborted = engine.submit(*asked(2)), engine.submit(*asked(2))
        other = await collect(engine.submit(PROMPT, SamplingParams(max_tokens=6, seed=1, noise="torch")))
        aborted.abort()
        ended = await collect(aborted)
        held.set()
        return other, ended, await collect(waiting)

    other, ended, late = asyncio.run(all_of_them())
    assert other[0].finish_reason in ("length", "stop")
    assert [(one.finish_reason, one.ids) for one in ended] == [("abort", [])] * 2
    assert [one.numbers for one in late] == [one.numbers for one in draw(engine, n=2)]
    run_one(engine, PROMPT, max_tokens=2)  # the engine has taken all of it in
    assert engine.load.num_running == engine.load.num_waiting == 0


def test_the_engine_ends_while_draws_are_skipped(make_engine: MakeEngine, held: threading.Event) -> None:
    engine = make_engine()

    async def ended() -> list[Any]:
        stream = engine.submit(*asked())
        await collect(engine.submit(PROMPT, SamplingParams(max_tokens=2)))
        await asyncio.to_thread(engine.shutdown)
        held.set()
        return await collect(stream)

    (one,) = asyncio.run(ended())
    assert one.finish_reason == "error" and "shut down" in str(one.error)
