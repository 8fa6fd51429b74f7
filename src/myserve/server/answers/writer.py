"""A dialect of HTTP is a plan, which reads a request, and a writer, which writes its answer whole or as events."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from myserve.core.params import SamplingParams
from myserve.engine.outputs import Delta
from myserve.server.answers.answer import ActiveAnswer
from myserve.server.choice import Choice
from myserve.wire.fields import GenerationRequest
from myserve.wire.sse import DONE, encode_event

__all__ = ["AnswerWriter", "Body", "Plan"]

R = TypeVar("R", bound=GenerationRequest)

# What is sent as JSON: one of the typed dicts in `wire.responses`.
Body = Any


class AnswerWriter(ABC, Generic[R]):
    """Write the answer to one request. A dialect is a subclass in `routes/`, with its types in `wire/`.

    `answer_request` calls either `whole`, once, or `began`, `gained` for every delta, and `ended`.
    """

    done: bytes = DONE  # what a stream's end looks like when nothing failed

    def __init__(self, answer: ActiveAnswer[R]) -> None:
        self.answer = answer
        self.request = answer.request

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

    def encode(self, event: bytes) -> bytes:
        """Frame one event's JSON; a dialect whose events have names overrides it."""
        return encode_event(event)


@dataclass(frozen=True, slots=True)
class Plan:
    """The draws that a request asks for, prompt by prompt, and the writer of their answer."""

    prompts: Sequence[Sequence[int]]
    params: Sequence[SamplingParams]
    writer: AnswerWriter[Any]
