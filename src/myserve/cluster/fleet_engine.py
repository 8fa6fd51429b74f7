"""A fleet is an engine: what routes ask of one is done by replicas, and every dialect, limit and key stays as it is."""

from __future__ import annotations

import asyncio
import secrets
import threading
import time
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

from myserve.cluster.controller import ControllerLostError
from myserve.cluster.fleet import Directory, Fleet
from myserve.cluster.journal import Adapter
from myserve.cluster.link import Link
from myserve.cluster.messages import Members, ReplicaStatus
from myserve.cluster.placed import Placed
from myserve.core.params import SamplingParams
from myserve.engine.config import EngineConfig
from myserve.engine.meters import EngineLoad, EngineMeters
from myserve.engine.outputs import FinishReason, RoutingShape
from myserve.engine.requests.admission import ModelFacts, checked_request
from myserve.engine.requests.detokenizer import Detokenizer
from myserve.engine.requests.options import SubmitOptions
from myserve.engine.requests.stream import RequestStream
from myserve.engine.scheduling.adapter import AdapterVersion
from myserve.engine.scheduling.pausing import PAUSE_MODES, PauseMode
from myserve.engine.token_bytes import TokenBytes
from myserve.engine.weights.prepare import UpdateOptions, WeightReport
from myserve.engine.weights.queue import WeightUpdate
from myserve.errors import (
    EngineDeadError,
    EngineError,
    ModelNotFoundError,
    OverloadedError,
    RequestError,
    WeightsLoadingError,
)
from myserve.server.errors import EngineRestartingError
from myserve.server.models.replicas import ReplicaView

__all__ = ["ControlPlane", "FleetEngine"]

T = TypeVar("T")


class ControlPlane(Directory, Protocol):
    """The controller, however it is reached."""

    async def update_weights(self, name: str, **options: Any) -> dict[str, Any]: ...
    async def change_adapter(self, change: Adapter) -> Any: ...
    async def everywhere(self, method: str, **args: Any) -> None: ...


