"""Checks of draws against the logprobs that the server reports, and against what parameters make of those."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping

from myserve.verify.results import Check
from myserve.verify.subject import is_number
from myserve.verify.traits import PROMPTS
from myserve.verify.trial import FaultError, LackingError, Trial, refused_or

__all__ = ["DISTRIBUTION"]

_ROUNDING = 2e-3  # what probabilities may add up to above 1
_CLEAR = 0.03  # nats between two neighbours in rank, so that no rounding swaps them


async def greedy(trial: Trial) -> str:
    asked = 0
    for prompt in PROMPTS[:3]:
        first = await trial.text_of(prompt)
        for seed in (1, 2):
            again = await trial.subject.ask_one(
                prompt,
                max_tokens=24,
                temperature=0.0,
                seed=seed,
                logprobs=0 if trial.traits.num_logprobs >= 0 else None,
            )
            if (again.text, again.names) != (first.text, first.names):
                raise FaultError(
                    f"temperature 0 gives two texts: {first.text[:60]!r}, and with seed {seed} {again.text[:60]!r}"
                )
        for place, token in enumerate(first.tokens):
            best = max(token.top.values(), default=None)
            asked += 1
            if best is not None and token.logprob is not None and token.logprob < best - 1e-4:
                raise FaultError(
                    f"token {place} of {first.text[:40]!r} has logprob {token.logprob:.4f}, the likeliest {best:.4f}"
                )
    how = (
        f"{asked} tokens, each the likeliest of those reported"
        if asked
        else "the same texts (no logprobs to look at)"
    )
    return f"3 prompts, 3 times each: {how}"


async def logprobs_normalised(trial: Trial) -> str:
    trial.need(logprobs=trial.traits.num_logprobs >= 0)
    places, largest = 0, 0.0
    for prompt in PROMPTS[:3]:
        choice = await trial.subject.ask_one(
            prompt, max_tokens=12, temperature=1.0, logprobs=trial.traits.num_logprobs, seed=trial.new_seed()
        )
        for token in choice.tokens:
            values = [*token.top.values(), token.logprob]
            if not all(map(is_number, values)) or max(v for v in values if v is not None) > _ROUNDING:
                raise FaultError(
                    f"{token.name!r} is reported with {values}: logprobs are finite numbers, 0 at most"
                )
            mass = math.fsum(map(math.exp, token.top.values()))
            if mass > 1 + _ROUNDING:
                raise FaultError(
                    f"the alternatives of token {places} have probabilities that add up to {mass:.4f}"
                )
            if token.name in token.top and abs(token.top[token.name] - (token.logprob or 0)) > _ROUNDING:
                raise FaultError(
                    f"{token.name!r} has logprob {token.logprob}, and {token.top[token.name]} among alternatives"
                )
            places, largest = places + 1, max(largest, mass)
    return f"{places} tokens; the alternatives' probabilities add up to {largest:.4f} at most"


async def draws_match(trial: Trial) -> str:
    top = trial.need_spread()
    weights = {name: math.exp(value) for name, value in top.items()}
    drawn = await trial.draw()
    return trial.judge("temperature 1", drawn, weights, 1, others=max(1e-12, 1 - math.fsum(weights.values())))


async def temperature(trial: Trial) -> str:
    if trial.traits.num_logprobs < 2:
        return await _temperature_without_logprobs(trial)
    top = trial.need_spread()
    words = []
    for value in (0.6, 1.4):
        drawn = await refused_or(trial.draw(temperature=value))
        words.append(trial.judge(f"temperature {value}", drawn, _powered(top, 1 / value), 2))
    return "; ".join(words)


async def _temperature_without_logprobs(trial: Trial) -> str:
    """See that a high temperature has an effect at all: more than one text in sixteen."""
    texts = {
        (
            await trial.subject.ask_one(
                trial.traits.prompt, **trial.seeded(trial.new_seed(), temperature=1.8)
            )
        ).text
        for _ in range(16)
    }
    if len(texts) == 1:
        raise FaultError(f"temperature 1.8 gives one text for 16 seeds: {texts.pop()[:60]!r}")
    raise LackingError(
        f"16 seeds at temperature 1.8 give {len(texts)} texts; without logprobs no more can be said"
    )


async def top_k(trial: Trial) -> str:
    return await _filtered(trial, "top_k", lambda top, count: count)


async def top_p(trial: Trial) -> str:
    def middle(top: Mapping[str, float], count: int) -> float:
        """Return a mass inside the last token's: that token crosses it, and is in."""
        masses = [math.exp(value) for value in list(top.values())[:count]]
        return round(math.fsum(masses) - masses[-1] / 2, 6)

    # two tokens: the one that crosses is as likely as it can be, and draws show whether it is there
    return await _filtered(trial, "top_p", middle, most=2)


