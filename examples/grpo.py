"""GRPO on two-digit sums, on-policy to the last bit: a server, the SDK, weights loaded every step, a plain trainer.

    python examples/grpo.py                      # about ten minutes on two cores: runs/grpo/curve.svg
    python examples/grpo.py --resume             # goes on with a run that was killed; the curve is the same
    python examples/grpo.py --url http://... --weights-dir DIR    # on a server of yours, started with that directory

Every step: draw n answers to each of some sums, score them, take minibatch steps of the clipped policy gradient,
save the weights, load them into the server. The denominators of the ratios are the server's own logprobs, because the
trainer computes the same numbers: the mismatch that is printed beside each step is an exact zero.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TypeVar

import torch
from display import Curve
from policy import Policy
from serving import Server
from sums import HELD_OUT, MAX_TOKENS, Sum, question, reward, sums_of_step
from torch import Tensor

from myserve.demo import embedded_model_path
from myserve.demo.evaluate import accuracy
from myserve.sdk import AdaptiveConcurrencyController, Completions, DeploymentSampler, SampledCompletion
from myserve.sdk.mismatch import measure


@dataclass(frozen=True)
class Config:
    """Every knob; each is an option of the command line."""

    model: str = str(embedded_model_path())
    run: str = "runs/grpo"  # rollouts, weights and curve
    url: str = ""  # a server's root; none: this script starts one
    weights_dir: str = ""  # with `url`: the directory that the server was started with
    steps: int = 50
    prompts: int = 64  # a step
    n: int = 8  # answers to each
    minibatches: int = 4
    learning_rate: float = 3e-5
    clip: float = 0.2
    temperature: float = 1.0
    top_p: float = 1.0
    correction: str = "kept"  # of truncated sampling: kept | mass | none (docs/training.md)
    exam_every: int = 5
    exam: int = 812  # held-out sums asked
    replay: bool = False  # a mixture of experts: the trainer uses the experts that the server used
    seed: int = 7
    resume: bool = False


C = TypeVar("C", bound=Config)


def advantages(rewards: Tensor) -> Tensor:
    """[P, n] -> [P, n]: how much better than the other answers to the same sum, in standard deviations."""
    return (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)


async def rollouts(
    config: Config, server: Server, sampler: DeploymentSampler, step: int, sums: Sequence[Sum]
) -> list[Completions]:
    """The answers by the weights of this step, and by no others: what a restarted server made is made again."""
    journal = Path(config.run) / f"rollouts-{step:04}.jsonl"
    while True:
        await server.load(sampler, step)
        groups = await sampler.sample_batch(
            [question(pair) for pair in sums], n=config.n, max_tokens=MAX_TOKENS, temperature=config.temperature,
            top_p=config.top_p, kept=config.top_p < 1, include_routing_matrix=config.replay, logprobs=True,
            on_error="refill", journal=journal, seed=config.seed * 1_000_003 + step,
        )  # fmt: skip
        if {answer.weight_version for group in groups for answer in group} == {server.version(step)}:
            return groups
        journal.unlink()


def policy_loss(config: Config, new: Tensor, old: Tensor, advantage: Tensor, weight: Tensor) -> Tensor:
    """The clipped surrogate, a mean over tokens. All [N]; `weight` is 1 but for the correction by mass."""
    ratio = (new - old).exp()
    clipped = ratio.clamp(1 - config.clip, 1 + config.clip)
    return -(torch.minimum(ratio * advantage, clipped * advantage) * weight).mean()


def learn(
    config: Config, policy: Policy, answers: Sequence[SampledCompletion], advantage: Tensor
) -> dict[str, float]:
    """One pass over a step's answers, in minibatches; what the first of them says of the mismatch."""
    figures: dict[str, float] = {}
    losses = []
    for part in torch.arange(len(answers)).chunk(config.minibatches):
        batch = [answers[i] for i in part]
        new = policy.logprobs(
            batch, temperature=config.temperature, kept=config.correction == "kept" and config.top_p < 1
        )
        old = torch.tensor([p for a in batch for p in a.sampling_logprobs or ()])
        if not figures:  # the weights are still those that drew the answers
            rows = [row.tolist() for row in new.detach().split([a.completion_len for a in batch])]
            found = measure(batch, rows, against="sampling")
            figures = {"mismatch": found.all.max, "kl_to_start": policy.kl_to_start(batch, new.detach())}
        if config.correction == "none":
            old = new.detach() if part[0] == 0 else old
        mass = torch.tensor([k["mass"] for a in batch for k in a.kept or [{"mass": 1.0}] * a.completion_len])
        weight = mass if config.correction == "mass" else torch.ones_like(old)
        lengths = torch.tensor([a.completion_len for a in batch])
        loss = policy_loss(config, new, old, advantage[part].repeat_interleave(lengths), weight)
        policy.step(loss)
        losses.append(loss.item())
    return figures | {"loss": sum(losses) / len(losses)}


async def train(config: Config) -> Path:
    """The whole run; returns the folder with its curve."""
    run = Path(config.run)
    if not config.resume:
        shutil.rmtree(run, ignore_errors=True)
    run.mkdir(parents=True, exist_ok=True)
    policy = Policy(config.model, config.learning_rate, replay=config.replay)
    held_out = [(question(pair), str(sum(pair))) for pair in HELD_OUT[: config.exam]]
    window = AdaptiveConcurrencyController(initial_window=64)
    weights_dir = Path(config.weights_dir or run / "weights")
    policy.save(weights_dir / "step-0000")
    with Server(config.model, weights_dir, config.url) as server, Curve(run, config.steps) as curve:
        sampler = DeploymentSampler(server.url, server.name, "", policy.tokenizer, window)
        for step in range(config.steps + 1):
            figures: dict[str, float] = {}
            if step % config.exam_every == 0 or step == config.steps:
                exam = accuracy(policy.model, policy.tokenizer, held_out)
                figures |= {"greedy": exam.greedy, "sampled": exam.sampled}
            if step < config.steps:
                sums = sums_of_step(config.seed, step, config.prompts)
                groups = await rollouts(config, server, sampler, step, sums)
                rewards = torch.tensor(
                    [[reward(p, answer) for answer in group] for p, group in zip(sums, groups, strict=True)]
                )
                answers = [answer for group in groups for answer in group]
                figures |= {"reward": rewards.mean().item()}
                figures |= learn(config, policy, answers, advantages(rewards).flatten())
                policy.save(weights_dir / f"step-{step + 1:04}")
                curve.live(sampler.stats.completion_tokens, window.step_completed()["window"])
            curve.add(step, figures)
        await sampler.aclose()
    return run


def parse_args(kind: type[C], arguments: Sequence[str] | None = None) -> C:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for field in fields(kind):
        name, default = "--" + field.name.replace("_", "-"), field.default
        if isinstance(default, bool):
            parser.add_argument(name, action="store_true")
        else:
            parser.add_argument(name, type=type(default), default=default, help=f"default: {default}")
    return kind(**vars(parser.parse_args(arguments)))


if __name__ == "__main__":
    folder = asyncio.run(train(parse_args(Config)))
    last = json.loads((folder / "curve.jsonl").read_text().splitlines()[-1])
    print(
        f"held-out sums: {last['greedy']:.1%} greedy, {last['sampled']:.1%} at temperature 1; {folder}/curve.svg"
    )
