"""The tools of a Responses request: functions, custom tools, groups of them, and a provider's own."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag

from myserve.wire.base import WireModel
from myserve.wire.fields import MAX_TOOLS
from myserve.wire.structured import Schema

__all__ = ["ChosenTool", "CustomTool", "FunctionTool", "NamespaceTool", "ProviderTool", "ResponseTool"]

ToolName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
_HINTS = frozenset({"defer_loading", "allowed_callers", "output_schema", "async"})


class FunctionTool(WireModel):
    """A function and the schema of its arguments."""

    HINTS: ClassVar[frozenset[str]] = _HINTS

    type: Literal["function"]
    name: ToolName
    description: str | None = None
    parameters: Schema | None = None
    strict: bool | None = None


class CustomFormat(WireModel):
    """The form of a custom tool's input: any text, a regular expression's, or a grammar's."""

    type: Literal["text", "grammar"]
    syntax: Literal["lark", "regex"] | None = None
    definition: str | None = None


class CustomTool(WireModel):
    """A tool whose input is a text."""

    HINTS: ClassVar[frozenset[str]] = _HINTS

    type: Literal["custom"]
    name: ToolName
    description: str | None = None
    format: CustomFormat | None = None


class NamespaceTool(WireModel):
    """A group of tools."""

    type: Literal["namespace"]
    name: ToolName
    description: str | None = None
    tools: Annotated[
        tuple[Annotated[FunctionTool | CustomTool, Discriminator("type")], ...],
        Field(fail_fast=True, max_length=MAX_TOOLS),
    ]


class ProviderTool(WireModel):
    """A tool that runs at a provider. It is left out, whatever it is, and the answer says so."""

    type: str
    name: str | None = None


_KINDS = frozenset({"function", "custom", "namespace"})


def _kind(value: Any) -> str:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return kind if isinstance(kind, str) and kind in _KINDS else "other"


ResponseTool = Annotated[
    Annotated[FunctionTool, Tag("function")]
    | Annotated[CustomTool, Tag("custom")]
    | Annotated[NamespaceTool, Tag("namespace")]
    | Annotated[ProviderTool, Tag("other")],
    Discriminator(_kind),
]


class ChosenTool(WireModel):
    """`tool_choice` as an object: one tool, or those that are allowed."""

    HINTS: ClassVar[frozenset[str]] = frozenset({"server_label"})

    type: str
    name: str | None = None
    namespace: str | None = None
    mode: Literal["auto", "required"] | None = None
    tools: Annotated[tuple[dict[str, Any], ...], Field(fail_fast=True, max_length=MAX_TOOLS)] | None = None