async def min_p(trial: Trial) -> str:
    def between(top: Mapping[str, float], count: int) -> float:
        values = list(top.values())
        return round(math.exp((values[count - 1] + values[count]) / 2 - values[0]), 6)

    return await _filtered(trial, "min_p", between)


async def logit_bias(trial: Trial) -> str:
    top = trial.need_spread()
    trial.need(names_of_token_ids=trial.traits.names_ids)
    banned, raised = list(top)[:2]
    bias = {banned.removeprefix("token_id:"): -100, raised.removeprefix("token_id:"): 1.5}
    drawn = await refused_or(trial.draw(logit_bias=bias))
    weights = {
        name: math.exp(value + (1.5 if name == raised else 0))
        for name, value in top.items()
        if name != banned
    }
    if drawn[banned]:
        raise FaultError(f"a token with a bias of -100 was drawn {drawn[banned]} times")
    return trial.judge("one token at -100, one at +1.5", drawn, weights, 1)


async def _filtered(
    trial: Trial, name: str, value_for: Callable[[Mapping[str, float], int], float], most: int = 6
) -> str:
    """Keep the first so many tokens by a filter; every draw must be one of them, in their proportions."""
    top = trial.need_spread()
    count = _clear_edge(top, most)
    value = value_for(top, count)
    drawn: Counter[str] = await refused_or(trial.draw(**{name: value}))
    weights = {token: math.exp(top[token]) for token in list(top)[:count]}
    try:
        return trial.judge(f"{name} {value}, which keeps {count}", drawn, weights, 1, others=0.0)
    except FaultError as fault:
        raise await trial.effect_or_lack(name, drawn, top, fault) from None


def _clear_edge(top: Mapping[str, float], most: int) -> int:
    """Return how many tokens to keep, two at least, so that the edge lies in the widest gap.

    `most` gives way where the gap there is not clear.
    """
    values = list(top.values())
    gaps = {count: values[count - 1] - values[count] for count in range(2, min(7, len(values)))}
    near = {count: gap for count, gap in gaps.items() if count <= most and gap >= _CLEAR}
    gaps = near or gaps
    count = max(gaps, key=gaps.__getitem__, default=0)
    if not count or gaps[count] < _CLEAR:
        raise LackingError("the likeliest tokens are all equally likely: no edge between them is clear")
    return count


def _powered(top: Mapping[str, float], power: float) -> dict[str, float]:
    best = max(top.values())
    return {name: math.exp((value - best) * power) for name, value in top.items()}


_DRAWN = ("logprobs_normalised", "draws_match")
DISTRIBUTION = (
    Check("greedy", "Temperature 0 takes the likeliest token, whatever the seed", greedy),
    Check("logprobs_normalised", "Logprobs are those of a distribution", logprobs_normalised),
    Check(
        "draws_match",
        "Tokens are drawn as often as their logprobs say",
        draws_match,
        ("logprobs_normalised",),
        is_statistical=True,
    ),
    Check("temperature", "Temperature divides the logits", temperature, _DRAWN, is_statistical=True),
    Check("top_k", "top_k keeps the k likeliest tokens", top_k, _DRAWN, is_statistical=True),
    Check(
        "top_p",
        "top_p keeps the fewest likeliest tokens that reach the mass",
        top_p,
        _DRAWN,
        is_statistical=True,
    ),
    Check(
        "min_p",
        "min_p keeps tokens by their share of the likeliest one's probability",
        min_p,
        _DRAWN,
        is_statistical=True,
    ),
    Check("logit_bias", "logit_bias is added to the logits", logit_bias, _DRAWN, is_statistical=True),
)
