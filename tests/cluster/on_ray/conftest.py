"""What a single server says to the requests that every fleet is asked."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import aiohttp
import pytest

from benchmarks.fleet.requests import Told, ask, requests
from benchmarks.fleet.serving import MODEL, is_well, serving

THREADS = {"MYSERVE_THREADS": "1"}


@pytest.fixture(scope="session")
def want() -> list[Told]:
    with serving(**THREADS) as alone:
        url = alone.url

        async def told() -> list[Told]:
            async with aiohttp.ClientSession() as session:
                await is_well(session, alone)
            return await told_by(url)

        answers = asyncio.run(told())
    assert {each.status for each in answers} == {200}
    return answers


async def told_by(url: str, fault: Callable[[], None] | None = None) -> list[Told]:
    """Ask for an answer of every shape, twice, all at once; `fault` happens while they are on their way."""
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=100)) as session:
        asked = [request for seed in (1, 2) for request in requests(MODEL, seed)]
        answers = [asyncio.ensure_future(ask(session, url, request)) for request in asked]
        if fault is not None:
            await asyncio.sleep(0.3)
            fault()
        return list(await asyncio.gather(*answers))
