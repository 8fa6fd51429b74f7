"""`myserve serve`: settings from the command line and the environment, then uvicorn."""

from __future__ import annotations

import gc
import logging
import os
import resource
import signal
import socket
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from myserve.cli.console import err, fail
from myserve.errors import MyserveError

if TYPE_CHECKING:
    from myserve.server.settings import Settings

NEEDS_SERVER = (
    "serving needs torch and friends, which the base install leaves out: pip install 'myserve[server]'"
)

log = logging.getLogger("myserve.server")


class LogLevel(StrEnum):
    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class LogFormat(StrEnum):
    TEXT = "text"
    JSON = "json"


def serve(
    model: Annotated[
        str | None,
        typer.Argument(help="A folder or a hub id. None: $MYSERVE_MODEL, else the embedded model."),
    ] = None,
    host: Annotated[str, typer.Option(help="0.0.0.0 to be reached from elsewhere.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0: any free one.")] = 8000,
    served_model_name: Annotated[
        list[str] | None, typer.Option(help="What clients call the model; may be given several times.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1 …")] = None,
    exact: Annotated[str | None, typer.Option(help="on, or off for the last per cent of speed.")] = None,
    threads: Annotated[int | None, typer.Option(help="Of the CPU, for the model.")] = None,
    max_num_seqs: Annotated[int | None, typer.Option(help="Samples that run side by side.")] = None,
    max_num_batched_tokens: Annotated[int | None, typer.Option(help="Tokens of one step.")] = None,
    max_model_len: Annotated[
        int | None,
        typer.Option(
            help="Tokens of the longest context; default: the model's, of LongRoPE as far as short texts' angles reach."
        ),
    ] = None,
    max_queue: Annotated[int | None, typer.Option(help="Samples that may wait or run before a 429.")] = None,
    prefix_caching: Annotated[bool | None, typer.Option(help="Keep the KV of prompts seen before.")] = None,
    trust_remote_code: Annotated[
        bool | None,
        typer.Option("--trust-remote-code", help="Run Python code that comes with the checkpoint."),
    ] = None,
    strict: Annotated[
        bool | None, typer.Option("--strict", help="Refuse request fields that no API knows.")
    ] = None,
    weights_dir: Annotated[
        str | None, typer.Option(help="Take new weights from folders in here: /v1/weights, hot load.")
    ] = None,
    tool_style: Annotated[
        str | None, typer.Option(help="How tool calls are written: auto, none, hermes or llama3_json.")
    ] = None,
    api_keys_file: Annotated[
        str | None,
        typer.Option(help="A key a line, read again when it changes; every route but health wants one."),
    ] = None,
    admin_keys_file: Annotated[
        str | None,
        typer.Option(help="Keys that may change weights; where there are API keys, no others may."),
    ] = None,
    ssl_certfile: Annotated[str | None, typer.Option(help="A certificate chain, PEM: serve HTTPS.")] = None,
    ssl_keyfile: Annotated[str | None, typer.Option(help="Its key, where another file has it.")] = None,
    ssl_keyfile_password: Annotated[
        str | None, typer.Option(envvar="MYSERVE_SSL_KEYFILE_PASSWORD", help="Of an encrypted key.")
    ] = None,
    ssl_ca_certs: Annotated[
        str | None, typer.Option(help="Clients must show a certificate that one of these signed.")
    ] = None,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(help="Pages that may ask, as https://host; may be given several times."),
    ] = None,
    max_body_bytes: Annotated[int | None, typer.Option(help="Of the largest request; more is a 413.")] = None,
    request_timeout: Annotated[
        float | None, typer.Option(help="Seconds for an answer; then a 504, or an error event in a stream.")
    ] = None,
    client_timeout: Annotated[
        float | None, typer.Option(help="Seconds in which a client must have sent its request.")
    ] = None,
    shutdown_timeout: Annotated[
        float | None, typer.Option(help="Seconds that running requests have to finish after SIGTERM.")
    ] = None,
    restart_engine: Annotated[
        bool | None,
        typer.Option("--restart-engine", help="Load an engine that stopped again, with the weights it had."),
    ] = None,
    exit_on_engine_death: Annotated[
        bool | None,
        typer.Option("--exit-on-engine-death", help="With status 1, for a supervisor to restart it."),
    ] = None,
    otlp_traces_endpoint: Annotated[
        str | None, typer.Option(help="Send OpenTelemetry spans there, as http://host:4318/v1/traces.")
    ] = None,
    log_level: Annotated[
        LogLevel, typer.Option(help="info has a line for each request, without its text.")
    ] = LogLevel.WARNING,
    log_format: Annotated[LogFormat, typer.Option(help="json: an object a line.")] = LogFormat.TEXT,
) -> None:
    """Serve a model over OpenAI's API, with exact, reproducible sampling."""
    # Threads that wait at a barrier spin, and stall the HTTP thread where cores are few; threads that never spin
    # wake late, 250 times a step. This long bridges the gap between two kernels and no more (a decode step of 28
    # layers: 108 ms; never 117; for ever 133). Must be set before torch is imported.
    os.environ.setdefault("GOMP_SPINCOUNT", "100000")
    gc.disable()  # imports and loading make no garbage, and a quarter of their time; on again when a model is loaded
    engine = {
        "dtype": dtype,
        "device": device,
        "exact": exact,
        "threads": threads,
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": max_num_batched_tokens,
        "max_model_len": max_model_len,
        "max_queue": max_queue,
        "prefix_caching": prefix_caching,
        "trust_remote_code": trust_remote_code,
    }
    server = {
        "strict": strict,
        "weights_dir": weights_dir,
        "tool_style": tool_style,
        "max_body_bytes": max_body_bytes,
        "request_timeout": request_timeout,
        "client_timeout": client_timeout,
        "shutdown_timeout": shutdown_timeout,
        "restart_engine": restart_engine,
        "exit_on_engine_death": exit_on_engine_death,
        "api_keys_file": api_keys_file,
        "admin_keys_file": admin_keys_file,
        "ssl_certfile": ssl_certfile,
        "ssl_keyfile": ssl_keyfile,
        "ssl_keyfile_password": ssl_keyfile_password,
        "ssl_ca_certs": ssl_ca_certs,
        "otlp_traces_endpoint": otlp_traces_endpoint,
        "cors_origins": tuple(cors_origin) if cors_origin else None,
    }
    listener = _listen(host, port)  # before the imports: a taken port is known at once
    try:
        settings = _settings(model, served_model_name, engine, server)
        _ask_for_memory(settings)
    except MyserveError as error:
        fail(str(error))
    except ModuleNotFoundError as error:
        fail(f"{NEEDS_SERVER}  (missing: {error.name})")
    _run(settings, listener, log_level, log_format)


