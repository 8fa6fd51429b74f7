"""Text and messages to token ids and back, for one model."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any, TypeVar

import jinja2

from myserve.engine.token_bytes import TokenBytes
from myserve.errors import EngineError, RequestError
from myserve.server.prompts.control_tokens import ControlTokens
from myserve.server.turns import LoopTurns
from myserve.wire.chat import ChatMessage
from myserve.wire.structured import Tool

__all__ = ["INLINE_CHARACTERS", "Codec", "Tokenizing"]

T = TypeVar("T")

# Up to here, a prompt is tokenized in the time that a thread switch costs; above, elsewhere than on the loop.
INLINE_CHARACTERS = 2048

# What a model without a chat template gets (GPT-2): one line a message, and the assistant's turn left open.
PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)

_RESERVED = frozenset(
    {"conversation", "messages", "tools", "documents", "chat_template", "tokenize", "add_generation_prompt"}
    | {"continue_final_message", "return_dict", "return_tensors", "return_assistant_tokens_mask"}
    | {"padding", "truncation", "max_length", "tokenizer_kwargs", "sanitize_control_tokens"}
)


class Codec:
    """Encodes and decodes with one model's tokenizer. Its methods may be called from any thread."""

    def __init__(self, tokenizer: Any, token_bytes: TokenBytes, template: str | None = None) -> None:
        """`template`: a chat template in place of the tokenizer's."""
        _end_truncation(tokenizer)
        self._tokenizer = tokenizer
        own = None if tokenizer.chat_template else PLAIN_TEMPLATE
        self._template = own if template is None else template
        self._control = ControlTokens(tokenizer, template)
        self._at_fault = "messages" if template is None else "chat_template"
        self.token_bytes = token_bytes

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the ids that the model's own tokenizer gives.

        `add_special_tokens` adds the BOS (or EOS) that the tokenizer puts around a text, whether or not the text has
        one already: say False for a text that has.
        """
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return ids

    def encode_chat(
        self,
        messages: Sequence[ChatMessage],
        template_kwargs: dict[str, Any],
        tools: Sequence[Tool] = (),
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> list[int]:
        """Return the ids of `tokenizer.apply_chat_template`, whose control tokens messages and tools cannot forge.

        They end with the beginning of an answer, unless `add_generation_prompt` is False, or inside the last message,
        which an answer then goes on with (`continue_final_message`).
        Raises RequestError for messages that the template refuses.
        """
        ends: dict[str, Any] = {"continue_final_message": True} if continue_final_message else {}
        ends["add_generation_prompt"] = add_generation_prompt and not continue_final_message
        _refuse_reserved(template_kwargs)
        turns = [self._as_template_sees(message) for message in messages]
        offered = [tool.model_dump(by_alias=True, exclude_unset=True) for tool in tools]
        # the caller's text like a message's, so they go the same way
        turns.append({"role": "system", "tools": offered, "template_kwargs": template_kwargs})

        def render(turns: list[dict[str, Any]]) -> str:
            *messages, rest = turns
            offered = {"tools": rest["tools"]} if tools else {}
            return self._render(messages, rest["template_kwargs"] | offered | ends)

        if self._control.in_messages(turns):
            return self._control.encode(turns, render)
        return self.encode(render(turns), add_special_tokens=False)

    def with_special_tokens(self, token_ids: list[int]) -> list[int]:
        """Return ids with the BOS or EOS around them that the tokenizer puts around a text."""
        probe = "a"
        plain, whole = self.encode(probe, add_special_tokens=False), self.encode(probe)
        starts = range(len(whole) - len(plain) + 1)
        start = next((at for at in starts if whole[at : at + len(plain)] == plain), 0)
        return [*whole[:start], *token_ids, *whole[start + len(plain) :]]

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of ids that are a whole text, as the tokenizer's own `decode` gives it."""
        return self.token_bytes.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def token_text(self, token_id: int) -> str:
        """Return what a token adds to a text, also one that the tokenizer has and the model has not."""
        try:
            data: bytes = self.token_bytes[token_id]
        except IndexError:
            return str(self._tokenizer.decode([token_id]))
        return data.decode("utf-8", "replace")

    def _as_template_sees(self, message: ChatMessage) -> dict[str, Any]:
        """Return OpenAI's message in the terms of templates: no "developer", a tool call's arguments as an object."""
        turn: dict[str, Any] = {
            "role": "system" if message.role == "developer" else message.role,
            "content": [{"type": "text", "text": message.text}] if self._reads_parts else message.text,
        }
        if message.name is not None:
            turn["name"] = message.name
        if message.tool_call_id is not None:
            turn["tool_call_id"] = message.tool_call_id
        if message.thought is not None:
            turn["reasoning_content"] = message.thought
        if message.tool_calls:
            turn["tool_calls"] = [_with_parsed_arguments(call) for call in message.tool_calls]
        return turn

    @cached_property
    def _reads_parts(self) -> bool:
        """True where the template reads content as parts alone, and leaves a string out."""
        probe = "a probe of 1 message"
        for content in (probe, [{"type": "text", "text": probe}]):
            try:
                text = self._render([{"role": "user", "content": content}], {})
            except RequestError:
                continue
            if probe in text:
                return content is not probe
        return False

    def fill(self, template: str, values: Mapping[str, Any], *, param: str) -> str:
        """Return the text that a template makes of the caller's `values`. Raises RequestError naming `param`."""
        return self._apply(template, [{"role": "user", "content": ""}], dict(values), param)

    def _render(self, turns: list[dict[str, Any]], template_kwargs: dict[str, Any]) -> str:
        return self._apply(
            self._template, turns, {"add_generation_prompt": True, **template_kwargs}, self._at_fault
        )

    def _apply(
        self, template: str | None, turns: list[dict[str, Any]], values: dict[str, Any], param: str
    ) -> str:
        try:
            text: str = self._tokenizer.apply_chat_template(
                turns, chat_template=template, tokenize=False, **values
            )
        except (
            jinja2.TemplateError,
            TypeError,
            ValueError,
            KeyError,
            AttributeError,
            RecursionError,
        ) as error:
            # A template is the model's program over the caller's data, and refuses what it does not know.
            raise RequestError(
                f"the chat template refuses this conversation: {error}", param=param
            ) from error
        return text


