"""An engine behind a channel: requests come in from any ingress, and what a step draws goes out as one frame."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Awaitable, Callable, Collection, Mapping
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from myserve.cluster.channel import Channel, Kind, error_to, pack, unpack
from myserve.cluster.journal import Adapter, Change, FleetWeights
from myserve.cluster.messages import Entry, ReplicaFacts, ReplicaStatus, write_entries
from myserve.cluster.probe import probe
from myserve.core.params import SamplingParams
from myserve.engine.engine import Engine
from myserve.engine.outputs import FinishReason
from myserve.engine.requests.options import SubmitOptions
from myserve.engine.requests.stream import StepOutcome, Submitted
from myserve.engine.weights.queue import WeightUpdate
from myserve.errors import EngineError

__all__ = ["ReplicaServer"]

log = logging.getLogger("myserve.cluster")


class ReplicaServer:
    """Serves one engine to the ingresses and the controller of a fleet, on an event loop in a thread of its own.

    `start` blocks until it listens, and has then run the probe; everything else may be called from any thread.
    """

    def __init__(self, engine: Engine, secret: str, *, host: str = "127.0.0.1") -> None:
        self.engine = engine
        self.host, self.port = host, 0
        self.bits = ""
        self.num_adapter_changes = 0
        self._secret = secret
        self._loop = asyncio.new_event_loop()
        self._channels: dict[Channel, _Requests] = {}
        self._held: dict[str, tuple[Channel, WeightUpdate]] = {}
        self._thread = threading.Thread(target=self._loop.run_forever, name="myserve-replica", daemon=True)
        self._listener: asyncio.Server | None = None

    def start(self) -> None:
        """Run the probe, then listen on a free port of `host`."""
        self._thread.start()
        self.bits = self.run(probe(self.engine)).result()
        self._listener = self.run(self._loop.create_server(self._channel, self.host, 0)).result()
        self.port = self._listener.sockets[0].getsockname()[1]

    def run(self, work: Any) -> Future[Any]:
        """Run a coroutine on the replica's loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    @property
    def num_in_flight(self) -> int:
        """Choices that run or wait here for any ingress."""
        return sum(requests.num_open for requests in list(self._channels.values()))

    def leave(self) -> None:
        """Tell every ingress that no more is taken: what is in flight goes on elsewhere, or here to its end."""

        def tell() -> None:
            for channel in list(self._channels):
                channel.send(Kind.LEAVING)

        self._loop.call_soon_threadsafe(tell)

    def close(self) -> None:
        """Stop the loop and the engine."""
        self.run(self._end()).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self.engine.shutdown()

    async def _end(self) -> None:
        if self._listener is not None:
            self._listener.close()
        for channel in list(self._channels):
            channel.close()
        # in which the transports close their sockets
        await asyncio.sleep(0.01)

    def status(self) -> ReplicaStatus:
        """Return the replica as it is now."""
        engine = self.engine
        facts = ReplicaFacts(
            engine.vocab_size,
            engine.max_model_len,
            engine.eos_token_ids,
            engine.routing_shape,
            engine.exactness,
            engine.quantization,
            self.bits,
        )
        return ReplicaStatus(
            facts,
            engine.weight_version,
            engine.is_alive,
            engine.is_paused,
            engine.released,
            engine.load,
            engine.meters,
            dict(engine.adapters),
        )

    async def apply(self, changes: Collection[Change]) -> None:
        """Make changes that the fleet has made without this replica, in their order. Raises what the first raises."""
        for change in changes:
            if isinstance(change, FleetWeights):
                await self.engine.update_weights(
                    Path(change.folder),
                    mode=change.mode,
                    partial=change.partial,
                    version=change.weight_version,
                    checksum=change.checksum,
                )
            elif isinstance(change, Adapter):
                await self._change_adapter(change)

    async def _change_adapter(self, change: Adapter) -> Any:
        if change.folder is None:
            version = await asyncio.wrap_future(self.engine.unload_adapter(change.name))
        else:
            loading = self.engine.load_adapter(
                change.name, change.folder, path=change.path, replaces=change.replaces, mode=change.mode
            )
            version = await asyncio.wrap_future(loading)
        self.num_adapter_changes += 1
        return version

    # ---- channels

    def _channel(self) -> Channel:
        return Channel(self._on_frame, self._on_lost, expects=self._secret)

    def _on_lost(self, channel: Channel) -> None:
        if (requests := self._channels.pop(channel, None)) is not None:
            requests.abort_all()
        # who prepared an update and is gone cannot say that all others have: nothing is changed
        for name, (owner, update) in list(self._held.items()):
            if owner is channel:
                update.withdraw(EngineError("the fleet's controller is gone: nothing was changed"))
                del self._held[name]

    def _on_frame(self, channel: Channel, kind: Kind, body: bytes) -> None:
        match kind:
            case Kind.HELLO:
                self._channels[channel] = _Requests(self.engine, channel)
                channel.send(Kind.STATUS, pack(self.status()))
            case Kind.PING:
                channel.send(Kind.STATUS, pack(self.status()))
            case Kind.SUBMIT:
                self._channels[channel].submit(*unpack(body))
            case Kind.ABORT:
                self._channels[channel].abort(*unpack(body))
            case Kind.CALL:
                number, name, args = unpack(body)
                task = asyncio.ensure_future(self._answer(channel, number, name, args))
                task.add_done_callback(lambda done: done.exception())

    async def _answer(self, channel: Channel, number: int, name: str, args: Mapping[str, Any]) -> None:
        try:
            answer = await self._methods[name](self, channel, **args)
            channel.send(Kind.REPLY, pack((number, answer, None)))
        except Exception as error:
            channel.send(Kind.REPLY, pack((number, None, error_to(error))))

    # ---- what ingress and controller call, by name

    async def _prepare(self, channel: Channel, params: SamplingParams) -> None:
        await self.engine.prepare(params)

    async def _prepare_weights(self, channel: Channel, transaction: str, change: FleetWeights) -> None:
        source: Any = Path(change.folder)
        update = self.engine.update_weights(
            source,
            mode=change.mode,
            partial=change.partial,
            version=change.weight_version,
            checksum=change.checksum,
            refuse_new=change.refuse_new,
            reset_prefix_cache=change.reset_prefix_cache,
            held=True,
        )
        self._held[transaction] = channel, update
        try:
            await update.checked()
        except BaseException:
            self._held.pop(transaction, None)
            raise

    async def _swap_weights(self, channel: Channel, transaction: str) -> dict[str, Any]:
        _, update = self._held.pop(transaction)
        update.release()
        return asdict(await update)

    async def _withdraw_weights(self, channel: Channel, transaction: str) -> None:
        if (held := self._held.pop(transaction, None)) is not None:
            held[1].withdraw(
                EngineError("another replica could not prepare the weights: nothing was changed")
            )

    async def _apply(self, channel: Channel, changes: Collection[Change]) -> None:
        await self.apply(changes)

    async def _adapter(self, channel: Channel, change: Adapter) -> Any:
        return await self._change_adapter(change)

    async def _pause(self, channel: Channel, mode: Any) -> None:
        await self.engine.pause(mode)

    async def _resume(self, channel: Channel) -> None:
        await self.engine.resume()

    async def _forget_prefixes(self, channel: Channel) -> None:
        await self.engine.forget_prefixes()

    async def _weight_checksums(self, channel: Channel) -> dict[str, str]:
        return await self.engine.weight_checksums()

    async def _release_memory(self, channel: Channel, tags: Collection[str]) -> None:
        await self.engine.release_memory(tags)

    async def _restore_memory(self, channel: Channel, tags: Collection[str]) -> None:
        await self.engine.restore_memory(tags)

    _methods: Mapping[str, Callable[..., Awaitable[Any]]] = {
        "prepare": _prepare,
        "prepare_weights": _prepare_weights,
        "swap_weights": _swap_weights,
        "withdraw_weights": _withdraw_weights,
        "apply": _apply,
        "adapter": _adapter,
        "pause": _pause,
        "resume": _resume,
        "forget_prefixes": _forget_prefixes,
        "weight_checksums": _weight_checksums,
        "release_memory": _release_memory,
        "restore_memory": _restore_memory,
    }


