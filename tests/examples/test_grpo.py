"""The loop, small: an exact zero beside every step, the same curve twice, and through a server that is killed."""

from __future__ import annotations

import asyncio
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conftest import make_tiny_model


def config(run: Path, **options: Any) -> Any:
    from grpo import Config

    small = {"steps": 3, "prompts": 4, "n": 4, "exam": 16, "exam_every": 2, "run": str(run)}
    return Config(**{**small, **options})


def curve(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "curve.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, embedded_url: str, weights_dir: Path) -> Path:
    from grpo import train

    at = {"url": embedded_url, "weights_dir": str(weights_dir)}
    return asyncio.run(train(config(tmp_path_factory.mktemp("runs") / "unbroken", **at)))


def test_every_step_is_on_policy_to_the_last_bit_and_the_policy_moves(unbroken):
    rows = curve(unbroken)
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert [row["mismatch"] for row in rows[:3]] == [0.0, 0.0, 0.0]
    assert rows[0]["kl_to_start"] == 0 < rows[2]["kl_to_start"]
    assert rows[3]["sampled"] != rows[0]["sampled"]
    assert len((unbroken / "rollouts-0001.jsonl").read_text().splitlines()) == 1 + 4 * 4
    assert "<svg" in (unbroken / "curve.svg").read_text()


@pytest.mark.thorough
@pytest.mark.timeout(300)  # two starts of a server, on whatever machine
def test_a_server_that_is_killed_in_the_middle_changes_nothing(unbroken, tmp_path, monkeypatch):
    import grpo

    killed = []

    class Killer(grpo.Server):
        async def load(self, sampler: Any, step: int, **how: Any) -> None:
            await super().load(sampler, step, **how)
            if step == 1 and not killed:
                killed.append(self.process.pid)
                self.process.kill()  # behind the loop's back: its samples are asked for next

    monkeypatch.setattr(grpo, "Server", Killer)
    folder = asyncio.run(grpo.train(config(tmp_path / "killed")))
    assert killed
    assert (folder / "curve.jsonl").read_bytes() == (unbroken / "curve.jsonl").read_bytes()


def test_a_script_that_was_killed_goes_on_from_its_journal(unbroken, tmp_path, embedded_url, weights_dir):
    """On a server that another run has used before, too: its version numbers go on, the curve does not care."""
    from grpo import train

    at = {"url": embedded_url, "weights_dir": str(weights_dir)}
    half = config(tmp_path / "resumed", **at)
    asyncio.run(train(replace(half, steps=1)))
    folder = asyncio.run(train(replace(half, resume=True)))
    assert (folder / "curve.jsonl").read_bytes() == (unbroken / "curve.jsonl").read_bytes()


@pytest.mark.thorough
@pytest.mark.timeout(300)  # a start of a server
def test_int8_rollouts_are_on_policy_to_the_last_bit_too(unbroken, tmp_path):
    from grpo import train

    rows = curve(asyncio.run(train(config(tmp_path / "int8", quantize="int8", steps=2))))
    assert [row["mismatch"] for row in rows[:2]] == [0.0, 0.0]
    assert rows[0]["kl_to_start"] == 0 and rows[2]["sampled"] != rows[0]["sampled"]
    assert rows[0]["loss"] != curve(unbroken)[0]["loss"]  # control: they are other numbers than float32's


@pytest.mark.thorough
@pytest.mark.timeout(300)  # two starts of a server
def test_a_hybrid_is_on_policy_to_the_last_bit_while_its_weights_move(tmp_path, monkeypatch):
    """Of random weights: it cannot add, so even token ids are its reward. The control: weights a step old."""
    from grpo import train
    from support.policy import Policy

    model = make_tiny_model("qwen3_5_text", tmp_path / "hybrid")
    small = {"model": str(model), "reward": "even", "n": 8, "learning_rate": 1e-2, "exam": 4}
    rows = curve(asyncio.run(train(config(tmp_path / "run", **small))))
    assert [row["mismatch"] for row in rows[:3]] == [0.0, 0.0, 0.0]
    assert all(0 < row["reward"] < 1 and row["loss"] for row in rows[:3])
    assert rows[0]["kl_to_start"] == 0 < rows[1]["kl_to_start"] < rows[2]["kl_to_start"]

    def saves_the_first_again(self: Policy, folder: Path) -> None:
        if not (first := folder.with_name("step-0000")).exists():
            save(self, first)
        elif folder != first:
            shutil.copytree(first, folder)

    save = Policy.save
    monkeypatch.setattr(Policy, "save", saves_the_first_again)
    rows = curve(asyncio.run(train(config(tmp_path / "stale", **small, steps=2))))
    assert rows[0]["mismatch"] == 0 < rows[1]["mismatch"]


def test_another_seed_is_another_curve(unbroken, tmp_path, embedded_url, weights_dir):
    from grpo import train

    other = config(tmp_path / "other", seed=8, steps=1, url=embedded_url, weights_dir=str(weights_dir))
    assert curve(asyncio.run(train(other)))[0]["reward"] != curve(unbroken)[0]["reward"]


def test_truncated_sampling_is_exact_over_its_support_and_not_without(tmp_path, embedded_url, weights_dir):
    from grpo import train

    found = {}
    for correction in ("kept", "mass", "none"):
        at = {"url": embedded_url, "weights_dir": str(weights_dir), "steps": 1, "top_p": 0.7}
        folder = asyncio.run(train(config(tmp_path / correction, correction=correction, **at)))
        found[correction] = curve(folder)[0]["mismatch"]
    assert found["kept"] == 0
    # the trainer's own distribution is not the one that was drawn from
    assert found["none"] == found["mass"] > 0.01


def test_a_trainer_that_is_not_exact_shows_it(embedded_url):
    """The control of every zero above."""
    from support.plain import plain_logprobs
    from support.serving import sampler_for
    from support.sums import HELD_OUT, question

    from myserve.embedded import embedded_model_path
    from myserve.sdk.mismatch.measure import measure

    async def draw() -> list[Any]:
        async with sampler_for(embedded_url) as sampler:
            prompts = [question(pair) for pair in HELD_OUT[:8]]
            groups = await sampler.sample_batch(prompts, n=4, max_tokens=8, seed=7, logprobs=True)
        return [answer for group in groups for answer in group]

    answers = asyncio.run(draw())
    assert measure(answers, plain_logprobs(str(embedded_model_path()), answers)).all.max > 0


def test_the_asynchronous_loop_bounds_staleness_and_loses_nothing(tmp_path, embedded_url, weights_dir):
    from compare_curves import points
    from grpo_async import AsyncConfig, train

    fields = {
        "steps": 4,
        "prompts": 4,
        "n": 4,
        "exam": 16,
        "url": embedded_url,
        "weights_dir": str(weights_dir),
    }
    folder = asyncio.run(train(AsyncConfig(run=str(tmp_path / "async"), staleness=2, **fields)))
    rows = curve(folder)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert 0 < max(row["stale_max"] for row in rows[:4]) <= 2
    journals = [path.read_text().splitlines() for path in sorted(folder.glob("rollouts-*"))]
    assert [len(lines) for lines in journals] == [1 + 4 * 4] * 4
    assert [step for step, _ in points(folder)] == [row["step"] for row in rows if "sampled" in row]
    folder = asyncio.run(train(AsyncConfig(run=str(tmp_path / "sync"), staleness=0, **fields)))
    assert {row["stale_max"] for row in curve(folder)[:4]} == {0}


@pytest.mark.thorough
@pytest.mark.timeout(300)
def test_a_mixture_of_experts_that_was_upcycled_can_add_and_learns_with_replay(tmp_path):
    from grpo import train
    from upcycle import upcycle

    moe = upcycle(tmp_path / "moe")
    rows = curve(asyncio.run(train(config(tmp_path / "run", model=str(moe), replay=True, steps=2, n=8))))
    assert rows[0]["reward"] > 0.2
    assert [row["mismatch"] for row in rows[:2]] == [0.0, 0.0]
