"""Batches run beside all else: their lines take some places of the engine, at a priority below every live request's."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field

from fastapi import FastAPI

from myserve.errors import MyserveError, RequestError
from myserve.server.answers.streaming import WRITTEN_INLINE_BYTES
from myserve.server.errors import INTERNAL
from myserve.server.observe import traces
from myserve.server.routes.batches_api.file_store import FileStore, StoredFile
from myserve.server.routes.batches_api.input_file import InputFile
from myserve.server.routes.batches_api.job import BatchJob, JobStore
from myserve.server.routes.batches_api.journal import AnswerJournal
from myserve.server.routes.batches_api.line_calls import CalledLine, call_route, comes_back
from myserve.wire.batches_api.lines import BatchLine, answer_line, error_line
from myserve.wire.batches_api.objects import BatchFault, BatchStatus
from myserve.wire.batches_api.usage import UsageSum

__all__ = ["BatchRuns"]

log = logging.getLogger("myserve.server")

LONGEST_PAUSE = 30.0  # seconds, before a server that could not answer is asked again

_FINAL: dict[str, BatchStatus] = {
    "": "completed",
    "expired": "expired",
    "cancelled": "cancelled",
    "failed": "failed",
}
# what is said of a line that nobody answered, by why that is
_UNDONE = {
    "expired": ("batch_expired", "this request was not answered before the completion window ended"),
    "cancelled": ("batch_cancelled", "the batch was cancelled before this request was answered"),
    "failed": ("batch_failed", "the batch failed before this request was answered"),
}


@dataclass(slots=True)
class _Run:
    """A batch whose lines are answered."""

    job: BatchJob
    input: InputFile
    journal: AnswerJournal
    taken: int  # bytes of room for the journal
    writing: asyncio.Lock = field(default_factory=asyncio.Lock)
    # answers on their way to the disk, which are not cancelled
    adding: set[asyncio.Task[None]] = field(default_factory=set)


class BatchRuns:
    """Run batches, each in a task. `places`: lines of all of them that are answered at a time, in turns."""

    def __init__(self, app: FastAPI, files: FileStore, jobs: JobStore, places: int) -> None:
        self._app, self._files, self._jobs = app, files, jobs
        self._places = asyncio.Semaphore(places)
        self._tasks: dict[str, asyncio.Task[None]] = {}  # by batch
        self._answering: dict[str, asyncio.Task[None]] = {}

    def __len__(self) -> int:
        return len(self._tasks)

    def start(self, job: BatchJob) -> None:
        """Begin a batch, or go on with it where it stands."""
        self._files.hold(job.input_file_id)
        task = self._tasks[job.id] = asyncio.create_task(self._run(job))
        task.add_done_callback(lambda _: self._ended(job))

    def cancel(self, job: BatchJob) -> None:
        """Answer no more of its lines; those that are answered are in its output. One that has ended stays as it is."""
        if job.status in ("validating", "in_progress"):
            job.become("cancelling", self._jobs.now())
            self._jobs.save(job)
            if (answering := self._answering.get(job.id)) is not None:
                answering.cancel()

    async def close(self) -> None:
        """Stop all where they stand; whoever starts them again goes on from there."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _ended(self, job: BatchJob) -> None:
        del self._tasks[job.id]
        self._files.release(job.input_file_id)

    async def _run(self, job: BatchJob) -> None:
        traces.follow(None)
        try:
            run = await self._opened(job)
        except (RequestError, OSError) as error:
            self._fail(job, [_fault(error)])
            return
        if run is None:
            return
        try:
            await self._answer_and_write(run)
        except Exception as error:
            log.error("batch %s failed", job.id, exc_info=error)
            self._fail(job, [_fault(error)])
        finally:
            if run.adding:
                await asyncio.wait(run.adding)
            run.journal.close()
            self._files.give(run.taken)
            if job.has_ended:
                with suppress(OSError):
                    self._jobs.journal_path(job).unlink(missing_ok=True)

    async def _opened(self, job: BatchJob) -> _Run | None:
        """Read the input, and what was answered already; None where the input is at fault, or nothing is to be done."""
        path = self._files.path(self._files.get(job.owner, job.input_file_id))
        read = await asyncio.to_thread(InputFile, path, job.endpoint)
        if read.faults:
            self._fail(job, read.faults)
            return None
        job.num_lines = len(read)
        journal = await asyncio.to_thread(AnswerJournal, self._jobs.journal_path(job))
        self._files.take(journal.num_bytes, bounded=False)
        run = _Run(job, read, journal, journal.num_bytes)
        _count(run)
        if job.status == "validating":
            self._enter(job, "in_progress")
        return run

    async def _answer_and_write(self, run: _Run) -> None:
        job, end = run.job, ""
        if job.status == "in_progress":
            answering = self._answering[job.id] = asyncio.create_task(self._answer_all(run))
            try:
                await asyncio.wait({answering}, timeout=max(0.0, job.expires_at - self._jobs.now()))
                if not answering.done():
                    end = "expired"
            finally:
                answering.cancel()
                await asyncio.gather(answering, return_exceptions=True)
                del self._answering[job.id]
            if not answering.cancelled() and (error := _first(answering.exception())) is not None:
                log.error("batch %s failed", job.id, exc_info=error)
                job.faults, end = [_fault(error)], "failed"
        if run.adding:
            await asyncio.wait(run.adding)
        if job.status == "cancelling":
            end = "cancelled"
        if not end:
            self._enter(job, "finalizing")
        await asyncio.to_thread(self._write_files, run, end)
        self._enter(job, _FINAL[end])

    async def _answer_all(self, run: _Run) -> None:
        async with asyncio.TaskGroup() as group:
            for number in range(len(run.input)):
                if number not in run.journal:
                    await self._places.acquire()
                    group.create_task(self._answer(run, number)).add_done_callback(
                        lambda _: self._places.release()
                    )

    async def _answer(self, run: _Run, number: int) -> None:
        line = await asyncio.to_thread(run.input.line, number)
        status, request_id, body = await self._called(run.job, line)
        answer = answer_line(line.custom_id, status, request_id, body)
        adding = asyncio.create_task(self._add(run, number, answer, is_good=status < 400))
        run.adding.add(adding)
        adding.add_done_callback(run.adding.discard)
        await asyncio.shield(adding)

    async def _add(self, run: _Run, number: int, answer: bytes, *, is_good: bool) -> None:
        async with run.writing:
            self._files.take(len(answer))
            run.taken += len(answer)
            if len(answer) > WRITTEN_INLINE_BYTES:
                await asyncio.to_thread(run.journal.add, number, answer, is_good=is_good)
            else:
                run.journal.add(number, answer, is_good=is_good)
        _count(run)

    async def _called(self, job: BatchJob, line: BatchLine) -> CalledLine:
        pause = 1.0
        while True:
            try:
                return await call_route(self._app, job.owner, line)
            except MyserveError as error:
                if not comes_back(error):
                    raise
                await asyncio.sleep(max(pause, getattr(error, "retry_after", 0.0)))
                pause = min(2 * pause, LONGEST_PAUSE)

    def _write_files(self, run: _Run, end: str) -> None:
        """Write the output and the errors, each in the order of the input. What nobody answered is an error."""
        job, numbers = run.job, range(len(run.input))
        used = UsageSum()
        job.output_file_id = self._write(job, "output", _good(run, used))
        job.usage = used.told()
        bad = (_error_of(run, number, end) for number in numbers if not run.journal.is_good(number))
        job.error_file_id = self._write(job, "error", bad)
        job.num_failed = len(run.input) - run.journal.num_good

    def _write(self, job: BatchJob, name: str, lines: Iterator[bytes | None]) -> str | None:
        # their room was taken by the journal, which goes
        with self._files.writing(bounded=False) as writer:
            for line in lines:
                writer.write((line or b"") + b"\n")
            if not writer.num_bytes:
                return None
            filename = f"{job.id}_{name}.jsonl"
            made: StoredFile = self._files.keep(
                writer, job.owner, filename, "batch_output", job.output_seconds
            )
            return made.id

    def _enter(self, job: BatchJob, status: BatchStatus) -> None:
        job.become(status, self._jobs.now())
        self._jobs.save(job)

    def _fail(self, job: BatchJob, faults: list[BatchFault]) -> None:
        job.faults = faults
        job.become("failed", self._jobs.now())
        # where the disk is full, it is at least told to those who ask now
        with suppress(OSError):
            self._jobs.save(job)


def _count(run: _Run) -> None:
    run.job.num_completed = run.journal.num_good
    run.job.num_failed = len(run.journal) - run.journal.num_good


def _good(run: _Run, used: UsageSum) -> Iterator[bytes]:
    """Yield the answers that are no errors, and add up what they used."""
    for number in range(len(run.input)):
        if run.journal.is_good(number) and (answer := run.journal.answer(number)) is not None:
            used.add(answer)
            yield answer


def _error_of(run: _Run, number: int, end: str) -> bytes:
    answered = run.journal.answer(number)
    if answered is not None:
        return answered
    return error_line(run.input.line(number).custom_id, *_UNDONE[end])


def _first(error: BaseException | None) -> BaseException | None:
    """Return the first error of a group of tasks."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _fault(error: BaseException) -> BatchFault:
    if isinstance(error, RequestError):
        code = error.code or "invalid_value"
        return {"code": code, "line": None, "message": error.message, "param": error.param}
    if isinstance(error, OSError):
        message = "the server's disk is full or broken; its log says more"
        return {"code": "storage_failed", "line": None, "message": message, "param": None}
    return {"code": "internal_error", "line": None, "message": INTERNAL, "param": None}
