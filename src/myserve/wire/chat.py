"""The chat request, as OpenAI types it, with the extensions of `GenerationRequest`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from myserve.errors import RequestError
from myserve.wire.base import Integer, WireModel
from myserve.wire.fields import MAX_MESSAGES, MAX_TOOLS, GenerationRequest, TokenIds
from myserve.wire.structured import Tool, ToolChoice

__all__ = [
    "ChatCompletionRequest",
    "ChatMessage",
    "ChatTemplate",
    "ContentPart",
    "ReasoningEffort",
    "Role",
    "check_prompt_end",
    "prefix_token_ids",
]

# a program, which runs on the server: only where its operator allows it
ChatTemplate = Annotated[str, Field(min_length=1, max_length=1 << 16)]
ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
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
        {"refusal", "annotations", "audio", "function_call", "reasoning_details", "generation_log_probs"}
    )

    role: Role
    content: str | Annotated[tuple[ContentPart, ...], Field(fail_fast=True)] | None = None
    name: str | None = None
    tool_calls: Annotated[tuple[dict[str, Any], ...], Field(fail_fast=True)] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None  # vLLM's and OpenRouter's name for it
    # NeMo-RL's: what an answer was drawn behind, and drawn as
    prompt_token_ids: TokenIds | None = None
    generation_token_ids: TokenIds | None = None

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
    chat_template: ChatTemplate | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: ReasoningEffort | None = None
    tools: Annotated[tuple[Tool, ...], Field(fail_fast=True, max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    thinking_token_budget: Integer | None = None
    include_reasoning: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    required_prefix_token_ids: Annotated[TokenIds, Field(min_length=1)] | None = None  # NeMo-RL's

    @property
    def prefix_token_ids(self) -> tuple[int, ...] | None:
        """Return the ids that the conversation must begin with. None: as it is rendered."""
        return prefix_token_ids(self.messages, self.required_prefix_token_ids)

    def check(self) -> None:
        """Raise RequestError for what no field alone is wrong about."""
        super().check()
        check_prompt_end(self.messages, self.add_generation_prompt, self.continue_final_message)


def prefix_token_ids(
    messages: Sequence[ChatMessage], required: tuple[int, ...] | None
) -> tuple[int, ...] | None:
    """Return the ids of the turns that were drawn: as required, or as the last message that carries them says.

    >>> answered = ChatMessage(role="assistant", content="a", prompt_token_ids=(1, 2), generation_token_ids=(3,))
    >>> prefix_token_ids([answered, ChatMessage(role="user", content="b")], None)
    (1, 2, 3)
    """
    if required is not None:
        return required
    for number, message in reversed(list(enumerate(messages))):
        if message.prompt_token_ids:
            if message.generation_token_ids is None:
                name = f"messages[{number}].generation_token_ids"
                raise RequestError(f"{name} is required beside prompt_token_ids", param=name)
            return message.prompt_token_ids + message.generation_token_ids
    return None


def check_prompt_end(
    messages: Sequence[ChatMessage] | None,
    add_generation_prompt: bool | None,
    continue_final_message: bool | None,
) -> None:
    """Raise RequestError where the last message is to be continued and cannot be.

    >>> check_prompt_end([ChatMessage(role="assistant", content=None)], None, True)
    Traceback (most recent call last):
    ...
    myserve.errors.RequestError: continue_final_message needs a last message with text, which the answer goes on with
    """
    if not continue_final_message:
        return
    if add_generation_prompt:
        reason = "and add_generation_prompt exclude each other: the last message goes on, or a new one begins"
    elif not messages or not messages[-1].text:
        reason = "needs a last message with text, which the answer goes on with"
    else:
        return
    raise RequestError(f"continue_final_message {reason}", param="continue_final_message")
