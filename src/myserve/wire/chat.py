"""The chat request, as OpenAI types it, with the extensions of `GenerationRequest`."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from myserve.wire.base import Integer, WireModel
from myserve.wire.fields import MAX_MESSAGES, MAX_TOOLS, GenerationRequest
from myserve.wire.structured import Tool, ToolChoice

__all__ = ["ChatCompletionRequest", "ChatMessage", "ContentPart", "Role"]

Role = Literal["developer", "system", "user", "assistant", "tool"]


class ContentPart(WireModel):
    """A piece of a message. Text is the only kind that a text-only language model reads.

    >>> ContentPart(type="text", text="hi").as_text()
    'hi'
    """

    type: str
    text: str | None = None
    refusal: str | None = None

    @model_validator(mode="after")
    def _is_text(self) -> ContentPart:
        if self.type not in ("text", "refusal"):
            raise ValueError(f"content parts of type {self.type!r} are not supported; send type 'text'")
        if getattr(self, self.type) is None:
            raise ValueError(f"a content part of type {self.type!r} needs a string in {self.type!r}")
        return self

    def as_text(self) -> str:
        return self.text or self.refusal or ""


class ChatMessage(WireModel):
    """One turn. Only an assistant's content may be null (it may have called tools alone).

    >>> parts = (ContentPart(type="text", text="a"), ContentPart(type="text", text="b"))
    >>> ChatMessage(role="user", content=parts).text
    'ab'
    >>> ChatMessage(role="assistant", content=None).text
    ''
    """

    # What OpenAI's clients put beside an answer that they send back.
    HINTS: ClassVar[frozenset[str]] = frozenset(
        {"refusal", "annotations", "audio", "function_call", "reasoning_details"}
    )

    role: Role
    content: str | Annotated[tuple[ContentPart, ...], Field(fail_fast=True)] | None = None
    name: str | None = None
    tool_calls: Annotated[tuple[dict[str, Any], ...], Field(fail_fast=True)] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None  # vLLM's and OpenRouter's name for it

    @model_validator(mode="after")
    def _has_content(self) -> ChatMessage:
        if self.content is None and self.role != "assistant":
            raise ValueError(f"a message with role {self.role!r} needs content: a string or text parts")
        return self

    @property
    def thought(self) -> str | None:
        """Return what was thought before the answer, by either name."""
        return self.reasoning if self.reasoning_content is None else self.reasoning_content

    @property
    def text(self) -> str:
        """The content as one string; parts are joined with nothing between: no character is invented."""
        if self.content is None or isinstance(self.content, str):
            return self.content or ""
        return "".join(part.as_text() for part in self.content)


class ChatCompletionRequest(GenerationRequest):
    """`POST /v1/chat/completions`.

    >>> ChatCompletionRequest(model="m", messages=(ChatMessage(role="user", content="hi"),)).messages[0].text
    'hi'
    """

    messages: Annotated[tuple[ChatMessage, ...], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Integer | None = None
    logprobs: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: Annotated[tuple[Tool, ...], Field(fail_fast=True, max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    thinking_token_budget: Integer | None = None
    include_reasoning: bool | None = None
