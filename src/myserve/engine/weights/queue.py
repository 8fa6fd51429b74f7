"""An engine's updates of its weights, in order: prepared on a thread of their own, swapped in between two steps."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from queue import SimpleQueue
from typing import Any, Literal, Protocol, TypeVar

from myserve.engine.scheduling.scheduler import Scheduler
from myserve.engine.weights.prepare import Prepared, Source, UpdateOptions, WeightReport
from myserve.errors import EngineError, RequestError

__all__ = ["Stage", "Swapper", "WeightUpdate", "WeightUpdates"]

T = TypeVar("T")
Stage = Literal["preparing", "draining", "done", "failed"]


class WeightUpdate:
    """One update on its way: `await` it, or `result()` where nothing is awaited. Giving up does not stop it."""

    def __init__(self, source: Source, options: UpdateOptions, *, held: bool = False) -> None:
        self.source = source
        self.options = options
        self._released: Future[None] = Future()
        if not held:
            self._released.set_result(None)
        self._checked: Future[None] = Future()
        self._report: Future[WeightReport] = Future()

    @property
    def stage(self) -> Stage:
        """The part of its way that it is in. Requests are served in all of them."""
        if self._report.done():
            return "failed" if self._report.exception() is not None else "done"
        return "draining" if self._checked.done() and self._released.done() else "preparing"

    @property
    def error(self) -> BaseException | None:
        """The exception that it failed with, if it did."""
        return self._report.exception() if self._report.done() else None

    def result(self, timeout: float | None = None) -> WeightReport:
        """Wait for the swap. Raises BadSnapshotError for what cannot be this model's, EngineError, TimeoutError."""
        return self._report.result(timeout)

    def __await__(self) -> Generator[Any, None, WeightReport]:
        return asyncio.shield(asyncio.wrap_future(self._report)).__await__()

    async def checked(self) -> None:
        """Wait until the weights are found good: from then on the swap cannot fail. Raises what `result` does."""
        await asyncio.shield(asyncio.wrap_future(self._checked))

    def when_done(self, call: Callable[[WeightReport], None]) -> None:
        """Call with the report once the weights are in place, on the engine's thread, before its next step."""

        def done(report: Future[WeightReport]) -> None:
            if report.exception() is None:
                call(report.result())

        self._report.add_done_callback(done)

    def release(self) -> None:
        """Let a held update go on to the swap. Harmless where it has been let or withdrawn."""
        with suppress(InvalidStateError):
            self._released.set_result(None)

    def withdraw(self, error: Exception) -> bool:
        """End a held update with `error`, and change nothing; False where it has been let go on, or has ended."""
        with suppress(InvalidStateError):
            self._released.set_exception(error)
            return True
        return False

    # ---- for the engine

    def wait_for_release(self) -> None:
        """Wait while it is held. Raises what withdrew it."""
        self._released.result()

    def set_checked(self) -> None:
        if not self._checked.done():
            self._checked.set_result(None)

    def finish(self, report: WeightReport) -> None:
        self._report.set_result(report)

    def fail(self, error: BaseException) -> None:
        """End it with an error; what has ended stays as it is."""
        for future in (self._checked, self._report, self._released):
            with suppress(InvalidStateError):
                future.set_exception(error)


class Swapper(Protocol):
    """The engine's part of an update, on its own thread, between two steps."""

    scheduler: Scheduler

    def abort_in_flight(self) -> int: ...
    def swap(self, prepared: Prepared, version: int, options: UpdateOptions) -> None: ...


