"""The body of a Responses request, as OpenAI types it, with the extensions of `GenerationRequest`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from myserve.errors import RequestError
from myserve.wire.base import Integer, WireModel
from myserve.wire.chat import ReasoningEffort
from myserve.wire.fields import MAX_MESSAGES, MAX_TOOLS, GenerationRequest
from myserve.wire.peers import REFUSED, Refused
from myserve.wire.responses_api.items import InputItem
from myserve.wire.responses_api.tools import ChosenTool, ResponseTool
from myserve.wire.structured import Schema

__all__ = ["ReasoningConfig", "ResponseRequest", "TextConfig", "TextFormat"]

ENCRYPTED_REASONING = "reasoning.encrypted_content"
TEXT_LOGPROBS = "message.output_text.logprobs"
# the others are about tools and kinds of content that are not served, and ask for nothing here
Include = Literal[
    "message.output_text.logprobs",
    "reasoning.encrypted_content",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
]


class TextFormat(WireModel):
    """The form of the answer's text.

    >>> TextFormat(type="json_schema")
    Traceback (most recent call last):
    ...
    pydantic_core._pydantic_core.ValidationError: 1 validation error for TextFormat
      Value error, a format of type 'json_schema' needs the field 'schema' ...
    """

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: Annotated[Schema | None, Field(alias="schema")] = None
    strict: bool | None = None

    @model_validator(mode="after")
    def _is_complete(self) -> TextFormat:
        if self.type == "json_schema" and self.schema_ is None:
            raise ValueError("a format of type 'json_schema' needs the field 'schema'")
        return self


class TextConfig(WireModel):
    format: TextFormat | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class ReasoningConfig(WireModel):
    HINTS: ClassVar[frozenset[str]] = frozenset({"mode", "context"})

    effort: ReasoningEffort | None = None
    summary: Literal["auto", "concise", "detailed", "none"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None


class ResponseRequest(GenerationRequest):
    """`POST /v1/responses`.

    >>> ResponseRequest(model="m", input="hi").input
    'hi'
    """

    REFUSED: ClassVar[Mapping[str, Refused]] = {
        **REFUSED,
        "conversation": Refused((), "previous_response_id"),
        "messages": Refused((), "input"),
        "prompt": Refused((), "input and instructions"),
        "moderation": Refused(),
        "reasoning_effort": Refused((), "reasoning.effort"),
    }
    HINTS: ClassVar[frozenset[str]] = frozenset({"background_options", "context_management"})

    input: str | Annotated[tuple[InputItem, ...], Field(fail_fast=True, max_length=MAX_MESSAGES)] | None = (
        None
    )
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    background: bool | None = None
    include: Annotated[tuple[Include, ...], Field(fail_fast=True, max_length=16)] | None = None
    max_output_tokens: Annotated[Integer, Field(ge=1)] | None = None
    max_tool_calls: Annotated[Integer, Field(ge=1)] | None = None
    metadata: dict[str, str] | None = None
    text: TextConfig | None = None
    reasoning: ReasoningConfig | None = None
    tools: Annotated[tuple[ResponseTool, ...], Field(fail_fast=True, max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ChosenTool | None = None
    parallel_tool_calls: bool | None = None
    truncation: Literal["auto", "disabled"] | None = None
    service_tier: str | None = None
    # ours, as on the chat route
    logprobs: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    thinking_token_budget: Integer | None = None
    include_reasoning: bool | None = None

    @property
    def includes(self) -> frozenset[str]:
        """Return what is to be in the answer beside the usual."""
        return frozenset(self.include or ())

    @property
    def shows_logprobs(self) -> bool:
        """Return whether the text's parts have their logprobs."""
        return TEXT_LOGPROBS in self.includes or bool(self.top_logprobs)

    @property
    def is_stored(self) -> bool:
        """Return whether the answer can be asked for later: by default it can, as at OpenAI."""
        return self.store is not False

    def check(self) -> None:
        """Raise RequestError for what no field alone is wrong about."""
        super().check()
        if self.n not in (None, 1):
            raise RequestError(f"n must be 1 on this route, got {self.n}; send several requests", param="n")
        if self.max_tokens is not None:
            raise RequestError("max_tokens is max_output_tokens on this route", param="max_tokens")
        if not self.input and self.previous_response_id is None:
            raise RequestError(
                "input is missing: send a text, or a list of items",
                param="input",
                code="missing_required_parameter",
            )
        if self.background and not self.is_stored:
            raise RequestError(
                "background needs store: there is no other way to the answer", param="background"
            )
