"""Passes over the same requests, against servers of their own, are each compared with the first: one at a time."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks.combine.answers import Answer, AnsweredChoice, ask
from benchmarks.mixed.requests import MixedRequest
from benchmarks.mixed.server import Server, counted, serving

__all__ = ["Report", "Way", "compare_all", "ways_of_threads"]

ANSWER_SECONDS = 900.0


@dataclass(frozen=True)
class Way:
    """How a server of one pass is started: `options` of `myserve serve`."""

    name: str
    options: tuple[str, ...]
    must_count: str = ""  # a metric that must not be 0 afterwards: what the way is for has happened


def ways_of_threads(threads: Sequence[int]) -> list[Way]:
    """Return a way for each number of threads, and the first once more, after a restart."""
    ways = [Way(f"{count} threads", ("--threads", str(count))) for count in threads]
    return [] if not ways else [*ways, Way(f"{ways[0].name} after a restart", ways[0].options)]


@dataclass
class Report:
    """What came of the passes."""

    differences: list[str] = field(default_factory=list)
    compared: int = 0  # answers with the first pass's
    tokens: int = 0  # of them

    def lines(self) -> Iterator[str]:
        """Say it: the differences, then the count."""
        yield from self.differences
        words = "all equal" if not self.differences else f"{len(self.differences)} DIFFER"
        yield f"{self.compared} answers compared, {self.tokens} tokens with their logprobs: {words}"


async def compare_all(
    model: Path | str,
    make_requests: Callable[[Server], Sequence[MixedRequest]],
    *,
    ways: Sequence[Way],
    options: Sequence[str],
    seed: int,
    alone_everywhere: bool = False,
    kept: Path | None = None,
) -> Report:
    """Serve in each way in turn, a process each; compare every pass with the first.

    `make_requests(server)` gives the requests. On the first server they are sent one after another, which is what all
    else is compared with; then, on each, all at once, staggered, and (`alone_everywhere`) one after another again.
    `kept`: a file of answers to compare with instead; written where there is none. Raises BenchError where a server
    does not start, or ends too soon, with what it said.
    """
    report, rng = Report(), random.Random(seed)
    expected = _read(kept)
    for number, way in enumerate(ways):
        with serving(model, [*way.options, *options]) as server:
            where = way.name
            requests = make_requests(server)
            async with _session(server) as session:
                if not expected or alone_everywhere or number == 0:
                    got = await _alone(session, requests, rng)
                    report.differences += _refused(requests, got)
                    if expected:
                        _compare(report, f"one at a time, {where}", requests, expected, got)
                    expected = expected or got
                    _write(kept, expected)
                for how, run in (("at once", _at_once), ("staggered", _staggered)):
                    _compare(report, f"{how}, {where}", requests, expected, await run(session, requests, rng))
            if way.must_count and not counted(server, way.must_count):
                report.differences.append(f"{where}: {way.must_count} is 0, so that the pass shows nothing")
    return report


def _read(file: Path | None) -> list[Answer]:
    if file is None or not file.exists():
        return []
    told = json.loads(file.read_text())
    return [
        Answer(one["status"], [AnsweredChoice(**choice) for choice in one["choices"]], one["error"])
        for one in told
    ]


def _write(file: Path | None, answers: Sequence[Answer]) -> None:
    if file is not None and not file.exists():
        file.write_text(json.dumps([asdict(answer) for answer in answers]))


def _session(server: Server) -> aiohttp.ClientSession:
    timeout = aiohttp.ClientTimeout(total=ANSWER_SECONDS)
    # a connection for each request: the server may close an idle one in the moment in which it is used again
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    return aiohttp.ClientSession(server.url, timeout=timeout, connector=connector)


async def _alone(
    session: aiohttp.ClientSession, requests: Sequence[MixedRequest], rng: random.Random
) -> list[Answer]:
    return [await ask(session, request, stream=rng.random() < 0.5) for request in requests]


async def _at_once(
    session: aiohttp.ClientSession, requests: Sequence[MixedRequest], rng: random.Random
) -> list[Answer]:
    sent = [ask(session, request, stream=rng.random() < 0.5) for request in requests]
    return list(await asyncio.gather(*sent))


async def _staggered(
    session: aiohttp.ClientSession, requests: Sequence[MixedRequest], rng: random.Random
) -> list[Answer]:
    """In another order, each some steps after the one before."""
    order = rng.sample(range(len(requests)), len(requests))
    tasks: dict[int, asyncio.Task[Answer]] = {}
    for index in order:
        tasks[index] = asyncio.create_task(ask(session, requests[index], stream=rng.random() < 0.5))
        await asyncio.sleep(rng.uniform(0, 0.2))
    return [await tasks[index] for index in range(len(requests))]


def _refused(requests: Sequence[MixedRequest], answers: Sequence[Answer]) -> Iterator[str]:
    for request, answer in zip(requests, answers, strict=True):
        if answer.status != 200:
            yield f"request {request.number} ({request.kind}): {answer.status} {answer.error}"


def _compare(
    report: Report,
    where: str,
    requests: Sequence[MixedRequest],
    expected: Sequence[Answer],
    got: Sequence[Answer],
) -> None:
    before = len(report.differences)
    for request, one, other in zip(requests, expected, got, strict=True):
        report.compared += 1
        report.tokens += sum(len(choice.token_ids) for choice in other.choices)
        difference = _difference(one, other)
        if difference:
            report.differences.append(f"request {request.number} ({request.kind}), {where}: {difference}")
    count = len(report.differences) - before
    print(f"{where}: {'all equal' if not count else f'{count} of {len(got)} differ'}", flush=True)


def _difference(one: Answer, other: Answer) -> str:
    """The first thing that is not the same, in words; "" where all is."""
    if one.status != other.status:
        return f"{other.status} {other.error}, alone {one.status} {one.error}"
    for index, (a, b) in enumerate(zip_longest(one.choices, other.choices)):
        if a is None or b is None:
            return f"{len(other.choices)} choices, alone {len(one.choices)}"
        for name, value in vars(a).items():
            if value != vars(b)[name]:
                return f"choice {index}, {name}: {_first_difference(vars(b)[name], value)}"
    return ""


def _first_difference(got: Any, alone: Any) -> str:
    """Where two values part: of lists, the first entries that do."""
    if isinstance(got, list) and isinstance(alone, list):
        for index, (a, b) in enumerate(zip_longest(got, alone)):
            if a != b:
                return f"[{index}] {a!r:.300}, alone {b!r:.300}"
    return f"{got!r:.200}, alone {alone!r:.200}"
