"""Keeps a run's samples on disk: JSONL, append-only, a line a sample; a killed run loses no whole sample.

The first line names the run seed. A line that was cut by a crash is dropped when the journal is opened again. A file
that is not a journal is never changed, and a line that was edited is an error: neither is taken for a sample. What is
known of a sample only later, a reward or a trainer's logprobs, is a line of its own: a note.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import sys
from array import array
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from myserve.errors import MyserveError
from myserve.sdk.request import SampleRequest
from myserve.sdk.types import SampledCompletion

if sys.platform != "win32":
    import fcntl

__all__ = ["Journal", "JournalError", "request_of"]

_VERSION = 1
# A first line that was cut in writing: enough of it that it is ours.
_CUT_HEAD = re.compile(rb'\{"journal":(1(,("(r(u(n(_(s(e(e(d("(:(-?\d*\}?)?)?)?)?)?)?)?)?)?)?)?)?)?)?')


class JournalError(MyserveError, ValueError):
    """The journal cannot be used: its file is not one, was edited, or a sample could not be written to it."""


class Journal:
    """Keep the samples of one run by (request fingerprint, sample index).

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
        """Open `path`, or begin it with `run_seed`; a journal that exists keeps the seed it began with.

        Raises JournalError for a file that is not a journal or was edited, which is left as it is; BlockingIOError for
        one that another run holds.
        """
        self.path = Path(path)
        self.run_seed = run_seed
        # fingerprint -> sample index -> offset
        self._places: dict[str, dict[int, int]] = {}
        self._keys: dict[bytes, str] | None = (
            None  # of samples, for notes: made when the first one is written
        )
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
        """Return the samples of a request that are here, by index. Raises JournalError for a line that was edited."""
        places = self._places.get(fingerprint, {})
        return {index: self._read(index, offset) for index, offset in places.items()}

    def add(self, fingerprint: str, sample: SampledCompletion, request: SampleRequest | None = None) -> None:
        """Write one sample. Once this returns, a kill of the process does not lose it. Raises JournalError.

        With its `request`, the line has all that draws the sample again (`myserve replay`).
        """
        entry: dict[str, Any] = {"key": fingerprint, "index": sample.index, "sample": sample.to_json()}
        if request is not None:
            entry["request"] = request.to_json()
        offset = self._append(entry)
        self._places.setdefault(fingerprint, {})[sample.index] = offset
        if self._keys is not None:
            self._keys[_identity(sample)] = fingerprint

    def note(
        self,
        sample: SampledCompletion,
        *,
        reward: float | None = None,
        trainer_logprobs: Sequence[float] | None = None,
    ) -> None:
        """Write what is known of a sample that is here; of several notes the last counts, field by field.

        `trainer_logprobs` [C]: the trainer's logprobs of the completion's tokens. The inspector shows both. Raises
        JournalError for a sample that is not here, ValueError for a list of another length or a number that is not
        finite.
        """
        if self._keys is None:
            self._keys = {_identity(known): key for key in self._places for known in self.known(key).values()}
        key = self._keys.get(_identity(sample))
        if key is None:
            raise JournalError(f"{self.path} has no sample {sample.index} with these tokens and this seed")
        if trainer_logprobs is not None and len(trainer_logprobs) != sample.completion_len:
            raise ValueError(
                f"trainer_logprobs has {len(trainer_logprobs)} numbers, the completion {sample.completion_len} tokens"
            )
        logprobs = None if trainer_logprobs is None else [float(value) for value in trainer_logprobs]
        note = {"reward": None if reward is None else float(reward), "trainer_logprobs": logprobs}
        numbers = [value for value in (note["reward"], *(logprobs or ())) if value is not None]
        if not all(map(math.isfinite, numbers)):
            raise ValueError("a reward and logprobs are finite numbers")
        told = {name: value for name, value in note.items() if value is not None}
        self._append({"key": key, "index": sample.index, "note": told})

    def close(self) -> None:
        """Force all to the disk, so that a power failure loses nothing either, and release the file."""
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

    def _read(self, index: int, offset: int) -> SampledCompletion:
        with self.path.open("rb") as lines:
            lines.seek(offset)
            line = lines.readline()
        try:
            sample = SampledCompletion.from_json(json.loads(line)["sample"])
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise self._edited(offset, str(error)) from error
        if sample.index != index:
            raise self._edited(offset, f"index {index} holds sample {sample.index}")
        return sample

    def _scan(self) -> int:
        """Note where each sample is; return the length of what is whole."""
        end = 0
        with self.path.open("rb") as lines:
            for line in lines:
                if not line.endswith(b"\n"):
                    if end == 0 and not _CUT_HEAD.fullmatch(line):
                        raise self._not_a_journal()
                    return end  # cut by a crash
                if end == 0:
                    self._take_head(line)
                else:
                    self._take_entry(line, end)
                end += len(line)
        return end

    def _take_head(self, line: bytes) -> None:
        head = _object_of(line)
        if head is None or head.get("journal") != _VERSION:
            raise self._not_a_journal()
        run_seed = head.get("run_seed")
        if type(run_seed) is not int:
            raise self._edited(0, f"run_seed is {run_seed!r}")
        self.run_seed = run_seed

    def _take_entry(self, line: bytes, offset: int) -> None:
        entry = _object_of(line)
        if entry is None:
            return  # damaged, by a power failure for one: its sample is asked for again
        key, index = entry.get("key"), entry.get("index")
        is_note = isinstance(entry.get("note"), dict)
        if (
            not isinstance(key, str)
            or type(index) is not int
            or index < 0
            or not ("sample" in entry or is_note)
        ):
            raise self._edited(
                offset, "an entry has a key (text), an index (0 or more) and a sample or a note"
            )
        if is_note:
            return
        self._places.setdefault(key, {})[index] = offset

    def _not_a_journal(self) -> JournalError:
        return JournalError(f"{self.path} is not a journal of this version; name another file")

    def _edited(self, offset: int, why: str) -> JournalError:
        with self.path.open("rb") as file:
            line = file.read(offset).count(b"\n") + 1
        return JournalError(
            f"{self.path}, line {line}, is not as it was written: {why}. Remove the line to draw it again"
        )

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


def request_of(entry: dict[str, Any]) -> SampleRequest | None:
    """Return the request of a journal's entry, its prompt from the sample; None where the entry was written without.

    Raises ValueError or TypeError for what is no request.
    """
    fields = entry.get("request")
    if fields is None:
        return None
    sample = SampledCompletion.from_json(entry["sample"])
    return SampleRequest.from_json(fields, sample.prompt_tokens)


def _identity(sample: SampledCompletion) -> bytes:
    """Return a digest of which sample it is: its seed, its index and its ids."""
    named = f"{sample.seed} {sample.index} {sample.prompt_len} ".encode()
    return hashlib.blake2b(named + array("q", sample.full_tokens).tobytes(), digest_size=16).digest()


def _object_of(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
