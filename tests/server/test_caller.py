"""A task has its own caller, and outside of a request there is one without a name."""

from __future__ import annotations

import asyncio

from myserve.server import caller


def test_tasks_do_not_see_each_others_caller() -> None:
    async def answer(name: str, arrived: float) -> tuple[str, float]:
        caller.begin(arrived)
        await asyncio.sleep(0)
        caller.name_it(name)
        await asyncio.sleep(0)
        found = caller.current(99.0)
        return found.name, found.arrived

    async def both() -> list[tuple[str, float]]:
        return await asyncio.gather(answer("alice", 1.0), answer("bob", 2.0))

    assert asyncio.run(both()) == [("alice", 1.0), ("bob", 2.0)]


def test_outside_of_a_request_a_name_is_not_kept() -> None:
    async def nothing() -> caller.Caller:
        caller.name_it("alice")
        return caller.current(7.0)

    assert asyncio.run(nothing()) == caller.Caller(arrived=7.0, name="")
