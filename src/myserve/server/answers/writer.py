"""A dialect of HTTP is a plan, which reads a request, and a writer, which writes its answer whole or as events."""

from __future__ import annotations

import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import orjson

from myserve.core.params import SamplingParams
from myserve.engine.outputs import Delta, TokenOutput
from myserve.engine.requests.lengths import OURS, LengthFields
from myserve.server.answers.answer import ActiveAnswer
from myserve.server.answers.streaming import error_event
from myserve.server.choice import Choice
from myserve.wire.chat import ChatMessage
from myserve.wire.fields import GenerationRequest
from myserve.wire.sse import DONE, encode_event

__all__ = ["AnswerWriter", "Body", "Plan"]

R = TypeVar("R", bound=GenerationRequest)

# What is sent as JSON: one of the typed dicts in `wire.responses`.
Body = Any


# a text that no name or id has
_MARK = uuid.uuid4().hex


class _Template(NamedTuple):
    """An event without its text. The fingerprint in it is that of one version of the weights and of the adapter."""

    fingerprint: str
    before: bytes
    after: bytes


class AnswerWriter(ABC, Generic[R]):
    """Write the answer to one request. A dialect is a subclass in `routes/`, with its types in `wire/`.

    `answer_request` calls either `whole`, once, or `began`, `gained` for every delta, and `ended`.
    """

    done: bytes = DONE  # what a stream's end looks like when nothing failed

    def __init__(self, answer: ActiveAnswer[R]) -> None:
        self.answer = answer
        self.request = answer.request
        self._templates: dict[int, _Template] = {}  # of choices

    @abstractmethod
    def whole(self, choices: Sequence[Choice]) -> Body:
        """Return the body of an answer whose choices have all ended."""

    def began(self, choices: Sequence[Choice]) -> Iterable[Body]:
        """Return the events that come before the first token; none in OpenAI's older dialects."""
        return ()

    @abstractmethod
    def gained(self, choice: Choice, delta: Delta) -> Iterable[Body]:
        """Return the events that tell what `choice` gained with `delta`, which it has taken in already."""

    @abstractmethod
    def ended(self, choices: Sequence[Choice]) -> Iterable[Body]:
        """Return the events that follow the last token of the last choice."""

    def said(self, choice: Choice) -> ChatMessage | None:
        """Return what an ended choice says, as its client will send it back; None where the dialect is no chat."""
        return None

    def is_text_alone(self, choice: Choice) -> bool:
        """Return whether all of `gained` but the text is the same for each delta in the middle of this choice."""
        return False

    def text_event(self, choice: Choice, delta: Delta) -> tuple[bytes] | None:
        """Return what `gained` tells of a delta, framed, where that is its text alone; None where it must be asked.

        The rest of the event is taken from one that `gained` made, and made anew when its fingerprint has changed.
        """
        if delta.finish_reason is not None or delta.prompt_logprobs is not None:
            return None
        template = self._templates.get(choice.index)
        fingerprint = self.answer.fingerprint
        if template is None or template.fingerprint != fingerprint:
            template = self._template_of(choice, fingerprint)
            if template is None:
                return None
            self._templates[choice.index] = template
        return (template.before + orjson.dumps(delta.text) + template.after,)

    def _template_of(self, choice: Choice, fingerprint: str) -> _Template | None:
        if not self.is_text_alone(choice):
            return None
        # a field that lists tokens, and that `is_text_alone` does not know of, makes these two differ
        of_text, of_token = (
            [
                self.encode(orjson.dumps(event))
                for event in self.gained(choice, Delta(choice.index, _MARK, tokens))
            ]
            for tokens in ((), (TokenOutput(0, -1.0, -1.0),))
        )
        before, *after = of_text[0].split(orjson.dumps(_MARK)) if of_text else (b"",)
        is_alone = len(after) == 1 and len(of_text) == 1 and of_text == of_token
        return _Template(fingerprint, before, *after) if is_alone else None

    def failed(self, error: Exception) -> bytes:
        """Return how a stream ends that has failed, framed; a dialect with a shape of its own overrides it."""
        return error_event(error)

    def encode(self, event: bytes) -> bytes:
        """Frame one event's JSON; a dialect whose events have names overrides it."""
        return encode_event(event)


@dataclass(frozen=True, slots=True)
class Plan:
    """The draws that a request asks for, prompt by prompt, and the writer of their answer."""

    prompts: Sequence[Sequence[int]]
    params: Sequence[SamplingParams]
    writer: AnswerWriter[Any]
    request_ids: Sequence[str] | None = None  # of the prompts, where the client named them one by one
    adapters: Sequence[str | None] | None = None  # of the prompts; None: what the request's model names
    differ: bool = False  # whether the prompts' parameters differ in more than the seed
    fields: LengthFields = OURS  # what the request calls them
