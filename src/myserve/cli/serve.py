"""`myserve serve`: settings from the command line, the environment and a file, then uvicorn."""

from __future__ import annotations

import faulthandler
import gc
import inspect
import logging
import os
import resource
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from myserve.cli import lean_imports
from myserve.cli.console import err, fail
from myserve.errors import MyserveError
from myserve.options import Option
from myserve.server.settings import OPTIONS, Settings

if TYPE_CHECKING:
    from myserve.engine.memory.prefault import Reserve
    from myserve.server.models.models import ModelLoader

__all__ = ["serve"]

NEEDS_SERVER = (
    "serving needs torch and friends, which the base install leaves out: pip install 'myserve[server]'"
)

log = logging.getLogger("myserve.server")


def _option(declared: Option) -> tuple[Any, Any]:
    """Return typer's annotation and option for one of ours; values stay texts, which `Settings.read` parses."""
    flags = [declared.flag, *filter(None, [declared.other_flag])]
    if declared.kind is bool:
        kind: Any = bool | None
        flags[0] += f"/--no-{declared.key}"
    else:
        kind = list[str] | None if declared.is_list else str | None
    values = f" One of {declared.range}." if declared.choices else ""
    described = f"{declared.help}{values} Default: {declared.usual}."
    return kind, typer.Option(
        *flags,
        help=described,
        rich_help_panel=declared.group,
        metavar=declared.metavar,
        show_default=False,
    )


def _parameters() -> Iterator[inspect.Parameter]:
    """Yield the command's parameters: the model, the file, and every declared option."""
    keyword = inspect.Parameter.KEYWORD_ONLY
    model = typer.Argument(
        help="A folder, a GGUF file or a hub id; name=folder gives it a name. Default: $MYSERVE_MODEL, else the "
        "embedded model."
    )
    config = typer.Option(
        "--config", metavar="FILE", help="YAML with any of these options: its keys are their names."
    )
    yield inspect.Parameter("model", keyword, default=None, annotation=Annotated[str | None, model])
    yield inspect.Parameter("config", keyword, default=None, annotation=Annotated[str | None, config])
    for name, declared in OPTIONS.items():
        if name != "model":
            kind, shown = _option(declared)
            yield inspect.Parameter(name, keyword, default=None, annotation=Annotated[kind, shown])


def serve(model: str | None = None, config: str | None = None, **given: Any) -> None:
    """Serve a model over OpenAI's API: deterministic, batch-invariant sampling.

    Each option is also a variable (--max-num-seqs is MYSERVE_MAX_NUM_SEQS) and a key of --config (max-num-seqs: 64).
    The command line counts before the environment, and that before the file.
    """
    # where the system ends it, by a fault in compiled code, the log has each thread's place
    if sys.__stderr__ is not None:
        faulthandler.enable(sys.__stderr__)
    # Threads that wait at a barrier spin, and stall the HTTP thread where cores are few; threads that never spin
    # wake late, 250 times a step. This long bridges the gap between two kernels and no more (a decode step of 28
    # layers: 108 ms; never 117; for ever 133). Must be set before torch is imported.
    os.environ.setdefault("GOMP_SPINCOUNT", "100000")
    # Imports and loading make no garbage, and collecting is a quarter of their time; on again when a model is loaded.
    gc.disable()
    try:
        # typer gives an empty list for a list that was not given
        asked = {name: value for name, value in given.items() if value not in (None, [])}
        settings = Settings.read(asked if model is None else {**asked, "model": (model,)}, file=config)
        # before the imports: a taken port is known at once
        listener = _listen(settings.host, settings.port)
        if settings.replicas is not None:
            _run_fleet(settings, listener)
            return
        reserve = _ask_for_memory(settings)
    except MyserveError as error:
        fail(str(error))
    except ModuleNotFoundError as error:
        fail(f"{NEEDS_SERVER}  (missing: {error.name})")
    _run(settings, listener, reserve)


# typer reads a command's parameters from its signature
serve.__signature__ = inspect.Signature(list(_parameters()))  # type: ignore[attr-defined]


