"""A batch's answers on disk, in the order in which they came; they are read in the order of the input."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

__all__ = ["AnswerJournal"]


class AnswerPlace(NamedTuple):
    is_good: bool
    start: int
    length: int


class AnswerJournal:
    """Append answers by the numbers of their lines. Opened again, it has all that were whole when its process ended.

    >>> path = getfixture("tmp_path") / "answers"
    >>> journal = AnswerJournal(path); journal.add(1, b"one", is_good=True); journal.add(0, b"none", is_good=False)
    >>> journal.close()
    >>> with path.open("ab") as torn: _ = torn.write(b"2 1 tw")
    >>> journal = AnswerJournal(path)
    >>> [journal.answer(number) for number in range(3)], journal.is_good(0), journal.is_good(1)
    ([b'none', b'one', None], False, True)
    """

    def __init__(self, path: Path) -> None:
        self._places: dict[int, AnswerPlace] = {}
        self.num_bytes = 0
        self.num_good = 0
        self._fd: int | None = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        with path.open("rb") as file:
            for line in file:
                # one that is torn was the last of a process
                if not line.endswith(b"\n"):
                    break
                number, is_good, rest = line.split(b" ", 2)
                self._note(int(number), is_good == b"1", len(line) - len(rest), len(rest) - 1)
        os.ftruncate(self._fd, self.num_bytes)

    def __contains__(self, number: int) -> bool:
        return number in self._places

    def __len__(self) -> int:
        return len(self._places)

    def add(self, number: int, answer: bytes, *, is_good: bool) -> None:
        """Append one answer, a line of JSON. Raises OSError, and then the answer is not there."""
        assert self._fd is not None
        head = b"%d %d " % (number, is_good)
        left = memoryview(head + answer + b"\n")
        at = self.num_bytes
        # nothing is noted before all is written: the next answer goes over what a full disk has cut
        while left:
            done = os.pwrite(self._fd, left, at)
            left, at = left[done:], at + done
        self._note(number, is_good, len(head), len(answer))

    def is_good(self, number: int) -> bool:
        """Return whether a line has an answer that is no error."""
        return number in self._places and self._places[number].is_good

    def answer(self, number: int) -> bytes | None:
        """Return a line's answer, or error; None where it has neither."""
        if (place := self._places.get(number)) is None:
            return None
        assert self._fd is not None
        return os.pread(self._fd, place.length, place.start)

    def close(self) -> None:
        """Close the file. Idempotent."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _note(self, number: int, is_good: bool, head: int, length: int) -> None:
        self._places[number] = AnswerPlace(is_good, self.num_bytes + head, length)
        self.num_good += is_good
        self.num_bytes += head + length + 1
