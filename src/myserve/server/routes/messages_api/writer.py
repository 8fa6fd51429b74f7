"""A chat's draw is answered as a message of Anthropic's API: one object, or the events that make it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import orjson

from myserve.core.grammar import Reasoning
from myserve.engine.outputs import Delta
from myserve.server.answers.answer import ActiveAnswer, finish_reason_of
from myserve.server.choice import Choice
from myserve.server.errors import messages_error_body
from myserve.server.routes.chat import ChatWriter
from myserve.server.routes.messages_api.output import OutputBlocks
from myserve.server.routes.messages_api.turn import MessagesTurn
from myserve.wire.chat import ChatCompletionRequest
from myserve.wire.messages_api.answer import MessageStop, MessageUsage
from myserve.wire.sse import encode_event
from myserve.wire.structured import Tool

__all__ = ["MessagesWriter"]

_STOPS: dict[str, MessageStop] = {"length": "max_tokens", "tool_calls": "tool_use", "abort": "pause_turn"}


class MessagesWriter(ChatWriter):
    """Write Anthropic's message."""

    done = b""  # a stream ends with its last event

    def __init__(
        self,
        answer: ActiveAnswer[ChatCompletionRequest],
        tools: Sequence[Tool],
        reasoning: Reasoning | None,
        *,
        turn: MessagesTurn,
    ) -> None:
        super().__init__(answer, tools, reasoning)
        self._turn = turn
        self._pieces = self._reader()
        self._output = OutputBlocks(omits_thoughts=turn.omits_thoughts)

    def whole(self, choices: Sequence[Choice]) -> Any:
        """Return the message."""
        (choice,) = choices
        for _ in self._blocks(choice, "".join(choice.texts), is_last=True):
            pass
        return {
            **self._message(self._output.blocks),
            **self._ends(choice),
            "usage": self._message_usage(choice),
            **self._ours(choice, first=True, last=True),
        }

    def began(self, choices: Sequence[Choice]) -> Iterator[Any]:
        """Return the event that begins the message."""
        self._choices = choices
        (choice,) = choices
        usage = self._message_usage(choice)
        yield {
            "type": "message_start",
            "message": {**self._message([]), "usage": usage, **self._ours(choice, first=True, last=False)},
        }

    def gained(self, choice: Choice, delta: Delta) -> Iterator[Any]:
        """Return the events of one delta; with the last one those that end the message."""
        is_last = delta.finish_reason is not None
        yield from self._blocks(choice, delta.text, is_last=is_last)
        if is_last:
            yield {
                "type": "message_delta",
                "delta": self._ends(choice),
                "usage": self._message_usage(choice),
                **self._ours(choice, first=True, last=True),
            }
            yield {"type": "message_stop"}

    def ended(self, choices: Sequence[Choice]) -> Iterator[Any]:
        """Return nothing: the last delta's events have it all."""
        return iter(())

    def is_text_alone(self, choice: Choice) -> bool:
        """Return False: the events depend on the block that is open."""
        return False

    def failed(self, error: Exception) -> bytes:
        """Return the event of a failure on the way."""
        return self.encode(orjson.dumps(messages_error_body(error)))

    def encode(self, event: bytes) -> bytes:
        """Frame one event, by the name that its JSON begins with."""
        return encode_event(event, event=event[len(b'{"type":"') :].partition(b'"')[0].decode())

    def _blocks(self, choice: Choice, text: str, *, is_last: bool) -> Iterator[Any]:
        yield from self._output.feed(self._pieces.pieces(text, last=is_last))
        if is_last:
            yield from self._output.end(is_cut=finish_reason_of(choice) in ("length", "abort"))

    def _message(self, content: Sequence[Any]) -> dict[str, Any]:
        return {
            "id": self.answer.id,
            "type": "message",
            "role": "assistant",
            "model": self._turn.asked.model,
            "content": content,
            "stop_reason": None,
            "stop_sequence": None,
            "system_fingerprint": self.answer.fingerprint,
            "warnings": self._turn.words,
        }

    def _ends(self, choice: Choice) -> dict[str, Any]:
        """Return why the message ended."""
        matched = choice.last.stop_reason if choice.last is not None else None
        reason = finish_reason_of(choice, has_called=self._output.has_called)
        if reason == "length" and self._turn.fills_context:
            return {"stop_reason": "model_context_window_exceeded", "stop_sequence": None}
        if reason == "stop" and isinstance(matched, str):
            return {"stop_reason": "stop_sequence", "stop_sequence": matched}
        return {"stop_reason": _STOPS.get(reason, "end_turn"), "stop_sequence": None}

    def _ours(self, choice: Choice, *, first: bool, last: bool) -> dict[str, Any]:
        """Return our fields; what ours calls a stop reason is Anthropic's stop sequence, or a token."""
        extras: dict[str, Any] = {
            **self.answer.extras(choice, choice.sampled if last else (), first=first, last=last)
        }
        matched = extras.pop("stop_reason", None)
        if isinstance(matched, int):
            extras["stop_token_id"] = matched
        if last and self._turn.asked.logprobs:
            extras["logprobs"] = self._logprobs(choice.tokens, choice.stop_tokens)
        return extras

    def _message_usage(self, choice: Choice) -> MessageUsage:
        usage = self._usage([choice])
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        written: MessageUsage = {
            "input_tokens": usage["prompt_tokens"] - cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
            "output_tokens": usage["completion_tokens"],
        }
        if (details := usage.get("completion_tokens_details")) is not None:
            written["output_tokens_details"] = {"thinking_tokens": details["reasoning_tokens"]}
        return written
