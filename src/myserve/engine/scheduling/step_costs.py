"""Predicts a step's seconds from those of earlier steps, and says how many prompt tokens fit into a step.

Pure arithmetic: seconds come in as numbers, no clock is read.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

__all__ = [
    "MIN_PROMPT_TOKENS",
    "MOST_WANTED",
    "WANTED_ROWS",
    "AttentionCost",
    "StepCosts",
    "nearest_padded_rows",
    "padded_rows",
    "padded_wanted",
    "prompt_work",
]

# Without a target, a stream that decodes beside a prompt is slowed to this many times its own pace ...
SLOWDOWN = 3.0
# ... or as far as the prompt needs to keep this share of the speed that it has in the largest chunks, ...
PROMPT_SPEED = 0.91
# ... but no step takes longer than this many seconds, for at four tokens a second a person reads on, ...
READING_PACE = 0.25
LEAST_SLOWDOWN = (
    2.0  # ... unless the streams are so slow themselves that prompts would have less than half of it.
)
# A step of prompts alone ends after so many seconds: a prompt that comes in meanwhile has to wait for it.
LONGEST_PROMPT_STEP = 0.4
# A step with prompts reads the weights for them anyway: a decode costs it what any row does, and all decodes together
# this share of a step of their own, for their draws.
DRAWS = 0.1
MIN_PROMPT_TOKENS = 16
MIN_OBSERVED = (
    48.0  # prompt tokens of a step that teaches what one costs: in fewer, the weights' own time shows
)
FASTER, SLOWER = 0.5, 0.15  # weight of the newest step: steps are late for many reasons, and early for none
MAX_SURPRISE = 2.0  # a step counts for at most this many times its estimate: a page fault, a recording
BUCKETS_PER_OCTAVE = 4  # numbers of decodes that are learned apart


class AttentionCost(NamedTuple):
    """The cost of a query's reading of one key in some layers, as a share of what a token's products cost."""

    window: int  # keys that these layers read at most; 0: all
    cost: float


def prompt_work(count: int, context: int, attention: Iterable[AttentionCost] = ()) -> float:
    """Return the work of `count` prompt tokens behind `context` others, in tokens that read no keys.

    >>> prompt_work(100, 2000), round(prompt_work(100, 2000, [AttentionCost(0, 0.0003), AttentionCost(512, 0.001)]), 1)
    (100.0, 212.7)
    """
    keys = context + (count + 1) / 2  # that a query reads on average
    return count * (1.0 + sum(cost * min(window or keys, keys) for window, cost in attention))


# Rows whose logits a recorded step with prompts gives: the output layer runs on one of these numbers.
WANTED_ROWS = (1, 8, 32, 64, 128, 256)
MOST_WANTED = WANTED_ROWS[-1]


class StepCosts:
    """Learns what decodes and prompt tokens cost on this machine; bounds a step's prompt tokens by time.

    `target`: seconds between two tokens of a running stream; None: as `SLOWDOWN`, `PROMPT_SPEED` and `READING_PACE`
    have it.

    >>> costs = StepCosts()
    >>> costs.seconds_for_prompts(decodes=8, most=256)  # nothing is known yet
    inf
    >>> costs.observe(decodes=0, prompt_work=256.0, seconds=0.74)
    >>> costs.observe(decodes=8, prompt_work=0.0, seconds=0.045)
    >>> seconds = costs.seconds_for_prompts(decodes=8, most=256)
    >>> round(seconds, 3), costs.tokens_in(seconds, context=0, most=256), costs.tokens_in(seconds, 4096, 256)
    (0.197, 68, 68)
    """

    def __init__(self, target: float | None = None, attention: tuple[AttentionCost, ...] = ()) -> None:
        self._target = target
        self._attention = attention
        self._decode: dict[int, float] = {}  # bucket of a number of decodes -> seconds of such a step
        self._per_token: float | None = None  # seconds of one prompt token more, beside the keys it reads

    def work(self, count: int, context: int) -> float:
        """Return `prompt_work` of this model."""
        return prompt_work(count, context, self._attention)

    def observe(self, decodes: int, prompt_work: float, seconds: float) -> None:
        """Take in what a step cost: `decodes` requests by one token, and the work of the prompts beside them."""
        if not decodes and not prompt_work:
            return
        if not prompt_work:
            bucket = _bucket(decodes)
            self._decode[bucket] = _smoothed(self._decode.get(bucket), seconds)
        elif prompt_work >= MIN_OBSERVED:
            rows = max(0.0, seconds - DRAWS * self.seconds_of_decodes(decodes))
            self._per_token = _smoothed(self._per_token, rows / (prompt_work + decodes))

    def seconds_for_prompts(self, decodes: int, most: int) -> float:
        """Return the seconds that prompts may add to a step with so many decodes; `most`: tokens, if they are fast.

        Infinite where too little is known.
        """
        if not decodes:
            return LONGEST_PROMPT_STEP
        base, per_token = self.seconds_of_decodes(decodes), self._per_token
        if not base or not per_token:
            return math.inf
        beside = DRAWS * base + decodes * per_token
        if self._target is not None:
            return self._target - beside
        # prompts that take p seconds of a step have p / (p + beside) of their speed alone; these p have PROMPT_SPEED of
        # the speed that `most` tokens have
        longest = most * per_token
        fast = PROMPT_SPEED * longest * beside / (beside + (1 - PROMPT_SPEED) * longest)
        step = min(max(SLOWDOWN * base, beside + fast), READING_PACE)
        return max(step, LEAST_SLOWDOWN * base) - beside

    def tokens_in(self, seconds: float, context: int, most: int) -> int:
        """Return how many tokens of a prompt, at most `most`, run in so many seconds behind `context` others."""
        if self._per_token is None or math.isinf(seconds):
            return most
        low, high = 0, most
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (
                (middle, high) if self.seconds_of_prompt(middle, context) <= seconds else (low, middle - 1)
            )
        return low

    def seconds_of_prompt(self, count: int, context: int) -> float:
        """Return the estimate for `count` prompt tokens behind `context` others; 0 where nothing is known."""
        return (self._per_token or 0.0) * self.work(count, context)

    def seconds_of_decodes(self, decodes: int) -> float:
        """Return the estimate for the nearest number that was seen; 0 where none was."""
        if not decodes or not self._decode:
            return 0.0
        bucket = _bucket(decodes)
        return self._decode[min(self._decode, key=lambda seen: abs(seen - bucket))]

    def most_seconds_of_decodes(self, decodes: int) -> float:
        """Return the estimate as if more decodes than were ever seen took longer by as much as they are more.

        >>> costs = StepCosts()
        >>> costs.observe(32, 0.0, 0.1); costs.observe(64, 0.0, 0.2)
        >>> costs.most_seconds_of_decodes(60), round(costs.most_seconds_of_decodes(96), 2)
        (0.2, 0.3)
        """
        most_seen = max(self._decode, default=0)
        return self.seconds_of_decodes(decodes) * max(
            1.0, decodes / math.pow(2.0, most_seen / BUCKETS_PER_OCTAVE)
        )


def padded_rows(rows: int) -> int:
    """Return the rows of the recorded step that runs so many rows, not all of them decodes.

    >>> padded_rows(33), padded_rows(113), padded_rows(129)
    (48, 128, 160)
    """
    grain = _grain(rows)
    return -(-rows // grain) * grain


def padded_wanted(wanted: int) -> int:
    """Return the rows of the output layer in a recorded step of prompts that wants so many, at most `MOST_WANTED`.

    >>> padded_wanted(1), padded_wanted(9)
    (1, 32)
    """
    return next(count for count in WANTED_ROWS if wanted <= count)


def nearest_padded_rows(rows: int) -> int:
    """Return the rows of the recorded step that is nearest in size.

    >>> nearest_padded_rows(3), nearest_padded_rows(39), nearest_padded_rows(40), nearest_padded_rows(150)
    (16, 32, 48, 160)
    """
    grain = _grain(rows)
    return max(grain, (rows + grain // 2) // grain * grain)


def _grain(rows: int) -> int:
    return 16 if rows <= 128 else 32


def _bucket(decodes: int) -> int:
    """Return a number's bucket: as its logarithm.

    >>> [_bucket(n) for n in (1, 2, 8, 9, 32, 33, 64)]
    [0, 4, 12, 13, 20, 20, 24]
    """
    return round(BUCKETS_PER_OCTAVE * math.log2(decodes))


def _smoothed(estimate: float | None, value: float) -> float:
    if estimate is None:
        return value
    weight = FASTER if value < estimate else SLOWER
    return estimate + weight * (min(value, MAX_SURPRISE * estimate) - estimate)
