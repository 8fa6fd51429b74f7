"""Updates while requests are in flight: every answer is what its marks say (`benchmarks.hot_load.weight_replay`).

The engine's steps are taken by hand here, so that a swap falls exactly where the test wants it.
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
from myserve.core.params import SamplingParams
from myserve.engine.config import EngineConfig
from myserve.engine.engine import Engine
from myserve.engine.scheduling import block_tables
from myserve.errors import EngineDeadError, WeightsLoadingError
from runs import Completion, collect
from stepped import Judge, Stepped, versions

PROMPT = list(range(100, 180))


@pytest.fixture(scope="module")
def snapshots(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("snapshots")
    return [make_tiny_model("qwen3", root / str(seed), seed=seed) for seed in range(3)]


@pytest.fixture(scope="module")
def judge(snapshots: list[Path]) -> Iterator[Judge]:
    with Judge(snapshots) as made:
        yield made


@pytest.fixture
def stepped(snapshots: list[Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Stepped]]:
    made: list[Stepped] = []

    def make(**config: Any) -> Stepped:
        made.append(Stepped(snapshots[0], monkeypatch, **config))
        return made[-1]

    yield make
    for each in made:
        each.engine.shutdown()


def test_keep_goes_on_with_the_old_keys_and_the_new_weights(
    stepped: Any, snapshots: list[Path], judge: Any
) -> None:
    engine = stepped()

    async def scene() -> list[Completion]:
        engine.submit(PROMPT, seed=1)
        engine.submit(PROMPT[:5], seed=2, max_tokens=9)
        engine.step(4)
        first = engine.ready(snapshots[1], mode="keep")
        engine.step(3)
        engine.submit(PROMPT, seed=3)  # what the first has cached is of no use to it
        second = engine.ready(snapshots[2], mode="keep")
        done = await engine.finish()
        assert [first.result(0).weight_version, second.result(0).weight_version] == [1, 2]
        return done

    long, short, late = asyncio.run(scene())
    assert versions(long) == [0] * 4 + [1] * 3 + [2] * 5
    assert versions(short) == [0] * 4 + [1] * 3 + [2] * 2
    assert versions(late) == [2] * 12
    assert late.metrics is not None and late.metrics.cached_tokens == 0
    for prompt, done in [(PROMPT, long), (PROMPT[:5], short), (PROMPT, late)]:
        assert numbers_of(done.tokens) == judge(prompt, done)


def test_control_the_judge_sees_a_wrong_mark(stepped: Any, snapshots: list[Path], judge: Any) -> None:
    engine = stepped()

    async def scene() -> list[Completion]:
        engine.submit(PROMPT, seed=1)
        engine.step(4)
        engine.ready(snapshots[1], mode="keep")
        return await engine.finish()

    (done,) = asyncio.run(scene())
    for at in (3, 4):  # the token before the swap, the first behind it
        moved = list(done.tokens)
        moved[at] = msgspec.structs.replace(moved[at], weight_version=1 - moved[at].weight_version)
        assert numbers_of(moved) != judge(PROMPT, replace(done, tokens=moved))


async def _same_prompt_again(engine: Stepped, snapshots: list[Path]) -> list[Completion]:
    """One that is done before the swap, one that lives through it and fills blocks after it, and one behind both."""
    engine.submit(PROMPT, seed=1, max_tokens=2)
    engine.submit(PROMPT[:20], seed=4, max_tokens=60)
    engine.step(4)
    engine.ready(snapshots[1], mode="keep")
    first = await engine.finish()
    engine.submit(PROMPT, seed=2)
    engine.submit(PROMPT[:20] + first[1].ids[:40], seed=5)
    engine.submit(PROMPT[:20] + first[1].ids[:40], seed=6)
    return await engine.finish()


def test_the_prefix_cache_never_mixes_versions(stepped: Any, snapshots: list[Path], judge: Any) -> None:
    done = asyncio.run(_same_prompt_again(stepped(), snapshots))
    for prompt, completion in zip(
        [PROMPT, PROMPT[:20], PROMPT, *[PROMPT[:20] + done[1].ids[:40]] * 2], done, strict=True
    ):
        assert numbers_of(completion.tokens) == judge(prompt, completion)


def test_control_without_the_version_in_its_key_the_cache_mixes_them(
    stepped: Any, snapshots: list[Path], judge: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block_tables, "_root", lambda request, version, adapter: request.cache_root)
    done = asyncio.run(_same_prompt_again(stepped(), snapshots))
    assert numbers_of(done[2].tokens) != judge(PROMPT, done[2])
    assert numbers_of(done[3].tokens) != judge(PROMPT[:20] + done[1].ids[:40], done[3])


def test_a_prompt_that_is_half_computed_starts_over(stepped: Any, snapshots: list[Path], judge: Any) -> None:
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
    for index, choice in enumerate(choices):
        assert versions(choice) == [1] * 12, index
    assert numbers_of(choices[0].tokens) == judge(PROMPT, choices[0])
    assert versions(scored) == [1] * 12
    prompt_scores = [
        next(d.prompt_logprobs for d in done.deltas if d.prompt_logprobs) for done in (scored, again)
    ]
    assert prompt_scores[0] == prompt_scores[1]


def test_who_is_preempted_is_marked_where_it_was_computed_anew(
    stepped: Any, snapshots: list[Path], judge: Any
) -> None:
    engine = stepped(num_blocks=7, max_num_seqs=3)
    prompts = [PROMPT[:60], PROMPT[1:61], PROMPT[2:62]]

    async def scene() -> list[Completion]:
        for seed, prompt in enumerate(prompts):
            engine.submit(prompt, seed=seed, max_tokens=30)
        engine.step(4)
        engine.ready(snapshots[1], mode="keep")
        return await engine.finish()

    done = asyncio.run(scene())
    assert any(token.recomputed for completion in done for token in completion.tokens)
    for prompt, completion in zip(prompts, done, strict=True):
        assert numbers_of(completion.tokens) == judge(prompt, completion)


def test_drain_lets_who_is_in_flight_finish_with_its_siblings(
    stepped: Any, snapshots: list[Path], judge: Any
) -> None:
    engine = stepped(max_num_seqs=2, max_num_batched_tokens=512)

    async def scene() -> list[Completion]:
        engine.submit(PROMPT, seed=1, n=4)  # two at a time: the others wait in line
        engine.step(3)
        update = engine.ready(snapshots[1], mode="drain")
        engine.submit(PROMPT, seed=1)
        engine.submit(PROMPT, seed=2)
        engine.step(5)
        assert update.stage == "draining"
        done = await engine.finish()
        assert update.result(0).drain_duration > 0
        return done

    *group, new, other = asyncio.run(scene())
    assert [set(versions(c)) for c in (*group, new, other)] == [{0}] * 4 + [{1}] * 2
    assert len({tuple(c.ids) for c in group}) == 4
    for completion in (group[0], new, other):
        assert numbers_of(completion.tokens) == judge(PROMPT, completion)


def test_drain_without_anyone_in_flight_swaps_at_once(stepped: Any, snapshots: list[Path]) -> None:
    engine = stepped()

    async def scene() -> None:
        engine.submit(PROMPT, seed=1)
        update = engine.ready(snapshots[1])
        engine.step()
        assert update.stage == "done"
        assert set(versions((await engine.finish())[0])) == {1}

    asyncio.run(scene())


def test_who_is_asked_to_refuse_while_it_drains_does(stepped: Any, snapshots: list[Path]) -> None:
    engine = stepped()

    async def scene() -> None:
        engine.submit(PROMPT, seed=1)
        engine.step(2)
        engine.ready(snapshots[1], refuse_new=True)
        engine.step()
        with pytest.raises(WeightsLoadingError, match="try again in a moment"):
            engine.engine.submit([1], SamplingParams())
        await engine.finish()
        engine.step()
        engine.submit(PROMPT, seed=2)
        assert set(versions((await engine.finish())[1])) == {1}

    asyncio.run(scene())


def test_abort_ends_who_has_tokens_with_them_and_nobody_else(
    stepped: Any, snapshots: list[Path], judge: Any
) -> None:
    engine = stepped(max_num_seqs=2, max_num_batched_tokens=512)

    later = [*PROMPT, *PROMPT[:30]]  # longer: of two that come together, the shorter goes first

    async def scene() -> list[Completion]:
        engine.submit(PROMPT, seed=1, n=2)
        engine.submit(later, seed=2)  # has no place yet, so it has nothing to lose
        engine.step(3)
        update = engine.ready(snapshots[1], mode="abort")
        done = await engine.finish()
        assert update.result(0).num_aborted == 2
        return done

    first, second, third = asyncio.run(scene())
    for aborted in (first, second):
        assert (aborted.finish_reason, versions(aborted)) == ("abort", [0] * 3)
    assert (third.finish_reason, versions(third)) == ("length", [1] * 12)
    assert numbers_of(first.tokens) == judge(PROMPT, first)
    assert numbers_of(third.tokens) == judge(later, third)
    assert engine.engine.scheduler.pool.num_free == 32


def test_reset_forgets_every_block(stepped: Any, snapshots: list[Path]) -> None:
    engine = stepped()

    async def scene() -> None:
        engine.submit(PROMPT, seed=1)
        await engine.finish()
        assert "2 cached" in repr(engine.engine.scheduler.pool)
        engine.ready(snapshots[1], reset_prefix_cache=True)
        engine.step()
        assert "0 cached" in repr(engine.engine.scheduler.pool)

    asyncio.run(scene())


def test_updates_wait_for_each_other_and_the_end_of_the_engine_ends_them(
    snapshots: list[Path],
) -> None:
    engine = Engine.from_pretrained(str(snapshots[0]), EngineConfig(num_blocks=32))

    async def scene() -> None:
        stream = asyncio.ensure_future(
            collect(engine.submit(PROMPT, SamplingParams(max_tokens=400, ignore_eos=True)))
        )
        await asyncio.sleep(0.05)
        kept = await engine.update_weights(snapshots[1], mode="keep")
        assert kept.weight_version == 1
        first, second = (engine.update_weights(path) for path in snapshots[1:])
        await first.checked()
        assert (first.stage, second.stage) == ("draining", "preparing")
        await asyncio.to_thread(engine.shutdown)
        for update in (first, second, engine.update_weights(snapshots[2])):
            assert update.stage == "failed"
            with pytest.raises(EngineDeadError):
                await update
        [completion] = await stream
        assert isinstance(completion.error, EngineDeadError)

    asyncio.run(scene())
