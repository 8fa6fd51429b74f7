"""A Responses answer, its items and its events, as they are sent."""

from __future__ import annotations

from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict

from myserve.wire.responses import ChatLogprobs, ChoiceExtras, TokenLogprob

__all__ = [
    "CustomCallOut",
    "DeletedResponse",
    "FunctionCallOut",
    "InputItemList",
    "InputTokenCount",
    "ItemOut",
    "ItemStatus",
    "MessageOut",
    "OutputText",
    "ReasoningOut",
    "ReasoningText",
    "ResponseEvent",
    "ResponseObject",
    "ResponseStatus",
    "ResponseUsage",
]

ItemStatus = Literal["in_progress", "completed", "incomplete"]
ResponseStatus = Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]


class OutputText(TypedDict):
    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[TokenLogprob]


class MessageOut(TypedDict):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    status: ItemStatus
    content: list[OutputText]


class ReasoningText(TypedDict):
    type: Literal["reasoning_text"]
    text: str


class ReasoningOut(TypedDict):
    id: str
    type: Literal["reasoning"]
    status: ItemStatus
    summary: list[Any]
    content: list[ReasoningText]
    encrypted_content: NotRequired[str]


class FunctionCallOut(TypedDict):
    id: str
    type: Literal["function_call"]
    status: ItemStatus
    call_id: str
    name: str
    namespace: NotRequired[str]
    arguments: str


class CustomCallOut(TypedDict):
    id: str
    type: Literal["custom_tool_call"]
    status: ItemStatus
    call_id: str
    name: str
    namespace: NotRequired[str]
    input: str


ItemOut = MessageOut | ReasoningOut | FunctionCallOut | CustomCallOut


class InputTokensDetails(TypedDict):
    cached_tokens: int
    cache_write_tokens: int


class OutputTokensDetails(TypedDict):
    reasoning_tokens: int


class ResponseUsage(TypedDict):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class ResponseFailure(TypedDict):
    code: str
    message: str


class IncompleteDetails(TypedDict):
    reason: Literal["max_output_tokens"]


class ResponseObject(ChoiceExtras):
    """OpenAI's response, and our fields beside it as on a chat's choice."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: ResponseStatus
    error: ResponseFailure | None
    incomplete_details: IncompleteDetails | None
    model: str
    output: list[ItemOut]
    usage: ResponseUsage | None
    background: bool
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: int | None
    metadata: dict[str, str]
    parallel_tool_calls: bool
    previous_response_id: str | None
    prompt_cache_key: NotRequired[str]
    reasoning: dict[str, Any]
    safety_identifier: NotRequired[str]
    service_tier: str
    store: bool
    temperature: float
    text: dict[str, Any]
    tool_choice: Any
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float
    truncation: Literal["auto", "disabled"]
    user: NotRequired[str]
    # ours
    system_fingerprint: str
    warnings: list[str]  # what was asked for and has no effect
    logprobs: NotRequired[ChatLogprobs]  # of every token that was drawn, as on the chat route
    perf_metrics: NotRequired[dict[str, int | float | str]]


class ResponseEvent(TypedDict, total=False):
    """One event of a stream. Which fields it has depends on its type."""

    type: str
    sequence_number: int
    response: ResponseObject
    output_index: int
    content_index: int
    item_id: str
    item: ItemOut
    part: OutputText | ReasoningText
    delta: str
    text: str
    arguments: str
    input: str
    name: str
    logprobs: list[TokenLogprob]
    code: str | None
    message: str
    param: str | None
    perf_metrics: dict[str, int | float | str]


class DeletedResponse(TypedDict):
    id: str
    object: Literal["response"]
    deleted: Literal[True]


class InputItemList(TypedDict):
    object: Literal["list"]
    data: list[dict[str, Any]]
    first_id: str | None
    last_id: str | None
    has_more: bool


class InputTokenCount(TypedDict):
    object: Literal["response.input_tokens"]
    input_tokens: int
