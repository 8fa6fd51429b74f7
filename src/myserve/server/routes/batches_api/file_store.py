"""Files of batches on disk: each is its owner's alone; all together are bounded, and dropped when they expire."""

from __future__ import annotations

import json
import os
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from myserve.errors import RequestError
from myserve.server.errors import BodyTooLargeError, NotFoundError

__all__ = ["DAY", "KEPT_SECONDS", "FileStore", "FileWriter", "StoredFile", "write_json"]

DAY = 86_400
KEPT_SECONDS = 30 * DAY  # OpenAI's default for files of batches
MOST_FILES = 10_000

Purpose = Literal["batch", "batch_output"]


@dataclass(frozen=True, slots=True)
class StoredFile:
    """Facts of a file beside its bytes. Times in unix seconds."""

    id: str
    owner: str
    filename: str
    purpose: Purpose
    num_bytes: int
    created_at: int
    expires_at: int


class FileStore:
    """Keep files in a folder: `<id>.data` and, written last, `<id>.json`. What is half there after a crash is removed.

    `most_bytes` is the room of all files, and of what `take` reserves beside them. Used from any thread.

    >>> store = FileStore(getfixture("tmp_path"), most_bytes=10)
    >>> with store.writing() as writer:
    ...     writer.write(b"{}")
    ...     made = store.keep(writer, "alice", "in.jsonl", "batch")
    >>> store.get("alice", made.id).num_bytes, store.num_bytes
    (2, 2)
    >>> store.get("bob", made.id)
    Traceback (most recent call last):
    ...
    myserve.server.errors.NotFoundError: no file 'file-...' is kept here
    """

    def __init__(self, folder: Path, most_bytes: int, now: Callable[[], float] = time.time) -> None:
        self._folder, self._most_bytes, self._now = folder, most_bytes, now
        self._lock = threading.Lock()
        self._held: Counter[str] = Counter()  # ids of files that batches read
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._files = {file.id: file for file in map(_read, folder.glob("*.json"))}
        for path in folder.iterdir():
            if path.stem not in self._files:
                path.unlink()
        self.num_bytes = sum(file.num_bytes for file in self._files.values())

    def path(self, file: StoredFile) -> Path:
        """Return where a file's bytes are."""
        return self._folder / f"{file.id}.data"

    def get(self, owner: str, file_id: str) -> StoredFile:
        """Return an owner's file. Raises NotFoundError."""
        self._drop_expired()
        file = self._files.get(file_id)
        if file is None or file.owner != owner:
            raise NotFoundError(f"no file {file_id[:80]!r} is kept here", param="file_id")
        return file

    def of(self, owner: str, purpose: str | None = None) -> list[StoredFile]:
        """Return an owner's files, the oldest first."""
        self._drop_expired()
        mine = [file for file in self._files.values() if file.owner == owner]
        return sorted(
            (file for file in mine if purpose in (None, file.purpose)), key=lambda file: file.created_at
        )

    @contextmanager
    def writing(self, *, bounded: bool = True) -> Iterator[FileWriter]:
        """Write a file; what `keep` has not taken by the end of the block is removed."""
        self._drop_expired()
        if bounded and len(self._files) >= MOST_FILES:
            raise RequestError(
                f"{MOST_FILES} files are kept here, and no more may be; delete some", code="too_many_files"
            )
        file_id = f"file-{uuid.uuid4().hex}"
        writer = FileWriter(file_id, self._folder / f"{file_id}.data", self, bounded=bounded)
        try:
            yield writer
        finally:
            writer.close()
            if file_id not in self._files:
                (self._folder / f"{file_id}.data").unlink(missing_ok=True)
                self.give(writer.num_bytes)

    def keep(
        self,
        writer: FileWriter,
        owner: str,
        filename: str,
        purpose: Purpose,
        seconds: int = KEPT_SECONDS,
    ) -> StoredFile:
        """Make what was written a file of `owner`, for so many seconds."""
        writer.close()
        created = int(self._now())
        file = StoredFile(writer.id, owner, filename, purpose, writer.num_bytes, created, created + seconds)
        write_json(self._folder / f"{file.id}.json", asdict(file))
        self._files[file.id] = file
        return file

    def delete(self, file: StoredFile) -> None:
        """Remove a file. Raises RequestError while a batch reads it."""
        if self._held[file.id]:
            raise RequestError(
                f"the file {file.id!r} is read by a batch; cancel that first",
                param="file_id",
                code="file_in_use",
            )
        self._remove(file)

    def hold(self, file_id: str) -> None:
        """Note that a batch reads this file: it neither expires nor is deleted."""
        self._held[file_id] += 1

    def release(self, file_id: str) -> None:
        """Undo one `hold`."""
        self._held[file_id] -= 1

    def take(self, num_bytes: int, *, bounded: bool = True) -> None:
        """Reserve room. Raises BodyTooLargeError where there is none."""
        with self._lock:
            if bounded and self.num_bytes + num_bytes > self._most_bytes:
                raise BodyTooLargeError(
                    f"the files of batches have {self._most_bytes} bytes of room here, and {self.num_bytes} are "
                    "taken; delete some, or let the operator give more by --batch-bytes",
                    code="storage_full",
                )
            self.num_bytes += num_bytes

    def give(self, num_bytes: int) -> None:
        """Give room back."""
        with self._lock:
            self.num_bytes -= num_bytes

    def _drop_expired(self) -> None:
        now = self._now()
        for file in [file for file in self._files.values() if file.expires_at <= now]:
            if not self._held[file.id]:
                self._remove(file)

    def _remove(self, file: StoredFile) -> None:
        """Remove the words first: bytes without them are removed at the next start."""
        if self._files.pop(file.id, None) is None:
            return
        (self._folder / f"{file.id}.json").unlink(missing_ok=True)
        self.path(file).unlink(missing_ok=True)
        self.give(file.num_bytes)


class FileWriter:
    """A file while it is written: each part takes its room first."""

    def __init__(self, file_id: str, path: Path, store: FileStore, *, bounded: bool) -> None:
        self.id, self.num_bytes = file_id, 0
        self._store, self._bounded = store, bounded
        # as everything here: for the server's user alone
        self._file = os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb")

    def write(self, part: bytes) -> None:
        """Add bytes. Raises BodyTooLargeError, OSError."""
        self._store.take(len(part), bounded=self._bounded)
        self.num_bytes += len(part)
        self._file.write(part)

    def close(self) -> None:
        """Bring all to the disk. Idempotent."""
        if not self._file.closed:
            with suppress(ValueError):
                self._file.flush()
                os.fsync(self._file.fileno())
            self._file.close()


def _read(path: Path) -> StoredFile:
    return StoredFile(**json.loads(path.read_text("utf-8")))


def write_json(path: Path, value: object) -> None:
    """Write a file whole or not at all, whatever ends the process meanwhile."""
    part = path.with_suffix(".part")
    with os.fdopen(
        os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8"
    ) as file:
        json.dump(value, file)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
    # else a power cut may take the name back, though the bytes are there
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
