"""Every generating route answers by this one function: parse, plan, draw, write; whole or as a stream."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi import Request, Response

from myserve.server.answers.answer import ActiveAnswer
from myserve.server.answers.generation import Generation
from myserve.server.answers.streaming import EventStream, json_response, unless_gone
from myserve.server.answers.writer import AnswerWriter, Body, Plan
from myserve.server.models.models import Models
from myserve.wire.fields import GenerationRequest

__all__ = ["answer_request"]

R = TypeVar("R", bound=GenerationRequest)


async def answer_request(
    http: Request, request: R, plan: Callable[[ActiveAnswer[R]], Awaitable[Plan]], *, answer_id: str
) -> Response:
    """Answer one parsed request in the dialect of the writer that `plan` returns.

    `plan` makes prompts and parameters; what it raises is the caller's error, before anything is drawn.
    """
    models: Models = http.app.state.models
    answer = ActiveAnswer.begin(request, await models.get(request.model), answer_id)
    planned = await plan(answer)
    engine, writer = answer.model.engine, planned.writer
    await engine.prepare(planned.params[0])
    generation = Generation(answer.model, planned.prompts, planned.params, request, answer.id)
    if request.stream:
        return EventStream(_events(answer, writer, generation), generation.abort, writer.encode, writer.done)
    try:
        choices = await unless_gone(http, generation.finish())
    finally:
        generation.abort()
    body, headers = writer.whole(choices), None
    if request.perf_metrics_in_response:
        metrics = answer.perf_metrics(choices)
        body["perf_metrics"], headers = metrics.to_dict(), metrics.to_headers()
    return json_response(body, headers)


async def _events(
    answer: ActiveAnswer[R], writer: AnswerWriter[R], generation: Generation
) -> AsyncGenerator[Mapping[str, Any], None]:
    choices = generation.choices
    for event in writer.began(choices):
        yield event
    running = len(choices)
    async with aclosing(generation.events()) as events:
        async for choice, delta in events:
            gained: list[Body] = list(writer.gained(choice, delta))
            running -= delta.finish_reason is not None
            if not running and answer.request.perf_metrics_in_response:
                gained[-1]["perf_metrics"] = answer.perf_metrics(choices).to_dict()
            for event in gained:
                yield event
    for event in writer.ended(choices):
        yield event
