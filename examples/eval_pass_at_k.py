"""pass@k on held-out sums, by the unbiased estimator, with confidence intervals; the same digits every time.

python examples/eval_pass_at_k.py --n 16 --problems 200 [--url http://...]
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Sequence
from math import comb
from random import Random

from support.serving import sampler_for
from support.sums import HELD_OUT, MAX_TOKENS, question, reward

RESAMPLES = 2000


def pass_at_k(n: int, right: int, k: int) -> float:
    """Return the chance that k of n answers, drawn without replacement, hold a right one: 1 - C(n - c, k) / C(n, k).

    (1 - (1 - c/n)^k, the plug-in estimate, is too small for every k > 1.)

    >>> pass_at_k(4, 1, 2)
    0.5
    """
    return 1.0 - comb(n - right, k) / comb(n, k)


def interval(values: Sequence[float], seed: int = 7) -> tuple[float, float]:
    """95 per cent, by the bootstrap over problems; seeded, so it is the same interval every time."""
    rng = Random(seed)
    means = sorted(sum(rng.choices(values, k=len(values))) / len(values) for _ in range(RESAMPLES))
    return means[RESAMPLES // 40], means[-RESAMPLES // 40]


async def main(n: int, problems: int, url: str = "", seed: int = 7) -> dict[int, tuple[float, float, float]]:
    """Return for each k the mean over problems, and its interval."""
    pairs = HELD_OUT[:: max(1, len(HELD_OUT) // problems)][:problems]
    async with sampler_for(url) as sampler:
        groups = await sampler.sample_batch(
            [question(pair) for pair in pairs], n=n, max_tokens=MAX_TOKENS, seed=seed, on_error="refill"
        )
    right = [int(sum(reward(pair, a) for a in group)) for pair, group in zip(pairs, groups, strict=True)]
    result = {}
    for k in (k for k in (1, 2, 4, 8, 16, 32) if k <= n):
        values = [pass_at_k(n, count, k) for count in right]
        result[k] = (sum(values) / len(values), *interval(values))
        print("pass@{}: {:.4f}  95% [{:.4f}, {:.4f}]".format(k, *result[k]))
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--n", type=int, default=16)
    parser.add_argument("--problems", type=int, default=200)
    parser.add_argument("--url", default="")
    parser.add_argument("--seed", type=int, default=7)
    asyncio.run(main(**vars(parser.parse_args())))
