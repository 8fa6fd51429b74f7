"""`sampler.decide` gives what the server says, and refuses answers that are none to its questions."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from myserve.sdk import Decisions, DeploymentSampler, RetryPolicy, SamplingError

QUESTIONS: list[dict[str, Any]] = [
    {"type": "predicate", "instructions": "A refund is requested.", "name": "refund"},
    {"type": "choice", "instructions": "Which?", "choices": [{"value": "true"}, {"value": True}]},
    {"type": "score", "instructions": "How angry?", "levels": [{"label": "calm"}, {"label": "cross"}]},
]
STATE = "I was charged twice for my order and want a refund."


def test_a_real_server_s_numbers_come_through(server_url: str) -> None:
    sampler = DeploymentSampler(server_url, "tiny")
    told = httpx.post(
        f"{server_url}/v1/decisions", json={"model": "tiny", "input": STATE, "questions": QUESTIONS}
    ).json()

    async def run() -> Decisions:
        async with sampler:
            return await sampler.decide(STATE, QUESTIONS, return_token_ids=True)

    refund, which, anger = decisions = asyncio.run(run())
    theirs = told["answers"]
    assert (refund.type, refund.name, refund.probability) == ("predicate", "refund", theirs[0]["probability"])
    assert which.probabilities == {
        one["value"]: one["probability"] for one in theirs[1]["probabilities"]
    } and list(which.probabilities) == ["true", True]
    assert (which.choice, which.confidence) == (theirs[1]["choice"], theirs[1]["confidence"])
    assert anger.score == theirs[2]["score"] and list(anger.probabilities or ()) == [0, 1]
    assert [answer.label_mass for answer in decisions] == [one["diagnostics"]["label_mass"] for one in theirs]
    assert refund.diagnostics is not None and len(refund.diagnostics["prompt_token_ids"]) > 20
    assert decisions.input_tokens == told["usage"]["input_tokens"]
    assert sampler.sync.decide(STATE, QUESTIONS[:1])[0].probability == refund.probability


def test_a_refusal_of_the_server_is_its_words(server_url: str) -> None:
    with pytest.raises(SamplingError, match=r"HTTP 400.*each must have a value of its own") as caught:
        DeploymentSampler(server_url, "tiny").sync.decide(
            STATE, [QUESTIONS[1] | {"choices": [{"value": "a"}] * 2}]
        )
    assert caught.value.attempts == 1 and not caught.value.retryable


class Answering:
    """A transport of one prepared answer after another."""

    def __init__(self, answers: list[tuple[int, Any]]) -> None:
        self.answers = answers
        self.urls: list[str] = []

    @asynccontextmanager
    async def request(
        self, method: str, url: str, headers: Mapping[str, str], body: bytes | None
    ) -> AsyncIterator[Any]:
        self.urls.append(url)
        status, told = self.answers.pop(0)

        class Answer:
            def __init__(self) -> None:
                self.status, self.headers = status, {"content-type": "application/json"}

            async def chunks(self) -> AsyncIterator[bytes]:
                yield json.dumps(told).encode()

        yield Answer()

    async def aclose(self) -> None:
        pass


def decided(*answers: tuple[int, Any]) -> tuple[Callable[[], Decisions], Answering]:
    transport = Answering(list(answers))
    policy = RetryPolicy(max_attempts=2, first_pause=0.001)
    sampler = DeploymentSampler("http://test/v1", "m", retry=policy, transport=transport)
    return lambda: asyncio.run(sampler.decide(STATE, QUESTIONS)), transport


PREDICATE = {"type": "predicate", "probability": 0.5}
CHOICE = {"type": "choice", "choice": True, "confidence": 0.0}
CHOICE |= {"probabilities": [{"value": "true", "probability": 0.25}, {"value": True, "probability": 0.75}]}
SCORE = {"type": "score", "score": 0.5, "confidence": 0.0}
SCORE |= {"probabilities": [{"value": n, "label": "", "probability": 0.5} for n in range(2)]}


def test_what_may_help_is_asked_again_and_another_server_s_answer_is_taken() -> None:
    run, transport = decided(
        (503, {"error": {"message": "busy"}}), (200, {"answers": [PREDICATE, {"type": "refusal"}, SCORE]})
    )
    decisions = run()
    assert transport.urls == 2 * ["http://test/v1/decisions"]
    assert [answer.type for answer in decisions] == ["predicate", "refusal", "score"]
    assert decisions[1].probabilities is None and decisions[0].label_mass is None


@pytest.mark.parametrize(
    "answers",
    [
        None,
        [PREDICATE, CHOICE],
        [SCORE, CHOICE, SCORE],
        [PREDICATE | {"probability": 1.5}, CHOICE, SCORE],
        [PREDICATE | {"probability": None}, CHOICE, SCORE],
        [PREDICATE, CHOICE | {"probabilities": CHOICE["probabilities"][::-1]}, SCORE],
        [PREDICATE, CHOICE | {"probabilities": CHOICE["probabilities"][:1]}, SCORE],
        [PREDICATE, CHOICE, SCORE | {"probabilities": [{"value": n, "probability": 0.9} for n in range(2)]}],
    ],
)
def test_answers_to_other_questions_are_refused(answers: Any) -> None:
    run, _ = decided(*2 * [(200, {"answers": answers})])
    with pytest.raises(SamplingError):
        run()


def test_control_the_right_answers_are_taken() -> None:
    run, _ = decided((200, {"answers": [PREDICATE, CHOICE, SCORE]}))
    assert run()[1].probabilities == {"true": 0.25, True: 0.75}
