"""Logs that a machine can read: a line a request, with its id, its cost and no word of its prompt or answer."""

from __future__ import annotations

import json
import logging
import sys
import time
from contextvars import ContextVar
from typing import Any, Literal

Format = Literal["text", "json"]

_noted: ContextVar[dict[str, Any] | None] = ContextVar("myserve_noted", default=None)


def begin(request_id: str) -> dict[str, Any]:
    """Open the notes of the request that the current task answers; what is logged from it carries them."""
    notes: dict[str, Any] = {"request_id": request_id}
    _noted.set(notes)
    return notes


def note(**fields: Any) -> None:
    """Put numbers and names into the current request's line; without a request, nothing happens.

    >>> notes = begin("r-1"); note(prompt_tokens=3); notes
    {'request_id': 'r-1', 'prompt_tokens': 3}
    """
    if (notes := _noted.get()) is not None:
        notes.update(fields)


class RequestFields(logging.Filter):
    """Gives a record the notes of the request that it was logged for."""

    def filter(self, record: logging.LogRecord) -> bool:
        notes = _noted.get() or {}
        own = getattr(record, "fields", None)
        record.fields = {"request_id": notes["request_id"]} if own is None and notes else own or {}
        return True


class JsonLines(logging.Formatter):
    """One JSON object a line.

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
    """The same for people: the message, then `name=value`."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  # logging's own name
        fields = getattr(record, "fields", {})
        return " ".join(
            [super().formatMessage(record), *(f"{name}={value}" for name, value in fields.items())]
        )


def configure(level: str, form: Format) -> None:
    """Everything to stderr, uvicorn's too. Other libraries below warnings are nobody's business."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if form == "json" else TextLines())
    handler.addFilter(RequestFields())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    for name in ("myserve", "uvicorn"):
        logging.getLogger(name).setLevel(level.upper())
