"""A store for journals whose writes can end a controller."""

from __future__ import annotations

from collections.abc import Callable

from myserve.cluster.journal import FleetJournal


class ControllerDiedError(BaseException):
    """Ends a controller at once: nothing of it runs on."""


class Store:
    """Keeps the journal; `fault` is called before and after each write, and may end the controller."""

    def __init__(self, journal: FleetJournal | None = None) -> None:
        self.body: bytes | None = None
        self.fault: Callable[[bytes, str], None] = lambda body, when: None
        if journal is not None:
            journal.write(self)

    def read(self) -> bytes | None:
        return self.body

    def write(self, body: bytes) -> None:
        self.fault(body, "before")
        self.body = body
        self.fault(body, "after")
