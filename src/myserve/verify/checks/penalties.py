"""Checks of penalties, without draws: a greedy text must be what they make of the logprobs at each of its places."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from myserve.verify.results import Check
from myserve.verify.trial import FaultError, LackingError, Trial, refused_or

__all__ = ["PENALTIES"]

_LENGTH = 12  # tokens of each text
_CLEAR = 0.05  # nats by which the winner must lead, so that no rounding decides


async def frequency_penalty(trial: Trial) -> str:
    return await _subtracted(trial, "frequency_penalty", 1.5, lambda count: 1.5 * count)


async def presence_penalty(trial: Trial) -> str:
    return await _subtracted(trial, "presence_penalty", 1.5, lambda count: 1.5 * (count > 0))


async def _subtracted(trial: Trial, name: str, value: float, penalty: Callable[[int], float]) -> str:
    """Compare each token with the largest of logprob - penalty(how often the completion has it)."""
    judged = changed = 0
    for prompt, ids, tops in await _texts(trial, name, value):
        for place, (token_id, top) in enumerate(zip(ids, tops, strict=True)):
            counts = Counter(ids[:place])
            scores = {one: at - penalty(counts[one]) for one, at in top.items()}
            best, second = sorted(scores.values(), reverse=True)[:2]
            # a token that is not listed has at most the last one's logprob, and none is raised
            if best - max(second, min(top.values())) < _CLEAR:
                continue
            winner, plain = max(scores, key=scores.__getitem__), max(top, key=top.__getitem__)
            judged, changed = judged + 1, changed + (winner != plain)
            if token_id != winner:
                raise _fault(name, value, prompt, place, token_id, winner)
    return _enough(name, judged, changed)


async def repetition_penalty(trial: Trial) -> str:
    """Check what can be known without the logits' zero: order is kept within the seen tokens and within the others."""
    judged = changed = 0
    for prompt, ids, tops in await _texts(trial, "repetition_penalty", 5.0):
        for place, (token_id, top) in enumerate(zip(ids, tops, strict=True)):
            seen = {*prompt, *ids[:place]}
            new = {one: at for one, at in top.items() if one not in seen}
            if not new:
                continue
            best, best_new = max(top, key=top.__getitem__), max(new, key=new.__getitem__)
            allowed = {best_new, best}  # a seen token may win still, where it leads by far
            judged, changed = judged + 1, changed + (token_id == best_new != best)
            clear = sorted(new.values(), reverse=True)
            if token_id not in allowed and (len(clear) < 2 or clear[0] - clear[1] > _CLEAR):
                raise _fault("repetition_penalty", 5.0, prompt, place, token_id, best_new)
    if judged and not changed:
        words = f"repetition_penalty 5 changed none of {judged} tokens, though the prompt repeats itself"
        if "repetition_penalty" in trial.traits.documented:
            raise FaultError(words)
        raise LackingError(f"{words}: the server ignores it, as it does not document it")
    return _enough("repetition_penalty", judged, changed)


async def _texts(
    trial: Trial, name: str, value: float
) -> list[tuple[list[int], list[int], list[Mapping[int, float]]]]:
    """Return prompts, their greedy continuations under the penalty, and at each place what may follow without it."""
    ids = await trial.known_ids()
    trial.need(logprobs_with_alternatives=trial.traits.num_logprobs > 1)
    prompts = [(ids[start : start + 3] or ids[:3]) * 4 for start in (0, 3, 6, 9)]
    texts = []
    for prompt in prompts:
        drawn = await refused_or(
            trial.subject.ask_one(prompt, max_tokens=_LENGTH, temperature=0.0, logprobs=0, **{name: value})
        )
        tops = await asyncio.gather(
            *(_next(trial, prompt + drawn.ids[:place]) for place in range(len(drawn.ids)))
        )
        texts.append((prompt, drawn.ids, list(tops)))
    return texts


async def _next(trial: Trial, prompt: Sequence[int]) -> Mapping[int, float]:
    top = await trial.next_tokens(list(prompt))
    return {int(name.removeprefix("token_id:")): value for name, value in top.items()}


def _fault(name: str, value: float, prompt: Sequence[int], place: int, drawn: int, due: int) -> FaultError:
    return FaultError(
        f"{name} {value} after {list(prompt[:6])}...: token {place} is {drawn}, and {due} was due"
    )


def _enough(name: str, judged: int, changed: int) -> str:
    if not changed:
        raise LackingError(f"none of {judged} greedy tokens was one that {name} changes: nothing is shown")
    return f"{judged} greedy tokens as {name} has them, {changed} of them others than without it"


PENALTIES = (
    Check(
        "frequency_penalty",
        "frequency_penalty is subtracted for each time that the completion has a token",
        frequency_penalty,
        ("greedy", "logprobs_normalised"),
    ),
    Check(
        "presence_penalty",
        "presence_penalty is subtracted once from each token that the completion has",
        presence_penalty,
        ("greedy", "logprobs_normalised"),
    ),
    Check(
        "repetition_penalty",
        "repetition_penalty lowers the tokens of prompt and completion, and no others",
        repetition_penalty,
        ("greedy", "logprobs_normalised"),
    ),
)