class FleetEngine:
    """Stands for an `Engine`, on any thread and event loop. Its streams outlive the replicas that they run on.

    `start` blocks until a replica has joined. `tokenizer` is the model's own.
    """

    def __init__(self, control: ControlPlane, secret: str, config: EngineConfig, tokenizer: Any) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.control = control
        self._is_shut_down = False
        self._refuses = False  # an update that refuses new requests is on its way
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="myserve-fleet", daemon=True)
        self.fleet = Fleet(control, secret, shares_prefixes=config.share_prefix_cache)
        self._running: Future[None] | None = None

    def start(self, wait: Callable[[], None] = lambda: time.sleep(0.1)) -> None:
        """Begin to follow the fleet, and wait for its first replica; what `wait` raises ends that."""
        if self._running is not None:
            return
        self._thread.start()
        self._running = self._run(self.fleet.run())
        coming = self._run(self.fleet.first_link())
        while not coming.done():
            wait()
        first = coming.result()
        assert first.status is not None
        self._facts = first.status.facts
        self.facts = ModelFacts(
            self._facts.vocab_size,
            self._facts.max_model_len,
            self._facts.eos_token_ids,
            self._facts.routing_shape,
        )
        self.token_bytes = TokenBytes(self.tokenizer, self._facts.vocab_size)

    def _run(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    async def _do(self, work: Coroutine[Any, Any, T]) -> T:
        return await asyncio.wrap_future(self._run(work))

    # ---- what does not change

    @property
    def max_model_len(self) -> int:
        return self.facts.max_model_len

    @property
    def vocab_size(self) -> int:
        return self.facts.vocab_size

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        return self.facts.eos_token_ids

    @property
    def routing_shape(self) -> RoutingShape | None:
        return self.facts.routing_shape

    @property
    def exactness(self) -> dict[str, str | int | bool]:
        """The first replica's, and the classes of bits that the replicas form; one, where all are alike."""
        classes = sorted({link.member.bits for link in self.links})
        return {**self._facts.exactness, "replica_classes": ",".join(classes)}

    @property
    def quantization(self) -> Mapping[str, Any]:
        return self._facts.quantization

    # ---- what is so now

    @property
    def links(self) -> list[Link]:
        """The replicas that are connected, by name."""
        return sorted(self.fleet.links.values(), key=lambda link: link.name)

    @property
    def _statuses(self) -> list[ReplicaStatus]:
        return [link.status for link in self.links if link.status is not None]

    @property
    def weight_version(self) -> int:
        """The published version; a replica that swaps at this moment may be ahead of it."""
        return self.fleet.members.weight_version

    @property
    def is_alive(self) -> bool:
        """False after `shutdown`: replicas that are lost come back."""
        return not self._is_shut_down

    @property
    def is_reachable(self) -> bool:
        """True while a replica takes requests."""
        return self.fleet.is_reachable

    @property
    def is_paused(self) -> bool:
        return any(status.is_paused for status in self._statuses)

    @property
    def released(self) -> frozenset[str]:
        return frozenset().union(*(status.released for status in self._statuses))

    @property
    def adapters(self) -> Mapping[str, AdapterVersion]:
        statuses = self._statuses
        return statuses[0].adapters if statuses else {}

    @property
    def load(self) -> EngineLoad:
        """The sums over the replicas; of the KV caches, the fullest."""
        loads = [status.load for status in self._statuses]
        return EngineLoad(
            sum(load.num_running for load in loads),
            sum(load.num_waiting for load in loads),
            max((load.kv_cache_usage for load in loads), default=0.0),
            sum(load.num_preemptions for load in loads),
        )

    @property
    def replicas(self) -> Mapping[str, ReplicaView]:
        """Each replica as `/metrics` and `/version` show it, by name."""
        views = {}
        for link in self.links:
            if link.status is not None:
                counts = self.fleet.counts[link.name]
                views[link.name] = ReplicaView(
                    host=link.member.host,
                    bits=link.member.bits,
                    status=link.status,
                    requests=counts.requests,
                    prompt_tokens=counts.prompt_tokens,
                    hit_tokens=counts.hit_tokens,
                    is_leaving=link.is_leaving,
                    is_behind=link.name in self.fleet.members.outside,
                )
        return views

    @property
    def num_moved(self) -> int:
        """Choices that went on at another replica."""
        return self.fleet.num_moved

    @property
    def meters(self) -> EngineMeters:
        """Counts of none: each replica has its own, and `/metrics` shows them by name."""
        return EngineMeters()

    # ---- requests

    def check_room(self, n: int) -> None:
        """Raise EngineRestartingError where no replica is left, OverloadedError where all are full."""
        if self._is_shut_down:
            raise EngineDeadError("the fleet was shut down")
        if not self.fleet.is_reachable:
            raise EngineRestartingError
        if self._refuses:
            raise WeightsLoadingError("new weights are about to be swapped in; try again in a moment")
        most = self.config.max_queue * len(self.fleet.links)
        if self.fleet.num_open + n > most:
            raise OverloadedError(
                f"{self.fleet.num_open} completions wait or run, and no more than {most} may; try again later",
                retry_after=1.0,
            )

    async def prepare(self, params: SamplingParams) -> None:
        """Have a replica compile the grammar: what is wrong with it is found before the answer begins."""
        if params.grammar is None:
            return
        self.check_room(1)
        await self._do(self._first_answer("prepare", params=params))

    async def _first_answer(self, name: str, **arguments: Any) -> Any:
        """Return what a replica answers; another is asked where one is lost meanwhile."""
        while True:
            link = await self.fleet.first_link()
            try:
                return await link.call(name, **arguments)
            except EngineDeadError:
                if link.is_open:
                    raise

    def submit(
        self,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        options: SubmitOptions | None = None,
    ) -> RequestStream:
        """Place one prompt and return the stream of its completions, as `Engine.submit` does, errors included."""
        options = options or SubmitOptions()
        if options.adapter is not None and options.adapter not in self.adapters:
            raise ModelNotFoundError(f"the adapter {options.adapter[:200]!r} is not loaded")
        prompt, max_tokens = checked_request(prompt_token_ids, params, options, self.facts)
        self.check_room(options.n)
        seed = secrets.randbits(64) if params.seed is None else params.seed
        in_all = max_tokens + options.num_prior_tokens
        placed = Placed(
            prompt, replace(params, seed=seed, max_tokens=in_all), options, asyncio.get_running_loop()
        )

        def abort(indices: list[int], reason: FinishReason) -> None:
            self._loop.call_soon_threadsafe(self.fleet.abort, placed, indices, reason)

        placed.stream = RequestStream(
            options.request_id or f"req-{id(placed):x}",
            seed,
            [Detokenizer(self.token_bytes, params) for _ in range(options.n)],
            abort=abort,
            metrics=placed.metrics_of,
        )
        self._loop.call_soon_threadsafe(self.fleet.submit, placed)
        return placed.stream

    # ---- changes

    def update_weights(
        self,
        source: Any,
        *,
        mode: Any = "drain",
        partial: bool = False,
        version: int | None = None,
        checksum: str | None = None,
        refuse_new: bool = False,
        reset_prefix_cache: bool = False,
    ) -> WeightUpdate:
        """New weights for the whole fleet, from a folder that every replica can read. See `Controller`."""
        if not isinstance(source, str | Path):
            raise RequestError(
                "a fleet takes weights from folders in its weights directory, which new replicas read as well; "
                "not over the wire",
                code="unsupported_parameter",
            )
        options = UpdateOptions(
            mode=mode,
            partial=partial,
            version=version,
            checksum=checksum,
            refuse_new=refuse_new,
            reset_prefix_cache=reset_prefix_cache,
        )
        update = WeightUpdate(source, options)
        self._run(self._update(update, str(source), options))
        return update

    async def _update(self, update: WeightUpdate, folder: str, options: UpdateOptions) -> None:
        name = secrets.token_hex(8)
        following = asyncio.ensure_future(self._follow(update))
        try:
            report = await self._outcome_of(name, folder, options)
            update.set_checked()
            self.fleet.members = replace(
                self.fleet.members,
                generation="",
                weight_version=max(self.fleet.members.weight_version, report["weight_version"]),
            )
            update.finish(WeightReport(**report))
        except BaseException as error:
            update.fail(error)
        finally:
            following.cancel()
            self._refuses = False

    async def _outcome_of(self, name: str, folder: str, options: UpdateOptions) -> dict[str, Any]:
        """Return the report of a transaction, of whose controller another may have taken the place."""
        before = self.fleet.members.weight_version
        try:
            return await self.control.update_weights(
                name,
                folder=folder,
                mode=options.mode,
                partial=options.partial,
                version=options.version,
                checksum=options.checksum,
                refuse_new=options.refuse_new,
                reset_prefix_cache=options.reset_prefix_cache,
            )
        except ControllerLostError:
            members = await self._members_again()
            wanted = before + 1 if options.version is None else options.version
            if members.weight_version != wanted:
                raise EngineError(
                    f"the fleet's controller died before it had decided: the weights are still version "
                    f"{members.weight_version}; send them again"
                ) from None
            zeros = dict.fromkeys(("prepare_duration", "drain_duration", "pause_duration"), 0.0)
            counts = dict.fromkeys(("num_tensors", "num_bytes", "num_aborted"), 0)
            return {"weight_version": wanted, "checksum": members.checksum or "", **counts, **zeros}

    async def _members_again(self) -> Members:
        """Ask until a controller answers. Raises ControllerLostError after a minute."""
        for _ in range(60):
            with suppress(ControllerLostError):
                return await self.control.members("")
            await asyncio.sleep(1.0)
        raise ControllerLostError("the fleet's controller has died, and none has come in its place")

    async def _follow(self, update: WeightUpdate) -> None:
        """Tell the update's stage as the controller's goes on."""
        while self.fleet.members.phase != "swap":
            await asyncio.sleep(0.02)
        self._refuses = update.options.refuse_new
        update.set_checked()

    def reset_weights(self) -> Any:
        """Raise RequestError: zeros are in no folder."""
        return self.update_weights({})

    def load_adapter(
        self,
        name: str,
        folder: str | Path,
        *,
        path: str | None = None,
        replaces: bool = True,
        mode: Any = "drain",
    ) -> Future[AdapterVersion]:
        """Load an adapter on every replica, new ones too."""
        change = Adapter(name, str(folder), str(folder) if path is None else path, replaces, mode)
        return self._run(self.control.change_adapter(change))

    def unload_adapter(self, name: str) -> Future[AdapterVersion]:
        """Take an adapter away on every replica."""
        return self._run(self.control.change_adapter(Adapter(name)))

    async def pause(self, mode: PauseMode = "keep") -> None:
        """Run no step anywhere until `resume`."""
        if mode not in PAUSE_MODES:
            raise RequestError(f"mode must be one of {', '.join(PAUSE_MODES)}, got {mode!r}", param="mode")
        await self._do(self.control.everywhere("pause", mode=mode))

    async def resume(self) -> None:
        """Go on everywhere."""
        await self._do(self.control.everywhere("resume"))

    async def forget_prefixes(self) -> None:
        """Forget every cached prefix of every replica."""
        await self._do(self.control.everywhere("forget_prefixes"))

    async def release_memory(self, tags: Collection[str]) -> None:
        """Give memory back on every replica, until `restore_memory`."""
        await self._do(self.control.everywhere("release_memory", tags=tuple(tags)))

    async def restore_memory(self, tags: Collection[str]) -> None:
        """Bring back what was released."""
        await self._do(self.control.everywhere("restore_memory", tags=tuple(tags)))

    async def weight_checksums(self) -> dict[str, str]:
        """Return the checksums of one replica's weights: all have the same, or have left the fleet."""
        found: dict[str, str] = await self._do(self._first_answer("weight_checksums"))
        return found

    def shutdown(self) -> None:
        """End the links, and the loop. Replicas are others' to end."""
        if self._is_shut_down:
            return
        self._is_shut_down = True
        if self._running is not None:
            self._running.cancel()
            self._run(self.fleet.end()).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
        self._loop.close()
