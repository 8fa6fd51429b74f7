"""The items of a Responses conversation, as clients send them: messages, thoughts, calls and their outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag, TypeAdapter, model_validator

from myserve.wire.base import WireModel, to_json

__all__ = [
    "UNSERVED_ITEMS",
    "CallOutputItem",
    "CustomCallItem",
    "FunctionCallItem",
    "InputItem",
    "ItemPart",
    "MessageItem",
    "ReasoningItem",
    "ReferenceItem",
    "UnservedItem",
    "joined",
    "read_items",
    "write_items",
]

# Items of tools that run at a provider. A conversation that began there may hold them; no model here can use them.
UNSERVED_ITEMS = frozenset(
    {
        *("file_search_call", "web_search_call", "image_generation_call", "code_interpreter_call"),
        *("computer_call", "computer_call_output", "tool_search_call", "tool_search_output"),
        *("local_shell_call", "local_shell_call_output", "shell_call", "shell_call_output"),
        *("apply_patch_call", "apply_patch_call_output", "mcp_list_tools", "mcp_approval_request"),
        *("mcp_approval_response", "mcp_call", "program", "program_output", "additional_tools"),
        *("configuration_update", "compaction", "compaction_trigger"),
    }
)
_TEXTS = ("input_text", "output_text", "text", "reasoning_text", "summary_text")

# what OpenAI's own answers have beside the fields that are read here
_ANSWERED = frozenset({"status", "phase", "caller", "async", "internal_chat_message_metadata_passthrough"})


class ItemPart(WireModel):
    """A piece of an item's content. Text is the only kind that a text-only language model reads.

    >>> ItemPart(type="input_text", text="hi").as_text()
    'hi'
    """

    HINTS: ClassVar[frozenset[str]] = frozenset(
        {"annotations", "logprobs", "detail", "prompt_cache_breakpoint"}
    )

    type: str
    text: str | None = None
    refusal: str | None = None

    @model_validator(mode="after")
    def _is_text(self) -> ItemPart:
        if self.type not in (*_TEXTS, "refusal"):
            raise ValueError(f"content of type {self.type[:80]!r} is not supported; send type 'input_text'")
        name = "refusal" if self.type == "refusal" else "text"
        if getattr(self, name) is None:
            raise ValueError(f"content of type {self.type!r} needs a string in {name!r}")
        return self

    def as_text(self) -> str:
        return self.text or self.refusal or ""


Parts = Annotated[tuple[ItemPart, ...], Field(fail_fast=True)]


def text_of(content: str | tuple[ItemPart, ...] | None) -> str:
    """Return content as one string; parts are joined with nothing between."""
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part.as_text() for part in content)


class MessageItem(WireModel):
    """One message; `type` may be left out.

    >>> MessageItem(role="user", content="hi").text
    'hi'
    """

    HINTS: ClassVar[frozenset[str]] = _ANSWERED

    type: Literal["message"] | None = None
    id: str | None = None
    role: Literal["user", "assistant", "system", "developer"]
    content: str | Parts

    @property
    def text(self) -> str:
        """Return the content as one string."""
        return text_of(self.content)


class ReasoningItem(WireModel):
    """A thought of an earlier turn: its text, or the text as this server sealed it."""

    HINTS: ClassVar[frozenset[str]] = _ANSWERED

    type: Literal["reasoning"]
    id: str | None = None
    summary: Parts | None = None
    content: Parts | None = None
    encrypted_content: str | None = None

    @property
    def text(self) -> str:
        """Return the thought's own text, without its summary."""
        return text_of(self.content)


class FunctionCallItem(WireModel):
    """A call of a function by an earlier turn."""

    HINTS: ClassVar[frozenset[str]] = _ANSWERED

    type: Literal["function_call"]
    id: str | None = None
    call_id: str
    name: str
    namespace: str | None = None
    arguments: str


class CustomCallItem(WireModel):
    """A call of a tool whose input is a text."""

    HINTS: ClassVar[frozenset[str]] = _ANSWERED

    type: Literal["custom_tool_call"]
    id: str | None = None
    call_id: str
    name: str
    namespace: str | None = None
    input: str


class CallOutputItem(WireModel):
    """A call's output, by either kind of call."""

    HINTS: ClassVar[frozenset[str]] = _ANSWERED | {"name", "namespace"}

    type: Literal["function_call_output", "custom_tool_call_output"]
    id: str | None = None
    call_id: str
    output: str | Parts

    @property
    def text(self) -> str:
        """Return the output as one string."""
        return text_of(self.output)


class ReferenceItem(WireModel):
    """An item that the server keeps, by its id."""

    type: Literal["item_reference"] | None = None
    id: str


class UnservedItem(WireModel):
    """An item of a tool that runs at a provider; it is left out, and the answer says so.

    >>> UnservedItem(type="web_search_call").type
    'web_search_call'
    """

    type: str

    @model_validator(mode="after")
    def _is_known(self) -> UnservedItem:
        if self.type not in UNSERVED_ITEMS:
            raise ValueError(
                f"items of type {self.type[:80]!r} are not known; send message, reasoning, function_call, "
                "function_call_output, custom_tool_call, custom_tool_call_output or item_reference"
            )
        return self


_SERVED = {
    "message": "message",
    "reasoning": "reasoning",
    "function_call": "function_call",
    "custom_tool_call": "custom_tool_call",
    "function_call_output": "output",
    "custom_tool_call_output": "output",
    "item_reference": "reference",
}


def _kind(value: Any) -> str:
    """Return which kind of item a value is meant to be: some leave their type out."""
    if not isinstance(value, dict):
        return str(_SERVED.get(getattr(value, "type", None) or "message", "other"))
    kind = value.get("type")
    if kind is None:
        return "message" if "role" in value else "reference" if "id" in value else "message"
    return _SERVED.get(kind, "other") if isinstance(kind, str) else "other"


InputItem = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[ReasoningItem, Tag("reasoning")]
    | Annotated[FunctionCallItem, Tag("function_call")]
    | Annotated[CustomCallItem, Tag("custom_tool_call")]
    | Annotated[CallOutputItem, Tag("output")]
    | Annotated[ReferenceItem, Tag("reference")]
    | Annotated[UnservedItem, Tag("other")],
    Discriminator(_kind),
]

_ITEMS: TypeAdapter[tuple[InputItem, ...]] = TypeAdapter(tuple[InputItem, ...])


def write_items(items: Sequence[InputItem]) -> bytes:
    """Return items as JSON, with the fields that were sent."""
    written = (item.model_dump_json(by_alias=True, exclude_unset=True) for item in items)
    return f"[{','.join(written)}]".encode()


def joined(*lists: bytes) -> bytes:
    """Return lists of JSON as one.

    >>> joined(b"[]", b'[{"a":1}]', b"[2]")
    b'[{"a":1},2]'
    """
    return b"[" + b",".join(each[1:-1] for each in lists if len(each) > 2) + b"]"


def read_items(items: Sequence[Mapping[str, Any]] | bytes) -> tuple[InputItem, ...]:
    """Return items of an answer, or their JSON, as those of a request: they come back so.

    >>> read_items([{"type": "message", "role": "assistant", "content": [], "status": "completed"}])[0].text
    ''
    """
    return _ITEMS.validate_json(items if isinstance(items, bytes) else to_json(items))
