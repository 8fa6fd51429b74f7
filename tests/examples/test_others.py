"""The corrections beside each other, and what TRL calls, small, on a real server."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest


@pytest.mark.thorough
def test_the_corrections_differ_in_their_weights_and_in_nothing_drawn(tmp_path):
    import corrections

    found = asyncio.run(corrections.main(steps=2, seeds=1, prompts=6, exam=16, run=str(tmp_path / "run")))
    first = {name: curves[0][0] for name, curves in found.items()}
    assert len({row["reward"] for row in first.values()}) == 1  # the same weights, the same draws
    assert first["kept"]["mismatch"] == 0 < first["mass"]["mismatch"] == first["none"]["mismatch"]
    assert len({row["loss"] for row in first.values()}) == 3
    chart = (tmp_path / "run" / "rewards.svg").read_text()
    assert all(f">{name}" in chart for name in found), "the legend names each correction"


def test_the_mass_gives_the_ratio_of_importance_sampling_back():
    """With it the trainer's ratio begins at one, where the clip is centred, and its product is the true ratio."""
    import torch
    from grpo import Config, ratio_base

    from myserve.sdk import SampledCompletion

    drawn = [torch.tensor(0.8).log().item(), torch.tensor(0.5).log().item()]
    sample = SampledCompletion(
        text="", full_tokens=[1, 2, 3], prompt_len=1, finish_reason="stop", completion_len=2,
        sampling_logprobs=drawn, kept=[{"token_ids": [2], "mass": 0.7}, {"token_ids": [3], "mass": 1.0}],
    )  # fmt: skip
    old, weight = ratio_base(Config(top_p=0.7, correction="mass"), [sample])
    torch.testing.assert_close(old.exp(), torch.tensor([0.8 * 0.7, 0.5]))  # what the whole vocabulary gives
    torch.testing.assert_close(weight, torch.tensor([0.7, 1.0]))
    for correction in ("kept", "none"):
        old, weight = ratio_base(Config(top_p=0.7, correction=correction), [sample])
        torch.testing.assert_close(old.exp(), torch.tensor([0.8, 0.5]))
        assert weight.tolist() == [1.0, 1.0]


@pytest.mark.thorough
def test_the_table_of_the_mismatch_names_each_trainer(tmp_path):
    import mismatch_table
    from support.serving import Server

    from myserve.embedded import embedded_model_path

    # with weights that no other test has changed
    with Server(str(embedded_model_path()), tmp_path) as server:
        found = asyncio.run(mismatch_table.main(url=server.url, prompts=24))
    named = {name: mismatch.verdict.kind for name, mismatch in found.items()}
    assert named == {
        "exact_forward": "exact", "plain float32": "rounding", "bfloat16": "precision",
        "temperature forgotten": "temperature", "off by one token": "off by one",
        "weights 4 updates apart": "stale weights",
    }  # fmt: skip


@pytest.mark.thorough
def test_the_table_of_the_routing_shows_what_replay_is_worth(tmp_path):
    import routing_table

    found = asyncio.run(routing_table.main(tmp_path / "moe", prompts=24))
    assert found["exact_forward"].all.max == found["exact_forward, replayed"].all.max == 0
    assert found["bfloat16, replayed"].all.kl_k3 < found["bfloat16"].all.kl_k3


class Trainer:
    """What TRL's `rollout_func` is given, as far as it is used: TRL itself is no dependency of ours."""

    def __init__(self, model: Any) -> None:
        self.model, self.state = model, SimpleNamespace(global_step=0)


@pytest.fixture
def trainer() -> Trainer:
    from transformers import AutoModelForCausalLM

    from myserve.embedded import embedded_model_path

    return Trainer(AutoModelForCausalLM.from_pretrained(embedded_model_path(), dtype="float32"))


def test_trl_draws_with_the_trainers_weights(trainer: Trainer, tmp_path: Path):
    import torch
    from support.serving import Server
    from support.sums import PRACTICE, question
    from transformers import AutoTokenizer
    from trl_grpo import OnPolicy, rewards

    from myserve.embedded import embedded_model_path
    from myserve.sdk import DeploymentSampler

    path = embedded_model_path()
    prompts = [question(pair) for pair in PRACTICE[:2] for _ in range(3)]
    with Server(str(path), tmp_path) as server:
        sampler = DeploymentSampler(
            server.url, server.name, "", AutoTokenizer.from_pretrained(path), run_seed=7
        )
        rollout = OnPolicy(server, sampler, tmp_path)
        before = rollout(prompts, trainer)
        with torch.no_grad():
            trainer.model.model.embed_tokens.weight.zero_()  # tied: every token is as likely as any other
        trainer.state.global_step = 1
        after = rollout(prompts, trainer)
        assert {len(rows) for rows in (*before.values(), *after.values())} == {len(prompts)}
        flat = [p for row in after["logprobs"] for p in row]
        uniform = -torch.tensor(float(len(sampler.tokenizer))).log().item()
        assert flat == pytest.approx([uniform] * len(flat), abs=1e-4)
        assert max(p for row in before["logprobs"] for p in row) > -1
    assert rewards(prompts=["", ""], completions=["11", "12"], answer=["11", "11"]) == [1.0, 0.0]
