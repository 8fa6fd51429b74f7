"""Many requests on one model: what a caller may ask, from any thread. `EngineThread` runs them, step by step."""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
import time
import weakref
from collections.abc import Collection, Hashable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any

from myserve.core.params import SamplingParams
from myserve.engine.config import NUM_SEQS_AT_ANY_PACE, EngineConfig
from myserve.engine.constraints.factory import Constraints
from myserve.engine.drafting.drafts import Drafts
from myserve.engine.memory import spill
from myserve.engine.memory.freed import give_back_freed
from myserve.engine.memory.prefault import Reserve
from myserve.engine.meters import EngineLoad
from myserve.engine.outputs import FinishReason, RequestMetrics, RoutingShape
from myserve.engine.progress import phase
from myserve.engine.requests.admission import ModelFacts, Submission, admit
from myserve.engine.requests.detokenizer import Detokenizer
from myserve.engine.requests.options import SubmitOptions
from myserve.engine.requests.results import request_metrics
from myserve.engine.requests.stream import OutcomeReceiver, RequestStream, Submitted
from myserve.engine.runner import kept_self_test
from myserve.engine.runner.combined_drafts import CombinedDrafts
from myserve.engine.runner.device_backend import DeviceBackend
from myserve.engine.runner.draft_model import DraftModel, check_vocabulary
from myserve.engine.runner.kv_cache import SLOTS_A_REQUEST
from myserve.engine.runner.model_runner import ModelRunner
from myserve.engine.scheduling.adapter import AdapterVersion
from myserve.engine.scheduling.batch import Limits
from myserve.engine.scheduling.blocks import BlockPool
from myserve.engine.scheduling.pausing import PAUSE_MODES, PauseMode
from myserve.engine.scheduling.queue_bound import QueueBound
from myserve.engine.scheduling.row_costs import RowCosts
from myserve.engine.scheduling.scheduler import Scheduler
from myserve.engine.scheduling.speculation import Speculation
from myserve.engine.scheduling.state_slots import StateSlots
from myserve.engine.thread import EngineThread
from myserve.engine.token_bytes import TokenBytes
from myserve.engine.weights.loader import LoadedModel, load
from myserve.engine.weights.lora.adapter_files import prepare_adapter
from myserve.engine.weights.lora.adapters import already_loaded
from myserve.engine.weights.prepare import MODES, Mode, Prepared, Source, UpdateOptions, prepare
from myserve.engine.weights.queue import WeightUpdate
from myserve.engine.weights.readback import checksums_of, places_of_weights, zeros_like_weights
from myserve.errors import RequestError, UnsupportedModelError

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
        self._limit = loaded.limit
        draft = self._load_draft_model(loaded)
        self_test_key = kept_self_test.key_of(loaded, config)  # before the weights are packed
        with ThreadPoolExecutor(1) as beside:  # a table of Python objects, while weights are packed
            token_bytes = beside.submit(TokenBytes, loaded.tokenizer, loaded.vocab_size)
            with phase("packing the weights"):
                self.runner = ModelRunner(loaded, config, backend, reserve)
        self.token_bytes = token_bytes.result()
        self._independent = kept_self_test.check(self.runner, self_test_key, loaded.vocab_size)
        give_back_freed()
        cache = self.runner.kv_cache
        longest, routing = self.runner.max_model_len, self.runner.routed_experts.shape
        if longest < (config.max_model_len or 0):
            logger.warning(
                "contexts end at %d tokens, not at the %d of max_model_len: the model was made for %d, and the KV "
                "cache has room for %d",
                *(longest, config.max_model_len, loaded.max_model_len, cache.num_blocks * cache.block_size),
            )
        eos_token_ids = tuple(i for i in loaded.eos_token_ids if 0 <= i < loaded.vocab_size)
        if unknown := sorted(set(loaded.eos_token_ids) - set(eos_token_ids)):
            logger.warning("the config's EOS ids %s are not in the vocabulary, and end nothing", unknown)
        self.facts = ModelFacts(loaded.vocab_size, longest, eos_token_ids, routing)
        states = StateSlots(cache.num_state_slots) if cache.states else None
        most = (
            config.most_seqs if states is None else min(config.most_seqs, states.num_slots // SLOTS_A_REQUEST)
        )
        side_by_side = min(config.max_num_seqs or NUM_SEQS_AT_ANY_PACE, most)
        limits = Limits(
            most,
            config.max_num_batched_tokens,
            config.prefill_chunk,
            longest,
            config.target_inter_token_latency,
            attention=self.runner.structure.attention_costs(loaded.num_weights),
            num_seqs_at_any_pace=side_by_side,
        )
        pool = BlockPool(cache.num_blocks, cache.block_size)
        self.draft_model = None if draft is None else DraftModel(draft, config, loaded.vocab_size)
        self.scheduler = Scheduler(pool, limits, self._speculation(limits), states)
        if config.exact == "on" and not self._independent:
            logger.warning(
                "%s: tokens depend on their batch; no way to compute was found exact", loaded.device
            )
        logger.info("exactness %s; %r; context %d", self.exactness, self.scheduler.pool, self.max_model_len)
        if self.quantization["method"] != "off":
            logger.info("quantization %s", self.quantization)
        self._loaded = loaded
        self._spilled: spill.Spilled | None = None  # weights whose memory is released; the engine's thread's
        self.constraints = Constraints(loaded.tokenizer, self.token_bytes, eos_token_ids)
        self._arrivals = count()
        self._queue = QueueBound(config.max_queue, side_by_side)
        self.thread = EngineThread(self.runner, self.scheduler, self._queue, self._prepare_weights)
        self.meters = self.thread.meters
        if (speculation := self.scheduler.speculation) is not None:
            self.meters.drafts = speculation.counts

    @classmethod
    def from_pretrained(
        cls,
        model: str | os.PathLike[str],
        config: EngineConfig | None = None,
        reserve: Reserve | None = None,
    ) -> Engine:
        """Load a path or hub id, in the calling thread. Raises UnsupportedModelError for what cannot be batched.

        `reserve`: memory for its weights that another thread fills already (`prefault.begin`); what is left of it is
        given back here, whether the model loads or not.
        """
        try:
            with phase(f"reading the weights of {model}"):
                loaded = load(model, config := config or EngineConfig(), reserve)
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
        """The means that make rows independent (`patch.ExactReport`), this machine's self-test, the drafts; a limit."""
        return self.runner.exact_report.as_dict() | {
            "rows_are_independent": self._independent,
            "speculation": "off" if self.scheduler.speculation is None else self.config.speculation,
            **({"limit": self._limit} if self._limit else {}),
        }

    @property
    def quantization(self) -> dict[str, Any]:
        """The layers that compute in int8, and those that do not (`QuantizationReport`)."""
        return self.runner.quantization.as_dict()

    @property
    def weight_version(self) -> int:
        """The version of the weights that compute now; 0 at first."""
        return self.scheduler.weight_version

    @property
    def load(self) -> EngineLoad:
        """The engine's load: read without a lock, so a step may lie between two of the numbers."""
        running, pool = len(self.scheduler.running), self.scheduler.pool
        waiting = max(0, self._queue.num_open - running)
        return EngineLoad(running, waiting, pool.usage, self.scheduler.num_preemptions)

    @property
    def is_alive(self) -> bool:
        """False once a step has failed in a way that was not one request's own, or after `shutdown`."""
        return self.thread.is_alive

    async def prepare(self, params: SamplingParams) -> None:
        """Compile the grammar, off the event loop, so that `submit` need not wait for it. Raises RequestError."""
        await self.constraints.prepare(params)

    def check_room(self, n: int) -> None:
        """Raise what `submit` would for `n` completions that do not fit the queue: before a prompt is tokenized."""
        self.thread.check_room(n)

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
        submission = self._admit(prompt_token_ids, params, options or SubmitOptions())
        stream = self._stream_of(submission)
        self._begin(submission, stream)
        return stream

    def submit_raw(
        self,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        options: SubmitOptions,
        receiver: OutcomeReceiver,
    ) -> Submitted:
        """Queue one prompt as `submit` does; its tokens go to `receiver` as they are drawn, without their text.

        Stop strings are the receiver's matter: it aborts what they end. Raises what `submit` raises.
        """
        submission = self._admit(prompt_token_ids, params, options)
        self._begin(submission, receiver)
        return self._submitted(submission)

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
        held: bool = False,
    ) -> WeightUpdate:
        """New weights for the same model, from a folder of safetensors or a `state_dict`: await it, or `.result()`.

        They are read, checked and packed beside the old ones, and then put in place between two steps. `mode`:
        "drain" lets requests in flight finish first and keeps new ones waiting (`refuse_new`: WeightsLoadingError
        instead); "keep" lets them go on with the keys and values they have; "abort" ends them with the tokens they
        have. `UpdateOptions` has the rest. Tensors of a state dict must not change until it is done.
        `held`: what is prepared waits for `WeightUpdate.release`.
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
        update = WeightUpdate(source, options, held=held)
        self.thread.updates.add(update, lambda: self.weight_version)
        self.start()
        return update

    @property
    def adapters(self) -> Mapping[str, AdapterVersion]:
        """The loaded adapters by their names, at this moment."""
        return self.runner.adapters.current

    def load_adapter(
        self,
        name: str,
        folder: str | Path,
        *,
        path: str | None = None,
        replaces: bool = True,
        mode: Mode = "drain",
    ) -> Future[AdapterVersion]:
        """Load a PEFT adapter (LoRA) from a folder; the future has its version. Any thread.

        It is read, checked and packed beside what serves, and put in place between two steps. `mode`: what becomes of
        requests in flight where the name had another version: "drain" lets them finish with theirs, "keep" lets them
        go on with the new one and the keys and values they have, "abort" ends them with the tokens they have. `path`:
        what the folder is called in lists. The future raises BadAdapterError, NotEnoughMemoryError, or RequestError
        where the name is loaded and `replaces` is False; then nothing was changed.
        """
        if mode not in MODES:
            raise RequestError(f"mode must be one of {', '.join(MODES)}, got {mode!r}", param="mode")
        if not self.runner.takes_adapters:
            raise UnsupportedModelError(
                "adapters are computed by the batch-invariant kernels of a CPU, and this engine computes without them "
                f"(device {self.runner.device}, exact={self.config.exact})"
            )
        if not replaces and name in self.adapters:
            raise already_loaded(name)
        self.start()
        told, names = str(folder) if path is None else path, self._loaded.weight_names

        def load_it() -> AdapterVersion:
            prepared = prepare_adapter(Path(folder), self.runner.model, names)
            return self.thread.call(
                lambda: self.thread.put_adapter(name, prepared, path=told, replaces=replaces, mode=mode)
            ).result()

        return self.thread.updates.read(load_it, lambda: self.weight_version)

    def unload_adapter(self, name: str) -> Future[AdapterVersion]:
        """Take an adapter away; requests that have begun with it go on to their ends. Any thread.

        The future raises ModelNotFoundError for a name that is not loaded.
        """
        self.start()
        return self.thread.call(lambda: self.runner.adapters.remove(name))

    async def pause(self, mode: PauseMode = "keep") -> None:
        """Run no step until `resume`; return when none runs. New requests and new weights are taken meanwhile.

        `mode`: what becomes of requests in flight: "keep" leaves them their keys and values, "retract" takes those, so
        that they are computed again, "wait" lets them finish first. Raises RequestError for a pause that `resume` has
        ended before it began, EngineDeadError.
        """
        if mode not in PAUSE_MODES:
            raise RequestError(f"mode must be one of {', '.join(PAUSE_MODES)}, got {mode!r}", param="mode")
        self.start()
        has_paused = await asyncio.wrap_future(self.thread.pause(mode))
        if not has_paused:
            self.thread.check_alive()
            raise RequestError(
                "generation was resumed before the requests in flight had finished", param="mode"
            )

    async def resume(self) -> None:
        """Go on where `pause` has stopped. Harmless where nothing is paused. Raises EngineDeadError."""
        self.start()
        await asyncio.wrap_future(self.thread.call(self.thread.pausing.end))

    async def weight_checksums(self) -> dict[str, str]:
        """Return SHA-256 of each weight, read back from where the model has it. Raises EngineDeadError, EngineError."""
        self.start()
        names, model = self._loaded.weight_names, self.runner.model
        read = self.thread.updates.read(lambda: checksums_of(model, names), lambda: self.weight_version)
        return await asyncio.wrap_future(read)

    def reset_weights(self) -> WeightUpdate:
        """Put zeros in place of every weight, as an update of its own: for a test that an update replaces all."""
        return self.update_weights(zeros_like_weights(self._loaded.weight_names), mode="keep", partial=True)

    async def release_memory(self, tags: Collection[str]) -> None:
        """Give the memory of "kv_cache" and "weights" back, until `restore_memory`; no step runs meanwhile.

        Requests in flight are computed again afterwards; weights lie in a temporary file until then. CPU alone: raises
        RequestError elsewhere.
        """
        if self.runner.device.type != "cpu":
            raise RequestError("memory can be released on a CPU alone", param="tags")
        self.start()
        await asyncio.wrap_future(self.thread.call(lambda: self._release(frozenset(tags))))

    async def restore_memory(self, tags: Collection[str]) -> None:
        """Bring back what `release_memory` has given away, with the same values; steps run once all of it is there."""
        self.start()
        await asyncio.wrap_future(self.thread.call(lambda: self._restore(frozenset(tags))))

    @property
    def released(self) -> frozenset[str]:
        """The tags whose memory is released now."""
        return self.scheduler.released

    def _release(self, tags: frozenset[str]) -> None:
        self.scheduler.preempt_all()
        self.scheduler.pool.forget_all()
        self.scheduler.released |= tags  # first: whatever fails below, no step runs without its memory
        if "kv_cache" in tags:
            spill.drop(tensor for layer in self.runner.kv_cache.layers for tensor in layer)
            spill.drop(self.runner.kv_cache.states)
        if "weights" in tags and self._spilled is None:
            self._spilled = spill.Spilled(places_of_weights(self.runner.model))

    def _restore(self, tags: frozenset[str]) -> None:
        if "weights" in tags and self._spilled is not None:
            self._spilled.restore()
            self._spilled = None
        self.scheduler.released -= tags

    async def forget_prefixes(self) -> None:
        """Forget every cached prefix; what requests in flight hold stays theirs. Raises EngineDeadError."""
        self.start()
        await asyncio.wrap_future(self.thread.call(self.scheduler.pool.forget_all))

    @property
    def is_paused(self) -> bool:
        """True while no step runs: until `resume`, or until memory that was released is there again."""
        return self.scheduler.is_paused or bool(self.scheduler.released)

    def start(self) -> None:
        """Start the engine's thread; nothing happens where it runs already."""
        if self.thread.start():
            # a thread that Python ends in the midst of PyTorch's code takes the process with it: SIGABRT
            atexit.register(_shut_down, weakref.ref(self))

    def shutdown(self) -> None:
        """End the thread; requests in flight end with an EngineDeadError. The engine cannot be started again.

        Gives its memory back, even where a reference to the engine is kept.
        """
        self.thread.stop()
        self.constraints.close()
        self.runner.close()
        if self.draft_model is not None:
            self.draft_model.close()
        vars(self).pop("_loaded", None)

    # ---- pieces of the above

    def _speculation(self, limits: Limits) -> Speculation | None:
        """Return what adds drafts to steps; None where they are off, or would show in what is drawn."""
        asked = self.config.speculation
        if asked == "off" or self.config.exact == "off" or not self._independent:
            return None
        number = None if asked == "auto" else int(asked)
        row_costs = RowCosts()
        drafter = CombinedDrafts(Drafts(), self.runner, self.draft_model, row_costs.seconds, number)
        return Speculation(drafter, limits, row_costs, number)

    def _load_draft_model(self, target: LoadedModel) -> LoadedModel | None:
        name = self.config.draft_model
        if name is None:
            return None
        with phase(f"reading the weights of the draft model {name}"):
            loaded = load(name, self.config)
        check_vocabulary(loaded, target, name)
        return loaded

    def _prepare_weights(self, source: Source, options: UpdateOptions) -> Prepared:
        return prepare(
            source,
            self.runner.model,
            self._loaded.weight_names,
            partial=options.partial,
            checksum=options.checksum,
            may_cast=self._loaded.casts,
        )

    def _cache_root(self, options: SubmitOptions) -> Hashable:
        """Return what requests must agree on to find each other's prefixes."""
        if not self.config.prefix_caching:
            return object()  # no two requests agree on a fresh object
        return ("" if self.config.share_prefix_cache else options.client, options.cache_salt)

    def _admit(
        self, prompt_token_ids: Sequence[int], params: SamplingParams, options: SubmitOptions
    ) -> Submission:
        if options.adapter is not None:
            self.runner.adapters.find(options.adapter)
        return admit(
            prompt_token_ids,
            params,
            options,
            self.facts,
            arrival=next(self._arrivals),
            cache_root=self._cache_root(options),
            constraints=self.constraints,
            now=time.monotonic(),
        )

    def _begin(self, submission: Submission, receiver: OutcomeReceiver) -> None:
        self.thread.enter(submission.options.n)
        submission.stream = receiver
        self.thread.add(submission)
        self.start()

    def _submitted(self, submission: Submission) -> Submitted:
        requests = submission.requests

        def abort(indices: list[int], reason: FinishReason) -> None:
            self.thread.abort([requests[i] for i in indices], reason)

        def metrics(index: int) -> RequestMetrics:
            now, usage = time.monotonic(), self.scheduler.pool.usage
            return request_metrics(requests[index], now, time.time(), self._queue.num_open, usage)

        return Submitted(submission.seed, abort, metrics)

    def _stream_of(self, submission: Submission) -> RequestStream:
        submitted = self._submitted(submission)
        detokenizers = [Detokenizer(self.token_bytes, submission.params) for _ in submission.requests]
        return RequestStream(
            submission.request_id,
            submission.seed,
            detokenizers,
            abort=submitted.abort,
            metrics=submitted.metrics,
        )


def _shut_down(engine: weakref.ref[Engine]) -> None:
    if (alive := engine()) is not None:
        alive.shutdown()
