"""Asks a model questions about an input, and checks that each answer is one to the question that was asked."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from myserve.sdk.errors import AttemptFailed, Failure, SamplingError
from myserve.sdk.retry import retrying
from myserve.sdk.transport.pool import ServerPool

__all__ = ["Decisions", "QuestionAnswer", "decide"]

PATH = "/v1/decisions"
AnswerType = Literal["predicate", "choice", "score", "refusal"]
TOLERANCE = 0.01  # of a sum of probabilities: a server may round what it writes


@dataclass(frozen=True, slots=True)
class QuestionAnswer:
    """The answer to one question. Which fields there are, its `type` says; the others are None.

    `probabilities` maps each choice's value, or each level's number, to its probability among the options alone;
    `diagnostics` has what the model thinks of the options at all (myserve's; None from other servers).
    """

    type: AnswerType
    name: str | None = None
    probability: float | None = None  # of a predicate
    choice: str | bool | None = None
    score: float | None = None  # the expected level; the first is 0
    confidence: float | None = None
    probabilities: Mapping[str | bool | int, float] | None = None
    diagnostics: Mapping[str, Any] | None = None

    @property
    def label_mass(self) -> float | None:
        """Return the probability that the model's own distribution gives all of the options' labels together."""
        return None if self.diagnostics is None else self.diagnostics.get("label_mass")


class Decisions(list[QuestionAnswer]):
    """The answers, in the order of the questions. `input_tokens` counts every prompt whole, cached parts too."""

    def __init__(
        self, answers: Iterable[QuestionAnswer], *, input_tokens: int = 0, cached_tokens: int = 0
    ) -> None:
        super().__init__(answers)
        self.input_tokens = input_tokens
        self.cached_tokens = cached_tokens


async def decide(
    backend: ServerPool, body: Mapping[str, Any], questions: Sequence[Mapping[str, Any]]
) -> Decisions:
    """Post the questions, again where that may help; return their answers. Raises SamplingError."""
    attempts = 0

    async def attempt() -> Decisions:
        nonlocal attempts
        attempts += 1
        # a place in the window for each attempt, none while it waits to be made again
        async with backend.semaphore.waiter(1) as waiter:
            with await waiter.take():
                told = await backend.post(PATH, body, about=json.dumps(body["input"]).encode())
        return _checked(told, questions)

    try:
        return await retrying(backend.retry, attempt)
    except AttemptFailed as failed:
        raise SamplingError(failed.failure, index=0, attempts=attempts) from failed


def _checked(told: Any, questions: Sequence[Mapping[str, Any]]) -> Decisions:
    answers = told.get("answers") if isinstance(told, dict) else None
    if not isinstance(answers, list) or len(answers) != len(questions):
        found = len(answers) if isinstance(answers, list) else "no"
        raise AttemptFailed(
            Failure("protocol", f"{len(questions)} questions were asked, {found} answers came")
        )
    usage = told.get("usage") if isinstance(told.get("usage"), dict) else {}
    details = usage.get("input_tokens_details")
    return Decisions(
        [_answer(answer, question) for answer, question in zip(answers, questions, strict=True)],
        input_tokens=usage.get("input_tokens") or 0,
        cached_tokens=details.get("cached_tokens") or 0 if isinstance(details, dict) else 0,
    )


def _answer(answer: Any, question: Mapping[str, Any]) -> QuestionAnswer:
    if not isinstance(answer, dict) or answer.get("type") not in (question.get("type"), "refusal"):
        raise AttemptFailed(
            Failure(
                "mismatch", f"a question of type {question.get('type')!r} was answered with {answer!r:.200}"
            )
        )
    kind: AnswerType = answer["type"]
    named: dict[str, Any] = {
        "type": kind,
        "name": answer.get("name"),
        "diagnostics": answer.get("diagnostics"),
    }
    if kind == "refusal":
        return QuestionAnswer(**named)
    if kind == "predicate":
        return QuestionAnswer(**named, probability=_probability(answer.get("probability")))
    options = _options(question)
    listed: Any = answer.get("probabilities")
    found = (
        {one["value"]: _probability(one.get("probability")) for one in listed} if _are_named(listed) else {}
    )
    if list(found) != options or list(map(type, found)) != list(map(type, options)):
        raise AttemptFailed(
            Failure("mismatch", f"the options of {question!r:.200} have other probabilities: {listed!r:.200}")
        )
    if abs(math.fsum(found.values()) - 1.0) > TOLERANCE:
        raise AttemptFailed(Failure("protocol", f"probabilities sum to {math.fsum(found.values())}"))
    return QuestionAnswer(
        **named,
        choice=answer.get("choice"),
        score=answer.get("score"),
        confidence=answer.get("confidence"),
        probabilities=found,
    )


def _options(question: Mapping[str, Any]) -> list[str | bool | int]:
    if question.get("type") == "choice":
        return [choice["value"] for choice in question["choices"]]
    return list(range(len(question["levels"])))


def _are_named(listed: Any) -> bool:
    return isinstance(listed, list) and all(isinstance(one, dict) and "value" in one for one in listed)


def _probability(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1 + TOLERANCE:
        raise AttemptFailed(Failure("protocol", f"{value!r:.80} is no probability"))
    return float(value)
