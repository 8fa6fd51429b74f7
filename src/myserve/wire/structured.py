"""The form of an answer: OpenAI's `response_format` and tools, vLLM's `structured_outputs`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from myserve.wire.base import WireModel

__all__ = [
    "Choices",
    "Function",
    "NamedTool",
    "ResponseFormat",
    "Schema",
    "StructuredOutputs",
    "Tool",
    "ToolChoice",
]

Schema = dict[str, Any] | bool
MAX_CHOICES = 20_000
Choices = Annotated[tuple[str, ...], Field(fail_fast=True, min_length=1, max_length=MAX_CHOICES)]


class JsonSchema(WireModel):
    """OpenAI's `response_format.json_schema`. `strict` has no effect: every schema is kept to."""

    schema_: Annotated[Schema, Field(alias="schema")]
    name: str | None = None
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(WireModel):
    """`{"type": "json_schema", "json_schema": {"schema": {...}}}` and its kin.

    >>> ResponseFormat(type="json_schema")
    Traceback (most recent call last):
    ...
    pydantic_core._pydantic_core.ValidationError: 1 validation error for ResponseFormat
      Value error, a response_format of type 'json_schema' needs the field 'json_schema' ...
    """

    type: Literal["text", "json_object", "json_schema", "regex", "grammar", "structural_tag"]
    json_schema: JsonSchema | None = None
    # beside json_object (Fireworks, llama.cpp) or json_schema (SGLang)
    schema_: Annotated[Schema | None, Field(alias="schema")] = None
    regex: str | None = None
    grammar: str | None = None
    # of a structural tag, in its newer form or in its older one
    format: dict[str, Any] | None = None
    structures: list[dict[str, Any]] | None = None
    triggers: list[str] | None = None

    @model_validator(mode="after")
    def _is_complete(self) -> ResponseFormat:
        if self.schema_ is not None and (self.json_schema is not None or not self.type.startswith("json_")):
            raise ValueError(
                "'schema' stands in a response_format of type 'json_object', or in 'json_schema'"
            )
        wanted = "schema_" if self.schema_ is not None else self.type
        if self.type in ("json_schema", "regex", "grammar") and getattr(self, wanted) is None:
            raise ValueError(f"a response_format of type {self.type!r} needs the field {self.type!r}")
        if self.type == "structural_tag" and self.format is None and self.structures is None:
            raise ValueError("a response_format of type 'structural_tag' needs the field 'format'")
        return self


class StructuredOutputs(WireModel):
    """vLLM's `structured_outputs`: one of these."""

    json_: Annotated[Schema | str | None, Field(alias="json")] = None
    json_object: bool | None = None
    regex: str | None = None
    choice: Choices | None = None
    grammar: str | None = None
    structural_tag: dict[str, Any] | str | None = None


class Function(WireModel):
    """A tool's name, its description, and the JSON schema of its arguments."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: Schema | None = None
    strict: bool | None = None


class Tool(WireModel):
    type: Literal["function"]
    function: Function


class FunctionName(WireModel):
    name: str


class NamedTool(WireModel):
    """`tool_choice` that names the one tool to be called."""

    type: Literal["function"]
    function: FunctionName


ToolChoice = Literal["none", "auto", "required"] | NamedTool
