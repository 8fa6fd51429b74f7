"""A tokenizer that brings a response template of transformers says itself how its model writes thoughts and calls.

It is used where the chat template shows no form that we know. What it opens and closes by literals is read; what it has
by patterns is not, nor anything where transformers has no such templates.
"""

from __future__ import annotations

from functools import partial
from importlib import import_module
from typing import Any

from myserve.server.parsing.tool_styles import Region, ToolStyle, object_style

__all__ = ["response_styles"]

NAME = "response_template"


def response_styles(tokenizer: Any) -> tuple[ToolStyle | None, tuple[str, str] | None]:
    """Return the form of calls and the marks of thoughts of a response template; None for what it lacks."""
    spec = getattr(tokenizer, "response_template", None)
    if not isinstance(spec, dict):
        return None, None
    try:
        parsing = import_module("transformers.utils.chat_parsing.response_templates")
        contents = import_module("transformers.utils.chat_parsing.content_parsers")
        fields = parsing.load_response_template(spec).fields
    except (ImportError, ValueError):
        return None, None
    calls = _marks(fields.get("tool_calls"))
    style = None if calls is None else _style(fields["tool_calls"], *calls, contents)
    return style, _marks(fields.get("thinking"))


def _marks(field: Any) -> tuple[str, str] | None:
    if field is None or not field.open_literals or not field.close_literals:
        return None
    return field.open_literals[0], field.close_literals[0]


def _style(field: Any, opens: str, closes: str, contents: Any) -> ToolStyle:
    whole = {"type": "function", "function": "{content}"}
    if field.content == "json" and not field.content_args and field.transform in (None, whole):
        return object_style(NAME, opens, closes)
    return ToolStyle(
        NAME,
        begin=opens,
        head="NAME",
        end=closes,
        between="",
        arguments=Region(partial(contents.process_field, field=field, captures={})),
    )
