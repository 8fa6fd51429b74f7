"""Arguments that a model wrote in a form of its own become a JSON object, each value by the schema of its parameter."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from enum import Enum
from typing import Any

from myserve.server.parsing.tool_styles import Elements, Quoted, Region, ToolStyle

__all__ = ["DECODER", "Unread", "kinds_of", "read_calls", "typed"]

Schemas = Mapping[str, Any]  # of each tool's parameters


class Unread(Enum):
    """Why a text is no call."""

    OPEN = "open"  # yet: an argument has begun and not ended
    OTHER = "other"


def read_calls(body: str, style: ToolStyle, schemas: Schemas) -> list[tuple[str, str]] | Unread:
    """Return names and arguments, as JSON, of what stands between a style's `begin` and `end`."""
    if isinstance(style.arguments, Region):
        return _of_region(body, style.arguments, schemas)
    assert style.read_head is not None and style.arguments is not None, "a JSON object is read as it comes"
    head = style.read_head.match(body)
    if head is None or head["name"] not in schemas:
        return Unread.OTHER
    name, rest = head["name"], body[head.end() :]
    properties = _properties(schemas[name])
    if isinstance(style.arguments, Elements):
        arguments = _elements(rest, style.arguments, style.tail.strip(), properties)
    else:
        arguments = _quoted(rest, style.arguments)
    return arguments if isinstance(arguments, Unread) else [(name, arguments)]


def _of_region(body: str, region: Region, schemas: Schemas) -> list[tuple[str, str]] | Unread:
    try:
        told = region.read(body)
    except (ValueError, TypeError, KeyError, RecursionError):
        return Unread.OTHER
    calls = []
    for call in told if isinstance(told, list) else [told]:
        function = call.get("function", call) if isinstance(call, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        arguments = function.get("arguments", {}) if isinstance(function, dict) else None
        if not isinstance(name, str) or name not in schemas or not isinstance(arguments, dict):
            return Unread.OTHER
        calls.append((name, json.dumps(arguments, ensure_ascii=False)))
    return calls or Unread.OTHER


def _properties(parameters: Any) -> Mapping[str, Any]:
    properties = parameters.get("properties") if isinstance(parameters, dict) else None
    return properties if isinstance(properties, dict) else {}


def _elements(text: str, form: Elements, tail: str, properties: Mapping[str, Any]) -> str | Unread:
    at, fields = 0, []
    while (match := form.read.match(text, at)) is not None:
        key, value = match["key"].strip(), match["value"]
        kind = match.groupdict().get("kind")
        if kind is None:
            value = typed(value, properties.get(key))
        else:
            value = json.dumps(value, ensure_ascii=False) if kind == "true" else _json_or_text(value)
        fields.append(f"{json.dumps(key, ensure_ascii=False)}: {value}")
        at = match.end()
    left = text[at:].strip()
    if left.removesuffix(tail).strip() and left != tail:
        opens = re.split("KEY", form.open.strip())[0]
        return Unread.OPEN if left.startswith(opens) else Unread.OTHER
    return "{" + ", ".join(fields) + "}"


def typed(text: str, schema: Any) -> str:
    """Return an argument's text as JSON of a type that its schema admits; a string where none other fits.

    >>> typed("42", {"type": "integer"}), typed("42", {"type": "string"}), typed("x", {"type": "integer"})
    ('42', '"42"', '"x"')
    """
    kinds = kinds_of(schema)
    if kinds == {"string"}:
        return json.dumps(text, ensure_ascii=False)
    bare = text.strip()
    if "boolean" in kinds and bare in ("True", "False"):
        return bare.lower()
    if "null" in kinds and bare == "None":
        return "null"
    value = _json_or_text(text)
    found = _kind(value)
    fits = found in kinds or (found == "integer" and "number" in kinds) or (not kinds and found != "string")
    return value if fits else json.dumps(text, ensure_ascii=False)


def _json_or_text(text: str) -> str:
    try:
        DECODER.decode(text)
    except (ValueError, RecursionError):
        return json.dumps(text, ensure_ascii=False)
    return text.strip()


def _kind(value: str) -> str:
    starts = {"{": "object", "[": "array", '"': "string", "t": "boolean", "f": "boolean", "n": "null"}
    number = "integer" if re.fullmatch(r"-?\d+(\.0+)?", value) else "number"
    return starts.get(value[:1], number)


def kinds_of(schema: Any) -> set[str]:
    """Return the types that a schema admits; none where it does not say.

    >>> sorted(kinds_of({"anyOf": [{"type": "string"}, {"type": ["null", "integer"]}]}))
    ['integer', 'null', 'string']
    """
    if not isinstance(schema, dict):
        return set()
    said = schema.get("type")
    kinds = {said} if isinstance(said, str) else {kind for kind in said or () if isinstance(kind, str)}
    values = [*(schema.get("enum") or ()), *([schema["const"]] if "const" in schema else [])]
    if not kinds and values:
        kinds = {_kind(json.dumps(value)) for value in values}
    for each in ("anyOf", "oneOf"):
        options = [kinds_of(option) for option in schema.get(each) or ()]
        # an option that does not say admits anything
        kinds |= set().union(*options) if all(options) else set()
    return kinds


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


DECODER = json.JSONDecoder(strict=False, parse_constant=_no_constant)


def _quoted(text: str, form: Quoted) -> str | Unread:
    """Return an object with bare names and marked strings as JSON."""
    pieces = text.strip().split(form.mark)
    if len(pieces) % 2 == 0:
        return Unread.OPEN
    # what stands between two marks is a string, as it is; names are bare in the rest
    written = [
        json.dumps(piece, ensure_ascii=False) if place % 2 else _BARE.sub(r'\1"\2"\3', piece)
        for place, piece in enumerate(pieces)
    ]
    whole = "".join(written)
    try:
        value = DECODER.decode(whole)
    except (ValueError, RecursionError):
        return Unread.OTHER
    return whole.strip() if isinstance(value, dict) else Unread.OTHER


_BARE = re.compile(r"([{,]\s*)([^\s\"{}\[\],:][^\"{}\[\],:]*?)(\s*:)")
