"""Judges the storm's answers: each must be, bit for bit, what its request gives alone by the weights that it names."""

from __future__ import annotations

import random
from collections.abc import AsyncIterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.hot_load.server import SNAPSHOTS
from benchmarks.hot_load.weight_replay import Numbers, replay
from benchmarks.storm.requests import Kind
from myserve.core.params import SamplingParams
from myserve.engine.config import EngineConfig
from myserve.engine.engine import Engine
from myserve.engine.weights.loader import load
from myserve.engine.weights.prepare import prepare
from myserve.wire.sse import SSEDecoder

REPLAYED = 300  # answers of several versions that are computed again; a random choice of them


@dataclass
class Told:
    """Hold one choice, whole or joined from its stream."""

    index: int
    text: str = ""
    numbers: list[Numbers] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    weight_version: int = -1
    spans: list[dict[str, int]] = field(default_factory=list)  # only where there are several

    def take(self, choice: dict[str, Any]) -> None:
        """Take in a whole choice, or a chunk of one."""
        said = choice.get("message") or choice.get("delta") or choice
        self.text += said.get("content") or choice.get("text") or ""
        for entry in (choice["logprobs"] or {"content": []})["content"]:
            self.numbers.append((entry["token_id"], entry["logprob"], entry["sampling_logprob"]))
        self.token_ids += choice.get("token_ids", [])
        self.finish_reason = choice["finish_reason"] or self.finish_reason
        self.weight_version = choice.get("weight_version", self.weight_version)
        self.spans = choice.get("weight_version_spans", self.spans)


@dataclass
class Verdict:
    equal: int = 0
    cut: int = 0  # by new weights, and equal as far as they came
    tokens: int = 0
    wrong: list[str] = field(default_factory=list)
    spanning: list[tuple[Kind, Told, int]] = field(default_factory=list)  # and the seed


def read_whole(body: dict[str, Any]) -> list[Told]:
    told = [Told(choice["index"]) for choice in body["choices"]]
    for one, choice in zip(told, body["choices"], strict=True):
        one.take(choice)
    return told


async def read_stream(content: AsyncIterable[bytes]) -> list[Told]:
    """Raises RuntimeError for a stream that does not end with [DONE]."""
    decoder, told, done = SSEDecoder(), dict[int, Told](), False
    async for part in content:
        for event in decoder.feed(part):
            if event.event == "error":
                raise RuntimeError(f"an error event: {event.data[:300]}")
            done = event.is_done
            for choice in () if done else event.json()["choices"]:
                told.setdefault(choice["index"], Told(choice["index"])).take(choice)
    if not done:
        raise RuntimeError("a stream without an end")
    return [told[index] for index in sorted(told)]


def judge(
    told: Sequence[tuple[Kind, list[Told]]],
    alone: Sequence[dict[str, list[Told]]],
    snapshot_of: dict[int, int],
) -> Verdict:
    verdict = Verdict()
    for kind, choices in told:
        for one in choices:
            verdict.tokens += len(one.token_ids)
            if one.token_ids != [number[0] for number in one.numbers]:
                verdict.wrong.append(f"kind {kind.name}: ids and logprobs are not aligned")
            elif len(one.spans) > 1:
                verdict.spanning.append((kind, one, kind.body["seed"]))
            elif _equals(one, alone[snapshot_of[one.weight_version]][kind.name][one.index]):
                verdict.cut += one.finish_reason == "abort"
                verdict.equal += one.finish_reason != "abort"
            else:
                verdict.wrong.append(f"kind {kind.name}, choice {one.index}: {one.text!r}")
    return verdict


def _equals(one: Told, expected: Told) -> bool:
    if one.finish_reason == "abort":
        return expected.numbers[: len(one.numbers)] == one.numbers
    return (one.numbers, one.text, one.finish_reason) == (
        expected.numbers,
        expected.text,
        expected.finish_reason,
    )


def control(
    told: Sequence[tuple[Kind, list[Told]]],
    alone: Sequence[dict[str, list[Told]]],
    snapshot_of: dict[int, int],
) -> float:
    """The share of choices that pass when they are held against another snapshot's answers: near 0, or equality says
    nothing."""
    passed = [
        _equals(one, alone[(snapshot_of[one.weight_version] + 1) % SNAPSHOTS][kind.name][one.index])
        for kind, choices in told
        for one in choices
        if len(one.spans) < 2 and one.numbers
    ]
    return sum(passed) / len(passed)


def replayed(
    spanning: Sequence[tuple[Kind, Told, int]], root: Path, snapshot_of: dict[int, int]
) -> tuple[int, int]:
    """Compute answers again, token by token, by the weights that they name; return how many, and how many differ."""
    free = [case for case in spanning if case[0].is_free]
    picked = random.Random(0).sample(free, min(REPLAYED, len(free)))
    return len(picked), sum(1 for _ in _differing(picked, root, snapshot_of))


def _differing(
    cases: Sequence[tuple[Kind, Told, int]], root: Path, snapshot_of: dict[int, int]
) -> Iterator[Told]:
    config = EngineConfig(num_blocks=64)
    engine = Engine.from_pretrained(str(root / "0"), config)
    names = load(str(root / "0"), config).weight_names
    options: dict[str, Any] = {"partial": False, "checksum": None, "may_cast": False}
    ready = [prepare(root / str(n), engine.runner.model, names, **options) for n in range(SNAPSHOTS)]
    for kind, told, seed in cases:
        asked = {name: kind.body[name] for name in ("temperature", "top_p", "ignore_eos", "top_k")}
        params = SamplingParams(seed=seed, **asked)
        numbers = replay(
            engine,
            lambda version: ready[snapshot_of[version]].install(),
            kind.body["prompt"],
            told.token_ids,
            told.spans,
            params,
            told.index,
        )
        if numbers != told.numbers:
            yield told
