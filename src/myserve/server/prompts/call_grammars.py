"""The grammar of a model's calls: each in its family's form, with arguments that fit their tool's schema."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from myserve.errors import RequestError
from myserve.grammar.lark.expressions import UnreadableError
from myserve.grammar.lark.reader import LarkGrammar
from myserve.grammar.lark.rules import written_in_json, written_up_to
from myserve.server.parsing.arguments import kinds_of
from myserve.server.parsing.tool_styles import Elements, Quoted, Region, ToolStyle
from myserve.wire.structured import Schema, Tool

__all__ = ["Forms", "calls_in_text", "forced_calls", "rules_of_calls", "why_no_form"]

# By the name of a tool with one parameter, a text: the grammar of that.
Forms = Mapping[str, LarkGrammar]

NO_ARGUMENTS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
# What may stand beside empty properties in a schema that admits no others.
_OF_NO_PROPERTIES = frozenset(
    {"$schema", "additionalProperties", "description", "properties", "required", "title", "type"}
)
TEXT = "TEXT: /(.|\\n)*/"


def forced_calls(style: ToolStyle, *, one: bool) -> str:
    """Return the expression of one call, or of one and more."""
    calls = "call" if one or style.lead else f"call ({_spelled(style, style.between)} call)*"
    return _joined(
        _lead(style), _spelled(style, style.opening + style.bracket), calls, _spelled(style, style.closing)
    )


def calls_in_text(tools: Sequence[Tool], style: ToolStyle, *, one: bool, forms: Forms | None = None) -> str:
    """Return the grammar of free text, in which whatever begins like a call goes on as one. Raises RequestError."""
    if style.lead:
        return _in_messages(tools, style, forms)
    entry = style.opening or style.begin
    if not entry:
        raise RequestError(
            f"this model writes calls in the style {style.name}, in which a call cannot be told from text as it "
            "begins: strict tools and parallel_tool_calls false need tool_choice 'required', or a tool's name",
            param="tools",
        )
    mark, rest = entry.strip(), entry[len(entry.rstrip()) :]
    if style.opening:
        calls = "call" if one else f"call ({_spelled(style, style.between)} call)*"
        calls = _joined(_spelled(style, rest + style.bracket), calls, _spelled(style, style.closing))
        rules = rules_of_calls(tools, style, style.begin, forms)
    else:
        calls, rules = "call", rules_of_calls(tools, style, rest, forms)
    return (
        f"start: {f'TEXT | opened {calls}' if one else f'(opened {calls})* TEXT'}\n"
        f"{_up_to('opened', mark, style)}\n{rules}" + ("" if TEXT in rules else f"\n{TEXT}")
    )


def _in_messages(tools: Sequence[Tool], style: ToolStyle, forms: Forms | None) -> str:
    """Return the grammar of messages in channels: what is said before a call, then the call or the answer."""
    lead, message = _lead(style), _spelled(style, "<|message|>")
    said, final = (_spelled(style, f"<|channel|>{name}") for name in ("commentary", "final"))
    return (
        f"start: said* (answer | {lead} call)\n"
        f"said: {lead} {said} {message} said_text\n{_up_to('said_text', '<|end|>', style)}\n"
        f"answer: {lead} {final} {message} TEXT\n"
        f"{rules_of_calls(tools, style, forms=forms)}\n{TEXT}"
    )


def _lead(style: ToolStyle) -> str:
    return f"({_spelled(style, style.lead)})?" if style.lead else ""


def rules_of_calls(
    tools: Sequence[Tool], style: ToolStyle, begin: str | None = None, forms: Forms | None = None
) -> str:
    """Return Lark's rules of one call, of any of these tools. `begin`: what stands before it, if not the style's."""
    begin = style.begin if begin is None else begin
    lines = ["call: " + " | ".join(f"call_{i}" for i in range(len(tools)))]
    for i, tool in enumerate(tools):
        header = begin + style.header(tool.function.name)[len(style.begin) :]
        schema = _of_object(tool.function.parameters)
        form = (forms or {}).get(tool.function.name)
        rules = [*_arguments(f"arguments_{i}", schema, style, form)]
        own = f"arguments_{i}" if rules else ""
        lines.append(f"call_{i}: {_joined(_spelled(style, header), own, _spelled(style, style.footer))}")
        lines += rules
    if style.arguments is not None and any("TEXT" in line for line in lines):
        lines.append(TEXT)
    return "\n".join(dict.fromkeys(lines))


def why_no_form(form: LarkGrammar, style: ToolStyle) -> str | None:
    """Return why a text cannot be kept to a grammar in a style; None: it can, or no call can be kept to anything."""
    if isinstance(style.arguments, Region):
        return None
    try:
        list(_arguments("arguments", {"properties": {"said": {"type": "string"}}}, style, form))
    except UnreadableError as reason:
        return str(reason)
    return None


def _arguments(
    name: str, schema: dict[str, Any], style: ToolStyle, form_of_text: LarkGrammar | None
) -> Iterator[str]:
    match style.arguments:
        case None if form_of_text is not None:
            (key,) = schema["properties"]
            opened, closed = (json.dumps(mark) for mark in (f'{{{json.dumps(key)}: "', '"}'))
            yield f"{name}: {opened} said_{name} {closed}"
            yield from written_in_json(form_of_text, f"said_{name}")
        case None:
            yield f"{name}: %json {_json(schema)}"
        case Elements() as form:
            yield from _elements(name, schema, style, form, form_of_text)
        case Region():
            raise RequestError(
                "this model's tokenizer reads calls by a response template, which says how they are read and not how "
                "they are written: no call can be forced or kept to; send tool_choice 'auto' and no strict tools",
                param="tools",
            )
        case Quoted() as form:
            yield from _quoted(name, schema, style, form, form_of_text)


def _elements(
    name: str, schema: dict[str, Any], style: ToolStyle, form: Elements, form_of_text: LarkGrammar | None
) -> Iterator[str]:
    parts = []
    for k, (key, value, is_required) in enumerate(_properties(schema, style)):
        parts.append(f"{name}_{k}{'' if is_required else '?'}")
        kind = "true" if _is_text(value) else "false"
        opened = _spelled(style, form.open.replace("KEY", key).replace("KIND", kind))
        yield f"{name}_{k}: {opened} value_{name}_{k}"
        yield from _value(f"value_{name}_{k}", value, style, form.close, form_of_text)
    if parts:
        yield f"{name}: {' '.join(parts)}"


def _quoted(
    name: str, schema: dict[str, Any], style: ToolStyle, form: Quoted, form_of_text: LarkGrammar | None
) -> Iterator[str]:
    fields = list(_properties(schema, style))
    for k, (key, value, is_required) in enumerate(fields):
        # first_k: none of the fields before is there; more_k: one is
        for state, comma in (("first", ""), ("more", ",")):
            field = _joined(
                json.dumps(f"{comma}{key}:", ensure_ascii=False), f"value_{name}_{k} more_{name}_{k + 1}"
            )
            yield f"{state}_{name}_{k}: {field}" + ("" if is_required else f" | {state}_{name}_{k + 1}")
        if _is_text(value):
            yield f"value_{name}_{k}: {_spelled(style, form.mark)} string_{name}_{k}"
            yield from _value(f"string_{name}_{k}", value, style, form.mark, form_of_text)
        else:
            yield f"value_{name}_{k}: %json {_json(value)}"
    yield f'{name}: "{{" first_{name}_0 "}}"'
    yield f'first_{name}_{len(fields)}: ""'
    yield f'more_{name}_{len(fields)}: ""'


def _value(
    name: str, schema: dict[str, Any], style: ToolStyle, close: str, form_of_text: LarkGrammar | None
) -> Iterator[str]:
    """Return the rule of a value and of the mark behind it."""
    if form_of_text is not None:
        yield from written_up_to(form_of_text, name, close.strip(), _spelled_pieces(style, close))
    elif not _is_text(schema):
        yield f"json_{name}: %json {_json(schema)}"
        yield f"{name}: json_{name} {_spelled(style, close)}"
    elif schema.get("enum"):
        options = " | ".join(json.dumps(str(option), ensure_ascii=False) for option in schema["enum"])
        yield f"{name}: ({options}) {_spelled(style, close)}"
    else:
        yield _up_to(name, close, style)


def _is_text(schema: dict[str, Any]) -> bool:
    """Return whether a value stands as it is: it may be a string, or anything."""
    kinds = kinds_of(schema)
    return not kinds or "string" in kinds


def _properties(schema: dict[str, Any], style: ToolStyle) -> Iterator[tuple[str, dict[str, Any], bool]]:
    """Yield each parameter, its schema, and whether it is required. Raises RequestError where they are not listed."""
    properties, required = schema.get("properties"), schema.get("required") or ()
    if not isinstance(properties, dict) or any(
        name in schema for name in ("anyOf", "oneOf", "allOf", "$ref")
    ):
        raise RequestError(
            f"this model writes calls in the style {style.name}, parameter by parameter: a tool that must be kept to "
            "needs its parameters in 'properties', without anyOf, oneOf, allOf or $ref around them",
            param="tools",
        )
    shared: dict[str, Any] = {name: schema[name] for name in ("$defs", "definitions") if name in schema}
    for key, value in properties.items():
        yield key, shared | (value if isinstance(value, dict) else {}), key in required


def _up_to(name: str, mark: str, style: ToolStyle) -> str:
    """Return the rule of any text up to a mark, which then cannot be read as text."""
    begins, *rest = _spelled_pieces(style, mark)
    if begins.startswith("<["):
        return f"{name}: TEXT {' '.join((begins, *rest))}"  # no text holds a special token
    if rest:
        return f"{name}: {name.upper()} {' '.join(rest)}\n{name.upper()}: /(.|\\n)*/ {begins}"
    # a lazy lexeme ends at the first
    return f"{name}[lazy]: TEXT {begins}"


def _spelled(style: ToolStyle, text: str) -> str:
    """Return text as Lark has it: special tokens by their ids, for no string matches one; nothing for none."""
    return " ".join(_spelled_pieces(style, text))


def _spelled_pieces(style: ToolStyle, text: str) -> list[str]:
    longest_first = sorted(style.special, key=len, reverse=True)
    pieces = re.split(f"({'|'.join(map(re.escape, longest_first))})", text) if longest_first else [text]
    return [
        f"<[{style.special[piece]}]>" if piece in style.special else json.dumps(piece, ensure_ascii=False)
        for piece in pieces
        if piece
    ]


def _joined(*parts: str) -> str:
    return " ".join(part for part in parts if part)


def _json(schema: dict[str, Any]) -> str:
    """Return the schema of arguments on one line, as models are trained to write them."""
    return json.dumps({"x-guidance": {"whitespace_pattern": " "}, **schema}, ensure_ascii=False)


def _of_object(parameters: Schema | None) -> dict[str, Any]:
    """Return the schema of a tool's arguments, which are an object whatever the tool says of them.

    Without parameters, or with none in them, the list is empty, as OpenAI has it: the one object is `{}`.

    >>> _of_object({"properties": {"a": {"type": "integer"}}})
    {'properties': {'a': {'type': 'integer'}}, 'type': 'object'}
    >>> _of_object({"type": "object", "properties": {}})["additionalProperties"]
    False
    """
    if parameters is None or parameters == {}:
        return NO_ARGUMENTS
    schema = dict(parameters) if isinstance(parameters, dict) else {}
    kinds = schema.get("type", "object")
    if kinds != "object" and not (isinstance(kinds, list) and "object" in kinds):
        raise RequestError(f"a tool's parameters must be of type 'object', got {kinds!r:.80}", param="tools")
    lists_none = (
        schema.get("properties") == {}
        and not schema.keys() - _OF_NO_PROPERTIES
        and not schema.get("additionalProperties")
    )
    return NO_ARGUMENTS if lists_none else schema | {"type": "object"}
