"""A start logs what it does: a line when a phase begins, one each second while any lasts, one when a long one ends."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["StartPhase", "phase"]

NOTICE_SECONDS = 1.0

# a logger of its own, so that a command can show these lines and no others of their level
log = logging.getLogger("myserve.start")


# the phases that run now; of several, those that say what they do speak for the others, which wait for them
_running: set[StartPhase] = set()


class StartPhase:
    """A phase that runs; `detail` is what it does now, in words."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.detail = ""
        self._began = time.monotonic()
        self._over = threading.Event()

    @property
    def seconds(self) -> float:
        """The seconds that it has run."""
        return time.monotonic() - self._began

    def report_until_over(self) -> None:
        """Log a line each second. Blocks until `end`."""
        while not self._over.wait(NOTICE_SECONDS):
            if not self.detail and any(other.detail for other in tuple(_running)):
                continue
            log.info("%s%s: %.0f s so far", self.name, self.detail and f" ({self.detail})", self.seconds)

    def end(self) -> None:
        """End the reports."""
        self._over.set()


@contextmanager
def phase(name: str, note: str = "") -> Iterator[StartPhase]:
    """Run a block as a phase of that name, with its lines in the log `myserve.start`; the first has the note too.

    >>> with phase("counting") as counting:
    ...     counting.detail = "1 of 1"
    """
    running = StartPhase(name)
    if not log.isEnabledFor(logging.INFO):
        yield running
        return
    log.info("%s%s", name, note and f" ({note})")
    reports = threading.Thread(target=running.report_until_over, name="myserve-progress", daemon=True)
    _running.add(running)
    reports.start()
    try:
        yield running
    finally:
        _running.discard(running)
        running.end()
        reports.join()
    if running.seconds > NOTICE_SECONDS:
        log.info("%s: done in %.1f s", name, running.seconds)
