"""What a client sends cannot make a line or a field of the log."""

from __future__ import annotations

import json
import logging
import re
import sys
from typing import Any

import pytest

from myserve.server.observe.logs import JsonLines, TextLines

EVIL = [
    "1 key=root status=200",
    'a"b',
    "a\nERROR myserve: forged",
    "a\r\x1b[2Jb",
    "a\u2028b",
    "a\\nb",
    "",
    "a=b",
    "\x85",
]


def record(message: str = "GET %s", *args: object, **fields: object) -> logging.LogRecord:
    made = logging.LogRecord("myserve.access", logging.INFO, "", 0, message, args, None)
    made.fields = fields
    return made


def fields_of(line: str) -> dict[str, Any]:
    """Read a line as a log collector does: name=value, the value quoted as JSON or without a space."""
    found = re.findall(r' (\w+)=("(?:[^"\\]|\\.)*"|[^\s"=]+)', line)
    return {name: json.loads(value) if value.startswith('"') else value for name, value in found}


@pytest.mark.parametrize("evil", EVIL)
def test_a_field_is_read_back_as_it_was(evil: str) -> None:
    line = TextLines().format(record("GET %s", "/x", request_id=evil, status=404))
    assert fields_of(line) == {"request_id": evil, "status": "404"}
    assert line.isprintable()


@pytest.mark.parametrize("evil", EVIL)
def test_a_message_and_an_exception_stay_theirs(evil: str) -> None:
    made = record("%s failed", evil, status=500)
    try:
        raise ValueError(evil)
    except ValueError:
        made.exc_info = sys.exc_info()
    first, *rest = TextLines().format(made).split("\n")
    assert first.isprintable() and fields_of(first)["status"] == "500"
    assert rest and all(line.startswith("    ") and line.isprintable() for line in rest)


@pytest.mark.parametrize("evil", EVIL)
def test_json_is_one_line_with_every_character(evil: str) -> None:
    line = JsonLines().format(record("%s", evil, request_id=evil))
    assert line.isprintable()
    assert json.loads(line)["message"] == json.loads(line)["request_id"] == evil


def test_plain_values_stay_plain() -> None:
    line = TextLines().format(record("GET %s", "/x", request_id="abc-1", seconds=0.25, model="org/m"))
    assert line.endswith("GET /x request_id=abc-1 seconds=0.25 model=org/m")
