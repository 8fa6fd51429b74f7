"""The examples' task: two-digit sums, most of which the embedded model gets right at most every other time."""

from __future__ import annotations

from random import Random

from myserve.embedded.arithmetic import SUM_PHRASINGS, two_digit_pairs
from myserve.sdk import SampledCompletion

Sum = tuple[int, int]
PRACTICE = list(two_digit_pairs(held_out=False))
HELD_OUT = list(two_digit_pairs(held_out=True))
MAX_TOKENS = 8


def question(pair: Sum) -> str:
    return SUM_PHRASINGS[0].format(a=pair[0], b=pair[1])


def reward(pair: Sum, answer: SampledCompletion) -> float:
    """Return 1 for the right number and nothing else, else 0."""
    return float(answer.finish_reason == "stop" and answer.text == str(sum(pair)))


def evenness(answer: SampledCompletion) -> float:
    """Return the share of even token ids: a reward that a model of random weights has, too."""
    return sum(token % 2 == 0 for token in answer.completion_tokens) / answer.completion_len


def sums_of_step(seed: int, step: int, count: int) -> list[Sum]:
    """Return a step's sums, a function of seed and step: a resumed run asks what it would have asked."""
    return Random(f"{seed}/{step}").sample(PRACTICE, count)
