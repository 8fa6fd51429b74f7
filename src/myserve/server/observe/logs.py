"""One log line a request, with its id and its cost; no prompt or answer is ever logged, and no line can be forged."""

from __future__ import annotations

import json
import logging
import sys
import time
from contextvars import ContextVar
from typing import Any, Literal

__all__ = ["Format", "JsonLines", "RequestFields", "TextLines", "begin", "configure", "note"]

Format = Literal["text", "json"]

_noted: ContextVar[dict[str, Any] | None] = ContextVar("myserve_noted", default=None)


def begin(request_id: str) -> dict[str, Any]:
    """Return new notes for the request that the current task answers; what is logged from it carries them."""
    notes: dict[str, Any] = {"request_id": request_id}
    _noted.set(notes)
    return notes


def note(**fields: Any) -> None:
    """Add fields to the current request's line; without a request, do nothing.

    >>> notes = begin("r-1"); note(prompt_tokens=3); notes
    {'request_id': 'r-1', 'prompt_tokens': 3}
    """
    if (notes := _noted.get()) is not None:
        notes.update(fields)


class RequestFields(logging.Filter):
    """Gives a record the fields of the request that it was logged for."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Set the record's fields; let every record pass."""
        notes = _noted.get() or {}
        own = getattr(record, "fields", None)
        record.fields = {"request_id": notes["request_id"]} if own is None and notes else own or {}
        return True


class JsonLines(logging.Formatter):
    """Formats a record as one JSON object on one line.

    >>> record = logging.LogRecord("myserve.server", logging.INFO, "", 0, "said %d", (2,), None)
    >>> record.fields = {"request_id": "r-1"}; record.created = 0.0
    >>> json.loads(JsonLines().format(record)) == {
    ...     "time": "1970-01-01T00:00:00.000Z", "level": "info", "logger": "myserve.server", "message": "said 2",
    ...     "request_id": "r-1"}
    True
    """

    def format(self, record: logging.LogRecord) -> str:
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {
            "time": f"{when}.{int(record.created * 1000) % 1000:03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class TextLines(logging.Formatter):
    """Formats a record for people: the message, then `name=value`, on one line; a traceback's lines are indented.

    What a client sent may stand in any of them, and cannot make another line or another field.

    >>> record = logging.LogRecord("myserve.access", logging.INFO, "", 0, "GET %s", ("/a\\nERROR",), None)
    >>> record.fields = {"request_id": "1 status=200", "model": "tiny"}
    >>> TextLines().format(record).partition("access: ")[2]
    'GET /a\\\\nERROR request_id="1 status=200" model=tiny'
    """

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  # logging's own name
        """Return the record's first line."""
        fields = getattr(record, "fields", {})
        line = _escaped(super().formatMessage(record))
        return " ".join([line, *(f"{name}={_quoted(value)}" for name, value in fields.items())])

    def formatException(self, ei: Any) -> str:  # noqa: N802  # logging's own name
        """Return the traceback, indented: the words of an exception may be a client's."""
        return "\n".join(f"    {_escaped(line)}" for line in super().formatException(ei).split("\n"))


def _escaped(text: str) -> str:
    """Return the text without control characters and line breaks, each as its escape."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _quoted(value: object) -> str:
    """Return a field's value, quoted as JSON where it could be read as more than one field."""
    text = str(value)
    plain = text and text.isprintable() and not any(c in text for c in ' "=\\')
    return text if plain else json.dumps(text)


def configure(level: str, form: Format) -> None:
    """Send everything to stderr, uvicorn's lines too; other libraries' from warnings on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if form == "json" else TextLines())
    handler.addFilter(RequestFields())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    for name in ("myserve", "uvicorn"):
        logging.getLogger(name).setLevel(level.upper())
    # a start takes a while, and says so unless only errors are wanted
    if level != "error":
        logging.getLogger("myserve.start").setLevel(logging.INFO)
