"""Preference pairs for DPO from one model's own answers: a right and a wrong one to the same sum, as token ids.

    python examples/dpo_pairs.py pairs.jsonl --n 8 --problems 200 [--url http://...]

A line has the conversation that DPO trainers read (`prompt`, `chosen`, `rejected`) and, beside it, the ids that were
sampled and the logprob of each answer under the model that gave it: the reference logprobs, already computed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from pathlib import Path
from typing import Any

from support.serving import sampler_for
from support.sums import PRACTICE, question, reward

from myserve.sdk import SampledCompletion


def pair_of(text: str, chosen: SampledCompletion, rejected: SampledCompletion) -> dict[str, Any]:
    sides = {"chosen": chosen, "rejected": rejected}
    line: dict[str, Any] = {"prompt": [{"role": "user", "content": text}], "prompt_ids": chosen.prompt_tokens}
    for name, answer in sides.items():
        line[name] = [{"role": "assistant", "content": answer.text}]
        line[f"{name}_ids"] = answer.completion_tokens
        line[f"{name}_ref_logp"] = sum(answer.inference_logprobs or ())
    return line


async def main(output: str, n: int, problems: int, url: str = "", seed: int = 7) -> int:
    """Writes a pair for each sum that had both kinds of answers; returns how many."""
    pairs = PRACTICE[:: max(1, len(PRACTICE) // problems)][:problems]
    lines = []
    async with sampler_for(url) as sampler:
        # Whoever ran out of length has no end, and would teach that too: max_tokens leaves room for any sum.
        groups = await sampler.sample_batch(
            [question(pair) for pair in pairs], n=n, max_tokens=8, seed=seed, logprobs=True, on_error="refill"
        )
    for pair, group in zip(pairs, groups, strict=True):
        ended = [answer for answer in group if answer.finish_reason == "stop"]
        right = [answer for answer in ended if reward(pair, answer)]
        wrong = [answer for answer in ended if not reward(pair, answer)]
        if right and wrong:
            lines.append(json.dumps(pair_of(question(pair), right[0], wrong[0])) + "\n")
    Path(output).write_text("".join(lines))
    print(f"{len(lines)} pairs from {len(pairs)} sums in {output}")
    return len(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output")
    parser.add_argument("--n", type=int, default=8)
    parser.add_argument("--problems", type=int, default=200)
    parser.add_argument("--url", default="")
    parser.add_argument("--seed", type=int, default=7)
    asyncio.run(main(**vars(parser.parse_args())))
