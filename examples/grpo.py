"""GRPO on two-digit sums, on-policy to the last bit: a server, the SDK, weights loaded every step, a plain trainer.

    python examples/grpo.py                      # a few minutes on two cores: runs/grpo/curve.svg
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
import os
import signal
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal, TypeVar, get_args

import torch
from support.display import Curve
from support.policy import Policy
from support.run_folder import RunError, folder_to_resume, new_folder
from support.serving import Server
from support.sums import HELD_OUT, MAX_TOKENS, evenness, question, reward, sums_of_step
from torch import Tensor

from myserve.embedded import embedded_model_path
from myserve.sdk import AdaptiveConcurrencyController, Completions, DeploymentSampler, SampledCompletion
from myserve.sdk.mismatch.measure import measure
from tools.embedded_model.evaluate import accuracy

Correction = Literal["kept", "mass", "none"]
Quantize = Literal["off", "int8"]
Reward = Literal["sum", "even"]
CHOICES = {
    "correction": get_args(Correction), "quantize": get_args(Quantize), "reward": get_args(Reward)
}  # fmt: skip


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
    correction: Correction = "kept"  # of truncated sampling (docs/training.md)
    reward: Reward = "sum"  # even: of even token ids, which a model that cannot add draws as well
    exam_every: int = 5
    exam: int = 812  # held-out sums asked
    replay: bool = False  # a mixture of experts: the trainer uses the experts that the server used
    replicas: int = 1  # more than one: a fleet on Ray, with the same curve (docs/scale.md)
    quantize: Quantize = "off"  # int8 rollouts, and a trainer with their bits (docs/quantization.md)
    seed: int = 7
    resume: bool = False


C = TypeVar("C", bound=Config)


def advantages(rewards: Tensor) -> Tensor:
    """Return [P, n]: rewards above the mean of the same sum's answers, in standard deviations."""
    return (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)


async def draw(config: Config, sampler: DeploymentSampler, step: int, journal: Path) -> list[Completions]:
    """Return a step's answers; those in the journal are not drawn again."""
    return await sampler.sample_batch(
        [question(pair) for pair in sums_of_step(config.seed, step, config.prompts)], n=config.n,
        max_tokens=MAX_TOKENS, temperature=config.temperature, top_p=config.top_p, kept=config.top_p < 1,
        include_routing_matrix=config.replay, logprobs=True, on_error="refill", journal=journal,
        seed=config.seed * 1_000_003 + step,
    )  # fmt: skip


async def rollouts(
    config: Config, server: Server, sampler: DeploymentSampler, step: int, journal: Path
) -> list[Completions]:
    """Return answers by the weights of this step and no others: those of a restarted server are drawn again."""
    while True:
        await server.load(sampler, step)
        groups = await draw(config, sampler, step, journal)
        if {answer.weight_version for group in groups for answer in group} == {server.version(step)}:
            return groups
        journal.unlink()


def rewards_of(config: Config, step: int, groups: Sequence[Completions]) -> Tensor:
    """Return the rewards [P, n] of a step's answers."""
    sums = sums_of_step(config.seed, step, config.prompts)
    if config.reward == "even":
        return torch.tensor([[evenness(answer) for answer in group] for group in groups])
    rows = [[reward(pair, answer) for answer in group] for pair, group in zip(sums, groups, strict=True)]
    return torch.tensor(rows)


def ratio_base(config: Config, batch: Sequence[SampledCompletion]) -> tuple[Tensor, Tensor]:
    """Return the logprob that each token's ratio divides by, and its weight: [N] both."""
    drawn_with = torch.tensor([p for answer in batch for p in answer.sampling_logprobs or ()])
    if config.correction != "mass" or config.top_p == 1:
        return drawn_with, torch.ones_like(drawn_with)
    mass = torch.tensor([entry["mass"] for answer in batch for entry in answer.kept or ()])
    return drawn_with + mass.log(), mass  # over the vocabulary; and ratio * mass is what was divided by


