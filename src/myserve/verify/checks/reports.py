"""Checks of what is reported beside the text: logprobs of the prompt, and token ids, each in its place."""

from __future__ import annotations

from collections.abc import Sequence

from myserve.verify.results import Check
from myserve.verify.subject import COMPLETIONS, DrawnToken
from myserve.verify.trial import FaultError, LackingError, Trial, refused_or

__all__ = ["REPORTS"]

_SAME_NUMBER = (
    0.25  # nats: a server without equal bits is still within this, a neighbour's number as a rule is not
)


async def echo(trial: Trial) -> str:
    prompt, drawn = await _drawn_ids(trial)
    got = await refused_or(
        trial.subject.ask_one(prompt + drawn[0], max_tokens=1, temperature=0.0, logprobs=0, echo=True)
    )
    rows = got.tokens[: len(prompt) + len(drawn[0])]
    if len(got.tokens) <= 1:
        raise LackingError("the server takes echo and ignores it")
    ids = [token.id for token in rows]
    if ids != prompt + drawn[0]:
        raise FaultError(f"the echoed tokens are {ids[:12]}..., and {(prompt + drawn[0])[:12]}... were sent")
    if rows[0].logprob is not None:
        raise FaultError(
            f"the first echoed token has logprob {rows[0].logprob}; nothing stands before it, so it has none"
        )
    return _aligned("echoed", [token.logprob for token in rows[len(prompt) :]], drawn[1])


async def prompt_logprobs(trial: Trial) -> str:
    prompt, drawn = await _drawn_ids(trial)
    got = await refused_or(
        trial.subject.ask_one(prompt + drawn[0], max_tokens=1, temperature=0.0, prompt_logprobs=0)
    )
    rows = got.raw.get("prompt_logprobs")
    if not rows:
        raise LackingError("the server reports no prompt_logprobs")
    if len(rows) != len(prompt) + len(drawn[0]) or rows[0] is not None:
        raise FaultError(
            f"{len(rows)} rows for a prompt of {len(prompt) + len(drawn[0])} tokens; the first is {rows[0]}"
        )
    values = []
    for place, token_id in enumerate((prompt + drawn[0])[1:], 1):
        if str(token_id) not in rows[place]:
            raise FaultError(
                f"row {place} has {list(rows[place])}, and not token {token_id}, which stands there"
            )
        values.append(rows[place][str(token_id)]["logprob"])
    return _aligned("scored", values[len(prompt) - 1 :], drawn[1])


async def token_ids(trial: Trial) -> str:
    prompt, drawn = await _drawn_ids(trial)
    got = await trial.subject.ask_one(prompt, max_tokens=len(drawn[0]), temperature=0.0, logprobs=0)
    sent, came = got.raw.get("prompt_token_ids"), got.raw.get("token_ids")
    if came is None:
        raise LackingError("the server returns no token_ids")
    if sent is not None and list(sent) != prompt:
        raise FaultError(f"the prompt came back as {sent[:12]}..., and {prompt[:12]}... was sent")
    if list(came) != got.ids:
        raise FaultError(f"token_ids are {came[:12]}..., the logprobs are of {got.ids[:12]}...")
    used = got.usage.get("completion_tokens")
    if used is not None and used != len(came):
        raise FaultError(f"{len(came)} token ids, and usage counts {used}")
    shown = await trial.subject.call(
        "POST", "/detokenize", {"model": trial.subject.model, "tokens": list(came)}
    )
    text = (shown.json or {}).get("prompt") if shown.status == 200 and isinstance(shown.json, dict) else None
    whole = f"; /detokenize gives {text[:30]!r}" if isinstance(text, str) else ""
    # a character at the border, and a token without a text of its own, may read otherwise alone
    if isinstance(text, str) and got.text.strip() and got.text.strip() not in text:
        raise FaultError(f"/detokenize makes {text[:60]!r} of the ids, the text is {got.text[:60]!r}")
    return f"{len(prompt)} ids of a prompt and {len(came)} of a completion came back as they were{whole}"


async def _drawn_ids(trial: Trial) -> tuple[list[int], tuple[list[int], list[float]]]:
    """Return a prompt of ids, and its greedy continuation: ids and logprobs."""
    if trial.subject.route != COMPLETIONS:
        raise LackingError("the server has no completions route")
    prompt = (await trial.known_ids())[:6] * 2
    got = await trial.subject.ask_one(prompt, max_tokens=10, temperature=0.0, logprobs=0)
    # the token that ended it is no part of every server's report
    tokens: Sequence[DrawnToken] = got.tokens
    return prompt, (
        [t.id for t in tokens if t.id is not None],
        [t.logprob for t in tokens if t.logprob is not None],
    )


def _aligned(what: str, scored: Sequence[float | None], drawn: Sequence[float]) -> str:
    """Compare logprobs of the same tokens, drawn and as a part of a prompt. Raises FaultError."""
    furthest = 0.0
    for place, (a, b) in enumerate(zip(scored, drawn, strict=True)):
        if a is None or abs(a - b) > _SAME_NUMBER:
            raise FaultError(f"token {place} was drawn with logprob {b:.4f}, and is {what} with {a}")
        furthest = max(furthest, abs(a - b))
    return f"{len(drawn)} drawn tokens, {what} as a prompt: logprobs differ by {furthest:.2g} at most"


REPORTS = (
    Check("echo", "An echoed prompt has each token's own logprob", echo, ("greedy", "logprobs_normalised")),
    Check(
        "prompt_logprobs",
        "prompt_logprobs has each token's own logprob",
        prompt_logprobs,
        ("greedy", "logprobs_normalised"),
    ),
    Check("token_ids", "Token ids come back as they were sent and drawn", token_ids, ("greedy",)),
)
