"""`myserve sample` on OpenAI's batch files: each line is asked of the route that it names; a killed run goes on."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from myserve.cli.client import ServerError
from myserve.errors import RequestError
from myserve.sdk.errors import AttemptFailed
from myserve.sdk.retry import RetryPolicy, retrying
from myserve.sdk.transport.http import AiohttpTransport
from myserve.sdk.transport.pool import root_of
from myserve.sdk.transport.replies import failure_of, read_all
from myserve.server.routes.batches_api.journal import AnswerJournal
from myserve.wire.batches_api.lines import BatchLine, answer_line, error_line, read_batch_line

__all__ = ["BatchSample", "is_batch_file", "read_lines"]

ANSWER_BYTES = 1 << 30
CONCURRENT = 32
MAX_REFUSED = 500  # statuses below are the line's own; others are tried again

_FIELDS = {"custom_id", "url", "body"}


def is_batch_file(text: str) -> bool:
    """Return whether a file's first line is one of OpenAI's batches.

    >>> is_batch_file('{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {}}')
    True
    >>> is_batch_file('{"prompt": "Hello"}')
    False
    """
    first = next((line for line in text.splitlines() if line.strip()), "")
    try:
        entry = json.loads(first)
    except ValueError:
        return False
    return isinstance(entry, dict) and entry.keys() >= _FIELDS


def read_lines(text: str, name: str) -> list[BatchLine]:
    """Return a batch's lines. Raises ValueError, which names the line that is wrong, before anything is asked."""
    lines: list[BatchLine] = []
    seen: set[str] = set()
    for number, raw in enumerate(text.splitlines(), 1):
        if not raw.strip():
            continue
        try:
            line = read_batch_line(raw.encode())
        except RequestError as error:
            raise ValueError(f"{name}, line {number}: {error.message}") from error
        if line.custom_id in seen:
            raise ValueError(f"{name}, line {number}: custom_id {line.custom_id!r} stands in an earlier line")
        if not line.url.startswith("/"):
            raise ValueError(
                f"{name}, line {number}: url must be a path such as /v1/completions, got {line.url!r}"
            )
        seen.add(line.custom_id)
        lines.append(line)
    return lines


@dataclass(slots=True)
class BatchSample:
    """One run over the lines of a batch. `journal` None: it cannot go on after it was killed."""

    urls: Sequence[str]
    api_key: str
    lines: Sequence[BatchLine]
    output: TextIO
    journal_path: Path | None = None
    concurrency: int | None = None
    policy: RetryPolicy = field(default_factory=RetryPolicy)
    num_failed: int = 0
    num_asked: int = 0
    _answers: dict[int, bytes] = field(default_factory=dict)  # that wait for those before them
    _next: int = 1  # the line that is written next, counted from 1
    _journal: AnswerJournal | None = None
    _transport: AiohttpTransport = field(default_factory=AiohttpTransport)

    async def run(self) -> None:
        """Ask every line that has no answer yet; write all in the order of the input. Raises ServerError, OSError."""
        places = asyncio.Semaphore(self.concurrency or CONCURRENT)
        self._open_journal()
        try:
            async with asyncio.TaskGroup() as group:
                for number in range(1, len(self.lines) + 1):
                    if self._journal is not None and number in self._journal:
                        self._write(
                            number, self._journal.answer(number) or b"", is_good=self._journal.is_good(number)
                        )
                        continue
                    await places.acquire()
                    group.create_task(self._one(number)).add_done_callback(lambda _: places.release())
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from None
        finally:
            if self._journal is not None:
                self._journal.close()
            await self._transport.aclose()
        self.output.flush()

    def _open_journal(self) -> None:
        if self.journal_path is None:
            return
        self._journal = journal = AnswerJournal(self.journal_path)
        # its first entry says which input it belongs to
        digest = hashlib.blake2b(digest_size=16)
        for line in self.lines:
            digest.update(b"%s %s %s\n" % (line.custom_id.encode(), line.url.encode(), bytes(line.body)))
        own = json.dumps(digest.hexdigest()).encode()
        if not len(journal):
            journal.add(0, own, is_good=False)
        elif journal.answer(0) != own:
            raise ServerError(
                f"{self.journal_path} is the journal of another input; remove it, or name another"
            )

    async def _one(self, number: int) -> None:
        line = self.lines[number - 1]
        self.num_asked += 1
        try:
            status, request_id, body = await retrying(self.policy, lambda: self._ask(number, line))
            answer, is_good = answer_line(line.custom_id, status, request_id, body), status < 400
        except AttemptFailed as ended:
            if ended.failure.kind == "transport":
                # of no line: the server is gone, and the same command goes on when it is back
                raise ServerError(f"no answer from {self._url(number)}: {ended.failure.message}") from ended
            answer = error_line(line.custom_id, "not_answered", ended.failure.message)
            is_good = False
        if self._journal is not None:
            self._journal.add(number, answer, is_good=is_good)
        self._write(number, answer, is_good=is_good)

    def _url(self, number: int) -> str:
        return root_of(self.urls[number % len(self.urls)])

    async def _ask(self, number: int, line: BatchLine) -> tuple[int, str, bytes]:
        headers = {"content-type": "application/json"}
        if self.api_key:
            headers["authorization"] = f"Bearer {self.api_key}"
        async with self._transport.request(
            "POST", self._url(number) + line.url, headers, bytes(line.body)
        ) as reply:
            told: Mapping[str, str] = reply.headers
            if reply.status >= MAX_REFUSED or reply.status in (408, 409, 425, 429):
                raise AttemptFailed(await failure_of(reply))
            body = await read_all(reply, ANSWER_BYTES)
            try:
                json.loads(body)
            except ValueError:
                body = json.dumps({"error": {"message": body[:1000].decode("utf-8", "replace")}}).encode()
            return reply.status, told.get("x-request-id", ""), body

    def _write(self, number: int, answer: bytes, *, is_good: bool) -> None:
        self._answers[number] = answer
        self.num_failed += not is_good
        while (ready := self._answers.pop(self._next, None)) is not None:
            self._next += 1
            self.output.write(ready.decode() + "\n")
