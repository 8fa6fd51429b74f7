"""Models are served from the operator's list alone; each is loaded once, at start or on first use."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import logging
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from typing import Any, Protocol

from myserve.engine.memory.prefault import Reserve
from myserve.errors import ModelNotFoundError, MyserveError, RequestError
from myserve.server.errors import EngineRestartingError, ModelLoadError
from myserve.server.models.echo import EchoEngine
from myserve.server.models.in_flight import InFlight
from myserve.server.models.restart import (
    Files,
    LostWeightsError,
    RestartRecord,
    Restarts,
    files_of,
    free_memory,
)
from myserve.server.models.served_engine import ServedEngine
from myserve.server.models.snapshots import Snapshots
from myserve.server.models.transfer import WeightTransfer
from myserve.server.prompts.chat_style import ChatStyle
from myserve.server.prompts.codec import Codec
from myserve.server.prompts.decisions import DecisionPrompts
from myserve.server.settings import Settings

__all__ = ["ModelLoader", "Models", "ServedModel", "load_adapters", "load_model", "serve_engine"]

log = logging.getLogger("myserve.server")


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A loaded model with its tokenizer, snapshots and requests in flight."""

    engine: ServedEngine
    codec: Codec
    digest: str
    decisions: DecisionPrompts
    snapshots: Snapshots = field(default_factory=Snapshots)
    in_flight: InFlight = field(default_factory=InFlight)
    transfer: WeightTransfer = field(default_factory=WeightTransfer)
    style: ChatStyle = field(default_factory=ChatStyle)
    files: Files = field(default_factory=dict)  # as they were when it was loaded
    num_restarts: int = 0
    tokenizer_thread: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="myserve-tokenizer")
    )

    @property
    def fingerprint(self) -> str:
        """Return the `system_fingerprint`: it changes with the package, the model, its settings and its weights."""
        return f"fp_{self.digest}_{self.engine.weight_version}"

    def with_template(self, template: str | None, settings: Settings) -> ServedModel:
        """Return this model with a request's own chat template. Raises RequestError where the operator allows none."""
        if template is None:
            return self
        if not settings.trust_request_chat_template:
            raise RequestError(
                "chat_template: this server takes none from a request; its operator may allow it, with "
                "--trust-request-chat-template",
                param="chat_template",
                code="unsupported_parameter",
            )
        codec = Codec(self.engine.tokenizer, self.codec.token_bytes, template)
        style = ChatStyle.of(self.engine.tokenizer, settings.tool_style, template)
        return replace(self, codec=codec, style=style)


class ModelLoader(Protocol):
    """Loads a model in the calling thread; `cancel`, from another one, makes it raise soon."""

    def __call__(self, path: str, settings: Settings) -> ServedModel: ...
    def cancel(self) -> None: ...


def _freeze_garbage(_: object) -> None:
    """Take all objects out of the garbage collector's sight: what a load leaves lives as long as the server."""
    gc.freeze()
    gc.enable()


