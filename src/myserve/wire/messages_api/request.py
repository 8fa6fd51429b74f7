"""The body of a request to Anthropic's Messages API, with the extensions of `GenerationRequest`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from myserve.errors import RequestError
from myserve.wire.base import Integer, WireModel
from myserve.wire.fields import MAX_MESSAGES, MAX_STOP_STRINGS, MAX_TOOLS, GenerationRequest
from myserve.wire.messages_api.blocks import Block, Texts
from myserve.wire.peers import REFUSED, Refused
from myserve.wire.structured import Schema

__all__ = [
    "ClientTool",
    "CountTokensRequest",
    "MessageTurn",
    "MessagesRequest",
    "ServerTool",
    "ThinkingConfig",
]


class MessageTurn(WireModel):
    """One message: a text, or blocks."""

    role: Literal["user", "assistant", "system"]
    content: str | Annotated[tuple[Block, ...], Field(fail_fast=True)]


class ClientTool(WireModel):
    """A tool that the client runs, and the schema of its input."""

    HINTS: ClassVar[frozenset[str]] = frozenset(
        {"cache_control", "allowed_callers", "defer_loading", "eager_input_streaming", "input_examples"}
    )

    type: Literal["custom"] | None = None
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    description: str | None = None
    input_schema: Schema
    strict: bool | None = None


class ServerTool(WireModel):
    """A tool that Anthropic has defined. It is left out, whatever it is, and the answer says so."""

    type: str
    name: str | None = None


def _kind(value: Any) -> str:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return "client" if kind is None or kind == "custom" else "server"


MessagesTool = Annotated[
    Annotated[ClientTool, Tag("client")] | Annotated[ServerTool, Tag("server")], Discriminator(_kind)
]


class MessagesToolChoice(WireModel):
    """The choice of a tool.

    >>> MessagesToolChoice(type="tool")
    Traceback (most recent call last):
    ...
    pydantic_core._pydantic_core.ValidationError: 1 validation error for MessagesToolChoice
      Value error, a choice of type 'tool' needs the field 'name' ...
    """

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None

    @model_validator(mode="after")
    def _is_complete(self) -> MessagesToolChoice:
        if self.type == "tool" and self.name is None:
            raise ValueError("a choice of type 'tool' needs the field 'name'")
        return self


class ThinkingConfig(WireModel):
    """The switch of thinking, and its budget.

    >>> ThinkingConfig(type="enabled")
    Traceback (most recent call last):
    ...
    pydantic_core._pydantic_core.ValidationError: 1 validation error for ThinkingConfig
      Value error, thinking of type 'enabled' needs the field 'budget_tokens' ...
    """

    type: Literal["enabled", "disabled", "adaptive", "between_tools"]
    budget_tokens: Annotated[Integer, Field(ge=0)] | None = None
    display: Literal["summarized", "omitted"] | None = None

    @model_validator(mode="after")
    def _is_complete(self) -> ThinkingConfig:
        if self.type == "enabled" and self.budget_tokens is None:
            raise ValueError("thinking of type 'enabled' needs the field 'budget_tokens'")
        return self


class OutputFormat(WireModel):
    type: Literal["json_schema"]
    schema_: Annotated[Schema, Field(alias="schema")]


class OutputConfig(WireModel):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


class CountTokensRequest(GenerationRequest):
    """`POST /v1/messages/count_tokens`, and all of a Messages request that makes its prompt."""

    REFUSED: ClassVar[Mapping[str, Refused]] = {
        **REFUSED,
        "mcp_servers": Refused(([],), "the tools themselves"),
        "prefill": Refused((), "a last message of the assistant"),
    }
    HINTS: ClassVar[frozenset[str]] = frozenset(
        {"cache_control", "container", "context_management", "diagnostics", "inference_geo", "speed", "betas"}
        | {"user_profile_id", "workspace_id"}
    )

    messages: Annotated[tuple[MessageTurn, ...], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES)]
    system: Texts | None = None
    tools: Annotated[tuple[MessagesTool, ...], Field(fail_fast=True, max_length=MAX_TOOLS)] | None = None
    tool_choice: MessagesToolChoice | None = None
    thinking: ThinkingConfig | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None  # its older name
    stop_sequences: Annotated[tuple[str, ...], Field(fail_fast=True, max_length=MAX_STOP_STRINGS)] | None = (
        None
    )
    service_tier: str | None = None
    thread: dict[str, Any] | None = None
    # ours, as on the chat route
    logprobs: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    thinking_token_budget: Integer | None = None

    def check(self) -> None:
        """Raise RequestError for what no field alone is wrong about."""
        super().check()
        if self.thread is not None:
            # by this code Anthropic's client knows to send all of the conversation, as it does without threads
            raise RequestError(
                "threads are not kept here: send the whole conversation, without thread",
                param="thread",
                code="thread_unsupported_request",
            )
        if self.n not in (None, 1):
            raise RequestError(f"n must be 1 on this route, got {self.n}; send several requests", param="n")
        if self.stop is not None and self.stop_sequences is not None:
            raise RequestError(
                "stop and stop_sequences are one field under two names: send one", param="stop"
            )


class MessagesRequest(CountTokensRequest):
    """`POST /v1/messages`.

    >>> MessagesRequest(model="m", max_tokens=5, messages=(MessageTurn(role="user", content="hi"),)).max_tokens
    5
    """

    max_tokens: Annotated[Integer, Field(ge=1)]
