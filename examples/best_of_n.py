"""Best of n on held-out sums: the answer that the model itself finds likeliest, and the one that most samples gave.

python examples/best_of_n.py --n 8 --problems 200 [--url http://...]
"""

from __future__ import annotations

import argparse
import asyncio
from collections import Counter
from collections.abc import Sequence

from support.serving import sampler_for
from support.sums import HELD_OUT, MAX_TOKENS, question, reward

from myserve.sdk import SampledCompletion


def likeliest(answers: Sequence[SampledCompletion]) -> SampledCompletion:
    """By the sum of logprobs: the probability of the whole answer."""
    return max(answers, key=lambda answer: sum(answer.inference_logprobs or ()))


def most_common(answers: Sequence[SampledCompletion]) -> SampledCompletion:
    """Self-consistency; of equally frequent texts the one that was drawn first."""
    text, _ = Counter(answer.text for answer in answers).most_common(1)[0]
    return next(answer for answer in answers if answer.text == text)


async def main(n: int, problems: int, url: str = "", seed: int = 7) -> dict[str, float]:
    """Return the share of right answers by each way of choosing."""
    pairs = HELD_OUT[:: max(1, len(HELD_OUT) // problems)][:problems]
    async with sampler_for(url) as sampler:
        groups = await sampler.sample_batch(
            [question(pair) for pair in pairs],
            n=n,
            max_tokens=MAX_TOKENS,
            seed=seed,
            logprobs=True,
            on_error="refill",
        )
    ways = {"the first": lambda answers: answers[0], "likeliest": likeliest, "most common": most_common}
    shares = {}
    for name, choose in ways.items():
        shares[name] = sum(
            reward(pair, choose(group)) for pair, group in zip(pairs, groups, strict=True)
        ) / len(pairs)
        print(f"{name:12} of {n}: {shares[name]:.1%}")
    return shares


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--n", type=int, default=8)
    parser.add_argument("--problems", type=int, default=200)
    parser.add_argument("--url", default="")
    parser.add_argument("--seed", type=int, default=7)
    asyncio.run(main(**vars(parser.parse_args())))