def policy_loss(config: Config, new: Tensor, old: Tensor, advantage: Tensor, weight: Tensor) -> Tensor:
    """Return the clipped surrogate, a mean over tokens. All [N]; `weight` is 1 but for the correction by mass."""
    ratio = (new - old).exp()
    clipped = ratio.clamp(1 - config.clip, 1 + config.clip)
    return -(torch.minimum(ratio * advantage, clipped * advantage) * weight).mean()


def learn(
    config: Config, policy: Policy, answers: Sequence[SampledCompletion], advantage: Tensor
) -> dict[str, float]:
    """Make one pass over a step's answers, in minibatches; return the first one's mismatch."""
    figures: dict[str, float] = {}
    losses = []
    for part in torch.arange(len(answers)).chunk(config.minibatches):
        batch = [answers[i] for i in part]
        old, weight = ratio_base(config, batch)
        over_support = config.correction == "kept" and config.top_p < 1
        new = policy.logprobs(batch, temperature=config.temperature, kept=over_support)
        if not figures:  # the weights are still those that drew the answers
            rows = [row.tolist() for row in new.detach().split([a.completion_len for a in batch])]
            found = measure(batch, rows, against="sampling")
            figures = {"mismatch": found.all.max, "kl_to_start": policy.kl_to_start(batch, new.detach())}
        lengths = torch.tensor([a.completion_len for a in batch])
        loss = policy_loss(config, new, old, advantage[part].repeat_interleave(lengths), weight)
        policy.step(loss)
        losses.append(loss.item())
    return figures | {"loss": sum(losses) / len(losses)}


async def train(config: Config) -> Path:
    """Run all steps; return the folder with the curve."""
    folder = folder_to_resume if config.resume else new_folder
    run = folder(Path(config.run), asdict(config))
    policy = Policy(config.model, config.learning_rate, replay=config.replay, quantize=config.quantize)
    held_out = [(question(pair), str(sum(pair))) for pair in HELD_OUT[: config.exam]]
    window = AdaptiveConcurrencyController(initial_window=64)
    weights_dir = Path(config.weights_dir or run / "weights")
    policy.save(weights_dir / "step-0000")
    options = ["--quantize", config.quantize]
    if config.replicas > 1:
        cores = (os.cpu_count() or 1) / config.replicas
        options += ["--replicas", str(config.replicas), "--replica-cpus", str(cores)]
    with Server(config.model, weights_dir, config.url, options) as server, Curve(run, config.steps) as curve:
        sampler = DeploymentSampler(server.url, server.name, "", policy.tokenizer, window)
        for step in range(config.steps + 1):
            figures: dict[str, float] = {}
            if step % config.exam_every == 0 or step == config.steps:
                exam = accuracy(policy.model, policy.tokenizer, held_out)
                figures |= {"greedy": exam.greedy, "sampled": exam.sampled}
            if step < config.steps:
                with curve.sampling(sampler, window):
                    groups = await rollouts(config, server, sampler, step, run / f"rollouts-{step:04}.jsonl")
                rewards = rewards_of(config, step, groups)
                answers = [answer for group in groups for answer in group]
                figures |= {"reward": rewards.mean().item()}
                figures |= learn(config, policy, answers, advantages(rewards).flatten())
                policy.save(weights_dir / f"step-{step + 1:04}")
                window.step_completed()
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
            words = {"default": default, "help": f"default: {default}"}
            parser.add_argument(name, type=type(default), choices=CHOICES.get(field.name), **words)
    return kind(**vars(parser.parse_args(arguments)))


def main() -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the server ends with the script
    try:
        folder = asyncio.run(train(parse_args(Config)))
    except RunError as error:
        raise SystemExit(f"grpo: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("stopped; --resume goes on") from None
    last = json.loads((folder / "curve.jsonl").read_text().splitlines()[-1])
    shares = f"{last['greedy']:.1%} greedy, {last['sampled']:.1%} at temperature 1"
    print(f"held-out sums: {shares}; {folder}/curve.svg")


if __name__ == "__main__":
    main()