def _listen(host: str, port: int) -> socket.socket:
    """Open the port; `host` is an address of either family, or a name."""
    try:
        listener = _bound(host.strip("[]"), port)
    except OSError as error:
        fail(
            f"cannot listen on {_url_host(host)}:{port}: {error.strerror or error}; pass --port (0: any free one)"
        )
    # asyncio does this only for sockets that name their protocol. Without it an answer, written as head and body,
    # waits 40 ms for the client's delayed acknowledgement; accepted connections inherit it.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def _bound(host: str, port: int) -> socket.socket:
    family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    # "::" takes IPv4 too, as every other server does
    both = family == socket.AF_INET6 and host == "::" and socket.has_dualstack_ipv6()
    return socket.create_server(address[:2], family=family, backlog=2048, dualstack_ipv6=both)


def _url_host(host: str) -> str:
    """Return an address as it stands in a URL.

    >>> _url_host("::1"), _url_host("127.0.0.1")
    ('[::1]', '127.0.0.1')
    """
    return f"[{host.strip('[]')}]" if ":" in host else host


def _ask_for_memory(settings: Settings) -> Reserve | None:
    """Prefault memory for the first model's packed weights while Python imports what packs them; not for a GPU."""
    engine = settings.engine
    as_saved = engine.dtype == "auto" and engine.exact == "on"
    if settings.preload and runs_on_cpu(settings) and as_saved and not settings.force_echo:
        from myserve.engine.memory import prefault

        # bytes where the checkpoint has bfloat16; of an int8 checkpoint, what is short is taken as it comes
        part = 0.5 if engine.quantize == "int8" else 1.0
        return prefault.begin(settings.models[settings.preload[0]], part=part)
    return None


def runs_on_cpu(settings: Settings) -> bool:
    """Return whether the engine will surely compute on the CPU."""
    return settings.engine.device == "cpu" or (settings.engine.device == "auto" and not has_gpu())


def has_gpu() -> bool:
    """Return whether torch, which is not imported yet, may find a GPU."""
    return any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/kfd").exists()


def _run_fleet(settings: Settings, listener: socket.socket) -> None:
    """Serve by a fleet: the engines are in processes of Ray's, and HTTP is here."""
    from myserve.cluster.on_ray.local import local_fleet
    from myserve.cluster.one_model import one_model

    gc.enable()
    settings = one_model(settings)
    err.print("[bold]myserve[/]  [dim]starting Ray[/]")
    # Ray's start takes seconds, and its processes have to be ended as well
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with local_fleet(settings) as load:
            _run(settings, listener, None, load)
    except KeyboardInterrupt:
        return  # ended before it served, as asked


def _run(
    settings: Settings,
    listener: socket.socket,
    reserve: Reserve | None,
    load: ModelLoader | None = None,
) -> None:
    # code that comes with a checkpoint, or runs on a GPU, may use all of torch
    if runs_on_cpu(settings) and not settings.engine.trust_remote_code and load is None:
        lean_imports.begin()
    try:
        from myserve.server.app import create_app
        from myserve.server.edge.graceful import GracefulServer
        from myserve.server.observe import logs
    except ModuleNotFoundError as error:
        fail(f"{NEEDS_SERVER}  (missing: {error.name})")
    host, port = listener.getsockname()[:2]
    url = f"{'http' if settings.ssl_certfile is None else 'https'}://{_url_host(host)}:{port}"
    err.print(f"[bold]myserve[/]  [dim]{', '.join(settings.preload or ())}[/]  at [bold]{url}[/]")
    logs.configure(settings.log_level, settings.log_format)
    try:
        server = GracefulServer(app := create_app(settings, reserve, load))
    except MyserveError as error:
        fail(str(error))
    if host not in ("127.0.0.1", "::1") and settings.api_keys_file is None:
        log.warning(
            "anyone who reaches %s:%d may use this server; --api-keys-file makes it ask for keys",
            _url_host(host),
            port,
        )
    failures: list[str] = []

    def give_up(name: str, error: BaseException) -> None:
        # whoever ends the server while it loads knows why
        if not server.should_exit:
            failures.append(f"{name} did not load: {error}")
        server.should_exit = True

    app.state.on_load_failure = give_up
    for number in (signal.SIGTERM, signal.SIGINT):
        # uvicorn shuts down in order, then raises the signal again for the handler that was there before. This one does
        # nothing, so that the process ends with status 0.
        signal.signal(number, lambda *_: None)
    _raise_file_limit()
    server.run(sockets=[listener])
    if server.engine_died:
        failures.append("an engine stopped; the log says why")
    if failures:
        fail(failures[0])


def _raise_file_limit() -> None:
    """Allow as many open files as the system lets us: a connection is one, and shells allow 1024."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
