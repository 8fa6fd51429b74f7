"""Text to ids and back: ids as the generating routes encode a prompt, text as the tokenizer's own `decode`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from fastapi import APIRouter, Request, Response
from pydantic import Field

from myserve.errors import RequestError
from myserve.server.answers.logprobs import TokenWriter
from myserve.server.answers.streaming import json_response
from myserve.server.models.models import ServedModel
from myserve.server.prompts.codec import Tokenizing
from myserve.server.prompts.lengths import check_lengths
from myserve.server.prompts.required_prefix import keeping_prefix
from myserve.server.routes.body import documented, models_of, read_request, settings_of
from myserve.wire.base import WireModel
from myserve.wire.chat import ChatMessage, ChatTemplate, ReasoningEffort, check_prompt_end, prefix_token_ids
from myserve.wire.fields import MAX_MESSAGES, MAX_TOOLS, TokenIds
from myserve.wire.peers import REFUSED, Refused
from myserve.wire.structured import Tool

__all__ = ["DetokenizeRequest", "TokenizeRequest", "router"]

router = APIRouter()


class TokenizeRequest(WireModel):
    """`POST /tokenize`: a text or a conversation. Without a model, the first served one.

    The tokenizer's own BOS or EOS is put around a text, and not around a conversation, unless `add_special_tokens` says
    otherwise: a chat template writes its own.
    """

    model: str | None = None
    prompt: str | None = None
    add_special_tokens: bool | None = None
    messages: (
        Annotated[tuple[ChatMessage, ...], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES)]
        | None
    ) = None
    tools: Annotated[tuple[Tool, ...], Field(fail_fast=True, max_length=MAX_TOOLS)] | None = None
    chat_template: ChatTemplate | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: ReasoningEffort | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    return_token_strs: bool = False
    required_prefix_token_ids: Annotated[TokenIds, Field(min_length=1)] | None = None  # as in a chat

    REFUSED: ClassVar[Mapping[str, Refused]] = REFUSED

    def check(self) -> None:
        """Raise RequestError for what no field alone is wrong about."""
        if (self.prompt is None) == (self.messages is None):
            raise RequestError("send either prompt or messages", param="prompt")
        check_prompt_end(self.messages, self.add_generation_prompt, self.continue_final_message)


class DetokenizeRequest(WireModel):
    """`POST /detokenize`. Special tokens are kept, so that the text shows every token, unless told otherwise."""

    model: str | None = None
    tokens: TokenIds
    skip_special_tokens: bool = False
    return_tokens: bool = False  # each token's text and bytes too


@router.post("/tokenize", openapi_extra=documented(TokenizeRequest))
async def tokenize(http: Request) -> Response:
    """`{"tokens": [...], "count": ..., "max_model_len": ...}`."""
    request = await read_request(http, TokenizeRequest)
    model = await models_of(http).get(request.model)
    model = model.with_template(request.chat_template, settings_of(http))
    ids = await Tokenizing(model.tokenizer_thread).run(_size(request), lambda: _encode(model, request))
    texts = [model.codec.token_text(i) for i in ids] if request.return_token_strs else None
    body = {
        "tokens": ids,
        "count": len(ids),
        "max_model_len": model.engine.max_model_len,
        "token_strs": texts,
    }
    return json_response(body)


@router.post("/detokenize", openapi_extra=documented(DetokenizeRequest))
async def detokenize(http: Request) -> Response:
    """`{"prompt": "..."}`; with `return_tokens` also `tokens`, each with its text and bytes, null for a special one."""
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
    if not request.return_tokens:
        return json_response({"prompt": text})
    writer = TokenWriter(model.codec.token_bytes, skip_special_tokens=True, as_ids=False)
    tokens = [
        {"token_id": i, "token": writer.text(i), "bytes": writer.bytes_in_text(i)} for i in request.tokens
    ]
    return json_response({"prompt": text, "tokens": tokens})


def _encode(model: ServedModel, request: TokenizeRequest) -> list[int]:
    """Return the ids. A text that no prompt could be is refused by its length, as it is where tokens are drawn."""
    codec, longest = model.codec, model.engine.max_model_len
    if request.messages is None:
        text = request.prompt or ""
        check_lengths([text], codec, longest, param="prompt")
        return codec.encode(text, add_special_tokens=request.add_special_tokens is not False)
    check_lengths(["".join(message.text for message in request.messages)], codec, longest, param="messages")
    kwargs = model.style.template_kwargs(request.reasoning_effort, request.chat_template_kwargs)
    ids = codec.encode_chat(
        request.messages,
        kwargs,
        request.tools or (),
        add_generation_prompt=request.add_generation_prompt is not False,
        continue_final_message=bool(request.continue_final_message),
    )
    prefix = prefix_token_ids(request.messages, request.required_prefix_token_ids)
    if prefix is not None:
        ids = keeping_prefix(ids, prefix, request.messages, codec, kwargs, model.engine.eos_token_ids)
    return codec.with_special_tokens(ids) if request.add_special_tokens else ids


def _size(request: TokenizeRequest) -> int:
    return len(request.prompt or "") + sum(len(message.text) for message in request.messages or ())
