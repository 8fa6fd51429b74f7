"""The blocks of a message in Anthropic's API, as clients send them: texts, thoughts, calls and their results."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from myserve.wire.base import WireModel

__all__ = [
    "Block",
    "TextBlock",
    "ThinkingBlock",
    "ToolResultBlock",
    "ToolUseBlock",
    "UnservedBlock",
    "text_of_blocks",
]

# Blocks of tools that run at a provider, and thoughts that only the provider reads: they are left out with a word.
UNSERVED_BLOCKS = frozenset(
    {
        *("redacted_thinking", "server_tool_use", "web_search_tool_result", "web_fetch_tool_result"),
        *(
            "code_execution_tool_result",
            "bash_code_execution_tool_result",
            "text_editor_code_execution_tool_result",
        ),
        *("tool_search_tool_result", "container_upload", "mcp_tool_use", "mcp_tool_result", "compaction"),
    }
)
_HINTS = frozenset({"cache_control", "citations", "caller", "toolset_name"})


class TextBlock(WireModel):
    HINTS: ClassVar[frozenset[str]] = _HINTS

    type: Literal["text"]
    text: str


Texts = str | Annotated[tuple[TextBlock, ...], Field(fail_fast=True)]


def text_of_blocks(content: str | tuple[TextBlock, ...] | None) -> str:
    """Return content as one string; blocks are joined with nothing between: no character is invented.

    >>> text_of_blocks((TextBlock(type="text", text="a"), TextBlock(type="text", text="b")))
    'ab'
    """
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(block.text for block in content)


class ThinkingBlock(WireModel):
    """A thought of an earlier turn, and this server's checksum of it."""

    HINTS: ClassVar[frozenset[str]] = _HINTS

    type: Literal["thinking"]
    thinking: str
    signature: str


class ToolUseBlock(WireModel):
    """A call by an earlier turn."""

    HINTS: ClassVar[frozenset[str]] = _HINTS

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


class ToolResultBlock(WireModel):
    """A call's result."""

    HINTS: ClassVar[frozenset[str]] = _HINTS

    type: Literal["tool_result"]
    tool_use_id: str
    content: Texts | None = None
    is_error: bool | None = None


class UnservedBlock(WireModel):
    """A block of a provider's own; it is left out, and the answer says so.

    >>> UnservedBlock(type="image")
    Traceback (most recent call last):
    ...
    pydantic_core._pydantic_core.ValidationError: 1 validation error for UnservedBlock
      Value error, blocks of type 'image' are not supported; send text, thinking, tool_use or tool_result ...
    """

    type: str

    @model_validator(mode="after")
    def _is_known(self) -> UnservedBlock:
        if self.type not in UNSERVED_BLOCKS:
            raise ValueError(
                f"blocks of type {self.type[:80]!r} are not supported; send text, thinking, tool_use or tool_result"
            )
        return self


_SERVED = frozenset({"text", "thinking", "tool_use", "tool_result"})


def _kind(value: Any) -> str:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return kind if isinstance(kind, str) and kind in _SERVED else "other"


Block = Annotated[
    Annotated[TextBlock, Tag("text")]
    | Annotated[ThinkingBlock, Tag("thinking")]
    | Annotated[ToolUseBlock, Tag("tool_use")]
    | Annotated[ToolResultBlock, Tag("tool_result")]
    | Annotated[UnservedBlock, Tag("other")],
    Discriminator(_kind),
]