class Tokenizing:
    """Runs a codec's work on the loop while it is short, in a thread of its own when not; measures the time."""

    def __init__(self, worker: ThreadPoolExecutor) -> None:
        self._worker = worker
        self._turns = LoopTurns()
        self.queued = 0.0  # seconds
        self.spent = 0.0

    async def run(self, size: int, work: Callable[[], T]) -> T:
        """Return `work()`, which is to tokenize about `size` characters."""
        if size <= INLINE_CHARACTERS:
            done = self._timed(work, time.perf_counter())
            # one of hundreds, it may be
            await self._turns.take()
            return done
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._worker, self._timed, work, time.perf_counter())

    def _timed(self, work: Callable[[], T], asked: float) -> T:
        began = time.perf_counter()
        try:
            return work()
        except (Exception, KeyboardInterrupt, SystemExit):
            raise
        # of a tokenizer in Rust: no Exception, so that no handler would answer
        except BaseException as panic:
            raise EngineError(f"the tokenizer failed: {panic}") from panic
        finally:
            self.queued += began - asked
            self.spent += time.perf_counter() - began


def _end_truncation(tokenizer: Any) -> None:
    """Take out what a tokenizer.json saved with truncation or padding would do to prompts."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        backend.no_truncation()
        backend.no_padding()


def _refuse_reserved(template_kwargs: dict[str, Any]) -> None:
    for name in sorted(_RESERVED & template_kwargs.keys()):
        raise RequestError(
            f"chat_template_kwargs may not set {name}: it is the server's to set",
            param="chat_template_kwargs",
        )


def _with_parsed_arguments(call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        # clients send "" back for a call without arguments
        arguments = json.loads(function["arguments"].strip() or "{}")
    except RecursionError:
        raise RequestError("the arguments of a tool call are nested too deeply", param="messages") from None
    except ValueError:
        return call  # what the model once wrote need not be JSON; the template gets the string
    return {**call, "function": {**function, "arguments": arguments}}
