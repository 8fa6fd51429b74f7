"""Chat completions: messages become one prompt, and `n` choices OpenAI's messages with thoughts and tool calls."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence

from fastapi import APIRouter, Request, Response

from myserve.core.grammar import Reasoning
from myserve.engine.outputs import Delta, TokenOutput
from myserve.server.answers.answer import ActiveAnswer, finish_reason_of, usage_of
from myserve.server.answers.respond import answer_request
from myserve.server.answers.writer import AnswerWriter, Plan
from myserve.server.choice import Choice
from myserve.server.parsing.message_reader import AnswerReader
from myserve.server.parsing.thinking import ThinkingReader, thinking_tokens
from myserve.server.parsing.tool_calls import CallReader
from myserve.server.prompts.lengths import check_lengths
from myserve.server.prompts.sampling import chat_params, lists_tokens, work_of_params
from myserve.server.prompts.tools import callable_tools, checked_tools, constrained
from myserve.server.routes.body import documented, read_request
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

__all__ = ["router"]

router = APIRouter()

# Characters that a message or a tool is worth when it is decided where to tokenize.
CHARS_PER_MESSAGE = 32
CHARS_PER_TOOL = 256

DOCUMENTED = documented(ChatCompletionRequest, ChatCompletion, ChatChunk)


@router.post("/v1/chat/completions", openapi_extra=DOCUMENTED)
@router.post("/inference/v1/chat/completions", openapi_extra=DOCUMENTED)
async def create_chat_completion(http: Request) -> Response:
    """Draw `n` answers to one conversation; whole, or as server-sent events with `stream`."""
    request = await read_request(http, ChatCompletionRequest)
    return await answer_request(http, request, _plan, answer_id=f"chatcmpl-{uuid.uuid4().hex}")


async def _plan(answer: ActiveAnswer[ChatCompletionRequest]) -> Plan:
    request, model = answer.request, answer.model
    codec, style = model.codec, model.style
    offered = checked_tools(request, style.tools)
    tools = callable_tools(request, offered)
    texts = [message.text for message in request.messages]

    def plan() -> Plan:
        check_lengths(texts, codec, model.engine.max_model_len, param="messages")
        params = chat_params(request, codec)
        prompt = codec.encode_chat(request.messages, request.chat_template_kwargs or {}, offered)
        reasoning = style.reasoning(codec, prompt, request.thinking_token_budget)
        params = constrained(params, request, tools, style.tools, reasoning)
        return Plan([prompt], [params], ChatWriter(answer, tools, reasoning))

    size = sum(map(len, texts)) + CHARS_PER_MESSAGE * len(texts) + CHARS_PER_TOOL * len(offered)
    return await answer.tokenizing.run(size + work_of_params(request), plan)


class ChatWriter(AnswerWriter[ChatCompletionRequest]):
    """Write OpenAI's messages. `tools` are those that may be called, `reasoning` how the answer's thought begins."""

    def __init__(
        self,
        answer: ActiveAnswer[ChatCompletionRequest],
        tools: Sequence[Tool],
        reasoning: Reasoning | None,
    ) -> None:
        super().__init__(answer)
        self._tools = tools
        self._reasoning = reasoning
        self._lists_tokens = lists_tokens(answer.request)
        self._choices: Sequence[Choice] = ()
        self._readers: dict[int, AnswerReader] = {}  # of the choices that have begun

    def whole(self, choices: Sequence[Choice]) -> ChatCompletion:
        """Return all choices, with usage, and the first one's logprobs as the original specification has them."""
        body: ChatCompletion = {
            "id": self.answer.id,
            "object": "chat.completion",
            "created": self.answer.created,
            "model": self.request.model,
            "system_fingerprint": self.answer.model.fingerprint,
            "choices": [self._choice(choice) for choice in choices],
            "usage": self._usage(choices),
        }
        if (logprobs := body["choices"][0]["logprobs"]) is not None:
            body["logprobs"] = logprobs
        if self.request.return_token_ids:
            body["prompt_token_ids"] = list(choices[0].prompt_token_ids)
        if (scores := body["choices"][0].get("prompt_logprobs")) is not None:
            body["prompt_logprobs"] = scores  # where vLLM has them
        return body

    def began(self, choices: Sequence[Choice]) -> Iterator[ChatChunk]:
        """Remember the choices: what opens them is known when the first token is there."""
        self._choices = choices
        return iter(())

    def gained(self, choice: Choice, delta: Delta) -> Iterator[ChatChunk]:
        """Return one chunk with what the choice gained. Several choices are opened first, in order, as OpenAI does.

        openai-python's stream helper relies on it: it takes the order of first chunks for the choices' indices, and
        counts the logprobs of a later choice's first chunk twice.
        """
        if not self._readers and len(self._choices) > 1:
            for opened in self._choices:
                yield from self._chunks(opened, Delta(opened.index))
        yield from self._chunks(choice, delta)

    def _chunks(self, choice: Choice, delta: Delta) -> Iterator[ChatChunk]:
        is_first = not self._readers
        chunk = self._envelope([self._gained_by(choice, delta)])
        if is_first and self.request.return_token_ids:
            chunk["prompt_token_ids"] = list(choice.prompt_token_ids)
        if is_first and (scores := chunk["choices"][0].get("prompt_logprobs")) is not None:
            chunk["prompt_logprobs"] = scores
        yield chunk

    def ended(self, choices: Sequence[Choice]) -> Iterator[ChatChunk]:
        """Return usage as the last chunk, where it was asked for."""
        if self.request.include_usage:
            yield {**self._envelope([]), "usage": self._usage(choices)}

    def _envelope(self, choices: list[ChatChunkChoice]) -> ChatChunk:
        chunk: ChatChunk = {
            "id": self.answer.id,
            "object": "chat.completion.chunk",
            "created": self.answer.created,
            "model": self.request.model,
            "system_fingerprint": self.answer.model.fingerprint,
            "choices": choices,
        }
        if self.request.include_usage:
            chunk["usage"] = self._usage(self._choices) if self.request.includes_usage_so_far else None
        return chunk

    def _choice(self, choice: Choice) -> ChatChoice:
        reader = self._reader()
        message = reader.whole("".join(choice.texts))
        return {
            "index": choice.index,
            "message": message,
            "logprobs": self._logprobs(choice.tokens, choice.stop_tokens),
            "finish_reason": finish_reason_of(choice, has_called=reader.has_called),
            **self.answer.extras(choice, choice.sampled, first=True, last=True),
        }

    def _gained_by(self, choice: Choice, delta: Delta) -> ChatChunkChoice:
        first, last = choice.index not in self._readers, delta.finish_reason is not None
        if first:
            self._readers[choice.index] = self._reader()
        reader = self._readers[choice.index]
        change = reader.feed(delta.text, last=last)
        if first:
            change = {"role": "assistant", **change}
        logprobs = self._logprobs(delta.tokens, delta.stop_tokens)
        if logprobs is not None and self.request.delta_logprobs:
            change["logprobs"] = logprobs
        return {
            "index": choice.index,
            "delta": change,
            "logprobs": logprobs,
            "finish_reason": finish_reason_of(choice, has_called=reader.has_called) if last else None,
            **self.answer.extras(choice, [*delta.tokens, *delta.stop_tokens], first=first, last=last),
        }

    def _reader(self) -> AnswerReader:
        """Return what finds thoughts and calls in one choice's text."""
        calls, thinking, style = None, None, self.answer.model.style.tools
        if self._tools and style is not None:
            calls = CallReader(style, {tool.function.name for tool in self._tools})
        if self._reasoning is not None:
            thinking = ThinkingReader(begun=self._reasoning.begun)
        return AnswerReader(thinking, calls, shows_thoughts=self.request.include_reasoning is not False)

    def _logprobs(
        self, tokens: Sequence[TokenOutput], stop_tokens: Sequence[TokenOutput]
    ) -> ChatLogprobs | None:
        """Return an entry for every token of the text; with ids asked for, for every sampled token."""
        if not self._lists_tokens:
            return None
        writer = self.answer.tokens
        entries = [writer.entry(token) for token in tokens]
        if self.answer.returns_ids:
            entries += [writer.entry(token, in_text=False) for token in stop_tokens]
        return {"content": entries}

    def _usage(self, choices: Sequence[Choice]) -> Usage:
        usage = usage_of(choices)
        if self.answer.model.style.thinks:
            usage["completion_tokens_details"] = {
                "reasoning_tokens": sum(self._thinking_tokens(choice) for choice in choices)
            }
        return usage

    def _thinking_tokens(self, choice: Choice) -> int:
        if self._reasoning is None:
            return 0
        table = self.answer.model.codec.token_bytes
        return thinking_tokens(
            [table[token.token_id] for token in choice.sampled], begun=self._reasoning.begun
        )