def _listen(host: str, port: int) -> socket.socket:
    try:
        listener = socket.create_server((host, port), backlog=2048)
    except OSError as error:
        fail(f"cannot listen on {host}:{port}: {error.strerror or error}; pass --port (0: any free one)")
    # asyncio does this only for sockets that name their protocol. Without it an answer, written as head and body,
    # waits 40 ms for the client's delayed acknowledgement; accepted connections inherit it.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def _settings(
    model: str | None, names: list[str] | None, engine: dict[str, Any], server: dict[str, Any]
) -> Settings:
    """What the environment asks for, and over it what the command line does."""
    from myserve.server.settings import Settings

    settings = Settings.from_env()
    changes = _given(server) | {"engine": replace(settings.engine, **_given(engine))}
    if model is not None:
        changes["models"] = dict.fromkeys(names or [_name_of(model)], model)
        changes["preload"] = None
    elif names:
        (path, *_) = [settings.models[name] for name in settings.preload or settings.models]
        changes["models"] = dict.fromkeys(names, path)
        changes["preload"] = None
    return replace(settings, **changes)


def _ask_for_memory(settings: Settings) -> None:
    """For the first model's packed weights, while Python imports what packs them; not where a GPU takes them."""
    engine = settings.engine
    on_cpu = engine.device == "cpu" or (engine.device == "auto" and not has_gpu())
    as_saved = engine.dtype == "auto" and engine.exact == "on"
    if settings.preload and on_cpu and as_saved and not settings.force_echo:
        from myserve.engine.memory import prefault

        prefault.begin(settings.models[settings.preload[0]])


def has_gpu() -> bool:
    """Whether torch, which is not imported yet, may find one."""
    return any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/kfd").exists()


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _name_of(model: str) -> str:
    """A hub id is its own name; a folder goes by its last part.

    >>> _name_of("Qwen/Qwen3-0.6B")
    'Qwen/Qwen3-0.6B'
    """
    path = Path(model)
    return path.resolve().name if path.is_dir() else model


def _run(settings: Settings, listener: socket.socket, log_level: LogLevel, log_format: LogFormat) -> None:
    try:
        from myserve.server.app import create_app
        from myserve.server.edge.graceful import GracefulServer
        from myserve.server.observe import logs
    except ModuleNotFoundError as error:
        fail(f"{NEEDS_SERVER}  (missing: {error.name})")
    host, port = listener.getsockname()[:2]
    url = f"{'http' if settings.ssl_certfile is None else 'https'}://{host}:{port}"
    err.print(f"[bold]myserve[/]  [dim]{', '.join(settings.preload or ())}[/]  at [bold]{url}[/]")
    logs.configure(log_level.value, log_format.value)
    try:
        server = GracefulServer(app := create_app(settings))
    except MyserveError as error:  # a file of keys without keys, of a certificate without one
        fail(str(error))
    if host not in ("127.0.0.1", "::1") and settings.api_keys_file is None:
        log.warning(
            "whoever reaches %s:%d may use this server; --api-keys-file makes it ask for keys", host, port
        )
    failures: list[str] = []

    def give_up(name: str, error: BaseException) -> None:
        failures.append(f"{name} did not load: {error}")
        server.should_exit = True

    app.state.on_load_failure = give_up
    for number in (signal.SIGTERM, signal.SIGINT):
        # uvicorn shuts down in order, then raises the signal again for whoever had it before: nobody, so that the
        # process ends as a server that was asked to end, with status 0
        signal.signal(number, lambda *_: None)
    _raise_file_limit()
    server.run(sockets=[listener])
    if server.engine_died:
        failures.append("an engine stopped, and its last words are in the log")
    if failures:
        fail(failures[0])


def _raise_file_limit() -> None:
    """A connection is a file, and shells allow 1024: as many as the system lets us."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
