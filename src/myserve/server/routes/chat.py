"""Chat completions: messages become one prompt, and `n` choices OpenAI's messages with thoughts and tool calls."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from fastapi import APIRouter, Request, Response

from myserve.core.grammar import Reasoning
from myserve.engine.outputs import Delta, TokenOutput
from myserve.engine.requests.lengths import LengthFields
from myserve.server.answers.answer import ActiveAnswer, finish_reason_of, usage_of
from myserve.server.answers.respond import answer_request
from myserve.server.answers.writer import AnswerWriter, Plan
from myserve.server.choice import Choice
from myserve.server.parsing.message_reader import AnswerReader
from myserve.server.parsing.thinking import ThinkingCount, thought_reader
from myserve.server.parsing.tool_calls import CallReader
from myserve.server.prompts.call_grammars import Forms
from myserve.server.prompts.lengths import check_lengths
from myserve.server.prompts.required_prefix import DrawnTurns, keeping_prefix
from myserve.server.prompts.sampling import chat_params, lists_tokens, tells_text_alone, work_of_params
from myserve.server.prompts.tools import callable_tools, checked_tools, constrained
from myserve.server.routes.body import documented, models_of, read_request, settings_of
from myserve.server.settings import Settings
from myserve.wire.chat import ChatCompletionRequest, ChatMessage
from myserve.wire.responses import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatLogprobs,
    Usage,
)
from myserve.wire.structured import Tool

__all__ = ["ChatWriter", "plan_chat", "prompt_of", "router"]

router = APIRouter()

# Characters that a message or a tool is worth when it is decided where to tokenize.
CHARS_PER_MESSAGE = 32
CHARS_PER_TOOL = 256

ChatWriters = Callable[
    [ActiveAnswer[ChatCompletionRequest], Sequence[Tool], Reasoning | None], AnswerWriter[Any]
]

DOCUMENTED = documented(ChatCompletionRequest, ChatCompletion, ChatChunk)


@router.post("/v1/chat/completions", openapi_extra=DOCUMENTED)
@router.post("/inference/v1/chat/completions", openapi_extra=DOCUMENTED)
async def create_chat_completion(http: Request) -> Response:
    """Draw `n` answers to one conversation; whole, or as server-sent events with `stream`."""
    request = await read_request(http, ChatCompletionRequest)
    plan = partial(plan_chat, settings_of(http))
    return await answer_request(http, request, plan, answer_id=f"chatcmpl-{uuid.uuid4().hex}")


async def plan_chat(
    settings: Settings,
    answer: ActiveAnswer[ChatCompletionRequest],
    write: ChatWriters | None = None,
    drawn: DrawnTurns | None = None,
    fields: LengthFields | None = None,
    forms: Forms | None = None,
) -> Plan:
    """Return the draws of a chat. `write` makes the writer of another dialect that was read as a chat.

    `drawn` are earlier turns that the prompt has as they were drawn where its text agrees, and is told where not.
    `fields`: what the other dialect calls its conversation and its limit. `forms`: grammars of its tools' texts.
    """
    request = answer.request
    fields = fields or _length_fields(request)
    model = answer.model = answer.model.with_template(request.chat_template, settings)
    codec, style = model.codec, model.style
    kwargs = style.template_kwargs(request.reasoning_effort, request.chat_template_kwargs)
    offered = checked_tools(request, style.tools)
    tools = callable_tools(request, offered)
    texts = [message.text for message in request.messages]
    prefix = request.prefix_token_ids

    def plan() -> Plan:
        check_lengths(["".join(texts)], codec, model.engine.max_model_len, param=fields.prompt)
        params = chat_params(request, codec)
        prompt = codec.encode_chat(
            request.messages,
            kwargs,
            offered,
            add_generation_prompt=request.add_generation_prompt is not False,
            continue_final_message=bool(request.continue_final_message),
        )
        eos_ids = model.engine.eos_token_ids
        if prefix is not None:
            prompt = keeping_prefix(prompt, prefix, request.messages, codec, kwargs, eos_ids)
        elif drawn is not None:
            prompt = drawn.kept(prompt, request.messages, codec, kwargs, eos_ids)
        if answer.session is not None:
            is_placed = prefix is not None or (drawn is not None and drawn.lost is None)
            prompt = answer.session.spliced(
                prompt, request, offered, kwargs, codec.token_bytes, is_required=is_placed
            )
        begun = texts[-1] if request.continue_final_message else ""
        reasoning = style.reasoning(codec, prompt, request.thinking_token_budget, begun)
        params = constrained(params, request, tools, style.tools, reasoning, forms)
        return Plan([prompt], [params], (write or ChatWriter)(answer, tools, reasoning), fields=fields)

    size = sum(map(len, texts)) + CHARS_PER_MESSAGE * len(texts) + CHARS_PER_TOOL * len(offered)
    size += len(prefix or ()) + (0 if drawn is None else len(drawn.token_ids))
    return await answer.tokenizing.run(size + work_of_params(request), plan)


def _length_fields(request: ChatCompletionRequest) -> LengthFields:
    return LengthFields(
        "messages", "max_tokens" if request.max_completion_tokens is None else "max_completion_tokens"
    )


async def prompt_of(
    http: Request,
    request: ChatCompletionRequest,
    drawn: DrawnTurns | None = None,
    fields: LengthFields | None = None,
) -> list[int]:
    """Return the prompt of a chat, of which nothing is drawn. Raises RequestError as a draw would."""
    models = models_of(http)
    model = await models.get(request.model)
    answer = ActiveAnswer.begin(request, model, "", models.adapter_of(request.model))
    return list((await plan_chat(settings_of(http), answer, drawn=drawn, fields=fields)).prompts[0])


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
        self._thoughts: dict[int, ThinkingCount] = {}

    def whole(self, choices: Sequence[Choice]) -> ChatCompletion:
        """Return all choices, with usage, and the first one's logprobs as the original specification has them."""
        body: ChatCompletion = {
            "id": self.answer.id,
            "object": "chat.completion",
            "created": self.answer.created,
            "model": self.request.model,
            "system_fingerprint": self.answer.fingerprint,
            "choices": [self._choice(choice) for choice in choices],
            "usage": self._usage(choices),
        }
        if (logprobs := body["choices"][0]["logprobs"]) is not None:
            body["logprobs"] = logprobs
        # where vLLM has them, null where they were not asked for
        asked = self.request.return_token_ids
        body["prompt_token_ids"] = list(choices[0].prompt_token_ids) if asked else None
        body["prompt_logprobs"] = body["choices"][0].get("prompt_logprobs")
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

    def said(self, choice: Choice) -> ChatMessage:
        """Return the message, with its thought also where that is not shown."""
        message = self._reader(shows_thoughts=True).whole("".join(choice.texts))
        return ChatMessage(
            role="assistant",
            content=message["content"],
            tool_calls=tuple(dict(call) for call in message.get("tool_calls", ())),
            reasoning_content=message.get("reasoning_content"),
        )

    def is_text_alone(self, choice: Choice) -> bool:
        """Return True behind the first chunk, where no thoughts, calls, lists of tokens or usage so far are told."""
        reads = bool(self._tools) or self._reasoning is not None
        return choice.index in self._readers and not reads and tells_text_alone(self.request)

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
            "system_fingerprint": self.answer.fingerprint,
            "choices": choices,
        }
        if self.request.include_usage:
            chunk["usage"] = self._usage(self._choices) if self.request.includes_usage_so_far else None
        return chunk

    def _choice(self, choice: Choice) -> ChatChoice:
        reader = self._reader()
        message = reader.whole("".join(choice.texts))
        if self._lists_tokens and self.request.return_tokens_as_token_ids:
            # NeMo-RL's: sent back with the message, they are the beginning of the next prompt
            message["prompt_token_ids"] = list(choice.prompt_token_ids)
            message["generation_token_ids"] = [token.token_id for token in choice.sampled]
            message["generation_log_probs"] = [token.sampling_logprob for token in choice.sampled]
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

    def _reader(self, *, shows_thoughts: bool | None = None) -> AnswerReader:
        """Return what finds thoughts and calls in one choice's text; it shows thoughts as the request wants them."""
        calls, thinking, style = None, None, self.answer.model.style.tools
        if self._tools and style is not None:
            calls = CallReader(style, {tool.function.name: tool.function.parameters for tool in self._tools})
        if self._reasoning is not None:
            thinking = thought_reader(self._reasoning.marks, starts_inside=self._reasoning.starts_inside)
        if shows_thoughts is None:
            shows_thoughts = self.request.include_reasoning is not False
        return AnswerReader(thinking, calls, shows_thoughts=shows_thoughts)

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
        count = self._thoughts.get(choice.index)
        if count is None:
            count = self._thoughts[choice.index] = ThinkingCount(
                starts_inside=self._reasoning.starts_inside, marks=self._reasoning.marks
            )
        # usage so far is on every chunk: what was counted before is not read again
        new = choice.tokens[count.num_fed :] if count.num_fed < len(choice.tokens) else ()
        for token in (*new, *choice.stop_tokens[max(0, count.num_fed - len(choice.tokens)) :]):
            count.feed(table[token.token_id])
        return count.tokens
