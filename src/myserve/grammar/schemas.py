"""JSON schemas in the sense that their validators share: what the compiler reads otherwise is rewritten, or refused.

Validators differ: `\\w`, `\\s` and their like mean ASCII in one and Unicode in another; a date format is checked by the
calendar in one and by its digits in another. A text must satisfy all of them, so each is narrowed to what they share.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from myserve.errors import RequestError

__all__ = ["class_members", "shared_pattern", "shared_schema"]

EXACT = 2**53  # integers up to here are exact as float64, in which the compiler keeps bounds
BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
DATA = ("enum", "const", "default", "examples")  # keywords whose value is no schema

# What every dialect (ECMAScript, Python, Rust, RE2) has in a class, and what any of them has.
_SPACE_IN_ALL = r"\t\n\f\r "
_SPACE_IN_ANY = (
    r"\t-\r\x1C-\x20\u{85}\u{A0}\u{1680}\u{2000}-\u{200A}\u{2028}\u{2029}\u{202F}\u{205F}\u{3000}\u{FEFF}"
)
_INSIDE = {"d": "0-9", "w": "0-9A-Za-z_", "s": _SPACE_IN_ALL}
_OUTSIDE = {"d": r"\p{Nd}", "w": r"\p{L}\p{M}\p{N}\p{Pc}\p{Cf}", "s": _SPACE_IN_ANY}

_YEAR = r"(?:[0-9]{3}[1-9]|[0-9]{2}[1-9]0|[0-9][1-9]00|[1-9]000)"  # no calendar of a programming language has year 0
_LEAP = r"(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)"
_DATE = (
    rf"(?:{_YEAR}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    rf"|02-(?:0[1-9]|1[0-9]|2[0-8]))|{_LEAP}-02-29)"
)
_HOURS = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]"
_TIME = rf"{_HOURS}:[0-5][0-9](?:\.[0-9]{{1,6}})?(?:Z|[+-]{_HOURS})"  # no leap seconds: most have none
# Within the lengths of RFC 1035 and 5321, and no "--", which means something to validators of international names.
_LABEL = "[A-Za-z0-9]{1,30}(?:-[A-Za-z0-9]{1,30})?"
_HOST = rf"(?:{_LABEL}\.){{0,3}}[A-Za-z]{{1,24}}"
_LOCAL = r"[A-Za-z0-9_+-]{1,31}(?:\.[A-Za-z0-9_+-]{1,31})?"
_EMAIL = rf"{_LOCAL}@(?:{_LABEL}\.){{1,3}}[A-Za-z]{{2,24}}"
FORMATS = {
    "date": f"^{_DATE}$",
    "time": f"^{_TIME}$",
    "date-time": f"^{_DATE}T{_TIME}$",
    "email": f"^{_EMAIL}$",
    "hostname": f"^{_HOST}$",
}


def shared_schema(source: str) -> str:
    """Return a JSON schema that admits only what its validators agree on. Raises RequestError for what none can keep.

    >>> shared_schema('{"pattern": "^\\\\\\\\d$"}')
    '{"pattern": "^[0-9]$"}'
    >>> shared_schema('{"maximum": 9007199254740999}')
    Traceback (most recent call last):
    ...
    myserve.errors.RequestError: maximum of 9007199254740999 cannot be kept to: bounds are exact up to 2**53 in size
    """
    schema = json.loads(source)
    _walk(schema)
    return json.dumps(schema, ensure_ascii=False)


def _walk(schema: Any) -> None:
    """Rewrite a schema in place, and those inside it. (Properties may have the names of keywords.)"""
    if not isinstance(schema, dict):
        return
    _check_numbers(schema)
    if isinstance(schema.get("pattern"), str):
        schema["pattern"] = shared_pattern(schema["pattern"])
    if (kind := schema.get("format")) in FORMATS and _is_text(schema):
        _narrow_format(schema, FORMATS[kind])
    for inside in _schemas_inside(schema):
        _walk(inside)


def _is_text(schema: dict[str, Any]) -> bool:
    """Return whether the schema is of strings alone: a format says nothing about other values."""
    return schema.get("type") == "string"


def _narrow_format(schema: dict[str, Any], pattern: str) -> None:
    del schema["format"]
    if "pattern" not in schema:
        schema["pattern"] = pattern
    else:
        schema["allOf"] = [*schema.get("allOf", []), {"type": "string", "pattern": pattern}]


def _check_numbers(schema: dict[str, Any]) -> None:
    for name in BOUNDS:
        value = schema.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) > EXACT:
            raise RequestError(
                f"{name} of {value!r:.80} cannot be kept to: bounds are exact up to 2**53 in size",
                param="grammar",
            )


def _schemas_inside(schema: dict[str, Any]) -> Iterator[Any]:
    for name, value in schema.items():
        if name in DATA:
            continue
        if name in ("properties", "$defs", "definitions", "dependentSchemas"):
            yield from value.values() if isinstance(value, dict) else ()
        elif name == "patternProperties" and isinstance(value, dict):
            yield from value.values()
        elif isinstance(value, list):
            yield from value
        else:
            yield value


def shared_pattern(pattern: str) -> str:
    """Return a regular expression whose classes hold what every dialect has in them.

    Digits, letters and spaces (`\\d`, `\\w`, `\\s`) are those that all agree on. Their complements, and what stands in
    a negated class, are what all agree to be none.

    >>> shared_pattern(r"^\\w+[^\\d]$")
    '^[0-9A-Za-z_]+[^\\\\p{Nd}]$'
    """
    pieces: list[str] = []
    negated: list[bool] = []  # of each open class
    i = 0
    while i < len(pattern):
        character = pattern[i]
        if character == "\\" and i + 1 < len(pattern):
            pieces.append(_class(pattern[i + 1], bool(negated), bool(negated) and negated[-1]))
            i += 2
            continue
        if character == "[":
            if negated:  # to ECMAScript and Python it is a character like any other
                pieces.append("\\[")
            else:
                negated.append(pattern[i + 1 : i + 2] == "^")
                pieces.append("[")
        elif character == "]" and negated:
            negated.pop()
            pieces.append("]")
        else:
            pieces.append(character)
        i += 1
    return "".join(pieces)


def _class(letter: str, in_class: bool, in_negated: bool) -> str:
    if letter.lower() not in _INSIDE:
        return f"\\{letter}"
    members = class_members(letter, is_negated=in_negated)
    # a complement inside of a class is a class in it
    return members if in_class and not members.startswith("^") else f"[{members}]"


def class_members(letter: str, *, is_negated: bool) -> str:
    r"""Return what all dialects have in a class such as `\d`; in a negated class, what any of them has.

    >>> class_members("d", is_negated=False), class_members("D", is_negated=False)
    ('0-9', '^\\p{Nd}')
    """
    is_complement = letter.isupper()
    members = (_OUTSIDE if is_complement != is_negated else _INSIDE)[letter.lower()]
    return f"^{members}" if is_complement else members
