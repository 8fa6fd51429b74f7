"""A trainer's logprobs spoiled in each of the usual ways, and the verdict on each: the table of docs/training.md.

python examples/mismatch_table.py [--chart docs/mismatch.svg]
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Sequence

import torch
from support.plain import Rows, plain_logprobs
from support.policy import Policy
from support.serving import sampler_for
from support.sums import HELD_OUT, MAX_TOKENS, question

from myserve.embedded import embedded_model_path
from myserve.sdk import SampledCompletion
from myserve.sdk.mismatch import Mismatch, measure, plot_mismatch

TEMPERATURE = 0.7


async def draw(url: str, prompts: int, server_options: Sequence[str] = ()) -> list[SampledCompletion]:
    asked = [question(pair) for pair in HELD_OUT[:prompts]]
    async with sampler_for(url, server_options) as sampler:
        groups = await sampler.sample_batch(
            asked,
            n=8,
            max_tokens=MAX_TOKENS,
            temperature=TEMPERATURE,
            seed=7,
            logprobs=True,
            on_error="refill",
        )
    return [answer for group in groups for answer in group]


def scored(policy: Policy, samples: Sequence[SampledCompletion], temperature: float = TEMPERATURE) -> Rows:
    flat = policy.logprobs(samples, temperature=temperature).detach()
    return [row.tolist() for row in flat.split([sample.completion_len for sample in samples])]


def trained(policy: Policy, samples: Sequence[SampledCompletion], steps: int) -> Policy:
    """Return the policy after some updates."""
    for _ in range(steps):
        policy.step(-policy.logprobs(samples).mean())
    return policy


def spoiled(samples: Sequence[SampledCompletion]) -> dict[str, Mismatch]:
    """Return the mismatch of each trainer, by its name."""
    model = str(embedded_model_path())
    exact = Policy(model, 3e-5)
    rows = scored(exact, samples)
    trainers = {
        "exact_forward": rows,
        "plain float32": plain_logprobs(model, samples, temperature=TEMPERATURE),
        "bfloat16": plain_logprobs(model, samples, temperature=TEMPERATURE, dtype=torch.bfloat16),
        "temperature forgotten": scored(exact, samples, temperature=1.0),
        "off by one token": [row[-1:] + row[:-1] for row in rows],
        "weights 4 updates apart": scored(trained(exact, samples[:64], 4), samples),
    }
    drawn_by = samples[0].weight_version or 0
    return {
        name: measure(
            samples, rows, against="sampling", trainer_version=drawn_by + 4 * name.startswith("weights")
        )
        for name, rows in trainers.items()
    }


def line(name: str, found: Mismatch) -> str:
    gap = found.all
    numbers = f"{gap.equal:.1%} | {gap.kl_k3:.1e} | {gap.p99:.1e} | {gap.max:.1e} | {gap.ess:.4f} | {gap.outside:.2%}"
    return f"| {name} | {numbers} | {found.verdict.kind} |"


def print_table(found: dict[str, Mismatch]) -> None:
    print("| trainer | equal | KL, k3 | 99% of tokens below | largest | ESS | out of [0.5, 2] | verdict |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    print("\n".join(line(name, mismatch) for name, mismatch in found.items()))


async def main(url: str = "", prompts: int = 100, chart: str = "") -> dict[str, Mismatch]:
    samples = await draw(url, prompts)
    found = spoiled(samples)
    if not url:  # only a server of our own can be started without exactness
        loose = await draw("", prompts, ("--exact", "off"))
        policy = Policy(str(embedded_model_path()), 0.0)
        found["the engine's exactness off"] = measure(loose, scored(policy, loose), against="sampling")
    print_table(found)
    if chart:
        plot_mismatch(found["bfloat16"], chart)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", default="")
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--chart", default="", help="a file that ends with .svg, .png or .pdf")
    asyncio.run(main(**vars(parser.parse_args())))
