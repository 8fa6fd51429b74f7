"""A mixture of experts: what a trainer's logprobs are worth with the experts that the server used, and without.

python examples/routing_table.py runs/moe        # makes the mixture there (upcycle.py); a table in docs/training.md
"""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path

import torch
from mismatch_table import print_table, scored
from support.plain import plain_logprobs
from support.policy import Policy
from support.serving import sampler_for
from support.sums import HELD_OUT, MAX_TOKENS, question
from upcycle import upcycle

from myserve.sdk import SampledCompletion
from myserve.sdk.mismatch import Mismatch, measure


async def draw(model: str, prompts: int) -> list[SampledCompletion]:
    """Draw samples; with `echo` the prompt's experts are reported, too."""
    asked = [question(pair) for pair in HELD_OUT[:prompts]]
    async with sampler_for(model=model) as sampler:
        groups = await sampler.sample_batch(
            asked, n=8, max_tokens=MAX_TOKENS, seed=7, logprobs=True, echo=True, include_routing_matrix=True
        )
    return [answer for group in groups for answer in group]


async def main(folder: Path, prompts: int = 100) -> dict[str, Mismatch]:
    model = str(folder if folder.exists() else upcycle(folder))
    samples = await draw(model, prompts)
    found = {}
    for replay in (False, True):
        how = ", replayed" if replay else ""
        for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
            rows = plain_logprobs(model, samples, dtype=dtype, replay=replay)
            found[f"{name}{how}"] = measure(samples, rows)
        found[f"exact_forward{how}"] = measure(
            samples, scored(Policy(model, 0.0, replay=replay), samples, 1.0)
        )
    print_table(found)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--prompts", type=int, default=100)
    asyncio.run(main(**vars(parser.parse_args())))
