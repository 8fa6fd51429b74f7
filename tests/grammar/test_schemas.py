"""What a schema's grammar admits, its validators admit: character classes, calendars, bounds; or it is refused."""

from __future__ import annotations

import json
import random
import re
from datetime import date, datetime
from typing import Any

import jsonschema_rs
import pytest

from myserve.core.grammar import Grammar
from myserve.errors import RequestError
from myserve.grammar.compiler import Compiler, Vocabulary
from myserve.grammar.schemas import shared_pattern, shared_schema

EOS = 256
COMPILER = Compiler(
    Vocabulary([*(bytes([byte]) for byte in range(256)), b"<eos>"], frozenset([EOS]), (EOS,)),
    lambda text: list(text.encode()),
)
CHARACTERS = [
    *map(chr, range(128)),
    *"éßΩжא٣५Ⅷ²ªµ\u0085\u00a0\u0300\u1680\u180e\u2003\u200b\u200d\u2028\u203f\u3000\ufeff你🦄٠·",
]


def admits(schema: Any, value: Any) -> bool:
    matcher = COMPILER.compile(Grammar.json_schema(schema))
    text = json.dumps(value, ensure_ascii=False).encode()
    return all(matcher.consume_token(byte) for byte in text) and bool(matcher.is_accepting())


@pytest.mark.parametrize(
    "pattern",
    [r"\d", r"\D", r"\w", r"\W", r"\s", r"\S", r"[^\d]", r"[^\w]", r"[^\s]", r"[^\D]", r"[^\W]", r"[^\S]", r"[\w-]",
     r"[\W\d]", r"[\sx]", r"[^\w\s]", r"[^\Wa]", r"[x[\d]", r"\\d", r"\.", r"[a\]\d]"],
)  # fmt: skip
def test_a_class_admits_what_every_validator_does(pattern: str) -> None:
    whole = f"^{pattern}$"
    schema = {"type": "string", "pattern": whole}
    judge = jsonschema_rs.validator_for(schema)
    admitted = [text for text in (*CHARACTERS, r"\d") if admits(schema, text)]
    assert admitted, "nothing is admitted"
    for text in admitted:
        verdicts = (judge.is_valid(text), *(re.search(whole, text, flags) for flags in (0, re.ASCII)))
        assert all(verdicts), (pattern, text, verdicts)
    # as much as can be: of ASCII, all that they agree on (but for control characters, which JSON escapes)
    for text in map(chr, range(32, 127)):
        if judge.is_valid(text) and re.search(whole, text) and re.search(whole, text, re.ASCII):
            assert text in admitted, (pattern, text)


def test_dates_are_of_the_calendar() -> None:
    schema = {"type": "string", "format": "date"}
    months = [
        f"{year:04}-{month:02}" for year in (1, 1900, 2000, 2023, 2024, 2100, 9999) for month in range(14)
    ]
    for text in [f"{month}-{day:02}" for month in months for day in (0, 1, 28, 29, 30, 31, 32)]:
        assert admits(schema, text) == _is_date(text), text
    assert not admits(schema, "0000-01-01")
    assert not admits(schema, "0000-02-29")


def _is_date(text: str) -> bool:
    try:
        date.fromisoformat(text)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize(
    ("text", "is_time"),
    [
        ("23:59:59Z", True),
        ("00:00:00.000001+14:00", True),
        ("24:00:00Z", False),
        ("23:60:00Z", False),
        ("12:00:60Z", False),
        ("23:59:60Z", False),  # a leap second: RFC 3339 has it, no calendar of a programming language does
        ("12:00:00", False),
        ("12:00:00+24:00", False),
    ],
)
def test_times_and_moments(text: str, is_time: bool) -> None:
    assert admits({"type": "string", "format": "time"}, text) == is_time
    moment = f"2024-02-29T{text}"
    schema = {"type": "string", "format": "date-time"}
    assert admits(schema, moment) == is_time
    assert not admits(schema, f"2023-02-29T{text}")
    if is_time:
        assert datetime.fromisoformat(moment) is not None
        assert jsonschema_rs.validator_for(schema, validate_formats=True).is_valid(moment)


def test_a_format_beside_a_pattern_holds_both() -> None:
    schema = {"type": "string", "format": "date", "pattern": "^20"}
    assert admits(schema, "2024-02-29")
    assert not admits(schema, "1999-01-01") and not admits(schema, "2023-02-29")


@pytest.mark.parametrize("name", ["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"])
@pytest.mark.parametrize("value", [2**53 + 1, -(2**53) - 1, 10**30, 1e300])
def test_a_bound_that_cannot_be_kept_is_refused(name: str, value: float) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer", name: value}}}
    with pytest.raises(RequestError, match=name):
        shared_schema(json.dumps(schema))
    shared_schema(json.dumps({"type": "integer", name: 2**53}))


def test_what_is_no_schema_is_left_alone() -> None:
    """Names of properties, and data, may look like keywords."""
    left = {
        "properties": {"pattern": {"type": "string"}, "maximum": {"const": {"maximum": 2**60}}},
        "enum": [{"pattern": "\\d", "maximum": 2**60}],
        "default": {"format": "date", "type": "string"},
    }
    assert json.loads(shared_schema(json.dumps(left))) == left


def test_every_schema_inside_is_walked() -> None:
    inner = {"type": "string", "pattern": "^\\d$"}
    places: list[Any] = [
        {"properties": {"properties": inner}},
        {"items": inner},
        {"prefixItems": [inner]},
        {"anyOf": [{"allOf": [inner]}]},
        {"$defs": {"x": inner}, "$ref": "#/$defs/x"},
        {"patternProperties": {"a": inner}},
        {"additionalProperties": inner},
    ]
    for schema in places:
        assert shared_pattern("^\\d$") in json.loads(json.dumps(shared_schema(json.dumps(schema))))


@pytest.mark.parametrize("pattern", ["a\\b", "^(?=a)b", "(?!x)y"])
def test_look_around_is_refused_and_named(pattern: str) -> None:
    with pytest.raises(RequestError, match="look"):
        COMPILER.compile(Grammar.json_schema({"type": "string", "pattern": pattern}))


def random_text(schema: Any, seed: int) -> str:
    """A text of the grammar by a random walk over bytes, closed when it gets long."""
    rng, matcher, text = random.Random(seed), COMPILER.compile(Grammar.json_schema(schema)), b""
    while not matcher.is_stopped():
        mask = matcher.compute_bitmask()
        if len(text) > 120 and matcher.is_accepting():
            break
        token = rng.choice([i for i in range(EOS + 1) if mask[i >> 3] >> (i & 7) & 1])
        if token == EOS:
            break
        assert matcher.consume_token(token)
        text += bytes([token])
    return text.decode()


@pytest.mark.parametrize(
    "kind", ["date", "time", "date-time", "email", "hostname", "ipv4", "ipv6", "uuid", "duration"]
)
def test_whatever_a_format_admits_its_validator_does(kind: str) -> None:
    schema = {"type": "string", "format": kind}
    judge = jsonschema_rs.validator_for(schema, validate_formats=True)
    for seed in range(60):
        value = json.loads(random_text(schema, seed))
        assert judge.is_valid(value), (kind, value)


def test_ordinary_addresses_are_admitted() -> None:
    for text in ("a@b.co", "first.last+tag@mail-01.example.org"):
        assert admits({"type": "string", "format": "email"}, text)
    for text in ("localhost", "api.example-site.com"):
        assert admits({"type": "string", "format": "hostname"}, text)
