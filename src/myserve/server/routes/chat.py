"""Chat completions: messages to one prompt, n choices to OpenAI's shape, and the seed's beside it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from functools import partial

from fastapi import APIRouter, Request, Response

from myserve.core.grammar import Reasoning
from myserve.engine.outputs import Delta, TokenOutput
from myserve.server.answers.answer import ActiveAnswer, finish_reason_of, usage_of
from myserve.server.answers.generation import Generation
from myserve.server.answers.streaming import EventStream, json_response, unless_gone
from myserve.server.choice import Choice
from myserve.server.models.models import ServedModel
from myserve.server.parsing.message_reader import AnswerReader
from myserve.server.parsing.thinking import ThinkingReader, thinking_tokens
from myserve.server.parsing.tool_calls import CallReader
from myserve.server.prompts.sampling import chat_params, lists_tokens
from myserve.server.prompts.tools import callable_tools, checked_tools, constrained
from myserve.server.routes.body import documented, models_of, read_request
from myserve.wire.chat import ChatCompletionRequest
from myserve.wire.responses import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatLogprobs,
    Usage,
)
from myserve.wire.structured import Tool

router = APIRouter()

CHARS_PER_TOOL = 256  # characters that a tool is worth to who decides where to tokenize


DOCUMENTED = documented(ChatCompletionRequest, ChatCompletion, ChatChunk)


@router.post("/v1/chat/completions", openapi_extra=DOCUMENTED)
@router.post("/inference/v1/chat/completions", openapi_extra=DOCUMENTED)
async def create_chat_completion(http: Request) -> Response:
    """One conversation, `n` answers; whole, or as server-sent events with `stream`."""
    request = await read_request(http, ChatCompletionRequest)
    model = await models_of(http).get(request.model)
    answer = ActiveAnswer.begin(request, model, "chatcmpl")
    offered = checked_tools(request, model.style.tools)
    tools = callable_tools(request, offered)
    params = chat_params(request, model.codec)
    prompt = await answer.tokenizing.run(
        sum(len(message.text) for message in request.messages) + CHARS_PER_TOOL * len(offered),
        lambda: model.codec.encode_chat(request.messages, request.chat_template_kwargs or {}, offered),
    )
    reasoning = model.style.reasoning(model.codec, prompt, request.thinking_token_budget)
    params = constrained(params, request, tools, model.style.tools, reasoning)
    await model.engine.prepare(params)
    generation = Generation(model, [prompt], [params], request, answer.id)
    read = partial(_reader, model, tools, reasoning)
    wants_logprobs = lists_tokens(request)
    if request.stream:
        return EventStream(_chunks(answer, generation, read, reasoning, wants_logprobs), generation.abort)
    try:
        choices = await unless_gone(http, generation.finish())
    finally:
        generation.abort()
    body = _completion(answer, choices, read, reasoning, wants_logprobs)
    if not request.perf_metrics_in_response:
        return json_response(body)
    metrics = answer.perf_metrics(choices)
    body["perf_metrics"] = metrics.to_dict()
    return json_response(body, metrics.to_headers())


def _reader(model: ServedModel, tools: Sequence[Tool], reasoning: Reasoning | None) -> AnswerReader:
    calls, thinking = None, None
    if tools and model.style.tools is not None:
        calls = CallReader(model.style.tools, {tool.function.name for tool in tools})
    if reasoning is not None:
        thinking = ThinkingReader(begun=reasoning.begun)
    return AnswerReader(thinking, calls)


def _completion(
    answer: ActiveAnswer,
    choices: Sequence[Choice],
    read: Callable[[], AnswerReader],
    reasoning: Reasoning | None,
    wants_logprobs: bool,
) -> ChatCompletion:
    body: ChatCompletion = {
        "id": answer.id,
        "object": "chat.completion",
        "created": answer.created,
        "model": answer.request.model,
        "system_fingerprint": answer.model.fingerprint,
        "choices": [_choice(answer, choice, read(), wants_logprobs) for choice in choices],
        "usage": _usage(answer, choices, reasoning),
    }
    if (logprobs := body["choices"][0]["logprobs"]) is not None:
        body["logprobs"] = logprobs
    if answer.request.return_token_ids:
        body["prompt_token_ids"] = list(choices[0].prompt_token_ids)
    return body


def _choice(answer: ActiveAnswer, choice: Choice, reader: AnswerReader, wants_logprobs: bool) -> ChatChoice:
    message = reader.whole("".join(choice.texts))
    return {
        "index": choice.index,
        "message": message,
        "logprobs": _logprobs(answer, choice.tokens, choice.stop_tokens) if wants_logprobs else None,
        "finish_reason": finish_reason_of(choice, has_called=reader.has_called),
        **answer.extras(choice, choice.sampled, first=True, last=True),
    }


async def _chunks(
    answer: ActiveAnswer,
    generation: Generation,
    read: Callable[[], AnswerReader],
    reasoning: Reasoning | None,
    wants_logprobs: bool,
) -> AsyncGenerator[ChatChunk, None]:
    request = answer.request
    begun: set[int] = set()
    readers = [read() for _ in generation.choices]
    running = len(generation.choices)
    async with aclosing(generation.events()) as events:
        async for choice, delta in events:
            first, reader = choice.index not in begun, readers[choice.index]
            chunk = _chunk(answer, [_chunk_choice(answer, choice, delta, reader, first, wants_logprobs)])
            if not begun and request.return_token_ids:
                chunk["prompt_token_ids"] = list(choice.prompt_token_ids)
            begun.add(choice.index)
            running -= delta.finish_reason is not None
            if not running and request.perf_metrics_in_response:
                chunk["perf_metrics"] = answer.perf_metrics(generation.choices).to_dict()
            yield chunk
    if request.include_usage:
        yield {**_chunk(answer, []), "usage": _usage(answer, generation.choices, reasoning)}


def _chunk(answer: ActiveAnswer, choices: list[ChatChunkChoice]) -> ChatChunk:
    chunk: ChatChunk = {
        "id": answer.id,
        "object": "chat.completion.chunk",
        "created": answer.created,
        "model": answer.request.model,
        "system_fingerprint": answer.model.fingerprint,
        "choices": choices,
    }
    if answer.request.include_usage:
        chunk["usage"] = None
    return chunk


def _chunk_choice(
    answer: ActiveAnswer,
    choice: Choice,
    delta: Delta,
    reader: AnswerReader,
    first: bool,
    wants_logprobs: bool,
) -> ChatChunkChoice:
    last = delta.finish_reason is not None
    change = reader.feed(delta.text, last=last)
    if first:
        change = {"role": "assistant", **change}
    logprobs = _logprobs(answer, delta.tokens, delta.stop_tokens) if wants_logprobs else None
    if logprobs is not None:
        change["logprobs"] = logprobs
    return {
        "index": choice.index,
        "delta": change,
        "logprobs": logprobs,
        "finish_reason": finish_reason_of(choice, has_called=reader.has_called) if last else None,
        **answer.extras(choice, [*delta.tokens, *delta.stop_tokens], first=first, last=last),
    }


def _usage(answer: ActiveAnswer, choices: Sequence[Choice], reasoning: Reasoning | None) -> Usage:
    usage = usage_of(choices)
    if answer.model.style.thinks:
        thoughts = (
            0 if reasoning is None else sum(_thinking_tokens(answer, one, reasoning) for one in choices)
        )
        usage["completion_tokens_details"] = {"reasoning_tokens": thoughts}
    return usage


def _thinking_tokens(answer: ActiveAnswer, choice: Choice, reasoning: Reasoning) -> int:
    table = answer.model.codec.token_bytes
    return thinking_tokens([table[token.token_id] for token in choice.sampled], begun=reasoning.begun)


def _logprobs(
    answer: ActiveAnswer, tokens: Sequence[TokenOutput], stop_tokens: Sequence[TokenOutput]
) -> ChatLogprobs:
    """An entry for every token of the text; with ids asked for, for every sampled token."""
    entries = [answer.writer.entry(token) for token in tokens]
    if answer.returns_ids:
        entries += [answer.writer.entry(token, in_text=False) for token in stop_tokens]
    return {"content": entries}
