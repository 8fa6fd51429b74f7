"""Decisions: many questions about one state, each read off the labels' logprobs behind its prompt. No text is drawn.

A question is a request of one token on the engine, so its numbers have the bits that they have alone, whatever runs
beside it, whatever is cached, and in whatever order the questions come.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from fastapi import APIRouter, Request, Response

from myserve.core.params import SamplingParams
from myserve.engine.outputs import TokenOutput
from myserve.errors import EngineError, RequestError
from myserve.server.answers.answer import ActiveAnswer
from myserve.server.answers.generation import Generation
from myserve.server.answers.streaming import json_response, unless_gone
from myserve.server.choice import Choice
from myserve.server.prompts.codec import INLINE_CHARACTERS
from myserve.server.prompts.decisions import AskedQuestion
from myserve.server.routes.body import documented, models_of, read_request
from myserve.server.sessions.store import session_id_of
from myserve.server.turns import LoopTurns
from myserve.wire.dialects.decisions import (
    Decision,
    DecisionFields,
    DecisionRequest,
    DecisionUsage,
    Diagnostics,
    OpenAIAnswer,
    SystemOneAnswers,
    SystemOneRequest,
)
from myserve.wire.fields import GenerationRequest

__all__ = ["router"]

router = APIRouter(tags=["Decisions"])


@dataclass(frozen=True, slots=True)
class LabelReading:
    """Hold one question's answer: the `probabilities` of its options, in their order, among the labels alone.

    None: no label has any probability.
    """

    asked: AskedQuestion
    probabilities: list[float] | None
    diagnostics: Diagnostics

    def answer(self) -> dict[str, Any]:
        """Return the answer as transformers writes it. Raises RequestError where there is none."""
        if self.probabilities is None:
            raise RequestError(
                f"question {self.asked.question.name!r:.80}: the model gives none of its labels any probability",
                param="questions",
            )
        answer: dict[str, Any] = self.asked.question.answer(self.probabilities)
        return answer


@router.post("/v1/systemone", openapi_extra=documented(SystemOneRequest, SystemOneAnswers))
async def decide_as_system_one(http: Request) -> Response:
    """Answer typed questions about a state: `noul`, `choice`, `score`."""
    request = await read_request(http, SystemOneRequest)
    answer, readings = await _decide(http, request, request.state, request.questions)
    usage = _usage(readings)
    body: SystemOneAnswers = {
        "id": answer.id,
        "object": "structured_decision",
        "created": answer.created,
        "model": request.model,
        "answers": {reading.asked.question.name: reading.answer() for reading in readings},
        "usage": {"input_tokens": usage["input_tokens"], "output_tokens": 0},
        "diagnostics": {reading.asked.question.name: reading.diagnostics for reading in readings},
        "system_fingerprint": answer.fingerprint,
        "warnings": _without_effect(http),
    }
    return json_response(body)


@router.post("/v1/decisions", openapi_extra=documented(DecisionRequest, Decision))
async def decide_as_openai(http: Request) -> Response:
    """Answer typed questions about an input: `predicate`, `choice`, `score`."""
    request = await read_request(http, DecisionRequest)
    answer, readings = await _decide(http, request, request.as_state(), request.as_questions())
    body: Decision = {
        "id": answer.id,
        "created": answer.created,
        "model": request.model,
        "answers": [
            openai_answer(question, reading)
            for question, reading in zip(request.questions, readings, strict=True)
        ],
        "usage": _usage(readings),
        "system_fingerprint": answer.fingerprint,
        "warnings": _without_effect(http),
    }
    return json_response(body)


def _without_effect(http: Request) -> list[str]:
    """Say that a session has none. It is no error: routers go by the header, and clients send it with everything."""
    if (name := session_id_of(http.headers)) is None:
        return []
    return [
        f"the session {name!r} has no effect: a decision draws nothing that a later turn could go on from"
    ]


def openai_answer(question: Any, reading: LabelReading) -> OpenAIAnswer:
    """Return OpenAI's answer; a refusal where no label has any probability, and nowhere else."""
    written: OpenAIAnswer = {
        "type": question.type,
        "name": question.name,
        "diagnostics": reading.diagnostics,
    }
    probabilities = reading.probabilities
    if probabilities is None:
        written["type"] = "refusal"
        return written
    told = reading.answer()
    if question.type == "predicate":
        written["probability"] = told["noul"]
        return written
    written["confidence"] = told["confidence"]
    if question.type == "choice":
        values = [choice.value for choice in question.choices]
        written["choice"] = values[max(range(len(values)), key=probabilities.__getitem__)]
        written["probabilities"] = [
            {"value": value, "probability": p} for value, p in zip(values, probabilities, strict=True)
        ]
    else:
        written["score"] = told["score"]
        written["probabilities"] = [
            {"label": level.label, "probability": p, "value": place}
            for place, (level, p) in enumerate(zip(question.levels, probabilities, strict=True))
        ]
    return written


