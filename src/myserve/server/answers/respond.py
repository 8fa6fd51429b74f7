"""Every generating route answers by this one function: parse, plan, draw, write; whole or as a stream."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple, TypeVar

from fastapi import Request, Response

from myserve.engine.requests.lengths import checked_max_tokens
from myserve.server import caller
from myserve.server.answers.answer import ActiveAnswer
from myserve.server.answers.bursts import bursts_of
from myserve.server.answers.generation import Generation
from myserve.server.answers.size import check_known_size
from myserve.server.answers.streaming import (
    WRITTEN_INLINE_BYTES,
    EventStream,
    json_response,
    to_json_in_slices,
    unless_gone,
)
from myserve.server.answers.writer import AnswerWriter, Body, Plan
from myserve.server.models.models import Models
from myserve.server.prompts.sampling import check_top_logprobs
from myserve.server.sessions.call import SessionCall
from myserve.server.sessions.store import Sessions, session_id_of, session_named
from myserve.wire.fields import GenerationRequest

__all__ = ["Begun", "answer_request", "begin_request"]

R = TypeVar("R", bound=GenerationRequest)


class Begun(NamedTuple):
    """A request whose draws run, and what writes its answer."""

    answer: ActiveAnswer[Any]
    writer: AnswerWriter[Any]
    generation: Generation


async def begin_request(
    http: Request, request: R, plan: Callable[[ActiveAnswer[R]], Awaitable[Plan]], *, answer_id: str
) -> Begun:
    """Submit one parsed request's draws to the engine.

    `plan` makes prompts and parameters; what it raises is the caller's error, before anything is drawn.
    """
    models: Models = http.app.state.models
    model = await models.get(request.model)
    answer = ActiveAnswer.begin(request, model, answer_id, models.adapter_of(request.model))
    answer.session = _session_call(http, answer)
    caller.current(0.0).session = session_named(http.headers)
    engine = answer.model.engine
    check_top_logprobs(request, http.app.state.settings.max_logprobs)
    engine.check_room(request.num_choices)
    planned = await plan(answer)
    # the engine does so too, but knows no route's names
    for prompt, params in zip(planned.prompts, planned.params, strict=True):
        checked_max_tokens(len(prompt), params.max_tokens, engine.max_model_len, planned.fields)
    check_known_size(
        planned.prompts,
        planned.params,
        n=request.n or 1,
        vocab_size=engine.vocab_size,
        max_model_len=engine.max_model_len,
    )
    for params in planned.params[: None if planned.differ else 1]:
        await engine.prepare(params)
    if answer.session is not None:
        answer.session.goes_on_from(planned.prompts, planned.adapters)
    generation = await Generation.begin(
        answer.model,
        planned.prompts,
        planned.params,
        request,
        answer.id,
        planned.request_ids,
        planned.adapters or [answer.adapter] * len(planned.prompts),
    )
    return Begun(answer, planned.writer, generation)


def _session_call(http: Request, answer: ActiveAnswer[Any]) -> SessionCall | None:
    sessions: Sessions = http.app.state.sessions
    name = session_id_of(http.headers) if sessions.are_kept else None
    if name is None:
        return None
    session = sessions.begin(caller.current(0.0).name, name)
    engine = answer.model.engine
    return SessionCall(sessions, session, answer.request.model, engine.eos_token_ids, answer.id)


async def answer_request(
    http: Request, request: R, plan: Callable[[ActiveAnswer[R]], Awaitable[Plan]], *, answer_id: str
) -> Response:
    """Answer one parsed request in the dialect of the writer that `plan` returns."""
    answer, writer, generation = await begin_request(http, request, plan, answer_id=answer_id)
    if request.stream:
        return EventStream(bursts_of(answer, writer, generation), generation.abort, writer.failed)
    try:
        choices = await unless_gone(http, generation.finish())
    finally:
        generation.abort()
    for choice in choices:
        answer.keep(choice, writer.said)
    metrics = answer.perf_metrics(choices) if request.perf_metrics_in_response else None

    def write() -> Body:
        body = writer.whole(choices)
        if metrics is not None:
            body["perf_metrics"] = metrics.to_dict()
        return body

    large = generation.size > WRITTEN_INLINE_BYTES
    body = await asyncio.to_thread(lambda: to_json_in_slices(write())) if large else write()
    return json_response(body, None if metrics is None else metrics.to_headers())
