"""A batch's input: all of it is read once before anything is drawn, and then line by line where it lies."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from myserve.errors import RequestError
from myserve.wire.batches_api.lines import BatchLine, read_batch_line
from myserve.wire.batches_api.objects import BatchFault

__all__ = ["MOST_LINES", "InputFile"]

MOST_LINES = 50_000  # OpenAI's own
MOST_FAULTS = 100  # that are told


class InputFile:
    """The lines of a file by their places. Empty ones do not count. Read in a thread: it may have hundreds of MB.

    >>> path = getfixture("tmp_path") / "in.jsonl"
    >>> good = b'{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {}}'
    >>> _ = path.write_bytes(good + bytes([10, 10]) + good + b"}")
    >>> file = InputFile(path, "/v1/completions")
    >>> len(file), file.line(0).custom_id, [(fault["line"], fault["code"]) for fault in file.faults]
    (2, 'a', [(3, 'invalid_json_line')])
    """

    def __init__(self, path: Path, endpoint: str) -> None:
        self._path, self._endpoint = path, endpoint
        self._places: list[tuple[int, int]] = []  # start and length of each line
        self.faults: list[BatchFault] = []  # no more than are told
        self._check()

    def __len__(self) -> int:
        return len(self._places)

    def line(self, number: int) -> BatchLine:
        """Return a line that was read without fault, counted from 0."""
        start, length = self._places[number]
        with self._path.open("rb") as file:
            return read_batch_line(os.pread(file.fileno(), length, start))

    def _check(self) -> None:
        seen: set[str] = set()
        for at, raw in _lines(self._path):
            if len(self._places) > MOST_LINES or len(self.faults) >= MOST_FAULTS:
                break
            self._places.append((raw[0], len(raw[1])))
            try:
                line = read_batch_line(raw[1])
                if line.custom_id in seen:
                    raise RequestError(
                        f"custom_id {line.custom_id[:80]!r} stands in an earlier line",
                        param="custom_id",
                        code="duplicate_custom_id",
                    )
                seen.add(line.custom_id)
                if line.url != self._endpoint:
                    raise RequestError(
                        f"url is {line.url[:80]!r}, and this batch's endpoint {self._endpoint!r}",
                        param="url",
                        code="mismatched_url",
                    )
            except RequestError as error:
                self.faults.append(_fault(error, at))
        if not self._places:
            self.faults.append(_fault(RequestError("the file has no lines", code="empty_file"), None))
        if len(self._places) > MOST_LINES:
            many = RequestError(f"a batch has {MOST_LINES} lines at most", code="too_many_lines")
            self.faults = [_fault(many, None)]


def _lines(path: Path) -> Iterator[tuple[int, tuple[int, bytes]]]:
    """Yield each line's number from 1, where it begins, and its bytes."""
    start = 0
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            if stripped := raw.strip():
                yield number, (start + raw.index(stripped[:1]), stripped)
            start += len(raw)


def _fault(error: RequestError, line: int | None) -> BatchFault:
    code = error.code or "invalid_value"
    return {"code": code, "line": line, "message": error.message, "param": error.param}