async def _decide(
    http: Request, request: DecisionFields, state: Any, questions: Mapping[str, Any]
) -> tuple[ActiveAnswer[GenerationRequest], list[LabelReading]]:
    """Ask every question of the model, and read its answer."""
    models = models_of(http)
    model = await models.get(request.model)
    generation = request.as_generation()
    answer_id = f"decision-{uuid.uuid4().hex}"
    answer = ActiveAnswer.begin(generation, model, answer_id, models.adapter_of(request.model))
    engine, decisions, kwargs = model.engine, model.decisions, request.chat_template_kwargs or {}
    engine.check_room(len(questions))
    # off the loop: the first reads the labels of the model's tokenizer, some hundred of them
    parsed = await answer.tokenizing.run(INLINE_CHARACTERS + 1, partial(decisions.parse, questions))
    # of what is no text, its length is known once it has been written, which is not done on the loop
    size = len(state) if isinstance(state, str) else INLINE_CHARACTERS + 1
    asked: list[AskedQuestion] = []
    for question in parsed:
        # one at a time, so that other requests' prompts go in between
        ask = partial(decisions.ask, state, question, engine.max_model_len, kwargs)
        asked.append(await answer.tokenizing.run(size, ask))
    # alone first: the others find the state that all begin with in the prefix cache, which one step cannot share
    choices = await _drawn(http, answer, asked[:1])
    if len(asked) > 1:
        choices += await _drawn(http, answer, asked[1:])
    readings: list[LabelReading] = []
    turns = LoopTurns()
    for one, choice in zip(asked, choices, strict=True):
        readings.append(_read(answer, one, choice, tells_prompt=bool(request.return_token_ids)))
        await turns.take()
    return answer, readings


async def _drawn(
    http: Request, answer: ActiveAnswer[GenerationRequest], asked: Sequence[AskedQuestion]
) -> list[Choice]:
    # at temperature 0 the token is the likeliest of all; labels are looked up whatever it is
    params = [SamplingParams(max_tokens=1, temperature=0.0, logprob_token_ids=one.label_ids) for one in asked]
    generation = await Generation.begin(
        answer.model,
        [one.prompt for one in asked],
        params,
        answer.request,
        answer.id,
        adapters=[answer.adapter] * len(asked),
    )
    try:
        return await unless_gone(http, generation.finish())
    finally:
        generation.abort()


def _read(
    answer: ActiveAnswer[GenerationRequest], asked: AskedQuestion, choice: Choice, *, tells_prompt: bool
) -> LabelReading:
    if not choice.sampled:
        raise EngineError("the decision was aborted by the server's control plane")
    token: TokenOutput = choice.sampled[0]
    logprobs = [logprob for _, logprob in token.token_id_logprobs]
    question = asked.question
    diagnostics: Diagnostics = {
        "label_mass": math.fsum(math.exp(one) for one in logprobs if one is not None),
        "argmax_is_label": token.token_id in asked.label_ids,
        "argmax": {
            "token": answer.tokens.text(token.token_id),
            "token_id": token.token_id,
            "logprob": token.logprob,
        },
        "labels": [
            {"option": option, "label": label, "token_id": token_id, "logprob": logprob}
            for option, label, (token_id, logprob) in zip(
                question.options, question.labels, token.token_id_logprobs, strict=True
            )
        ],
        "weight_version": token.weight_version,
        "cached_tokens": choice.metrics.cached_tokens,
    }
    if token.adapter_version is not None:
        diagnostics["adapter_version"] = token.adapter_version
    if tells_prompt:
        diagnostics["prompt_token_ids"] = list(asked.prompt)
    return LabelReading(asked, probabilities_of(logprobs, asked.temperature), diagnostics)


def probabilities_of(logprobs: Sequence[float | None], temperature: float = 1.0) -> list[float] | None:
    """Return softmax(logprobs / temperature) in float64, None being no probability; None where all are.

    The sum is the exact one, rounded once: the order of the options changes no bit of it.

    >>> probabilities_of([-1.0, None, -1.0])
    [0.5, 0.0, 0.5]
    >>> probabilities_of([None]) is None
    True
    """
    there = [logprob for logprob in logprobs if logprob is not None]
    if not there:
        return None
    largest = max(there)
    weights = [0.0 if one is None else math.exp((one - largest) / temperature) for one in logprobs]
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def _usage(readings: Sequence[LabelReading]) -> DecisionUsage:
    prompts = sum(len(reading.asked.prompt) for reading in readings)
    cached = sum(reading.diagnostics["cached_tokens"] for reading in readings)
    return {
        "input_tokens": prompts,
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
        "output_tokens": 0,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": prompts,
    }