class _Requests:
    """The requests of one channel, by the numbers that its other end gave them."""

    def __init__(self, engine: Engine, channel: Channel) -> None:
        self._engine = engine
        self._channel = channel
        self._open: dict[int, _Receiver] = {}
        self._entries: list[Entry] = []

    @property
    def num_open(self) -> int:
        return sum(len(receiver.open) for receiver in list(self._open.values()))

    def submit(self, number: int, prompt: list[int], params: SamplingParams, options: SubmitOptions) -> None:
        """Begin a request; what `Engine.submit` would raise is the end of each of its choices."""
        receiver = self._open[number] = _Receiver(self, number, set(range(options.n)))
        if params.grammar is None:
            self._begin(receiver, prompt, params, options)
        else:
            # compiled off the loop, as a route does
            task = asyncio.ensure_future(self._prepare_and_begin(receiver, prompt, params, options))
            task.add_done_callback(lambda done: done.exception())

    async def _prepare_and_begin(self, receiver: _Receiver, *request: Any) -> None:
        with contextlib.suppress(Exception):  # `submit` raises it again
            await self._engine.prepare(request[1])
        if receiver.open:
            self._begin(receiver, *request)

    def _begin(
        self, receiver: _Receiver, prompt: list[int], params: SamplingParams, options: SubmitOptions
    ) -> None:
        try:
            receiver.submitted = self._engine.submit_raw(prompt, params, options, receiver)
        except Exception as error:
            for index in sorted(receiver.open):
                receiver.fail(index, error)

    def add(self, entry: Entry) -> None:
        """Send an entry with the others of this turn of the loop, which is a step."""
        if not self._entries:
            asyncio.get_running_loop().call_soon(self._flush)
        self._entries.append(entry)

    def _flush(self) -> None:
        entries, self._entries = self._entries, []
        self._channel.send(Kind.OUTCOMES, write_entries(entries))

    def ended(self, number: int) -> None:
        self._open.pop(number, None)

    def abort(self, number: int, indices: list[int], reason: FinishReason) -> None:
        if (receiver := self._open.get(number)) is not None:
            receiver.abort(indices, reason)

    def abort_all(self) -> None:
        for receiver in list(self._open.values()):
            receiver.abort(sorted(receiver.open), "abort")


