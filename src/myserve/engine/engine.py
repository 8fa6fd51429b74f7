"""The loop: requests in, steps on a thread of its own, tokens out. It plans nothing and computes nothing itself."""

from __future__ import annotations

import asyncio
import atexit
import logging
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count

from myserve.core.isolation import failure_of, raise_if_of_the_device
from myserve.core.params import SamplingParams
from myserve.engine.config import EngineConfig
from myserve.engine.constraints.factory import Constraints
from myserve.engine.memory.prefault import Reserve
from myserve.engine.meters import EngineLoad, EngineMeters
from myserve.engine.outputs import FinishReason, RequestMetrics, RoutingShape
from myserve.engine.progress import phase
from myserve.engine.requests.admission import ModelFacts, Submission, admit
from myserve.engine.requests.detokenizer import Detokenizer
from myserve.engine.requests.dispatch import Dispatcher
from myserve.engine.requests.options import SubmitOptions
from myserve.engine.requests.results import outcome_of, request_metrics
from myserve.engine.requests.stream import RequestStream, StepOutcome
from myserve.engine.runner.device_backend import DeviceBackend
from myserve.engine.runner.model_runner import ModelRunner, StepResult
from myserve.engine.runner.self_test import choose_batch_invariant_mode
from myserve.engine.scheduling.blocks import BlockPool
from myserve.engine.scheduling.queue_bound import QueueBound
from myserve.engine.scheduling.request import Request
from myserve.engine.scheduling.scheduler import Batch, Limits, Scheduler
from myserve.engine.token_bytes import TokenBytes
from myserve.engine.weights.loader import LoadedModel, load
from myserve.engine.weights.prepare import Mode, Prepared, Source, UpdateOptions, prepare
from myserve.engine.weights.queue import WeightUpdate, WeightUpdates
from myserve.errors import EngineDeadError, WeightsLoadingError

__all__ = ["Engine"]

logger = logging.getLogger("myserve.engine")


