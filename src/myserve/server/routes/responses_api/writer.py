"""A chat's draw is answered as a response: one object, or the events that make it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

from myserve.core.grammar import Reasoning
from myserve.engine.outputs import Delta
from myserve.errors import OverloadedError, RequestError
from myserve.server.answers.answer import ActiveAnswer, finish_reason_of
from myserve.server.answers.logprobs import TextOffsets
from myserve.server.choice import Choice
from myserve.server.errors import error_body
from myserve.server.routes.chat import ChatWriter
from myserve.server.routes.responses_api.output import OutputItems
from myserve.server.routes.responses_api.store import KeptResponse, kept_response
from myserve.server.routes.responses_api.turn import ResponseTurn
from myserve.wire.base import to_json
from myserve.wire.chat import ChatCompletionRequest
from myserve.wire.responses import TokenLogprob
from myserve.wire.responses_api.answer import ResponseEvent, ResponseObject, ResponseStatus, ResponseUsage
from myserve.wire.responses_api.request import ENCRYPTED_REASONING
from myserve.wire.sse import encode_event
from myserve.wire.structured import Tool

__all__ = ["ResponseWriter"]

_STATUS: dict[str, ResponseStatus] = {"length": "incomplete", "abort": "cancelled"}


class ResponseWriter(ChatWriter):
    """Write OpenAI's response. `keep` is called with what is to be kept of it."""

    done = b""  # a stream ends with its last event

    def __init__(
        self,
        answer: ActiveAnswer[ChatCompletionRequest],
        tools: Sequence[Tool],
        reasoning: Reasoning | None,
        *,
        turn: ResponseTurn,
        keep: Callable[[KeptResponse], None] | None = None,
    ) -> None:
        super().__init__(answer, tools, reasoning)
        self.kept: KeptResponse | None = None  # once it has ended, where it is stored
        self._turn = turn
        self._keep_it = keep
        self._pieces = self._reader()
        offsets = TextOffsets(answer.model.codec.token_bytes) if turn.asked.shows_logprobs else None
        seals = ENCRYPTED_REASONING in turn.asked.includes
        self._output = OutputItems(turn.offered.by_name, offsets, seals_thoughts=seals)
        self._num_events = 0

    def whole(self, choices: Sequence[Choice]) -> Any:
        """Return the response."""
        (choice,) = choices
        self._add_tokens(choice, 0)
        pieces = self._pieces.pieces("".join(choice.texts), last=True)
        for _ in (*self._output.feed(pieces), *self._output.end(is_cut=_status(choice) != "completed")):
            pass
        return self._final(choice)

    def began(self, choices: Sequence[Choice]) -> Iterator[Any]:
        """Return the events that tell of the response before its first token."""
        self._choices = choices
        (choice,) = choices
        for kind in ("created", "in_progress"):
            extras = self.answer.extras(choice, (), first=True, last=False)
            yield self._numbered(
                {"type": f"response.{kind}", "response": {**self.unfinished("in_progress"), **extras}}
            )

    def gained(self, choice: Choice, delta: Delta) -> Iterator[Any]:
        """Return the events of one delta; with the last one the whole response."""
        is_last = delta.finish_reason is not None
        self._add_tokens(choice, len(choice.tokens) - len(delta.tokens))
        for event in self._output.feed(self._pieces.pieces(delta.text, last=is_last)):
            yield self._numbered(event)
        if is_last:
            status = _status(choice)
            for event in self._output.end(is_cut=status != "completed"):
                yield self._numbered(event)
            kind = "completed" if status == "completed" else "incomplete"
            yield self._numbered({"type": f"response.{kind}", "response": self._final(choice)})

    def ended(self, choices: Sequence[Choice]) -> Iterator[Any]:
        """Return nothing: the last delta's events have it all."""
        return iter(())

    def is_text_alone(self, choice: Choice) -> bool:
        """Return False: every event has a number."""
        return False

    def failed(self, error: Exception) -> bytes:
        """Return the events of a failure on the way: what it was, and that the response has failed."""
        said = error_body(error)["error"]
        told: ResponseEvent = {
            "type": "error",
            "code": said["code"],
            "message": said["message"],
            "param": said["param"],
        }
        failed = self.unfinished("failed")
        failed["error"] = {"code": _code(error), "message": said["message"]}
        self._keep(failed, ())
        events = (told, {"type": "response.failed", "response": failed})
        return b"".join(self.encode(to_json(self._numbered(event))) for event in events)  # type: ignore[arg-type]

    def encode(self, event: bytes) -> bytes:
        """Frame one event, by the name that its JSON begins with."""
        return encode_event(event, event=event[len(b'{"type":"') :].partition(b'"')[0].decode())

    def unfinished(self, status: ResponseStatus) -> ResponseObject:
        """Return the response before its end, with no output."""
        asked = self._turn.asked
        body: dict[str, Any] = {
            "id": self.answer.id,
            "object": "response",
            "created_at": self.answer.created,
            "completed_at": None,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "model": asked.model,
            "output": [],
            "usage": None,
            **self._turn.echoed,
            "system_fingerprint": self.answer.fingerprint,
            "warnings": self._turn.warnings(),
        }
        return cast("ResponseObject", body)

    def listed_items(self) -> list[dict[str, Any]]:
        """Return the items that it answers, as they are listed."""
        return self._turn.listed_items()

    def _numbered(self, event: ResponseEvent) -> ResponseEvent:
        number, self._num_events = self._num_events, self._num_events + 1
        return {"type": event["type"], "sequence_number": number, **event}

    def _final(self, choice: Choice) -> ResponseObject:
        status = _status(choice)
        body: dict[str, Any] = {
            **self.unfinished(status),
            "completed_at": int(time.time()) if status == "completed" else None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "output": self._output.items,
            "usage": self._response_usage(choice),
            **self.answer.extras(choice, choice.sampled, first=True, last=True),
        }
        if self._turn.asked.logprobs and (logprobs := self._logprobs(choice.tokens, choice.stop_tokens)):
            body["logprobs"] = logprobs
        response = cast("ResponseObject", body)
        self._keep(response, [*choice.prompt_token_ids, *(token.token_id for token in choice.sampled)])
        return response

    def _keep(self, body: ResponseObject, token_ids: Sequence[int]) -> None:
        if not self._turn.asked.is_stored:
            return
        turn = self._turn
        conversation = turn.conversation(body["output"])
        self.kept = kept_response(body, turn.listed_items(), conversation, token_ids, turn.shown)
        if self._keep_it is not None:
            self._keep_it(self.kept)

    def _response_usage(self, choice: Choice) -> ResponseUsage:
        usage = self._usage([choice])
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        details = usage.get("completion_tokens_details")
        return {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": details["reasoning_tokens"] if details else 0},
            "total_tokens": usage["total_tokens"],
        }

    def _add_tokens(self, choice: Choice, start: int) -> None:
        if self._turn.asked.shows_logprobs:
            self._output.add_tokens([self._entry(token) for token in choice.tokens[start:]])

    def _entry(self, token: Any) -> TokenLogprob:
        entry = self.answer.tokens.entry(token)
        # OpenAI's types want a list, also of a token that the text leaves out
        entry["bytes"] = entry["bytes"] or []
        return entry


def _status(choice: Choice) -> ResponseStatus:
    return _STATUS.get(finish_reason_of(choice), "completed")


def _code(error: Exception) -> str:
    """Return one of the codes that OpenAI's types know."""
    if isinstance(error, OverloadedError):
        return "rate_limit_exceeded"
    return "invalid_prompt" if isinstance(error, RequestError) else "server_error"
