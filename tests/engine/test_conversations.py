"""Conversations that share their beginnings, asked at random, cut off, preempted and drafted.

What the prefix cache gives of them is what their prompts give whole, and nothing is kept too long.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from typing import Any

import pytest

from myserve.core.params import SamplingParams
from myserve.engine.engine import Engine
from myserve.engine.requests.options import SubmitOptions
from myserve.engine.scheduling.block_tables import BlockTables
from myserve.engine.scheduling.request import Request
from runs import Asked, Completion, collect, run, thorough

MakeEngine = Callable[..., Engine]
TIGHT = {"num_blocks": 12, "max_num_seqs": 5}  # preempts now and then: surely in many rounds
MANY = 150
RAGGED = {"num_blocks": 64, "max_num_batched_tokens": 40, "prefill_chunk": 9}  # prompts in small pieces
LONGEST, VOCAB = 212, 380
MORE = (0, 1, 5, 31, 32, 33, 64, 140)  # tokens of a turn: at borders of blocks, and beside them


class Talks:
    """Begins with three instructions, and goes on from any turn that it had, or from a part of one."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self._instructions = [self._tokens(length) for length in (130, 150, 180)]
        self._turns = list(self._instructions)

    def _tokens(self, count: int) -> list[int]:
        return [self.rng.randrange(3, VOCAB) for _ in range(count)]

    def ask(self) -> Asked:
        rng = self.rng
        before = rng.choice([*self._turns[-12:], *self._instructions])
        kept = before if rng.random() < 0.6 else before[: rng.randint(1, len(before))]
        params = SamplingParams(
            max_tokens=rng.choice((1, 2, 9, 33, 40)),
            seed=rng.randrange(99),
            temperature=rng.choice((0.0, 1.0)),
            ignore_eos=True,
            prompt_logprobs=0 if rng.random() < 0.15 else None,
        )
        return Asked(
            [*kept, *self._tokens(rng.choice(MORE))][:LONGEST], params, n=rng.choice((1, 1, 1, 2, 3))
        )

    def answered(self, asked: Asked, choices: list[Completion]) -> None:
        self._turns.append(asked.prompt + choices[0].ids)


def everything(choices: list[Completion]) -> list[Any]:
    scored = [[s and s.logprob for d in c.deltas for s in d.prompt_logprobs or ()] for c in choices]
    return [scored, [c.numbers for c in choices]]


async def answers(engine: Engine, asked: list[Asked], rng: random.Random) -> list[list[Completion] | None]:
    """All at once, or nearly; None of one that its client gave up."""

    async def one(wanted: Asked, at: float, gives_up_after: int) -> list[Completion] | None:
        await asyncio.sleep(at)
        stream = engine.submit(wanted.prompt, wanted.params, SubmitOptions(n=wanted.n))
        if not gives_up_after:
            return await collect(stream)
        async for _ in stream:
            gives_up_after -= 1
            if not gives_up_after:
                break
        return None

    pace = [(0.1 * rng.random(), rng.randint(1, 8) if rng.random() < 0.2 else 0) for _ in asked]
    return await asyncio.gather(*(one(a, *times) for a, times in zip(asked, pace, strict=True)))


def differing(engines: list[Engine], whole: Engine, rounds: int, seed: int = 0) -> tuple[int, int]:
    """Return how many requests had other numbers than whole ones have, and how many prompt tokens were cached."""
    talks, wrong, cached = Talks(seed), 0, 0
    for turn in range(rounds):
        engine = engines[turn % len(engines)]
        asked = [talks.ask() for _ in range(talks.rng.randint(2, 6))]
        for wanted, choices in zip(asked, asyncio.run(answers(engine, asked, talks.rng)), strict=True):
            if choices is None:
                continue
            wrong += everything(choices) != everything(run(whole, [wanted])[0])
            cached += sum(c.metrics.cached_tokens for c in choices if c.metrics is not None)
            talks.answered(wanted, choices)
        engine.scheduler.check_integrity()
    return wrong, cached


def nothing_is_held(engine: Engine) -> bool:
    states = engine.scheduler.block_tables.states
    return engine.scheduler.pool.usage == 0 and (states is None or states.num_free == states.num_slots)


@pytest.mark.parametrize(
    ("arch", "dtype", "rounds"),
    [
        ("llama", "float32", 9),
        ("qwen3_5_text", "float32", 12),
        ("granitemoehybrid-scan", "bfloat16", 9),
        thorough("qwen3_5_text", "bfloat16", MANY),
        thorough("jamba", "float32", MANY),
        thorough("lfm2", "bfloat16", MANY),
    ],
)
def test_a_turn_has_the_numbers_that_it_has_without_a_cache(
    arch: str, dtype: str, rounds: int, make_engine: MakeEngine
) -> None:
    whole = make_engine(arch, dtype=dtype, prefix_caching=False, speculation="off")
    engines = [make_engine(arch, dtype=dtype, **sizes) for sizes in ({}, TIGHT, RAGGED)]
    wrong, cached = differing(engines, whole, rounds)
    assert not wrong and cached > 100 * rounds
    assert rounds < MANY or engines[1].scheduler.num_preemptions, (
        "the pool was not small enough to show anything"
    )
    end = time.monotonic() + 10
    while not all(map(nothing_is_held, engines)):
        assert time.monotonic() < end, "blocks or states leaked"
        time.sleep(0.01)


def test_the_control_a_state_of_another_border_is_found(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A state that is named one step after its border has taken in tokens that the block's name does not know of."""
    whole = make_engine("qwen3_5_text", dtype="float32", prefix_caching=False, speculation="off")
    publish = BlockTables.publish_full

    def late(tables: BlockTables, request: Request) -> None:
        states, tables.states = tables.states, None
        publish(tables, request)
        tables.states = states
        past = request.num_computed_tokens % tables._pool.block_size
        if past == 1 and states is not None and request.content_ids and not request.state_lag:
            tables._publish_state(states, request)

    monkeypatch.setattr(BlockTables, "publish_full", late)
    engine = make_engine("qwen3_5_text", dtype="float32", num_blocks=129)  # its own: wrong states stay in it
    assert differing([engine], whole, 9)[0]