class Models:
    """The served models by name. `get` loads what is not loaded; it may be called from any event loop and thread."""

    def __init__(
        self,
        settings: Settings,
        load: Callable[[str, Settings], ServedModel] | None = None,
        cancel_load: Callable[[], None] | None = None,
    ) -> None:
        self._settings = settings
        self._load = load or load_model
        self._cancel_load = cancel_load
        self._lock = threading.Lock()
        self._loads: dict[str, Future[ServedModel]] = {}  # by path: two names of one path share an engine
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="myserve-load")  # one load at a time
        self._closing = False
        self._restarts: defaultdict[str, Restarts] = defaultdict(Restarts)  # by path, as the next
        self._restart_records: dict[str, RestartRecord] = {}  # of those whose engine has stopped once
        self.created = int(time.time())

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._settings.models)

    async def get(self, name: str | None) -> ServedModel:
        """Return the model of that name; None means the first.

        Raises ModelNotFoundError for a name that is not served, ModelLoadError for one that does not load,
        EngineRestartingError.
        """
        name = self.names[0] if name is None else name
        if name not in self._settings.models:
            if (holder := self.holder_of(name)) is not None:
                return holder
            served = ", ".join([*self.names, *self.adapters])
            raise ModelNotFoundError(
                f"the model {name[:200]!r} is not served here; this server has: {served}"
            )
        path = self._settings.models[name]
        future = self._start_loading(path)
        if path in self._restart_records and not future.done():
            # at start a request waits; here another replica may have room
            raise EngineRestartingError
        try:
            # Shielded: a client that leaves must not cancel the load for the others that wait for it.
            return await asyncio.shield(asyncio.wrap_future(future))
        except asyncio.CancelledError:
            raise
        except Exception as error:
            # Our own words are for people; anything else may name paths and belongs in the log.
            reason = str(error) if isinstance(error, MyserveError) else "the server's log says why"
            raise ModelLoadError(f"the model {name!r} did not load: {reason}") from error

    def adapter_of(self, name: str | None) -> str | None:
        """Return the name where it is not a model's own, but an adapter's."""
        return None if name is None or name in self._settings.models else name

    @property
    def adapters(self) -> dict[str, str]:
        """The names of loaded adapters, and those of the models that they are loaded for."""
        found = {name: self.if_loaded(name) for name in reversed(self.names)}
        loaded = {name: model for name, model in found.items() if model is not None}
        return {adapter: name for name, model in loaded.items() for adapter in model.engine.adapters}

    def holder_of(self, adapter: str) -> ServedModel | None:
        """Return the loaded model that has an adapter of this name."""
        return next((model for model in self._loaded() if adapter in model.engine.adapters), None)

    def if_loaded(self, name: str) -> ServedModel | None:
        """Return the model if it is loaded, else None; start no load."""
        future = self._loads.get(self._settings.models[name])
        return future.result() if future is not None and _succeeded(future) else None

    def preload(self, on_failure: Callable[[str, BaseException], None] | None = None) -> None:
        """Begin to load the models of `preload`, without waiting. `on_failure` gets a name and the error."""

        def report(name: str, done: Future[ServedModel]) -> None:
            if on_failure is not None and not done.cancelled() and (error := done.exception()) is not None:
                on_failure(name, error)

        for name in self._settings.preload or ():
            self._start_loading(self._settings.models[name]).add_done_callback(partial(report, name))

    def readiness(self) -> dict[str, str]:
        """Return the state of each model in `preload`.

        "unloaded", "loading", "ready" or "failed"; "restarting" or "dead" where the engine has stopped.
        """
        return {name: self._state(self._settings.models[name]) for name in self._settings.preload or ()}

    def close_door(self) -> None:
        """Take no new generations; those in flight go on."""
        self._closing = True
        if self._cancel_load is not None:
            self._cancel_load()
        for model in self._loaded():
            model.in_flight.close()

    def cut_all(self) -> None:
        """End every generation with an error that says why."""
        for model in self._loaded():
            model.in_flight.cut_all()

    def _loaded(self) -> list[ServedModel]:
        return [future.result() for future in self._loads.values() if _succeeded(future)]

    def close(self) -> None:
        """Shut every engine down. Blocks until their threads have ended."""
        self._loader.shutdown(wait=True, cancel_futures=True)
        for model in self._loaded():
            _end(model)

    def restart_stopped(self, now: float) -> None:
        """Load each model whose engine has stopped again, when `Restarts` says that it is due. Called on every tick."""
        with self._lock:
            for path, future in self._loads.items():
                if not self._closing and self._is_down(path, future) and self._restarts[path].is_due(now):
                    self._loads[path] = self._restart(path, [future.result()] if _succeeded(future) else [])

    def _is_down(self, path: str, future: Future[ServedModel]) -> bool:
        """Return whether its engine once ran, has stopped, and is not being loaded again."""
        if not future.done():
            return False
        return not future.result().engine.is_alive if _succeeded(future) else path in self._restart_records

    def _restart(self, path: str, stopped: list[ServedModel]) -> Future[ServedModel]:
        log.error("%s: its engine has stopped, and is loaded again", path)
        if stopped:
            self._restart_records[path] = RestartRecord.of(stopped[0])
        return self._submit(path, partial(self._load_again, path, stopped))

    def _load_again(self, path: str, stopped: list[ServedModel]) -> ServedModel:
        """Load a stopped model again, in the loader's thread.

        `stopped` is emptied first: two models at once may be more than the memory holds.
        """
        record = self._restart_records[path]
        while stopped:
            _end(stopped.pop())
        free_memory()
        try:
            record.check_files(files_of(path))
            model = replace(
                self._load(path, self._settings),
                num_restarts=record.num_restarts + 1,
                snapshots=Snapshots(record.labels),
            )
            try:
                record.check_files(model.files)
                record.restore(model)
            except BaseException:
                _end(model)
                raise
        except LostWeightsError:
            self._restarts[path].given_up = True
            raise
        if self._closing:
            model.in_flight.close()
        return model

    def _start_loading(self, path: str) -> Future[ServedModel]:
        with self._lock:
            future = self._loads.get(path)
            failed = future is not None and future.done() and not _succeeded(future)
            # A failed load may be tried again; a failed restart may not: other weights than those served might come.
            if future is None or (failed and path not in self._restart_records):
                future = self._loads[path] = self._submit(path, partial(self._load, path, self._settings))
            return future

    def _submit(self, path: str, load: Callable[[], ServedModel]) -> Future[ServedModel]:
        future = self._loader.submit(load)
        future.add_done_callback(_freeze_garbage)
        future.add_done_callback(partial(_log_failure, path))
        return future

    def _state(self, path: str) -> str:
        future = self._loads.get(path)
        if future is None:
            return "unloaded"
        if _succeeded(future) and future.result().engine.is_alive:
            # a fleet may be without a replica for a while
            return "ready" if getattr(future.result().engine, "is_reachable", True) else "restarting"
        if not _succeeded(future) and path not in self._restart_records:
            return "failed" if future.done() else "loading"
        comes_back = self._settings.restart_engine and not self._restarts[path].given_up
        return "restarting" if comes_back else "dead"