class WeightUpdates:
    """The queue of updates: one is prepared and swapped in before the next is looked at."""

    def __init__(
        self, prepare: Callable[[Source, UpdateOptions], Prepared], post: Callable[[Callable[[], None]], None]
    ) -> None:
        self._prepare = prepare
        self._post = post  # has something done on the engine's thread, between two steps
        self._queue: SimpleQueue[WeightUpdate | Callable[[], None] | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._open: set[WeightUpdate] = set()
        self._closed_by: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._swap: _Swap | None = None  # the engine's thread alone touches it
        self._current: WeightUpdate | None = None

    @property
    def refuses_requests(self) -> bool:
        """True where new requests are refused: as soon as an update is reported as draining, not from the next step."""
        update = self._current
        return update is not None and update.options.refuse_new and update.stage == "draining"

    def add(self, update: WeightUpdate, current_version: Callable[[], int]) -> None:
        """Queue an update. Any thread. It fails where the engine has ended."""
        with self._lock:
            if self._closed_by is not None:
                update.fail(self._closed_by)
                return
            self._open.add(update)
            self._start(current_version)
        self._queue.put(update)

    def read(self, task: Callable[[], T], current_version: Callable[[], int]) -> Future[T]:
        """Do `task` where updates are prepared: no swap falls into it. Any thread. The future has its result."""
        done: Future[T] = Future()

        def run() -> None:
            try:
                done.set_result(task())
            except Exception as error:
                done.set_exception(error)

        with self._lock:
            if self._closed_by is not None:
                raise self._closed_by
            self._start(current_version)
            # under the lock: what stands before the end is still done
            self._queue.put(run)
        return done

    def _start(self, current_version: Callable[[], int]) -> None:
        if self._thread is None:
            self._thread = threading.Thread(
                target=self._run, args=(current_version,), name="myserve-weights", daemon=True
            )
            self._thread.start()

    def close(self, error: BaseException) -> None:
        """Fail every update that has not ended with `error`: the engine has ended."""
        with self._lock:
            self._closed_by = error
            unfinished, self._open = self._open, set()
        for update in unfinished:
            update.fail(error)
        self._queue.put(None)

    # ---- the thread that prepares

    def _run(self, current_version: Callable[[], int]) -> None:
        while (update := self._queue.get()) is not None:
            if not isinstance(update, WeightUpdate):
                update()
                continue
            try:
                self._carry_out(update, current_version())
            except RequestError as error:
                update.fail(error)
            except EngineError as error:
                update.fail(error)
            except Exception as error:
                failure = EngineError(f"the weights were not updated: {type(error).__name__}: {error}")
                failure.__cause__ = error
                update.fail(failure)
            with self._lock:
                self._open.discard(update)

    def _carry_out(self, update: WeightUpdate, current: int) -> None:
        version = current + 1 if update.options.version is None else update.options.version
        if version <= current:
            raise RequestError(
                f"the version must grow, or tokens of different weights would look alike: it is {current}, got "
                f"{version}",
                param="version",
            )
        prepared = self._prepare(update.source, update.options)
        if isinstance(update.source, Mapping):
            update.source = {}  # the tensors are the caller's again, and no longer kept here
        self._current = update
        update.set_checked()
        update.wait_for_release()
        self._post(lambda: self._begin(_Swap(update, prepared, version)))
        update.result()

    # ---- the engine's thread

    def _begin(self, swap: _Swap) -> None:
        if swap.update.stage == "draining":  # not failed meanwhile: the engine goes on
            self._swap = swap

    def advance(self, engine: Swapper) -> None:
        """Swap if weights are ready and no request must finish first. Called between any two steps."""
        if self._swap is None:
            return
        if self._swap.advance(engine):
            self._swap = None


class _Swap:
    """One update, from the first step after its preparation to the swap."""

    def __init__(self, update: WeightUpdate, prepared: Prepared, version: int) -> None:
        self.update = update
        self._prepared = prepared
        self._version = version
        self._began: float | None = None
        self._num_aborted = 0

    def advance(self, engine: Swapper) -> bool:
        """Go on; return True once it is done."""
        mode, now = self.update.options.mode, time.monotonic()
        if self._began is None:
            self._began = now
            if mode == "drain":
                engine.scheduler.drain("weights")
            elif mode == "abort":
                self._num_aborted = engine.abort_in_flight()
        if mode == "drain" and not engine.scheduler.is_drained("weights"):
            return False
        engine.swap(self._prepared, self._version, self.update.options)
        self.update.finish(self._report(now - self._began, time.monotonic() - now))
        return True

    def _report(self, drained: float, paused: float) -> WeightReport:
        prepared = self._prepared
        return WeightReport(
            weight_version=self._version,
            checksum=prepared.checksum,
            num_tensors=prepared.num_tensors,
            num_bytes=prepared.num_bytes,
            prepare_duration=prepared.duration,
            drain_duration=drained,
            pause_duration=paused,
            num_aborted=self._num_aborted,
        )
