"""Checks of seeds: the same draws again, alone, under load and after other traffic; others for every other seed."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from myserve.verify.results import Check
from myserve.verify.statistics import binomial_tail
from myserve.verify.subject import DrawnChoice
from myserve.verify.traits import PROMPTS
from myserve.verify.trial import FaultError, LackingError, Trial

__all__ = ["SEEDS"]

_REPEATED = 4  # seeds that are drawn from again
_LOAD = 24  # requests beside them


async def seed_alone(trial: Trial) -> str:
    seeds = [trial.new_seed() for _ in range(_REPEATED)]
    first = [await _drawn(trial, seed) for seed in seeds]
    again = [await _drawn(trial, seed) for seed in seeds]
    _same(seeds, first, again, "asked twice, one request after the other")
    if len({choice.text for choice in first}) == 1:
        raise LackingError("the model has one answer for every seed: nothing is shown")
    count = sum(len(choice.names) for choice in first)
    return f"{len(seeds)} seeds, each twice: the same {f'{count} tokens' if count else 'texts'}"


async def seed_under_load(trial: Trial) -> str:
    seeds = [trial.new_seed() for _ in range(_REPEATED)]
    first = [await _drawn(trial, seed) for seed in seeds]
    others = [
        trial.subject.ask_one(
            PROMPTS[i % len(PROMPTS)], max_tokens=24, temperature=1.0, seed=trial.new_seed()
        )
        for i in range(_LOAD)
    ]
    half = _LOAD // 2
    at_once = await asyncio.gather(*others[:half], *(_drawn(trial, seed) for seed in seeds), *others[half:])
    _same(seeds, first, at_once[half : half + len(seeds)], f"asked alone, and beside {_LOAD} other requests")
    return f"{len(seeds)} seeds alone and among {_LOAD} other requests: the same tokens"


async def seed_after_traffic(trial: Trial) -> str:
    seeds = [trial.new_seed() for _ in range(_REPEATED)]
    first = [await _drawn(trial, seed) for seed in seeds]
    traffic = [
        ask(prompt, max_tokens=16, temperature=0.7, top_p=0.9, seed=trial.new_seed())
        for prompt in PROMPTS
        for ask in (trial.subject.ask_one, trial.subject.stream)
    ]
    await asyncio.gather(*traffic)
    again = [await _drawn(trial, seed) for seed in seeds]
    _same(seeds, first, again, f"asked before and after {len(traffic)} other requests")
    return f"{len(seeds)} seeds before and after {len(traffic)} other requests: the same tokens"


async def n_distinct(trial: Trial) -> str:
    count = min(16, trial.traits.most_choices)
    if count < 2:
        raise LackingError("the server answers a request for several choices with one, or not at all")
    groups = [await trial.subject.ask(trial.traits.prompt, n=count, **_long(trial)) for _ in range(2)]
    texts = [[choice.text for choice in group] for group in groups]
    if all(len(set(group)) == 1 for group in texts):
        alone = await asyncio.gather(*(_drawn(trial, trial.new_seed()) for _ in range(6)))
        if len({choice.text for choice in alone}) > 1:
            raise FaultError(
                f"all {count} choices of a request are the same, while other seeds draw other texts"
            )
        raise LackingError("the model has one answer for every seed: nothing is shown")
    if trial.traits.num_logprobs < 2:
        return f"2 x {count} choices, {len(set(texts[0] + texts[1]))} different texts"
    return await _independent(trial, "neighbouring choices", _pairs_of_choices)


async def seeds_independent(trial: Trial) -> str:
    trial.need_spread()
    return await _independent(trial, "neighbouring seeds", _pairs_of_seeds)


async def _pairs_of_choices(trial: Trial) -> list[tuple[str, str]]:
    count = min(trial.traits.most_choices, 64)
    groups = await asyncio.gather(*(_firsts(trial, trial.new_seed(), count) for _ in range(512 // count)))
    return [pair for group in groups for pair in zip(group[::2], group[1::2], strict=False)]


async def _pairs_of_seeds(trial: Trial) -> list[tuple[str, str]]:
    """Pair choice j of seed s with choice j - 1 of seed s + 1, and with choice j: a key that adds the two collides."""
    count = min(trial.traits.most_choices, 8)
    seeds = [trial.new_seed() for _ in range(256 // count)]
    here = await asyncio.gather(*(_firsts(trial, seed, count) for seed in seeds))
    beside = await asyncio.gather(*(_firsts(trial, seed + 1, count) for seed in seeds))
    shifted = [
        pair for a, b in zip(here, beside, strict=True) for pair in zip(a[1::2], b[0::2], strict=False)
    ]
    same_place = [
        pair for a, b in zip(here, beside, strict=True) for pair in zip(a[0::2], b[0::2], strict=True)
    ]
    # of single choices there is no shifted pair; two lists, for a collision in one is thinned by the other
    return max(shifted, same_place, key=lambda pairs: sum(a == b for a, b in pairs))


async def _independent(
    trial: Trial, what: str, draw_pairs: Callable[[Trial], Awaitable[list[tuple[str, str]]]]
) -> str:
    top = trial.need_spread()
    pairs = await draw_pairs(trial)
    trial.num_draws += 2 * len(pairs)
    listed = [math.exp(value) for value in top.values()]
    rest = max(0.0, 1.0 - math.fsum(listed))
    # the others may all be one token, at most as likely as the last that is listed
    equal = math.fsum(p * p for p in listed) + rest * min(rest, min(listed))
    hits = sum(first == second for first, second in pairs)
    chance = binomial_tail(hits, len(pairs), min(1.0, equal * 1.02))
    words = f"{hits} of {len(pairs)} pairs of {what} are equal, {equal * len(pairs):.0f} expected"
    if chance < trial.error_rate / 2:
        raise FaultError(f"{words} (p = {chance:.1g})")
    return words


async def _firsts(trial: Trial, seed: int, count: int) -> list[str]:
    fields = {"max_tokens": 1, "temperature": 1.0, "seed": seed} | ({"n": count} if count > 1 else {})
    choices = await trial.subject.ask(trial.traits.prompt, logprobs=0, **fields)
    return [choice.names[0] if choice.names else "" for choice in choices]


async def _drawn(trial: Trial, seed: int) -> DrawnChoice:
    logprobs = 0 if trial.traits.num_logprobs >= 0 else None
    return await trial.subject.ask_one(trial.traits.prompt, logprobs=logprobs, **trial.seeded(seed))


def _long(trial: Trial) -> dict[str, Any]:
    return trial.seeded(trial.new_seed())


def _same(seeds: Sequence[int], first: Sequence[DrawnChoice], again: Sequence[DrawnChoice], how: str) -> None:
    for seed, one, other in zip(seeds, first, again, strict=True):
        if (one.names, one.text) != (other.names, other.text):
            place = next(
                (i for i, (a, b) in enumerate(zip(one.names, other.names, strict=False)) if a != b),
                min(len(one.names), len(other.names)),
            )
            raise FaultError(
                f"seed {seed} {how}: the answers part at token {place}: {one.text[:60]!r}, {other.text[:60]!r}"
            )


SEEDS = (
    Check("seed_alone", "A seed draws the same tokens again, one request after the other", seed_alone),
    Check(
        "seed_under_load",
        "A seed draws the same tokens beside other requests",
        seed_under_load,
        ("seed_alone",),
    ),
    Check(
        "seed_after_traffic",
        "A seed draws the same tokens after other traffic",
        seed_after_traffic,
        ("seed_alone",),
    ),
    Check(
        "n_distinct",
        "The n choices of a request are independent samples",
        n_distinct,
        is_statistical=True,
    ),
    Check(
        "seeds_independent",
        "Neighbouring seeds are independent samples",
        seeds_independent,
        ("n_distinct",),
        is_statistical=True,
    ),
)