class Engine:
    """Many requests on one model.

    `submit` from any event loop; the engine's thread starts with the first request, or with `start()`.
    Every public method may be called from any thread.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        config: EngineConfig,
        backend: DeviceBackend | None = None,
        reserve: Reserve | None = None,
    ) -> None:
        self.config = config
        self.tokenizer = loaded.tokenizer
        with ThreadPoolExecutor(1) as beside:  # a table of Python objects, while weights are packed
            token_bytes = beside.submit(TokenBytes, loaded.tokenizer, loaded.vocab_size)
            with phase("packing the weights"):
                self.runner = ModelRunner(loaded, config, backend, reserve)
        self.token_bytes = token_bytes.result()
        with phase("checking that a request's tokens do not depend on its batch"):
            self._independent = choose_batch_invariant_mode(self.runner, loaded.vocab_size)
        cache = self.runner.kv_cache
        longest, routing = self.runner.max_model_len, self.runner.routed_experts.shape
        eos_token_ids = tuple(i for i in loaded.eos_token_ids if 0 <= i < loaded.vocab_size)
        if unknown := sorted(set(loaded.eos_token_ids) - set(eos_token_ids)):
            logger.warning("the config's EOS ids %s are not in the vocabulary, and end nothing", unknown)
        self.facts = ModelFacts(loaded.vocab_size, longest, eos_token_ids, routing)
        limits = Limits(
            config.max_num_seqs,
            config.max_num_batched_tokens,
            config.prefill_chunk,
            longest,
            config.target_inter_token_latency,
        )
        self.scheduler = Scheduler(BlockPool(cache.num_blocks, cache.block_size), limits)
        if config.exact == "on" and not self._independent:
            logger.warning(
                "%s: tokens depend on their batch; no way to compute was found exact", loaded.device
            )
        logger.info("exactness %s; %r; context %d", self.exactness, self.scheduler.pool, self.max_model_len)
        self._loaded = loaded
        self._updates = WeightUpdates(self._prepare_weights, self._post)
        self.constraints = Constraints(loaded.tokenizer, self.token_bytes, eos_token_ids)
        self._arrivals = count()
        # of requests that have not ended; the engine's thread alone writes it, and the meters
        self._owner: dict[Request, Submission] = {}
        self.meters = EngineMeters()
        self._inbox: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._fatal: str | None = None  # not the error: its traceback would keep the weights
        self._queue = QueueBound(config.max_queue, config.max_num_seqs)  # under the lock

    @classmethod
    def from_pretrained(
        cls, model: str, config: EngineConfig | None = None, reserve: Reserve | None = None
    ) -> Engine:
        """Load a path or hub id, in the calling thread. Raises UnsupportedModelError for what cannot be batched.

        `reserve`: memory for its weights that another thread fills already (`prefault.begin`); what is left of it is
        given back here, whether the model loads or not.
        """
        try:
            with phase(f"reading the weights of {model}"):
                loaded = load(model, config := config or EngineConfig())
            return cls(loaded, config, reserve=reserve)
        finally:
            if reserve is not None:
                reserve.give_back()

    # ---- for callers

    @property
    def max_model_len(self) -> int:
        """Tokens of prompt and completion together that one request may have."""
        return self.facts.max_model_len

    @property
    def vocab_size(self) -> int:
        """Width of the logits."""
        return self.facts.vocab_size

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Ids that end a completion unless `ignore_eos`."""
        return self.facts.eos_token_ids

    @property
    def routing_shape(self) -> RoutingShape | None:
        """The form of what `SamplingParams.routed_experts` reports for each token; None for a dense model."""
        return self.facts.routing_shape

    @property
    def exactness(self) -> dict[str, str | int | bool]:
        """How rows are made independent (`exact.ExactReport`), and whether they were found so on this machine."""
        return self.runner.exact_report.as_dict() | {"rows_are_independent": self._independent}

    @property
    def weight_version(self) -> int:
        """The version of the weights that compute now; 0 at first."""
        return self.scheduler.weight_version

    @property
    def load(self) -> EngineLoad:
        """How full it is: read without a lock, so a step may lie between two of the numbers."""
        running, pool = len(self.scheduler.running), self.scheduler.pool
        waiting = max(0, self._queue.num_open - running)
        return EngineLoad(running, waiting, pool.usage, self.scheduler.num_preemptions)

    @property
    def is_alive(self) -> bool:
        """False once a step has failed in a way that was not one request's own, or after `shutdown`."""
        return self._fatal is None and not self._stopping

    async def prepare(self, params: SamplingParams) -> None:
        """Compile the grammar, off the event loop, so that `submit` need not wait for it. Raises RequestError."""
        await self.constraints.prepare(params)

    def check_room(self, n: int) -> None:
        """Raise what `submit` would for `n` completions that do not fit the queue: before a prompt is tokenized."""
        with self._wake:
            self._check_open()
            self._queue.check(n)

    def submit(
        self,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        options: SubmitOptions | None = None,
    ) -> RequestStream:
        """Queue one prompt and return the stream of its completions; call it inside a running event loop.

        `prompt_token_ids`: at least one id, fewer than the context has; `options`: how many completions, whose, and
        what else is not about sampling. Raises `RequestError` for what cannot be asked, `ContextLengthError` for what
        does not fit the context, `OverloadedError` when the queue is full, `EngineDeadError`.
        """
        options = options or SubmitOptions()
        submission = admit(
            prompt_token_ids,
            params,
            options,
            self.facts,
            arrival=next(self._arrivals),
            cache_root=self._cache_root(options),
            constraints=self.constraints,
            now=time.monotonic(),
        )
        self._reserve(options.n)
        submission.stream = self._stream_of(submission)
        self._post(lambda: self._add(submission))
        self.start()
        return submission.stream

    def update_weights(
        self,
        source: Source,
        *,
        mode: Mode = "drain",
        partial: bool = False,
        version: int | None = None,
        checksum: str | None = None,
        refuse_new: bool = False,
        reset_prefix_cache: bool = False,
    ) -> WeightUpdate:
        """New weights for the same model, from a folder of safetensors or a `state_dict`: await it, or `.result()`.

        They are read, checked and packed beside the old ones, and then put in place between two steps. `mode`:
        "drain" lets requests in flight finish first and keeps new ones waiting (`refuse_new`: WeightsLoadingError
        instead); "keep" lets them go on with the keys and values they have; "abort" ends them with the tokens they
        have. `UpdateOptions` has the rest. Tensors of a state dict must not change until it is done.
        Raises RequestError here, BadSnapshotError from the update: then nothing was changed.
        """
        options = UpdateOptions(
            mode=mode,
            partial=partial,
            version=version,
            checksum=checksum,
            refuse_new=refuse_new,
            reset_prefix_cache=reset_prefix_cache,
        )
        update = WeightUpdate(source, options)
        self._updates.add(update, lambda: self.weight_version)
        self.start()
        return update

    def start(self) -> None:
        """Start the engine's thread; nothing happens where it runs already."""
        with self._wake:
            if self._thread is None and not self._stopping:
                self._thread = threading.Thread(target=self._run, name="myserve-engine", daemon=True)
                self._thread.start()
                # a thread that Python ends in the midst of PyTorch's code takes the process with it: SIGABRT
                atexit.register(_shut_down, weakref.ref(self))

    def shutdown(self) -> None:
        """End the thread; requests in flight end with an EngineDeadError. The engine cannot be started again.

        Gives its memory back, though somebody may still hold the engine.
        """
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread is not None:
            self._thread.join()
        self.constraints.close()
        self.runner.close()
        vars(self).pop("_loaded", None)

    # ---- the engine's thread

    def step(self) -> bool:
        """Plan, run, take in, hand out. False when there was nothing to do."""
        began = time.monotonic()
        batch = self.scheduler.schedule(began)
        if not batch.scheduled:
            return False
        result = self.runner.run(batch)
        now = time.monotonic()
        self.meters.add_step(batch, result, now - began, now)
        ended = self.scheduler.update(batch, result.token_ids, now)
        self._hand_out(batch, result, dict(ended))
        return True

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._take_inbox()
                self._updates.advance(self)
                if not self.step():
                    self._wait_for_work()
            self._fail_all(EngineDeadError("the engine was shut down"))
        except BaseException as error:
            logger.critical("the engine stopped", exc_info=True)
            self._fatal = f"{type(error).__name__}: {error}"
            self._fail_all(EngineDeadError(f"the engine stopped: {self._fatal}"))

    def _take_inbox(self) -> None:
        while self._inbox:
            self._inbox.popleft()()

    def _wait_for_work(self) -> None:
        ever_held, is_idle = self.scheduler.pool.num_ever_held, True
        # a little at a time: a request that comes in waits for one of them at most
        while is_idle and not (self._inbox or self._stopping):
            is_idle = self.runner.prepare_while_idle(ever_held)
        with self._wake:
            self._wake.wait_for(lambda: bool(self._inbox) or self._stopping)

    def _add(self, submission: Submission) -> None:
        for request in submission.requests:
            self._owner[request] = submission
        try:
            for request in submission.requests:
                row = submission.row_state(request.index, self.runner.device)
                self.runner.add(request, row, submission.params)
        except Exception as error:
            raise_if_of_the_device(error)
            self._fail(submission.requests, failure_of(error, "preparing its sampling"))
        else:
            self.scheduler.add(submission.requests[0])

    def _abort(self, requests: Sequence[Request], reason: str = "abort") -> None:
        for request in requests:
            self.scheduler.abort(request)
            self._forget(request, reason)

    def _forget(self, request: Request, reason: str) -> None:
        if self._owner.pop(request, None) is None:
            return
        self.runner.remove(request)
        now = time.monotonic()
        self.meters.add_end(request, reason, now)
        with self._wake:
            self._queue.leave(now - request.times.arrived)

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
        for (request, _), draw, routed in zip(batch.draws, result.draws, result.routed_experts, strict=True):
            owner = self._owner[request]
            try:
                outcome = outcome_of(
                    request,
                    draw,
                    routed,
                    ended.get(request),
                    owner,
                    self.weight_version,
                    now,
                    closed_early=self.runner.closes_early(request),
                )
            except Exception as error:
                failure = failure_of(error, "reporting its token")
                outcome = StepOutcome(request.index, finish_reason="error", error=failure)
                ended[request] = "error"
                self.scheduler.abort(request)
            mail.add(owner, outcome)
        for request, reason in ended.items():
            self._forget(request, reason)
        mail.send(self._abort_all_of)

    def _abort_all_of(self, loop: asyncio.AbstractEventLoop) -> None:
        """Abort the requests of an event loop that is closed: no one is left to read them."""
        self._abort([request for request, owner in self._owner.items() if owner.loop is loop])

    def _fail_all(self, error: Exception) -> None:
        self._updates.close(error)
        self._take_inbox()
        self._fail(list(self._owner), error)

    def _fail(self, requests: Sequence[Request], error: Exception) -> None:
        """End requests that the scheduler does not have, or will not run again, with an error."""
        mail = Dispatcher()
        for request in requests:
            mail.add(self._owner[request], StepOutcome(request.index, finish_reason="error", error=error))
            self._forget(request, "error")
        mail.send(self._abort_all_of)

    # ---- new weights, on the engine's thread (`weight_updates.Swapper`)

    def end_begun(self) -> int:
        """Everyone in flight that has tokens ends with them; the others have nothing to lose, and start over."""
        begun = [request for request in self.scheduler.in_flight if request.num_output_tokens]
        mail = Dispatcher()
        for request in begun:
            mail.add(self._owner[request], StepOutcome(request.index, finish_reason="abort"))
            self._abort([request])
        mail.send(self._abort_all_of)
        return len(begun)

    def swap(self, prepared: Prepared, version: int, options: UpdateOptions) -> None:
        prepared.install()
        self.runner.recorded_steps.clear()
        for request in self.scheduler.change_weights(version):
            self.runner.restart(request)
        if options.reset_prefix_cache:
            self.scheduler.pool.forget_all()
        logger.info("weights %d, %s", version, prepared.checksum)

    def _prepare_weights(self, source: Source, options: UpdateOptions) -> Prepared:
        return prepare(
            source,
            self.runner.model,
            self._loaded.weight_names,
            partial=options.partial,
            checksum=options.checksum,
            may_cast=self._loaded.casts,
        )

    # ---- between the threads

    def _post(self, task: Callable[[], None]) -> None:
        with self._wake:
            self._inbox.append(task)
            self._wake.notify()

    def _reserve(self, n: int) -> None:
        """Count `n` choices in, or say that there is no room."""
        with self._wake:
            self._check_open()
            self._queue.enter(n)

    def _cache_root(self, options: SubmitOptions) -> Hashable:
        """Return what requests must agree on to find each other's prefixes."""
        if not self.config.prefix_caching:
            return object()  # no two requests agree on a fresh object
        return ("" if self.config.share_prefix_cache else options.client, options.cache_salt)

    def _check_open(self) -> None:
        if not self.is_alive:
            raise EngineDeadError(f"the engine has stopped ({self._fatal or 'shut down'})")
        if self._updates.refuses_requests:
            raise WeightsLoadingError("new weights are about to be swapped in; try again in a moment")

    def _stream_of(self, submission: Submission) -> RequestStream:
        requests = submission.requests

        def abort(indices: list[int], reason: FinishReason) -> None:
            self._post(lambda: self._abort([requests[i] for i in indices], reason))

        def metrics(index: int) -> RequestMetrics:
            now, usage = time.monotonic(), self.scheduler.pool.usage
            return request_metrics(requests[index], now, time.time(), self._queue.num_open, usage)

        detokenizers = [Detokenizer(self.token_bytes, submission.params) for _ in requests]
        return RequestStream(
            submission.request_id, submission.seed, detokenizers, abort=abort, metrics=metrics
        )


def _shut_down(engine: weakref.ref[Engine]) -> None:
    if (alive := engine()) is not None:
        alive.shutdown()
