"""A run's samples on disk: JSONL, append-only, a whole line a sample; a killed run loses nothing whole.

The first line names the run seed. A line that was cut by a crash is dropped when the journal is opened again.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

from myserve.errors import MyserveError
from myserve.sdk.types import SampledCompletion

if sys.platform != "win32":
    import fcntl

_VERSION = 1


class JournalError(MyserveError):
    """A sample could not be written down; going on would lose it."""


class Journal:
    """The samples of one run by (request fingerprint, sample index).

    Opened, it holds an exclusive lock on its file. Only offsets are kept in memory.

    >>> import tempfile
    >>> sample = SampledCompletion(text="4", full_tokens=[1, 4], prompt_len=1, finish_reason="stop",
    ...     completion_len=1)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with Journal(Path(folder) / "run.jsonl", run_seed=7) as journal:
    ...         journal.add("a1", sample)
    ...     with Journal(Path(folder) / "run.jsonl", run_seed=8) as journal:
    ...         journal.run_seed, journal.known("a1") == {0: sample}
    (7, True)
    """

    def __init__(self, path: str | Path, run_seed: int) -> None:
        """Opens `path`, or begins it with `run_seed`; a journal that exists keeps the seed it began with."""
        self.path = Path(path)
        self.run_seed = run_seed
        self._places: dict[str, dict[int, int]] = {}  # fingerprint -> sample index -> offset
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            self._lock()
            end = self._scan()
        except BaseException:
            os.close(self._file)
            raise
        os.ftruncate(self._file, end)
        if end == 0:
            self._append({"journal": _VERSION, "run_seed": run_seed})

    def known(self, fingerprint: str) -> dict[int, SampledCompletion]:
        """The samples of a request that are here, by index."""
        places = self._places.get(fingerprint, {})
        return {index: self._read(offset) for index, offset in places.items()}

    def add(self, fingerprint: str, sample: SampledCompletion) -> None:
        """Writes one sample. Once this returns, a kill of the process does not lose it."""
        offset = self._append({"key": fingerprint, "index": sample.index, "sample": sample.to_json()})
        self._places.setdefault(fingerprint, {})[sample.index] = offset

    def close(self) -> None:
        """Forces all to the disk, so that a power failure loses nothing either, and lets go of the file."""
        os.fsync(self._file)
        os.close(self._file)

    def _append(self, entry: dict[str, Any]) -> int:
        line = json.dumps(entry, separators=(",", ":"), ensure_ascii=False).encode() + b"\n"
        try:
            offset = os.fstat(self._file).st_size
            while line:  # one write as a rule; the rest of it where the disk took a part
                line = line[os.write(self._file, line) :]
        except OSError as error:
            # Not an OSError any more: inside a request that would pass for a broken connection, and be retried.
            raise JournalError(f"cannot write {self.path}: {error.strerror or error}") from error
        return offset

    def _read(self, offset: int) -> SampledCompletion:
        with self.path.open("rb") as lines:
            lines.seek(offset)
            return SampledCompletion.from_json(json.loads(lines.readline())["sample"])

    def _scan(self) -> int:
        """Notes where each sample is; returns the length of what is whole."""
        end = 0
        with self.path.open("rb") as lines:
            for line in lines:
                if not line.endswith(b"\n"):
                    return end  # cut by a crash
                entry = _entry(line)
                if end == 0:
                    self._take_head(entry)
                elif entry is not None:  # a damaged line in between: its sample is asked for again
                    self._places.setdefault(entry["key"], {})[entry["index"]] = end
                end += len(line)
        return end

    def _take_head(self, entry: dict[str, Any] | None) -> None:
        if entry is None or entry.get("journal") != _VERSION:
            raise ValueError(f"{self.path} is not a journal of this version; name another file")
        self.run_seed = entry["run_seed"]

    def _lock(self) -> None:
        if sys.platform != "win32":
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise BlockingIOError(f"{self.path} is in use by another run") from error

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _entry(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return (
        entry
        if isinstance(entry, dict) and ("journal" in entry or {"key", "index", "sample"} <= entry.keys())
        else None
    )
