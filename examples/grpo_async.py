"""Asynchronous GRPO: rollouts go on while the trainer steps, and new weights come in under them (`keep`).

    python examples/grpo_async.py --staleness 2       # runs/grpo-async/curve.svg

A batch begins at most `staleness` steps before it is trained on, so no token is older than that; each token says which
weights drew it, and its own logprob is the ratio's denominator. Nothing is lost at a swap. What is in flight at a swap
depends on the clock, so this curve is not the same twice; with --staleness 0 it is the synchronous one.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from grpo import Config, advantages, draw, learn, parse_args, rewards_of
from support.display import Curve
from support.policy import Policy
from support.run_folder import RunError, new_folder
from support.serving import Server
from support.sums import HELD_OUT, question

from myserve.sdk import AdaptiveConcurrencyController, Completions, DeploymentSampler, SampledCompletion
from tools.embedded_model.evaluate import accuracy


@dataclass(frozen=True)
class AsyncConfig(Config):
    run: str = "runs/grpo-async"
    staleness: int = 2  # steps that a token may be old


def versions(answer: SampledCompletion) -> Iterator[int]:
    """Return the weight version of each token."""
    last = answer.weight_version or 0
    for span in answer.weight_version_spans or [
        {"start": 0, "end": answer.completion_len, "weight_version": last}
    ]:
        yield from [span["weight_version"]] * (span["end"] - span["start"])


def staleness(server: Server, step: int, answers: Sequence[SampledCompletion]) -> list[int]:
    """Return how many steps old each token is."""
    return [server.version(step) - version for answer in answers for version in versions(answer)]


async def train(config: AsyncConfig) -> Path:
    if config.resume:
        raise RunError("an asynchronous run cannot be gone on with: what is in flight depends on the clock")
    run = new_folder(Path(config.run), asdict(config))
    policy = Policy(config.model, config.learning_rate, replay=config.replay, quantize=config.quantize)
    held_out = [(question(pair), str(sum(pair))) for pair in HELD_OUT[: config.exam]]
    window = AdaptiveConcurrencyController(initial_window=64)
    weights_dir = Path(config.weights_dir or run / "weights")
    policy.save(weights_dir / "step-0000")
    started: deque[asyncio.Task[list[Completions]]] = deque()
    options = ("--quantize", config.quantize)
    with Server(config.model, weights_dir, config.url, options) as server, Curve(run, config.steps) as curve:
        sampler = DeploymentSampler(server.url, server.name, "", policy.tokenizer, window)
        await server.load(sampler, 0)
        for step in range(config.steps + 1):
            figures: dict[str, float] = {}
            for ahead in range(step + len(started), min(step + config.staleness + 1, config.steps)):
                journal = run / f"rollouts-{ahead:04}.jsonl"
                started.append(asyncio.create_task(draw(config, sampler, ahead, journal)))
            # In threads of their own: meanwhile the event loop takes in the rollouts of the steps to come.
            if step % config.exam_every == 0 or step == config.steps:
                exam = await asyncio.to_thread(accuracy, policy.model, policy.tokenizer, held_out)
                figures |= {"greedy": exam.greedy, "sampled": exam.sampled}
            if started:
                with curve.sampling(sampler, window):
                    groups = await started.popleft()
                    answers = [answer for group in groups for answer in group]
                    rewards = rewards_of(config, step, groups)
                    ages = staleness(server, step, answers)
                    figures |= {"reward": rewards.mean().item()}
                    figures |= {"stale_mean": sum(ages) / len(ages), "stale_max": max(ages)}
                    advantage = advantages(rewards).flatten()
                    figures |= await asyncio.to_thread(learn, config, policy, answers, advantage)
                    policy.save(weights_dir / f"step-{step + 1:04}")
                    await server.load(sampler, step + 1, mode="keep")
            curve.add(step, figures)
        await sampler.aclose()
    return run


if __name__ == "__main__":
    try:
        asyncio.run(train(parse_args(AsyncConfig)))
    except RunError as error:
        raise SystemExit(f"grpo_async: {error}") from None
