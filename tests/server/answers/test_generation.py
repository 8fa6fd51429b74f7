"""Many prompts are submitted without keeping the event loop, and a request that ends early leaves none running."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from myserve.core.params import SamplingParams
from myserve.errors import MyserveError, OverloadedError
from myserve.server.answers import generation, size
from myserve.server.answers.generation import Generation, params_of_prompts
from myserve.server.models.in_flight import InFlight
from myserve.server.prompts.sampling import seed_of_prompt
from myserve.server.turns import LoopTurns
from myserve.wire.completions import CompletionRequest

PROMPTS = [[1, 2]] * 50


class Stream:
    seed = 7

    def __init__(self) -> None:
        self.aborted = 0

    def abort(self) -> None:
        self.aborted += 1


class FakeEngine:
    def __init__(self, on_submit: Callable[[int], None] = lambda _: None) -> None:
        self.streams: list[Stream] = []
        self._on_submit = on_submit

    def submit(self, prompt: Any, params: Any, options: Any) -> Stream:
        self._on_submit(len(self.streams))
        self.streams.append(Stream())
        return self.streams[-1]


async def begin(engine: FakeEngine, flight: InFlight | None = None, **fields: Any) -> Generation:
    model: Any = SimpleNamespace(engine=engine, in_flight=InFlight() if flight is None else flight)
    request = CompletionRequest(model="m", prompt="a", **fields)
    return await Generation.begin(model, PROMPTS, [SamplingParams()] * len(PROMPTS), request, "id")


@pytest.fixture
def no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every prompt takes as long as a request may have the event loop for."""
    monkeypatch.setattr(generation, "LoopTurns", lambda: LoopTurns(seconds=0.0))


@pytest.mark.usefixtures("no_time")
@pytest.mark.asyncio
async def test_other_tasks_run_between_the_prompts() -> None:
    turns: list[int] = []
    engine = FakeEngine()

    async def other() -> None:
        while len(engine.streams) < len(PROMPTS):
            turns.append(len(engine.streams))
            await asyncio.sleep(0)

    _, generation = await asyncio.gather(other(), begin(engine, n=2))
    assert set(turns) == set(range(len(PROMPTS)))
    assert [(c.index, c.prompt) for c in generation.choices] == [(i, i // 2) for i in range(2 * len(PROMPTS))]


@pytest.mark.asyncio
async def test_few_prompts_take_no_turns() -> None:
    """The control: where there was time enough, nothing runs in between."""
    engine = FakeEngine()
    task = asyncio.ensure_future(begin(engine))
    await asyncio.sleep(0)
    assert len(engine.streams) == len(PROMPTS)
    await task


@pytest.mark.usefixtures("no_time")
@pytest.mark.asyncio
async def test_a_queue_that_fills_up_midway_leaves_nothing_running() -> None:
    def full(number: int) -> None:
        if number == 20:
            raise OverloadedError("full", retry_after=1.0)

    engine, flight = FakeEngine(full), InFlight()
    with pytest.raises(OverloadedError):
        await begin(engine, flight)
    assert len(engine.streams) == 20 and all(stream.aborted for stream in engine.streams)
    assert len(flight) == 0


@pytest.mark.usefixtures("no_time")
@pytest.mark.asyncio
async def test_a_request_that_is_cut_meanwhile_submits_no_more() -> None:
    engine, flight = FakeEngine(), InFlight()

    async def cut() -> None:
        while len(engine.streams) < 10:
            await asyncio.sleep(0)
        flight.cut_all()

    _, result = await asyncio.gather(cut(), begin(engine, flight), return_exceptions=True)
    assert isinstance(result, MyserveError)
    assert len(engine.streams) < 12 and all(stream.aborted for stream in engine.streams)


@pytest.mark.usefixtures("no_time")
@pytest.mark.asyncio
async def test_a_request_that_is_cancelled_meanwhile_leaves_nothing_running() -> None:
    engine, flight = FakeEngine(), InFlight()
    task = asyncio.ensure_future(begin(engine, flight))
    while len(engine.streams) < 10:
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert all(stream.aborted for stream in engine.streams) and len(flight) == 0


def test_each_prompt_has_its_seed_and_the_parameters_are_checked_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    params = SamplingParams(seed=5, allowed_token_ids=tuple(range(1000)))
    monkeypatch.setattr(SamplingParams, "__post_init__", lambda _: pytest.fail("checked again"))
    made = params_of_prompts(params, 3)
    assert [one.seed for one in made] == [5, seed_of_prompt(5, 1), seed_of_prompt(5, 2)]
    assert {one.allowed_token_ids for one in made} == {params.allowed_token_ids}


def test_thousands_of_choices_count_towards_the_size_of_an_answer() -> None:
    """Their text may be short: what is written is an object for each."""
    assert size.CHOICE * 4096 > 1 << 17


@pytest.mark.usefixtures("no_time")
@pytest.mark.asyncio
async def test_many_prompts_are_ended_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "AT_ONCE", 10)
    engine, flight = FakeEngine(), InFlight()
    made = await begin(engine, flight)
    flight.cut_all()
    assert len(flight) == 0 and not any(stream.aborted for stream in engine.streams)
    seen: list[int] = []
    while not all(stream.aborted for stream in engine.streams):
        seen.append(sum(stream.aborted for stream in engine.streams))
        await asyncio.sleep(0)
    assert len(set(seen)) > 40
    made.abort()
