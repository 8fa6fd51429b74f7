"""All files and batches of a server, in one folder that one server at a time may use."""

from __future__ import annotations

import fcntl
import logging
import tempfile
from pathlib import Path
from typing import TextIO

from fastapi import FastAPI

from myserve.engine.config import NUM_SEQS_AT_ANY_PACE
from myserve.errors import RequestError
from myserve.server.routes.batches_api.file_store import FileStore
from myserve.server.routes.batches_api.job import JobStore
from myserve.server.routes.batches_api.runs import BatchRuns
from myserve.server.settings import Settings

__all__ = ["Batches"]

log = logging.getLogger("myserve.server")

TEMPORARY = "files and batches are in a temporary folder, gone when the server ends: it runs without --batch-directory"


class Batches:
    """Hold the stores and the runs. The operator's folder is opened at once, a temporary one when it is first needed.

    Raises RequestError for a folder that cannot be used.
    """

    def __init__(self, app: FastAPI, settings: Settings) -> None:
        self._app, self._settings = app, settings
        self._lock: TextIO | None = None  # as a file it is closed with an app that was never run
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self.warnings: list[str] = []
        if settings.batch_directory is not None:
            self._open(Path(settings.batch_directory))

    @property
    def files(self) -> FileStore:
        """Return the files."""
        self._open_temporary()
        return self._files

    @property
    def jobs(self) -> JobStore:
        """Return the batches."""
        self._open_temporary()
        return self._jobs

    @property
    def runs(self) -> BatchRuns:
        """Return the batches that run."""
        self._open_temporary()
        return self._runs

    def go_on(self) -> None:
        """Start the batches that the folder has unfinished."""
        if self._lock is not None:
            for job in self._jobs.unfinished():
                self._runs.start(job)

    async def close(self) -> None:
        """Stop what runs, and leave the folder to others."""
        if self._lock is None:
            return
        await self._runs.close()
        self._lock.close()
        self._lock = None
        if self._temporary is not None:
            self._temporary.cleanup()
            self._temporary = None

    def _open_temporary(self) -> None:
        if self._lock is None:
            log.warning(TEMPORARY)
            self._temporary = tempfile.TemporaryDirectory(prefix="myserve-batches-")
            self.warnings = [TEMPORARY]
            self._open(Path(self._temporary.name))

    def _open(self, folder: Path) -> None:
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = _locked(folder / "lock")
            self._files = FileStore(folder / "files", self._settings.batch_bytes)
            self._jobs = JobStore(folder / "batches")
        except BlockingIOError:
            raise RequestError(
                f"batch_directory: {folder} is used by another server; give each its own",
                param="batch_directory",
            ) from None
        except (OSError, ValueError, TypeError) as error:
            raise RequestError(
                f"batch_directory: {folder} cannot be used: {error}", param="batch_directory"
            ) from error
        self._runs = BatchRuns(self._app, self._files, self._jobs, places_of(self._settings))


def _locked(path: Path) -> TextIO:
    """Return a file that this process alone has locked. Raises BlockingIOError where another has."""
    file = path.open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise
    return file


def places_of(settings: Settings) -> int:
    """Return how many lines are answered at a time: three in four of the choices that run side by side at any pace.

    The rest is free for live requests at once; a place that a line has is theirs too, but a step later.

    >>> places_of(Settings(models={"m": "m"}))
    48
    """
    engine = settings.engine
    return max(1, (engine.max_num_seqs or min(NUM_SEQS_AT_ANY_PACE, engine.most_seqs)) * 3 // 4)
