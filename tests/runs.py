"""How the engine's tests run requests and put the deltas back together."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field
from typing import Any

import pytest

from myserve.core.params import SamplingParams
from myserve.engine.engine import Engine
from myserve.engine.outputs import Delta, RequestMetrics, TokenOutput
from myserve.engine.requests.options import SubmitOptions
from myserve.engine.requests.stream import RequestStream


def thorough(*values: Any) -> Any:
    """Return a parameter of a proof that has enough of them in `make test`: `make thorough` runs it too."""
    return pytest.param(*values, marks=pytest.mark.thorough)


@dataclass
class Completion:
    """One choice, put together from its deltas."""

    text: str = ""
    tokens: list[TokenOutput] = field(default_factory=list)  # as drawn: stop tokens included
    shown: list[TokenOutput] = field(default_factory=list)  # those that have text
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    error: Exception | None = None
    metrics: RequestMetrics | None = None
    seed: int = 0
    deltas: list[Delta] = field(default_factory=list)

    @property
    def ids(self) -> list[int]:
        return [t.token_id for t in self.tokens]

    @property
    def numbers(self) -> list[tuple[int, float, float]]:
        """All that must be equal, bit for bit, however a request was run."""
        return [(t.token_id, t.logprob, t.sampling_logprob) for t in self.tokens]


async def collect(stream: RequestStream) -> list[Completion]:
    choices: dict[int, Completion] = {}
    async for delta in stream:
        choice = choices.setdefault(delta.index, Completion(seed=stream.seed))
        assert choice.finish_reason is None, "a delta after the end"
        choice.deltas.append(delta)
        choice.text += delta.text
        choice.tokens += [*delta.tokens, *delta.stop_tokens]
        choice.shown += delta.tokens
        choice.finish_reason = delta.finish_reason
        choice.stop_reason = delta.stop_reason
        choice.error = delta.error
        choice.metrics = delta.metrics
    return [choices[index] for index in sorted(choices)]


@dataclass(frozen=True)
class Asked:
    """A request to be run: `run(engine, [Asked(...), ...])` runs all of them at once."""

    prompt: list[int]
    params: SamplingParams
    n: int = 1
    adapter: str | None = None


def mixed_requests(count: int, seed: int = 0, max_tokens: int = 24) -> list[Asked]:
    """Requests with nothing in common: lengths from 1 to 90 tokens, and every parameter that shapes a draw."""
    rng = random.Random(seed)
    asked = []
    for i in range(count):
        params = SamplingParams(
            max_tokens=rng.randint(1, max_tokens),
            seed=rng.getrandbits(64),
            ignore_eos=True,
            noise=rng.choice(["counter", "counter", "torch"]),
            temperature=rng.choice([0.0, 0.3, 0.7, 1.0, 1.0, 1.7]),
            top_k=rng.choice([None, None, 1, 5, 50]),
            top_p=rng.choice([1.0, 1.0, 0.3, 0.9, 0.95]),
            min_p=rng.choice([0.0, 0.0, 0.05]),
            typical_p=rng.choice([1.0, 1.0, 0.8]),
            repetition_penalty=rng.choice([1.0, 1.0, 1.2]),
            frequency_penalty=rng.choice([0.0, 0.0, 0.5]),
            presence_penalty=rng.choice([0.0, 0.0, -0.4]),
            top_logprobs=rng.choice([0, 3]),
            kept=rng.random() < 0.2,
            logit_bias={rng.randrange(384): 3.0} if i % 5 == 0 else {},
        )
        asked.append(Asked([rng.randrange(384) for _ in range(rng.randint(1, 90))], params))
    return asked


def run(engine: Engine, asked: list[Asked]) -> list[list[Completion]]:
    async def all_at_once() -> list[list[Completion]]:
        streams = [engine.submit(a.prompt, a.params, SubmitOptions(n=a.n, adapter=a.adapter)) for a in asked]
        return list(await asyncio.gather(*(collect(stream) for stream in streams)))

    return asyncio.run(all_at_once())


def run_one(engine: Engine, prompt: list[int], n: int = 1, **params: object) -> Completion:
    return run(engine, [Asked(prompt, SamplingParams(**params), n)])[0][0]
