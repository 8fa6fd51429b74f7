"""Checks of what must be refused: a value out of range is an error of OpenAI's shape, not another value in silence."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from myserve.verify.results import Check
from myserve.verify.subject import WireAnswer
from myserve.verify.trial import FaultError, LackingError, Trial

__all__ = ["REFUSALS"]


async def limits(trial: Trial) -> str:
    names, wrong = [], []
    for name, body in _bad_bodies(trial):
        answer = await trial.subject.call("POST", trial.subject.route, body)
        if 400 <= answer.status < 500:
            names.append(name)
        else:
            words = f": {answer.message}" if answer.status >= 500 else ""
            wrong.append(f"{name} is answered with {answer.status}{words}")
    if wrong:
        raise FaultError(f"{'; '.join(wrong)}; each should be refused with a 4xx")
    return f"refused, each with a 4xx: {', '.join(names)}"


async def error_shape(trial: Trial) -> str:
    shown, wrong = 0, []
    for name, body in _bad_bodies(trial):
        answer = await trial.subject.call("POST", trial.subject.route, body)
        if 400 <= answer.status < 500:
            wrong += _misshapen(name, answer)
            shown += 1
    if not shown:
        raise LackingError("nothing was refused")
    if wrong:
        raise FaultError("; ".join(wrong))
    return f"{shown} errors, each with error.message, .type, .param and .code"


def _misshapen(name: str, answer: WireAnswer) -> list[str]:
    """Return what an error lacks of OpenAI's shape, in words."""
    body = answer.json
    error = body.get("error") if isinstance(body, dict) else None
    if not isinstance(error, dict) or not isinstance(error.get("message"), str):
        return [f"the error for {name} has not OpenAI's shape: {answer.raw[:120].decode('utf-8', 'replace')}"]
    missing = {"type", "param", "code"} - error.keys()
    return [f"the error for {name} has no {', '.join(sorted(missing))}"] if missing else []


def _bad_bodies(trial: Trial) -> Iterator[tuple[str, dict[str, Any] | bytes]]:
    good = trial.subject.body("Hello", max_tokens=1)
    values: dict[str, Any] = {
        "temperature": -1,
        "top_p": 1.5,
        "n": 0,
        "max_tokens": -1,
        "presence_penalty": 3,
        "frequency_penalty": -3,
        "stop": 5,
    }
    for field, value in values.items():
        yield f"{field} {value}", good | {field: value}
    yield "temperature 'hot'", good | {"temperature": "hot"}
    if trial.traits.num_logprobs >= 0:
        yield "100000 logprobs", trial.subject.body("Hello", max_tokens=1, logprobs=100_000)
    if (
        trial.traits.max_model_len is not None
        and trial.traits.max_model_len <= 2**16
        and trial.traits.takes_ids
    ):
        yield "a prompt beyond the context", good | {"prompt": [1] * (trial.traits.max_model_len + 1)}
    yield "an unknown model", good | {"model": "no-such-model"}
    yield "no prompt", {name: value for name, value in good.items() if name not in ("prompt", "messages")}
    yield "half a JSON object", b'{"model": '


REFUSALS = (
    Check("limits", "Values out of range are refused, and not changed in silence", limits),
    Check("error_shape", "Errors have OpenAI's shape", error_shape),
)
