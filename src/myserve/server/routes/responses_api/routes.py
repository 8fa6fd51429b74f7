"""OpenAI's Responses API: answers are made, kept, listed, cancelled and deleted; each is its key owner's alone."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, Sequence
from functools import partial
from typing import Any

from fastapi import APIRouter, Request, Response

from myserve.core.grammar import Grammar
from myserve.core.params import SamplingParams
from myserve.engine.requests.lengths import LengthFields
from myserve.errors import RequestError
from myserve.server import caller
from myserve.server.answers.answer import ActiveAnswer
from myserve.server.answers.respond import answer_request, begin_request
from myserve.server.answers.streaming import EventStream, json_response
from myserve.server.answers.writer import Plan
from myserve.server.errors import NotFoundError
from myserve.server.models.models import ServedModel
from myserve.server.routes.body import (
    documented,
    made_of,
    models_of,
    query_choice,
    read_request,
    settings_of,
)
from myserve.server.routes.chat import plan_chat, prompt_of
from myserve.server.routes.responses_api.background import BackgroundRun, BackgroundRuns
from myserve.server.routes.responses_api.offered import UnreadForm
from myserve.server.routes.responses_api.store import KeptResponse, ResponseStore
from myserve.server.routes.responses_api.truncation import fit_prompt
from myserve.server.routes.responses_api.turn import Earlier, ResponseTurn, turn_of
from myserve.server.routes.responses_api.writer import ResponseWriter
from myserve.wire.chat import ChatCompletionRequest
from myserve.wire.responses_api.answer import (
    DeletedResponse,
    InputItemList,
    InputTokenCount,
    ResponseEvent,
    ResponseObject,
)
from myserve.wire.responses_api.items import InputItem, ReferenceItem, read_items
from myserve.wire.responses_api.request import ResponseRequest
from myserve.wire.responses_api.tools import CustomTool, NamespaceTool

__all__ = ["router"]

router = APIRouter(tags=["Responses"])

ROOT = "/v1/responses"
MOST_LISTED = 100
LENGTH_FIELDS = LengthFields("input", "max_output_tokens")
BYTES_PER_ITEM = 64  # of a conversation's JSON, at least
CHARACTERS_PER_ITEM = 8  # of a grammar, that are read in the time of an item

MADE = documented(ResponseRequest, ResponseObject, ResponseEvent)


@router.post(ROOT, openapi_extra=MADE)
async def create_response(http: Request) -> Response:
    """Draw an answer to a conversation: whole, as server-sent events, or in the background."""
    asked = await read_request(http, ResponseRequest)
    turn = await _turn(http, asked)
    answer_id = f"resp_{uuid.uuid4().hex}"
    if asked.background:
        return await _in_background(http, turn, answer_id)
    keep = partial(_store(http).put, _owner())
    return await answer_request(http, turn.chat, _planned(http, turn, keep), answer_id=answer_id)


@router.post(f"{ROOT}/input_tokens", openapi_extra=documented(ResponseRequest, InputTokenCount))
async def count_input_tokens(http: Request) -> Response:
    """Return how many tokens the prompt of a request has."""
    turn = await _turn(http, await read_request(http, ResponseRequest))
    prompt = await prompt_of(http, turn.chat, turn.drawn, LENGTH_FIELDS)
    return json_response(InputTokenCount(object="response.input_tokens", input_tokens=len(prompt)))


@router.get(f"{ROOT}/{{response_id}}", openapi_extra=documented(None, ResponseObject, ResponseEvent))
async def get_response(http: Request, response_id: str) -> Response:
    """Return a response that is kept, or that goes on; with `stream=true` its events behind `starting_after`."""
    run, kept = _find(http, response_id)
    if query_choice(http, "stream", ("true", "false"), "false") == "true":
        return _events(run, kept, _number(http, "starting_after", -1, most=2**53))
    return json_response(run.body() if run is not None else _there(kept).body)


@router.delete(f"{ROOT}/{{response_id}}", openapi_extra=documented(None, DeletedResponse))
async def delete_response(http: Request, response_id: str) -> Response:
    """Forget a response; one that goes on is ended first."""
    run, _ = _find(http, response_id)
    if run is not None:
        await run.cancel()
    _store(http).forget(_owner(), response_id)
    return json_response(DeletedResponse(id=response_id, object="response", deleted=True))


@router.post(f"{ROOT}/{{response_id}}/cancel", openapi_extra=documented(None, ResponseObject))
async def cancel_response(http: Request, response_id: str) -> Response:
    """End a response that is made in the background, with what it has. One that has ended stays as it is."""
    run, kept = _find(http, response_id)
    if run is not None:
        await run.cancel()
        _, kept = _find(http, response_id)
    if not _there(kept).is_background:
        raise RequestError(
            "only a response that is made in the background can be cancelled", param="response_id"
        )
    return json_response(_there(kept).body)


@router.get(f"{ROOT}/{{response_id}}/input_items", openapi_extra=documented(None, InputItemList))
async def list_input_items(http: Request, response_id: str) -> Response:
    """Return the items that a response answered, a page at a time."""
    run, kept = _find(http, response_id)
    if run is not None:
        items = list(run.writer.listed_items())
    else:
        items = await made_of(len(_there(kept).item_ids), _there(kept).listed_items)
    if query_choice(http, "order", ("asc", "desc"), "desc") == "desc":
        items.reverse()
    limit = _number(http, "limit", 20, least=1, most=MOST_LISTED)
    ids = [str(item["id"]) for item in items]
    start, end = 0, len(items)
    for name in ("after", "before"):
        if (cursor := http.query_params.get(name)) is not None:
            if cursor not in ids:
                raise RequestError(
                    f"{name} is {cursor[:80]!r}, which is no item of this response", param=name
                )
            start, end = (ids.index(cursor) + 1, end) if name == "after" else (start, ids.index(cursor))
    page = [dict(item) for item in items[start:end][:limit]]
    return json_response(
        InputItemList(
            object="list",
            data=page,
            first_id=page[0]["id"] if page else None,
            last_id=page[-1]["id"] if page else None,
            has_more=end - start > limit,
        )
    )


async def _turn(http: Request, asked: ResponseRequest) -> ResponseTurn:
    store, owner = _store(http), _owner()
    model = await models_of(http).get(asked.model)
    earlier = Earlier()
    if asked.previous_response_id is not None:
        before = store.get(owner, asked.previous_response_id)
        if before is None:
            raise RequestError(
                f"previous_response_id is {asked.previous_response_id[:80]!r}, and no such response is kept: it was "
                "sent with store false, was deleted, goes on, or had to make room; send its items in input instead",
                param="previous_response_id",
                code="previous_response_not_found",
            )
        said = await made_of(
            len(before.conversation) // BYTES_PER_ITEM, lambda: read_items(before.conversation)
        )
        drawn = before.token_ids.tolist() or None
        earlier = Earlier(said, before.conversation, drawn, before.shown)
    if not isinstance(asked.input, str) and any(
        isinstance(item, ReferenceItem) for item in asked.input or ()
    ):
        asked = asked.model_copy(
            update={"input": await asyncio.to_thread(_resolved, asked.input or (), store, owner)}
        )
    own = 1 if isinstance(asked.input, str) else len(asked.input or ())
    size = len(earlier.items) + own + _size_of_grammars(asked) // CHARACTERS_PER_ITEM
    turn = await made_of(size, lambda: turn_of(asked, model, earlier))
    for form in turn.offered.unread:
        await _check_form(form, model)
    return turn


def _size_of_grammars(asked: ResponseRequest) -> int:
    sent = asked.tools or ()
    inner = (tool for group in sent if isinstance(group, NamespaceTool) for tool in group.tools)
    forms = (tool.format for tool in (*sent, *inner) if isinstance(tool, CustomTool))
    return sum(len(form.definition or "") for form in forms if form is not None)


async def _check_form(form: UnreadForm, model: ServedModel) -> None:
    """Raise RequestError for a form that is no grammar at all; one that is has no effect, and its warning stands."""
    try:
        await model.engine.prepare(SamplingParams(grammar=Grammar(form.syntax, form.definition)))
    except RequestError as error:
        raise form.refused(error) from None


def _resolved(items: Sequence[InputItem], store: ResponseStore, owner: str) -> tuple[InputItem, ...]:
    """Return items with those in place that others refer to. A reference to none is refused where it stands."""
    wanted = {item.id for item in items if isinstance(item, ReferenceItem)}
    found = store.items(owner, wanted)
    return tuple(
        read_items([found[item.id]])[0] if isinstance(item, ReferenceItem) and item.id in found else item
        for item in items
    )


def _planned(http: Request, turn: ResponseTurn, keep: Any = None) -> Any:
    async def plan(answer: ActiveAnswer[ChatCompletionRequest]) -> Plan:
        if turn.asked.truncation == "auto" and (word := await fit_prompt(answer)) is not None:
            turn.words.append(word)
        write = partial(ResponseWriter, turn=turn, keep=keep)
        return await plan_chat(
            settings_of(http), answer, write, turn.drawn, LENGTH_FIELDS, turn.offered.forms
        )

    return plan


async def _in_background(http: Request, turn: ResponseTurn, answer_id: str) -> Response:
    begun = await begin_request(http, turn.chat, _planned(http, turn), answer_id=answer_id)
    assert isinstance(begun.writer, ResponseWriter)
    run = _runs(http).start(_owner(), begun, begun.writer, has_events=bool(turn.asked.stream))
    return _events(run, None, -1) if turn.asked.stream else json_response(run.body("queued"))


def _events(run: BackgroundRun | None, kept: KeptResponse | None, after: int) -> Response:
    if run is not None and run.has_events:
        return EventStream(run.bursts(after), lambda: None)
    if run is not None or kept is None or not kept.events:
        raise RequestError(
            "only a response that was made with background and stream has events", param="stream"
        )
    return EventStream(_bursts_of_kept(kept.events[after + 1 :]), lambda: None)


async def _bursts_of_kept(events: Sequence[bytes]) -> AsyncGenerator[bytes, None]:
    if events:
        yield b"".join(events)


def _find(http: Request, response_id: str) -> tuple[BackgroundRun | None, KeptResponse | None]:
    """Return the caller's response as it goes on, or as it is kept. Raises NotFoundError."""
    run = _runs(http).get(_owner(), response_id)
    kept = None if run is not None else _store(http).get(_owner(), response_id)
    if run is None and kept is None:
        raise NotFoundError(f"no response {response_id[:80]!r} is kept here", param="response_id")
    return run, kept


def _there(kept: KeptResponse | None) -> KeptResponse:
    if kept is None:
        raise NotFoundError("the response had to make room", param="response_id")
    return kept


def _number(http: Request, name: str, default: int, *, least: int = 0, most: int) -> int:
    text = http.query_params.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) < 20 and least <= int(text) <= most):
        raise RequestError(f"{name} must be an integer in [{least}, {most}], got {text[:80]!r}", param=name)
    return int(text)


def _store(http: Request) -> ResponseStore:
    store: ResponseStore = http.app.state.responses
    return store


def _runs(http: Request) -> BackgroundRuns:
    runs: BackgroundRuns = http.app.state.background_runs
    return runs


def _owner() -> str:
    return caller.current(0.0).name
