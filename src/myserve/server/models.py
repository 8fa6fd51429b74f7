"""Which models are served: the operator's list alone, each loaded once, on first use or at start."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import logging
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from typing import Any, Protocol

from myserve.core.params import SamplingParams
from myserve.engine.meters import EngineLoad, EngineMeters
from myserve.engine.outputs import Delta, RequestMetrics, RoutingShape
from myserve.engine.token_bytes import TokenBytes
from myserve.errors import ModelNotFoundError, MyserveError
from myserve.server.chat_style import ChatStyle
from myserve.server.codec import Codec
from myserve.server.echo import EchoEngine
from myserve.server.errors import ModelLoadError
from myserve.server.in_flight import InFlight
from myserve.server.settings import Settings
from myserve.server.snapshots import Snapshots

log = logging.getLogger("myserve.server")


class Stream(Protocol):
    """What the routes use of a `RequestStream`."""

    seed: int

    def __aiter__(self) -> AsyncIterator[Delta]: ...
    def metrics(self, index: int) -> RequestMetrics: ...
    def abort(self) -> None: ...


class Backend(Protocol):
    """What the routes use of an `Engine`."""

    @property
    def tokenizer(self) -> Any: ...
    @property
    def token_bytes(self) -> TokenBytes: ...
    @property
    def max_model_len(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def weight_version(self) -> int: ...
    @property
    def is_alive(self) -> bool: ...
    @property
    def meters(self) -> EngineMeters: ...
    @property
    def load(self) -> EngineLoad: ...
    @property
    def routing_shape(self) -> RoutingShape | None: ...
    @property
    def exactness(self) -> Mapping[str, str | int | bool]: ...
    async def prepare(self, params: SamplingParams) -> None: ...
    def submit(
        self,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        n: int = 1,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str = "",
        sample_index: int = 0,
        num_prior_tokens: int = 0,
    ) -> Stream: ...
    def update_weights(self, source: Any, **options: Any) -> Any: ...
    def shutdown(self) -> None: ...


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A loaded model, as the routes need it."""

    engine: Backend
    codec: Codec
    digest: str
    snapshots: Snapshots = field(default_factory=Snapshots)
    in_flight: InFlight = field(default_factory=InFlight)
    style: ChatStyle = field(default_factory=ChatStyle)
    tokenizer_thread: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="myserve-tokenizer")
    )

    @property
    def fingerprint(self) -> str:
        """Changes with whatever may change the answer to a seed: this package, the model, its weights."""
        return f"fp_{self.digest}_{self.engine.weight_version}"


def _spare_the_collector(_: object) -> None:
    """What a load leaves behind lives as long as the server: no collection need walk over it again."""
    gc.freeze()
    gc.enable()


class Models:
    """The served names. `get` loads what it must; any number of event loops and threads may call it."""

    def __init__(
        self, settings: Settings, load: Callable[[str, Settings], ServedModel] | None = None
    ) -> None:
        self._settings = settings
        self._load = load or load_model
        self._lock = threading.Lock()
        self._loads: dict[str, Future[ServedModel]] = {}  # by path: two names of one path share an engine
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="myserve-load")  # one load at a time
        self.created = int(time.time())

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._settings.models)

    async def get(self, name: str | None) -> ServedModel:
        """The model of that name; None means the only one, or the first.

        Raises ModelNotFoundError for a name that is not served, ModelLoadError for one that does not load.
        """
        name = self.names[0] if name is None else name
        if name not in self._settings.models:
            served = ", ".join(self.names)
            raise ModelNotFoundError(
                f"the model {name[:200]!r} is not served here; this server has: {served}"
            )
        future = self._start_loading(self._settings.models[name])
        try:
            # Shielded: a client that leaves must not cancel the load for those who wait with it.
            return await asyncio.shield(asyncio.wrap_future(future))
        except asyncio.CancelledError:
            raise
        except Exception as error:
            # Our own words are for people; anything else may name paths and belongs in the log.
            reason = str(error) if isinstance(error, MyserveError) else "the server's log says why"
            raise ModelLoadError(f"the model {name!r} did not load: {reason}") from error

    def if_loaded(self, name: str) -> ServedModel | None:
        """The model, where it is ready; starts nothing."""
        future = self._loads.get(self._settings.models[name])
        return future.result() if future is not None and _succeeded(future) else None

    def preload(self, on_failure: Callable[[str, BaseException], None] | None = None) -> None:
        """Begin to load what the operator wants ready; returns at once. `on_failure` gets a name and why it failed."""

        def report(name: str, done: Future[ServedModel]) -> None:
            if on_failure is not None and not done.cancelled() and (error := done.exception()) is not None:
                on_failure(name, error)

        for name in self._settings.preload or ():
            self._start_loading(self._settings.models[name]).add_done_callback(partial(report, name))

    def readiness(self) -> dict[str, str]:
        """What each model that is to be ready at start is: "unloaded", "loading", "ready", "failed" or "dead"."""
        return {name: self._state(self._settings.models[name]) for name in self._settings.preload or ()}

    def close_door(self) -> None:
        """Take no new generations; who is in flight goes on."""
        for model in self._loaded():
            model.in_flight.close()

    def cut_all(self) -> None:
        """End every generation with an error that says why."""
        for model in self._loaded():
            model.in_flight.cut_all()

    def _loaded(self) -> list[ServedModel]:
        return [future.result() for future in self._loads.values() if _succeeded(future)]

    def close(self) -> None:
        """End every engine. Blocks until their threads have ended."""
        self._loader.shutdown(wait=True, cancel_futures=True)
        for model in self._loaded():
            model.engine.shutdown()
            model.tokenizer_thread.shutdown()

    def _start_loading(self, path: str) -> Future[ServedModel]:
        with self._lock:
            future = self._loads.get(path)
            if future is None or (
                future.done() and not _succeeded(future)
            ):  # a failed load may be tried again
                future = self._loads[path] = self._loader.submit(self._load, path, self._settings)
                future.add_done_callback(_spare_the_collector)
                future.add_done_callback(lambda done: _log_failure(path, done))
            return future

    def _state(self, path: str) -> str:
        future = self._loads.get(path)
        if future is None:
            return "unloaded"
        if not future.done():
            return "loading"
        if not _succeeded(future):
            return "failed"
        return "ready" if future.result().engine.is_alive else "dead"


def load_model(path: str, settings: Settings) -> ServedModel:
    """Load in the calling thread: the engine of a folder or hub id, or an echo if the operator wants one."""
    engine: Any
    if settings.force_echo:
        engine = EchoEngine()
    else:
        from transformers.utils import logging as transformers_logging

        from myserve.engine.engine import Engine  # torch is imported when a model is, and not before

        if not sys.stderr.isatty():
            transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # a log is no terminal
        engine = Engine.from_pretrained(path, settings.engine)
    identity = f"{version('myserve')}/{path}/{settings.engine}/{settings.force_echo}"
    digest = hashlib.blake2b(identity.encode(), digest_size=5).hexdigest()
    style = ChatStyle.of(engine.tokenizer, settings.tool_style)
    codec, in_flight = Codec(engine.tokenizer, engine.token_bytes), InFlight(settings.request_timeout)
    return ServedModel(engine, codec, digest, style=style, in_flight=in_flight)


def _succeeded(future: Future[ServedModel]) -> bool:
    return future.done() and not future.cancelled() and future.exception() is None


def _log_failure(path: str, future: Future[ServedModel]) -> None:
    if not future.cancelled() and (error := future.exception()) is not None:
        log.error("the model at %s did not load", path, exc_info=error)
