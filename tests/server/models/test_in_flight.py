"""Generations in flight are cut at their deadline, by the shorter limit, and all of them at the end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from myserve.errors import MyserveError
from myserve.server import caller
from myserve.server.errors import DeadlineError, ShuttingDownError
from myserve.server.models.in_flight import InFlight


class Generation:
    def __init__(self) -> None:
        self.errors: list[MyserveError] = []

    def cut(self, error: MyserveError) -> None:
        self.errors.append(error)


def on_a_loop(test: Callable[[], Any]) -> Any:
    async def run() -> Any:
        caller.begin(asyncio.get_running_loop().time())
        return await test()

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("own", "servers", "whose"), [(0.01, 60, "the request's own"), (60, 0.01, "this server's")]
)
def test_the_shorter_limit_cuts_and_says_whose_it_was(own: float, servers: float, whose: str) -> None:
    async def test() -> Generation:
        flight, generation = InFlight(servers), Generation()
        flight.add(generation, own)
        await asyncio.sleep(0.2)
        return generation

    (error,) = on_a_loop(test).errors
    assert isinstance(error, DeadlineError) and whose in str(error)


def test_what_has_ended_is_not_cut() -> None:
    async def test() -> tuple[Generation, int]:
        flight, generation = InFlight(0.01), Generation()
        flight.add(generation)
        flight.remove(generation)
        flight.remove(generation)
        await asyncio.sleep(0.1)
        return generation, len(flight)

    generation, left = on_a_loop(test)
    assert (generation.errors, left) == ([], 0)


def test_a_deadline_that_is_over_is_an_error_at_once() -> None:
    async def test() -> None:
        caller.begin(asyncio.get_running_loop().time() - 10)
        with pytest.raises(DeadlineError, match="not done after 5 s"):
            InFlight().add(Generation(), 5)

    on_a_loop(test)


def test_at_the_end_no_more_come_in_and_all_are_cut() -> None:
    async def test() -> None:
        flight, generation = InFlight(), Generation()
        flight.add(generation)
        flight.close()
        with pytest.raises(ShuttingDownError):
            flight.add(Generation())
        assert (len(flight), generation.errors) == (1, [])
        flight.cut_all()
        assert isinstance(generation.errors[0], ShuttingDownError)

    on_a_loop(test)
