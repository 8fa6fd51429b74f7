"""The engine's thread: steps, and everything that only this thread may touch. It plans and computes nothing itself."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from myserve.core.isolation import failure_of, raise_if_of_the_device
from myserve.core.rows import RowState
from myserve.engine.meters import EngineMeters
from myserve.engine.requests.admission import Submission
from myserve.engine.requests.dispatch import Dispatcher
from myserve.engine.requests.results import drafters_of, outcomes_of
from myserve.engine.requests.stream import StepOutcome
from myserve.engine.runner.model_runner import ModelRunner
from myserve.engine.runner.step_result import StepResult
from myserve.engine.scheduling.adapter import AdapterVersion
from myserve.engine.scheduling.batch import Batch
from myserve.engine.scheduling.pausing import PauseMode, Pausing
from myserve.engine.scheduling.queue_bound import QueueBound
from myserve.engine.scheduling.request import Event, Request
from myserve.engine.scheduling.scheduler import Scheduler
from myserve.engine.weights.lora.adapter_files import PreparedAdapter
from myserve.engine.weights.prepare import Mode, Prepared, Source, UpdateOptions
from myserve.engine.weights.queue import WeightUpdates
from myserve.errors import EngineDeadError, WeightsLoadingError

__all__ = ["EngineThread"]

T = TypeVar("T")

logger = logging.getLogger("myserve.engine")


class EngineThread:
    """Runs one step after the other; between two steps it does what other threads have posted.

    The scheduler, the blocks, the cache and the sampling states belong to it. Other threads call `post`, `enter`,
    `check_room`, `start`, `stop`, and read counters.
    """

    def __init__(
        self,
        runner: ModelRunner,
        scheduler: Scheduler,
        queue: QueueBound,
        prepare_weights: Callable[[Source, UpdateOptions], Prepared],
    ) -> None:
        self.runner = runner
        self.scheduler = scheduler
        self.queue = queue  # under the lock
        self.updates = WeightUpdates(prepare_weights, self.post)
        self.meters = EngineMeters()
        self.pausing = Pausing(scheduler)
        # of requests that have not ended
        self._owner: dict[Request, Submission] = {}
        # of these, the ones whose sampling states are still being made
        self._unready: set[Request] = set()
        self._skipping = ThreadPoolExecutor(1, thread_name_prefix="myserve-noise")
        self._inbox: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._fatal: str | None = None  # not the error: its traceback would keep the weights

    # ---- for other threads

    @property
    def is_alive(self) -> bool:
        """False once a step has failed in a way that was not one request's own, or after `stop`."""
        return self._fatal is None and not self._stopping

    def start(self) -> bool:
        """Start the thread. False where it runs already, or has been stopped."""
        with self._wake:
            if self._thread is not None or self._stopping:
                return False
            self._thread = threading.Thread(target=self._run, name="myserve-engine", daemon=True)
            self._thread.start()
            return True

    def stop(self) -> None:
        """End the thread and wait for it; requests in flight end with an EngineDeadError."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread is not None:
            self._thread.join()
        self._skipping.shutdown(wait=False, cancel_futures=True)

    def post(self, task: Callable[[], None]) -> None:
        """Have `task` done on this thread, between two steps."""
        with self._wake:
            self._inbox.append(task)
            self._wake.notify()

    def check_room(self, n: int) -> None:
        """Raise what `enter` would, and count nothing."""
        with self._wake:
            self._check_open()
            self.queue.check(n)

    def enter(self, n: int) -> None:
        """Count `n` choices in. Raises OverloadedError, EngineDeadError, WeightsLoadingError."""
        with self._wake:
            self._check_open()
            self.queue.enter(n)

    def add(self, submission: Submission) -> None:
        """Begin with its requests after the present step."""
        self.post(lambda: self._add(submission))

    def abort(self, requests: Sequence[Request], reason: str) -> None:
        """End requests after the present step; those that have ended already stay as they are."""
        self.post(lambda: self._abort(requests, reason))

    def pause(self, mode: PauseMode) -> Future[bool]:
        """Run no step from now on, or from when `mode` allows it; the future says whether it came to that."""
        paused: Future[bool] = Future()
        self._post_alive(lambda: self.pausing.begin(mode, paused.set_result))
        return paused

    def call(self, task: Callable[[], T]) -> Future[T]:
        """Have `task` done between two steps; the future has its result. Raises EngineDeadError."""
        done: Future[T] = Future()

        def run() -> None:
            try:
                done.set_result(task())
            except Exception as error:
                done.set_exception(error)

        self._post_alive(run)
        return done

    def check_alive(self) -> None:
        """Raise EngineDeadError where it has ended."""
        if not self.is_alive:
            raise EngineDeadError(f"the engine has stopped ({self._fatal or 'shut down'})")

    def _post_alive(self, task: Callable[[], None]) -> None:
        """Post a task that somebody waits for: it is done, or this raises EngineDeadError."""
        with self._wake:
            self.check_alive()
            self._inbox.append(task)
            self._wake.notify()

    def _check_open(self) -> None:
        self.check_alive()
        if self.updates.refuses_requests:
            raise WeightsLoadingError("new weights are about to be swapped in; try again in a moment")

    # ---- the loop

    def step(self) -> bool:
        """Plan, run, take in, hand out. False when there was nothing to do."""
        began = time.monotonic()
        batch = self.scheduler.schedule(began)
        if not batch.scheduled:
            return False
        batch.planned = time.monotonic()  # what a draft model took is no cost of this step's rows
        result = self.runner.run(batch)
        now = time.monotonic()
        self.meters.add_step(batch, result, now - began, now)
        ended = self.scheduler.update(
            batch, result.token_ids, now, result.sampling_seconds, is_typical=result.is_typical
        )
        self._hand_out(batch, result, dict(ended))
        return True

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._take_inbox()
                self.updates.advance(self)
                self.pausing.advance()
                if not self.step():
                    self._wait_for_work()
            self._fail_all(EngineDeadError("the engine was shut down"))
        except BaseException as error:
            logger.critical("the engine stopped", exc_info=True)
            with self._wake:  # what was posted before is done by `_fail_all`, and nothing after
                self._fatal = f"{type(error).__name__}: {error}"
            self._fail_all(EngineDeadError(f"the engine stopped: {self._fatal}"))

    def _take_inbox(self) -> None:
        while self._inbox:
            self._inbox.popleft()()

    def _wait_for_work(self) -> None:
        def is_over() -> bool:
            return bool(self._inbox) or self._stopping

        # a little at a time, dropped when a request comes in; memory that was released must not be touched
        is_idle = not self.scheduler.released
        blocks, slots = self.scheduler.pool.num_ever_held, self.scheduler.block_tables.slots_ever_held
        while is_idle and not is_over():
            is_idle = self.runner.prepare_while_idle(blocks, slots, is_over)
        with self._wake:
            self._wake.wait_for(is_over)

    # ---- requests

    def _add(self, submission: Submission) -> None:
        for request in submission.requests:
            self._owner[request] = submission
        device = self.runner.device
        if not submission.skips_noise:
            self._begin(submission, lambda: submission.row_states(device))
            return
        # moving torch's generators on takes as long as many steps: no other request waits for it
        self._unready.update(submission.requests)
        made = self._skipping.submit(submission.row_states, device)
        made.add_done_callback(lambda rows: self.post(lambda: self._begin(submission, rows.result)))

    def _begin(self, submission: Submission, make_rows: Callable[[], list[RowState]]) -> None:
        """Hand those requests to the scheduler that nobody has aborted meanwhile."""
        self._unready.difference_update(submission.requests)
        requests = [request for request in submission.requests if request in self._owner]
        if not requests:
            return
        try:
            rows = dict(zip(submission.requests, make_rows(), strict=True))
            if submission.options.adapter is not None:
                version = self.runner.adapters.find(submission.options.adapter)
                for request in requests:
                    request.adapter = version
                    self.runner.adapters.begin(version)
            for request in requests:
                self.runner.add(request, rows[request], submission.params)
        except Exception as error:
            raise_if_of_the_device(error)
            self._fail(requests, failure_of(error, "preparing its sampling"))
        else:
            leader, *leader.siblings = requests
            self.scheduler.add(leader)

    def _abort(self, requests: Sequence[Request], reason: str) -> None:
        for request in requests:
            if request in self._unready:  # the scheduler has not seen it
                self._unready.discard(request)
                request.apply(Event.ABORT)
            else:
                self.scheduler.abort(request)
            self._forget(request, reason)

    def _forget(self, request: Request, reason: str) -> None:
        if self._owner.pop(request, None) is None:
            return
        self.runner.remove(request)
        if request.adapter is not None:
            self.runner.adapters.end(request.adapter)
        now = time.monotonic()
        self.meters.add_end(request, reason, now)
        with self._wake:
            self.queue.leave(now - request.times.arrived)

    def _hand_out(self, batch: Batch, result: StepResult, ended: dict[Request, str]) -> None:
        """Send the outcomes of a step to their streams; a prompt's scores before its first token."""
        mail, now = Dispatcher(), time.time()
        for request, scores in result.prompt_logprobs.items():
            mail.add(self._owner[request], StepOutcome(request.index, prompt_logprobs=scores))
        for request, error in result.failed_prompts.items():
            mail.add(self._owner[request], StepOutcome(request.index, finish_reason="error", error=error))
            ended[request] = "error"
            self.scheduler.abort(request)
        for request in batch.scored:
            mail.add(self._owner[request], StepOutcome(request.index, finish_reason="length"))
        for (request, part), draws, routed in zip(
            batch.draws, result.draws, result.routed_experts, strict=True
        ):
            owner, made_by = self._owner[request], drafters_of(batch.scheduled[part], draws)
            try:
                outcomes = outcomes_of(
                    request,
                    draws,
                    routed,
                    made_by,
                    ended.get(request),
                    owner,
                    self.scheduler.weight_version,
                    now,
                    closed_early=self.runner.closes_early(request),
                )
            except Exception as error:
                failure = failure_of(error, "reporting its token")
                outcomes = [StepOutcome(request.index, finish_reason="error", error=failure)]
                ended[request] = "error"
                self.scheduler.abort(request)
            for outcome in outcomes:
                mail.add(owner, outcome)
        for request, reason in ended.items():
            self._forget(request, reason)
        mail.send(self._abort_all_of)

    def _abort_all_of(self, loop: asyncio.AbstractEventLoop) -> None:
        """Abort the requests of an event loop that is closed: no one is left to read them."""
        self._abort([request for request, owner in self._owner.items() if owner.loop is loop], "abort")

    def _fail_all(self, error: Exception) -> None:
        self.updates.close(error)
        self._take_inbox()
        self.pausing.end()
        self._fail(list(self._owner), error)

    def _fail(self, requests: Sequence[Request], error: Exception) -> None:
        """End requests that the scheduler does not have, or will not run again, with an error."""
        mail = Dispatcher()
        for request in requests:
            mail.add(self._owner[request], StepOutcome(request.index, finish_reason="error", error=error))
            self._forget(request, "error")
        mail.send(self._abort_all_of)

    # ---- new weights (`weights.queue.Swapper`)

    def abort_in_flight(self) -> int:
        """End the requests that have tokens, with these; return how many. The others lose nothing, and start over."""
        return self._abort_with_tokens(self.scheduler.in_flight)

    def _abort_with_tokens(self, requests: Sequence[Request]) -> int:
        with_tokens = [request for request in requests if request.num_output_tokens]
        mail = Dispatcher()
        for request in with_tokens:
            mail.add(self._owner[request], StepOutcome(request.index, finish_reason="abort"))
            self._abort([request], "abort")
        mail.send(self._abort_all_of)
        return len(with_tokens)

    def swap(self, prepared: Prepared, version: int, options: UpdateOptions) -> None:
        """Put prepared weights in place; requests without a token yet start over with them."""
        prepared.install()
        self.runner.forget_recordings()
        for request in self.scheduler.change_weights(version):
            self.runner.restart(request)
        if options.reset_prefix_cache:
            self.scheduler.pool.forget_all()
        logger.info("weights %d, %s", version, prepared.checksum)

    def put_adapter(
        self, name: str, prepared: PreparedAdapter, *, path: str, replaces: bool, mode: Mode
    ) -> AdapterVersion:
        """Put an adapter in place of what its name meant. By "drain" requests that have begun keep their version."""
        adapters = self.runner.adapters
        version, old, is_void = adapters.put(name, prepared, path=path, replaces=replaces)
        if is_void:
            self.runner.forget_recordings(of_adapters_alone=True)
        if old is not None and mode != "drain":
            if mode == "abort":
                self._abort_with_tokens([r for r in self.scheduler.in_flight if r.adapter is old])
            following = [request for request in self._owner if request.adapter is old]
            adapters.begin(version, len(following))
            for request in self.scheduler.change_adapter(old, version):
                self.runner.restart(request)
            for _ in following:
                adapters.end(old)
        logger.info("adapter %r, version %d, %s", name, version.version, version.checksum)
        return version
