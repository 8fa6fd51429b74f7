"""Anthropic's Messages API: a message, whole or as events, and the count of its prompt's tokens."""

from __future__ import annotations

import uuid
from dataclasses import replace
from functools import partial

from fastapi import APIRouter, Request, Response

from myserve.engine.requests.lengths import LengthFields
from myserve.server.answers.answer import ActiveAnswer
from myserve.server.answers.respond import answer_request
from myserve.server.answers.streaming import json_response
from myserve.server.answers.writer import Plan
from myserve.server.errors import MESSAGES
from myserve.server.routes.body import documented, made_of, models_of, read_request, settings_of
from myserve.server.routes.chat import plan_chat, prompt_of
from myserve.server.routes.messages_api.turn import MessagesTurn, messages_turn
from myserve.server.routes.messages_api.writer import MessagesWriter
from myserve.wire.chat import ChatCompletionRequest
from myserve.wire.messages_api.answer import MessageEvent, MessageOfAssistant, MessageTokensCount
from myserve.wire.messages_api.request import CountTokensRequest, MessagesRequest

__all__ = ["router"]

router = APIRouter(tags=["Messages"])

LENGTH_FIELDS = LengthFields("messages", "max_tokens")
MADE = documented(MessagesRequest, MessageOfAssistant, MessageEvent)


@router.post(MESSAGES, openapi_extra=MADE)
async def create_message(http: Request) -> Response:
    """Draw the next message of a conversation; whole, or as server-sent events with `stream`."""
    asked = await read_request(http, MessagesRequest)
    turn = await _turn(http, asked)

    async def plan(answer: ActiveAnswer[ChatCompletionRequest]) -> Plan:
        planned = await plan_chat(
            settings_of(http), answer, partial(MessagesWriter, turn=turn), fields=LENGTH_FIELDS
        )
        room = answer.model.engine.max_model_len - len(planned.prompts[0])
        return replace(planned, params=[turn.fitting(params, room) for params in planned.params])

    return await answer_request(http, turn.chat, plan, answer_id=f"msg_{uuid.uuid4().hex}")


@router.post(f"{MESSAGES}/count_tokens", openapi_extra=documented(CountTokensRequest, MessageTokensCount))
async def count_tokens(http: Request) -> Response:
    """Return how many tokens the prompt of a request has."""
    asked = await read_request(http, CountTokensRequest)
    turn = await _turn(http, asked)
    return json_response(MessageTokensCount(input_tokens=len(await prompt_of(http, turn.chat))))


async def _turn(http: Request, asked: CountTokensRequest) -> MessagesTurn:
    model = await models_of(http).get(asked.model)
    blocks = sum(1 if isinstance(turn.content, str) else len(turn.content) for turn in asked.messages)
    return await made_of(len(asked.messages) + blocks, lambda: messages_turn(asked, model))
