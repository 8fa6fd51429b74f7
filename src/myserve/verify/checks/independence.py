"""Checks that an answer's bits depend on its own request: not on what is cached, nor on what runs beside it."""

from __future__ import annotations

import asyncio
import random

from myserve.verify.results import Check
from myserve.verify.subject import DrawnChoice
from myserve.verify.traits import PROMPTS
from myserve.verify.trial import FaultError, Trial

__all__ = ["INDEPENDENCE"]

_LOAD = 15
# Sums in another order give the same bits often enough that a few tokens show nothing (vLLM: 8 of 8).
_PROMPTS, _TOKENS = 12, 24


async def cached_cold(trial: Trial) -> str:
    trial.need(logprobs=trial.traits.num_logprobs >= 0)
    cached = 0
    for place in range(4):
        prompt = await _fresh_prompt(trial, place)
        cold, again = await _scored(trial, prompt), await _scored(trial, prompt)
        cached += int((again.usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0)
        _equal("cold and again, from the cache where there is one", cold, again)
    how = f"{cached} tokens came from the cache" if cached else "the server reports no cached tokens"
    return f"4 prompts, cold and again: tokens and logprobs equal to the bit; {how}"


async def batch_alone(trial: Trial) -> str:
    trial.need(logprobs=trial.traits.num_logprobs >= 0)
    prompts = [await _fresh_prompt(trial, place) for place in range(_PROMPTS)]
    for prompt in prompts:
        await _scored(trial, prompt)  # so that both that are compared find the same cache
    alone = [await _scored(trial, prompt) for prompt in prompts]
    others = [
        trial.subject.ask_one(PROMPTS[i % len(PROMPTS)] * (1 + i % 4), max_tokens=24, temperature=1.0, seed=i)
        for i in range(_LOAD)
    ]
    beside = await asyncio.gather(*others[:8], *(_scored(trial, prompt) for prompt in prompts), *others[8:])
    for one, other in zip(alone, beside[8 : 8 + _PROMPTS], strict=True):
        _equal(f"alone and beside {_LOAD} other requests", one, other)
    count = sum(len(choice.tokens) for choice in alone)
    return f"{_PROMPTS} prompts alone and beside {_LOAD} other requests: {count} tokens and logprobs equal to the bit"


async def _scored(trial: Trial, prompt: str | list[int]) -> DrawnChoice:
    logprobs = min(5, trial.traits.num_logprobs)
    return await trial.subject.ask_one(prompt, max_tokens=_TOKENS, temperature=0.0, logprobs=logprobs)


async def _fresh_prompt(trial: Trial, place: int) -> str | list[int]:
    """Return a prompt of some hundred tokens that no cache knows: ids or, in every second place, text."""
    fresh = random.Random(trial.new_seed())
    if place % 2 == 0 and trial.traits.names_ids and trial.traits.takes_ids:
        ids = await trial.known_ids()
        length = 160 if trial.traits.max_model_len is None else min(160, trial.traits.max_model_len // 2)
        return [fresh.choice(ids) for _ in range(length)]
    return " ".join(str(fresh.randrange(10, 100)) for _ in range(50))


def _equal(how: str, one: DrawnChoice, other: DrawnChoice) -> None:
    for place, (a, b) in enumerate(zip(one.numbers, other.numbers, strict=False)):
        if a[0] != b[0]:
            raise FaultError(f"{how}: token {place} is {a[0]!r}, then {b[0]!r}")
        if a != b:
            raise FaultError(f"{how}: token {place} has logprob {a[1]}, then {b[1]}, or other alternatives")
    if len(one.tokens) != len(other.tokens):
        raise FaultError(f"{how}: {len(one.tokens)} tokens, then {len(other.tokens)}")


INDEPENDENCE = (
    Check(
        "cached_cold",
        "A prompt from the cache has the bits of a cold one",
        cached_cold,
        ("greedy", "logprobs_normalised"),
    ),
    Check(
        "batch_alone",
        "A request beside others has the bits of one alone",
        batch_alone,
        ("greedy", "logprobs_normalised"),
    ),
)
