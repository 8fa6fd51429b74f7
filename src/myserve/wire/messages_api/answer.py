"""A message of Anthropic's API, its blocks, its events and its errors, as they are sent."""

from __future__ import annotations

from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict

from myserve.wire.responses import ChatLogprobs

__all__ = [
    "BlockOut",
    "MessageEvent",
    "MessageOfAssistant",
    "MessageStop",
    "MessageTokensCount",
    "MessageUsage",
    "MessagesError",
    "MessagesModel",
    "MessagesModelList",
    "TextOut",
    "ThinkingOut",
    "ToolUseOut",
]

# pause_turn: new weights ended it, as their sender asked; sent back as it is, it goes on
MessageStop = Literal[
    "end_turn", "max_tokens", "stop_sequence", "tool_use", "pause_turn", "model_context_window_exceeded"
]


class TextOut(TypedDict):
    type: Literal["text"]
    text: str


class ThinkingOut(TypedDict):
    type: Literal["thinking"]
    thinking: str
    signature: str


class ToolUseOut(TypedDict):
    type: Literal["tool_use"]
    id: str
    name: str
    input: Any  # an object, as the model wrote it


BlockOut = TextOut | ThinkingOut | ToolUseOut


class ThinkingTokens(TypedDict):
    thinking_tokens: int


class MessageUsage(TypedDict):
    """Tokens of the prompt are counted once: those that were read from the cache are not among `input_tokens`."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int
    output_tokens_details: NotRequired[ThinkingTokens]


class MessageOfAssistant(TypedDict):
    """Anthropic's message; ours beside it are a chat's choice's fields (`docs/messages.md`)."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[BlockOut]
    stop_reason: MessageStop | None
    stop_sequence: str | None
    usage: MessageUsage
    # ours
    system_fingerprint: str
    warnings: list[str]  # what was asked for and has no effect
    seed: NotRequired[int]
    weight_version: NotRequired[int]
    token_ids: NotRequired[list[int] | None]
    prompt_token_ids: NotRequired[list[int] | None]
    stop_token_id: NotRequired[int]
    logprobs: NotRequired[ChatLogprobs]
    perf_metrics: NotRequired[dict[str, int | float | str]]


class MessageEvent(TypedDict, total=False):
    """One event of a stream. Which fields it has depends on its type."""

    type: str
    message: MessageOfAssistant
    index: int
    content_block: BlockOut
    delta: dict[str, Any]
    usage: MessageUsage
    perf_metrics: dict[str, int | float | str]


class MessageTokensCount(TypedDict):
    input_tokens: int


class MessagesErrorDetails(TypedDict):
    error_code: str


class MessagesErrorBody(TypedDict):
    type: str
    message: str
    details: NotRequired[MessagesErrorDetails]  # where Anthropic's client looks for the code
    param: str | None
    code: str | None


class MessagesError(TypedDict):
    """Anthropic's shape of an error, with the field and the code of ours."""

    type: Literal["error"]
    error: MessagesErrorBody


class MessagesModel(TypedDict):
    """A served model as Anthropic's clients list it."""

    type: Literal["model"]
    id: str
    display_name: str
    created_at: str  # RFC 3339
    lifecycle: Literal["active"]
    max_input_tokens: int | None  # None: it is not loaded
    max_tokens: int | None


class MessagesModelList(TypedDict):
    data: list[MessagesModel]
    first_id: str | None
    last_id: str | None
    has_more: bool
