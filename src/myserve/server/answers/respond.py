"""Every generating route answers by this one function: parse, plan, draw, write; whole or as a stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import TypeVar

from fastapi import Request, Response

from myserve.engine.outputs import Delta
from myserve.server.answers.answer import ActiveAnswer
from myserve.server.answers.generation import Generation
from myserve.server.answers.size import check_known_size, delta_size
from myserve.server.answers.streaming import (
    WRITTEN_INLINE_BYTES,
    Chunk,
    EventStream,
    json_response,
    to_json_in_slices,
    unless_gone,
)
from myserve.server.answers.writer import AnswerWriter, Body, Plan
from myserve.server.choice import Choice
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
    engine = answer.model.engine
    engine.check_room(request.num_choices)
    planned = await plan(answer)
    writer = planned.writer
    check_known_size(
        planned.prompts,
        planned.params,
        n=request.n or 1,
        vocab_size=engine.vocab_size,
        max_model_len=engine.max_model_len,
    )
    await engine.prepare(planned.params[0])
    generation = Generation(answer.model, planned.prompts, planned.params, request, answer.id)
    if request.stream:
        return EventStream(_events(answer, writer, generation), generation.abort, writer.encode, writer.done)
    try:
        choices = await unless_gone(http, generation.finish())
    finally:
        generation.abort()
    metrics = answer.perf_metrics(choices) if request.perf_metrics_in_response else None

    def write() -> Body:
        body = writer.whole(choices)
        if metrics is not None:
            body["perf_metrics"] = metrics.to_dict()
        return body

    large = generation.size > WRITTEN_INLINE_BYTES
    body = await asyncio.to_thread(lambda: to_json_in_slices(write())) if large else write()
    return json_response(body, None if metrics is None else metrics.to_headers())


async def _events(
    answer: ActiveAnswer[R], writer: AnswerWriter[R], generation: Generation
) -> AsyncGenerator[Chunk, None]:
    choices = generation.choices
    for event in writer.began(choices):
        yield event
    running = len(choices)
    async with aclosing(generation.events()) as events:
        async for choice, delta in events:
            running -= delta.finish_reason is not None
            has_metrics = not running and bool(answer.request.perf_metrics_in_response)

            def write(choice: Choice = choice, delta: Delta = delta, ends: bool = has_metrics) -> list[Body]:
                gained = list(writer.gained(choice, delta))
                if ends:
                    gained[-1]["perf_metrics"] = answer.perf_metrics(choices).to_dict()
                return gained

            for event in write() if delta_size(delta) <= WRITTEN_INLINE_BYTES else await _in_thread(write):
                yield event
    for event in writer.ended(choices):
        yield event


async def _in_thread(write: Callable[[], list[Body]]) -> list[Chunk]:
    return await asyncio.to_thread(lambda: [to_json_in_slices(event) for event in write()])