def load_model(path: str, settings: Settings, reserve: Reserve | None = None) -> ServedModel:
    """Load the engine of a folder or hub id, or an echo where `force_echo` is set, in the calling thread.

    `reserve`: memory that was asked for ahead; the first model that loads takes of it, and gives the rest back.
    """
    engine: Any
    if settings.force_echo:
        engine = EchoEngine()
    else:
        from transformers.utils import logging as transformers_logging

        from myserve.engine.engine import Engine  # imports torch

        # a log is no terminal
        if not sys.stderr.isatty():
            transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        engine = Engine.from_pretrained(path, settings.engine, reserve)
    if path == next(iter(settings.models.values())):
        load_adapters(engine, settings)
    model = serve_engine(engine, path, settings)
    if not settings.force_echo:
        # not by the first request: what steps of likely shapes need is made ready before one comes
        engine.start()
    return model


def serve_engine(engine: Any, path: str, settings: Settings) -> ServedModel:
    """Return what routes need beside an engine: its tokenizer's codec, its chat style, its fingerprint."""
    identity = f"{version('myserve')}/{path}/{settings.engine}/{settings.force_echo}"
    digest = hashlib.blake2b(identity.encode(), digest_size=5).hexdigest()
    style = ChatStyle.of(engine.tokenizer, settings.tool_style)
    files = {} if settings.force_echo else files_of(path)
    codec, in_flight = Codec(engine.tokenizer, engine.token_bytes), InFlight(settings.request_timeout)
    decisions = DecisionPrompts(codec, None if settings.force_echo else path)
    return ServedModel(engine, codec, digest, decisions, style=style, in_flight=in_flight, files=files)


def load_adapters(engine: Any, settings: Settings) -> None:
    try:
        for name, folder in settings.adapters.items():
            engine.load_adapter(name, folder).result()
    except BaseException:
        engine.shutdown()
        raise


def _end(model: ServedModel) -> None:
    model.engine.shutdown()
    model.tokenizer_thread.shutdown()


def _succeeded(future: Future[ServedModel]) -> bool:
    return future.done() and not future.cancelled() and future.exception() is None


def _log_failure(path: str, future: Future[ServedModel]) -> None:
    if not future.cancelled() and (error := future.exception()) is not None:
        if isinstance(error, MyserveError):  # it says in a sentence what is wrong, and whose fault that is
            log.error("the model at %s did not load: %s", path, error)
        else:
            log.error("the model at %s did not load", path, exc_info=error)
