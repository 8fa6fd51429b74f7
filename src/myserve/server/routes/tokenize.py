"""Text to ids and back: ids as the generating routes encode a prompt, text as the tokenizer's own `decode`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from fastapi import APIRouter, Request, Response
from pydantic import Field

from myserve.errors import RequestError
from myserve.server.answers.streaming import json_response
from myserve.server.models.models import ServedModel
from myserve.server.prompts.codec import Tokenizing
from myserve.server.prompts.lengths import check_memory
from myserve.server.routes.body import documented, models_of, read_request
from myserve.wire.base import WireModel
from myserve.wire.chat import ChatMessage
from myserve.wire.fields import MAX_MESSAGES, MAX_TOOLS, TokenIds
from myserve.wire.peers import REFUSED, Refused
from myserve.wire.structured import Tool

__all__ = ["DetokenizeRequest", "TokenizeRequest", "router"]

router = APIRouter()


class TokenizeRequest(WireModel):
    """`POST /tokenize`: a text or a conversation. Without a model, the first served one."""

    model: str | None = None
    prompt: str | None = None
    add_special_tokens: bool = True
    messages: (
        Annotated[tuple[ChatMessage, ...], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES)]
        | None
    ) = None
    tools: Annotated[tuple[Tool, ...], Field(fail_fast=True, max_length=MAX_TOOLS)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool = False

    REFUSED: ClassVar[Mapping[str, Refused]] = REFUSED


class DetokenizeRequest(WireModel):
    """`POST /detokenize`. Special tokens are kept, so that the text shows every token, unless told otherwise."""

    model: str | None = None
    tokens: TokenIds
    skip_special_tokens: bool = False


@router.post("/tokenize", openapi_extra=documented(TokenizeRequest))
async def tokenize(http: Request) -> Response:
    """`{"tokens": [...], "count": ..., "max_model_len": ...}`."""
    request = await read_request(http, TokenizeRequest)
    if (request.prompt is None) == (request.messages is None):
        raise RequestError("send either prompt or messages", param="prompt")
    model = await models_of(http).get(request.model)
    ids = await Tokenizing(model.tokenizer_thread).run(_size(request), lambda: _encode(model, request))
    body: dict[str, Any] = {"tokens": ids, "count": len(ids), "max_model_len": model.engine.max_model_len}
    if request.return_token_strs:
        body["token_strs"] = [model.codec.token_text(i) for i in ids]
    return json_response(body)


@router.post("/detokenize", openapi_extra=documented(DetokenizeRequest))
async def detokenize(http: Request) -> Response:
    """`{"prompt": "..."}`."""
    request = await read_request(http, DetokenizeRequest)
    model = await models_of(http).get(request.model)
    for position, token_id in enumerate(request.tokens):
        if not 0 <= token_id < model.engine.vocab_size:
            raise RequestError(
                f"tokens[{position}]: {token_id} is no id of this model, whose ids are 0 to "
                f"{model.engine.vocab_size - 1}",
                param=f"tokens[{position}]",
            )
    skips = request.skip_special_tokens
    text = await Tokenizing(model.tokenizer_thread).run(
        len(request.tokens), lambda: model.codec.decode(request.tokens, skip_special_tokens=skips)
    )
    return json_response({"prompt": text})


def _encode(model: ServedModel, request: TokenizeRequest) -> list[int]:
    texts = [request.prompt or "", *(message.text for message in request.messages or ())]
    check_memory(sum(map(len, texts)))
    if request.messages is not None:
        return model.codec.encode_chat(
            request.messages, request.chat_template_kwargs or {}, request.tools or ()
        )
    return model.codec.encode(request.prompt or "", add_special_tokens=request.add_special_tokens)


def _size(request: TokenizeRequest) -> int:
    return len(request.prompt or "") + sum(len(message.text) for message in request.messages or ())
