"""New weights while a model with recurrent layers answers: states follow the rules that keys and values follow.

The judge computes each answer again by its marks alone, span by span (`benchmarks.hot_load.weight_replay`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from benchmarks.hot_load.weight_replay import numbers_of
from conftest import make_tiny_model
from drafters import drafting
from myserve.engine.scheduling import block_tables
from myserve.engine.scheduling.scheduler import Scheduler
from runs import Completion
from stepped import Judge, Stepped, versions

PROMPT = [(3 + 7 * i) % 380 for i in range(150)]  # its state is kept at 128 tokens
MakeStepped = Callable[..., Stepped]


@pytest.fixture(scope="module")
def snapshots(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("snapshots")
    return [make_tiny_model("qwen3_5_text", root / str(seed), seed=seed) for seed in range(3)]


@pytest.fixture(scope="module")
def judge(snapshots: list[Path]) -> Iterator[Judge]:
    with Judge(snapshots) as made:
        yield made


@pytest.fixture
def stepped(snapshots: list[Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeStepped]:
    made: list[Stepped] = []

    def make(**config: Any) -> Stepped:
        # what is drafted depends on what steps cost here, and when a token is drawn on that
        made.append(Stepped(snapshots[0], monkeypatch, **({"speculation": "off"} | config)))
        return made[-1]

    yield make
    for each in made:
        states = each.engine.scheduler.block_tables.states
        assert states is not None and states.num_free == states.num_slots
        each.engine.shutdown()


def test_keep_goes_on_from_the_old_state_by_the_new_weights(
    stepped: MakeStepped, snapshots: list[Path], judge: Judge
) -> None:
    engine = stepped()

    async def scene() -> list[Completion]:
        engine.submit(PROMPT, seed=1)
        engine.submit(PROMPT[:5], seed=2, max_tokens=9)
        engine.step(5)
        engine.ready(snapshots[1], mode="keep")
        engine.step(3)
        engine.submit(PROMPT, seed=3)  # the state that the first has left at a border is of no use to it
        engine.ready(snapshots[2], mode="keep")
        return await engine.finish()

    done = asyncio.run(scene())
    long, short, late = done
    assert set(versions(long)) == set(versions(short)) == {0, 1, 2} and versions(late) == [2] * 12
    assert late.metrics is not None and late.metrics.cached_tokens == 0
    for prompt, one in zip([PROMPT, PROMPT[:5], PROMPT], done, strict=True):
        assert not any(token.recomputed for token in one.tokens)
        assert numbers_of(one.tokens) == judge(prompt, one)
    at = versions(long).index(1)  # the control: a wrong mark is seen
    moved = list(long.tokens)
    moved[at] = msgspec.structs.replace(moved[at], weight_version=0)
    assert numbers_of(moved) != judge(PROMPT, replace(long, tokens=moved))


def test_the_control_a_state_that_new_weights_had_changed_is_seen(
    stepped: MakeStepped, snapshots: list[Path], judge: Judge
) -> None:
    engine = stepped()

    async def scene() -> list[Completion]:
        engine.submit(PROMPT, seed=1)
        engine.step(5)
        engine.ready(snapshots[1], mode="keep")
        for state in engine.engine.runner.kv_cache.states:
            state.mul_(1.5)
        return await engine.finish()

    [done] = asyncio.run(scene())
    assert numbers_of(done.tokens) != judge(PROMPT, done)


async def _second_turns(engine: Stepped, snapshots: list[Path]) -> list[tuple[list[int], Completion]]:
    """One that is done before the swap, one that lives through it, and their next turns, twice each."""
    prompts = [PROMPT, PROMPT[1:]]
    engine.submit(prompts[0], seed=1, max_tokens=2)
    engine.submit(prompts[1], seed=4, max_tokens=60)
    engine.step(6)
    engine.ready(snapshots[1], mode="keep")
    first = await engine.finish()
    prompts += [prompts[0], [*prompts[1], *first[1].ids[:50]]]
    engine.submit(prompts[2], seed=2)
    engine.submit(prompts[3], seed=5)
    await engine.finish()
    prompts += prompts[2:]
    engine.submit(prompts[4], seed=6)
    engine.submit(prompts[5], seed=7)
    return list(zip(prompts, await engine.finish(), strict=True))


def test_states_of_the_prefix_cache_never_mix_versions(
    stepped: MakeStepped, snapshots: list[Path], judge: Judge
) -> None:
    done = asyncio.run(_second_turns(stepped(num_blocks=64), snapshots))
    cached = [one.metrics.cached_tokens for _, one in done if one.metrics is not None]
    assert cached == [0, 0, 0, 0, 128, 192]
    for prompt, one in done:
        assert numbers_of(one.tokens) == judge(prompt, one)


def test_the_control_without_the_version_in_their_names_they_do(
    stepped: MakeStepped, snapshots: list[Path], judge: Judge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block_tables, "_root", lambda request, version, adapter: request.cache_root)
    done = asyncio.run(_second_turns(stepped(num_blocks=64), snapshots))
    for prompt, one in done[2:4]:
        assert numbers_of(one.tokens) != judge(prompt, one)


def _with_wrong_drafts(engine: Stepped, snapshots: list[Path]) -> Completion:
    """New weights come while a state lags behind a wrong draft."""

    async def scene() -> Completion:
        with drafting(engine.engine, "wrong", [[[7] * 40]]):
            engine.submit(PROMPT, seed=1, max_tokens=30)
            engine.step(6)
            assert engine.engine.scheduler.running[0].state_lag
            engine.ready(snapshots[1], mode="keep")
            return (await engine.finish())[0]

    return asyncio.run(scene())


def test_a_state_that_lags_is_computed_anew_and_marked_so(
    stepped: MakeStepped, snapshots: list[Path], judge: Judge
) -> None:
    done = _with_wrong_drafts(stepped(speculation="5"), snapshots)
    first = versions(done).index(1)
    assert [token.recomputed for token in done.tokens].index(True) == first
    assert numbers_of(done.tokens) == judge(PROMPT, done)


def test_the_control_where_it_catches_up_by_the_new_weights_its_marks_are_wrong(
    stepped: MakeStepped, snapshots: list[Path], judge: Judge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Scheduler, "_preempt_lagging", lambda self, concerns: None)
    done = _with_wrong_drafts(stepped(speculation="5"), snapshots)
    assert numbers_of(done.tokens) != judge(PROMPT, done)


def test_a_prompt_that_is_half_computed_starts_over_with_its_scores(
    stepped: MakeStepped, snapshots: list[Path], judge: Judge
) -> None:
    engine = stepped(max_num_seqs=4, max_num_batched_tokens=40, prefill_chunk=40)

    async def scene() -> list[Completion]:
        engine.submit(PROMPT, seed=1, n=3)
        engine.submit(PROMPT[:70], seed=2, prompt_logprobs=0)
        engine.step(1)
        engine.ready(snapshots[1], mode="keep")
        done = await engine.finish()
        engine.submit(PROMPT[:70], seed=2, prompt_logprobs=0)
        return done[:4] + (await engine.finish())[4:]

    *choices, scored, again = asyncio.run(scene())
    assert [versions(choice) for choice in choices] == [[1] * 12] * 3
    assert numbers_of(choices[0].tokens) == judge(PROMPT, choices[0])
    scores = [next(d.prompt_logprobs for d in one.deltas if d.prompt_logprobs) for one in (scored, again)]
    assert scores[0] == scores[1]


def test_who_is_preempted_is_marked_where_it_was_computed_anew(
    stepped: MakeStepped, snapshots: list[Path], judge: Judge
) -> None:
    engine = stepped(num_blocks=7, max_num_seqs=3)
    prompts = [PROMPT[i : 60 + i] for i in range(3)]

    async def scene() -> list[Completion]:
        for seed, prompt in enumerate(prompts):
            engine.submit(prompt, seed=seed, max_tokens=30)
        engine.step(4)
        engine.ready(snapshots[1], mode="keep")
        return await engine.finish()

    done = asyncio.run(scene())
    assert any(token.recomputed for one in done for token in one.tokens)
    for prompt, one in zip(prompts, done, strict=True):
        assert numbers_of(one.tokens) == judge(prompt, one)


def test_the_experts_of_a_mixture_are_those_of_each_tokens_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [make_tiny_model("granitemoehybrid-scan", tmp_path / str(seed), seed=seed) for seed in (0, 1)]
    engine = Stepped(paths[0], monkeypatch, speculation="off")

    async def scene() -> list[Completion]:
        engine.submit(PROMPT[:40], seed=1, max_tokens=24, routed_experts=True)
        engine.step(6)
        engine.ready(paths[1], mode="keep")
        return await engine.finish()

    [done] = asyncio.run(scene())
    engine.engine.shutdown()
    routed = [token.routed_experts for token in done.tokens]
    assert set(versions(done)) == {0, 1} and all(routed)
    with Judge(paths) as judge:
        found: list[bytes | None] = []
        assert numbers_of(done.tokens) == judge(PROMPT[:40], done, found)
        assert found == routed
        found = []  # the control: one version alone has other experts
        judge(
            PROMPT[:40],
            replace(done, tokens=[msgspec.structs.replace(t, weight_version=1) for t in done.tokens]),
            found,
        )
        assert found != routed