@dataclass(eq=False)
class _Receiver:
    """Passes the outcomes of one request on."""

    requests: _Requests
    number: int
    open: set[int]
    submitted: Submitted | None = None
    begun: set[int] = field(default_factory=set)

    def receive(self, outcome: StepOutcome) -> None:
        index, ends = outcome.index, outcome.finish_reason is not None
        if index not in self.open:
            return
        is_first = outcome.token is not None and index not in self.begun
        metrics = None
        if (ends or is_first) and self.submitted is not None:
            self.begun.add(index)
            metrics = self.submitted.metrics(index)
        self.requests.add(
            Entry(
                self.number,
                index,
                outcome.token,
                outcome.finish_reason,
                outcome.stop_reason,
                outcome.hides_token,
                None if outcome.error is None else error_to(outcome.error),
                outcome.prompt_logprobs,
                metrics,
            )
        )
        if ends:
            self._close(index)

    def fail(self, index: int, error: Exception) -> None:
        self.receive(StepOutcome(index, finish_reason="error", error=error))

    def abort(self, indices: list[int], reason: FinishReason) -> None:
        indices = [index for index in indices if index in self.open]
        if self.submitted is not None and indices:
            self.submitted.abort(indices, reason)
        for index in indices:
            self._close(index)

    def _close(self, index: int) -> None:
        self.open.discard(index)
        if not self.open:
            self.requests.ended(self.number)
