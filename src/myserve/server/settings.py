"""Each option of the server is declared here, once; no request changes it.

`Settings.read` takes values from the command line, the environment and a YAML file, in this order of precedence.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from myserve.embedded import embedded_model_path
from myserve.engine.config import EngineConfig
from myserve.errors import RequestError
from myserve.options import Option, Source, check_options, option, options_of, read_options
from myserve.server.parsing.tool_styles import TOOL_STYLES

__all__ = ["DEFAULT_ON_DEMAND", "EMBEDDED_MODEL", "OPTIONS", "ServedNames", "Settings"]

EMBEDDED_MODEL = "myserve-demo"
# docs/specification.md asks a server without settings for this model
DEFAULT_ON_DEMAND = "sshleifer/tiny-gpt2"

_MODELS, _ADDRESS, _ACCESS, _TLS = "Models served", "Address", "Access", "TLS"
_API, _LIMITS, _LIFE, _LOGS = "API", "Limits", "Start and end", "Logs and traces"
_FLEET = "Fleet"
_BATCHES = "Batches"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedNames:
    """The options that say which models are served, and under which names."""

    model: tuple[str, ...] = option(
        (),
        "A folder, a GGUF file or a hub id, or name=folder; several, with commas. On the command line and in a file a "
        "single folder goes by its last part; in the variable, by what stands there.",
        group=_MODELS,
        unset="the embedded model",
    )
    served_model_name: tuple[str, ...] = option(
        (),
        "What clients call the model; several names are possible.",
        group=_MODELS,
        unset="the model's own name",
    )
    allow_models: tuple[str, ...] = option(
        (DEFAULT_ON_DEMAND,),
        "Hub ids that are loaded when a request first names them, where no model is given.",
        group=_MODELS,
    )

    def models(self) -> tuple[dict[str, str], tuple[str, ...]]:
        """Return paths by served name, and the names that are loaded at start."""
        named = dict(_name_and_path(text) for text in self.model)
        preloaded = named or {EMBEDDED_MODEL: str(embedded_model_path())}
        if self.served_model_name:
            if len(preloaded) > 1:
                raise RequestError(
                    f"served_model_name names one model, and {len(preloaded)} are served; write name=folder for each",
                    param="served_model_name",
                )
            (path,) = preloaded.values()
            preloaded = dict.fromkeys(self.served_model_name, path)
            return preloaded, tuple(preloaded)
        on_demand = {} if named else {name: name for name in self.allow_models}
        return preloaded | on_demand, tuple(preloaded)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Hold the served models, the options of their loading, and the server's limits. Raises RequestError.

    `models` maps served names to folders or hub ids; it is the only place where a name becomes a path. Models
    in `preload` are loaded at start, the others when a request first names them.

    >>> Settings(models={"mine": "models/mine"}).preload
    ('mine',)
    """

    models: Mapping[str, str]  # a pathlib.Path becomes a text
    preload: tuple[str, ...] | None = None  # None: all
    engine: EngineConfig = field(default_factory=EngineConfig)

    force_echo: bool = option(
        False, "Load no model and answer with the prompt; for trying out clients.", group=_MODELS
    )
    weights_dir: str | None = option(
        None,
        "Take new weights from folders in here: /v1/weights, hot load.",
        group=_MODELS,
        unset="the weights stay as loaded",
    )
    lora: tuple[str, ...] = option(
        (),
        "Adapters (PEFT) of the first model that are loaded at start, as name=folder.",
        group=_MODELS,
        unset="none",
    )
    enable_memory_saver: bool = option(
        False,
        "Let a trainer on the same machine free the KV cache and the weights between rollouts.",
        group=_MODELS,
    )
    strict: bool = option(False, "Refuse request fields that no API knows.", group=_API)
    tool_style: str = option(
        "auto",
        "How the model writes tool calls; auto is as its chat template shows.",
        group=_API,
        choices=TOOL_STYLES,
    )

    trust_request_chat_template: bool = option(
        False,
        "Take a chat template from a request. It is a program: one may use up the server's time and memory.",
        group=_API,
    )
    max_logprobs: int = option(
        20,
        "The most alternatives of a token that a request may ask for; 20 is OpenAI's limit.",
        group=_API,
        at_least=0,
        at_most=1024,
    )

    host: str = option(
        "127.0.0.1", "The address to listen on; 0.0.0.0 or :: to be reached from elsewhere.", group=_ADDRESS
    )
    port: int = option(
        8000, "The port to listen on; 0: any free one.", group=_ADDRESS, at_least=0, at_most=65535
    )
    allowed_hosts: tuple[str, ...] = option(
        (),
        "Names in the Host header that are this server's, beside localhost, addresses, the machine's name and --host; "
        ".example.com: all below it; *: every name.",
        group=_ADDRESS,
        unset="none beside those",
    )
    cors_origins: tuple[str, ...] = option(
        (),
        "Pages that may use this server, as https://host; *: every page.",
        group=_ADDRESS,
        unset="none",
        other_flag="--cors-origin",
    )

    api_keys_file: str | None = option(
        None,
        "A key a line, read again when it changes; every route but health and the page needs one.",
        group=_ACCESS,
        unset="no keys are needed",
    )
    admin_keys_file: str | None = option(
        None,
        "Keys that may change weights; where there are API keys, no others may.",
        group=_ACCESS,
        unset="with API keys, the weights cannot be changed",
    )

    ssl_certfile: str | None = option(
        None, "A certificate chain, PEM: serve HTTPS, and nothing else on the port.", group=_TLS, unset="HTTP"
    )
    ssl_keyfile: str | None = option(None, "Its private key.", group=_TLS, unset="in the certificate's file")
    ssl_keyfile_password: str | None = option(
        None, "The password of an encrypted key.", group=_TLS, unset="none", is_secret=True
    )
    ssl_ca_certs: str | None = option(
        None, "Clients must show a certificate that one of these signed.", group=_TLS, unset="they need none"
    )

    max_body_bytes: int = option(
        16 << 20, "The largest request; more is a 413.", group=_LIMITS, at_least=1, is_bytes=True
    )
    request_timeout: float | None = option(
        None,
        "Seconds for an answer; then a 504, or an error event in a stream.",
        group=_LIMITS,
        unset="as long as it takes",
        above=0,
    )
    client_timeout: float = option(
        60.0,
        "Seconds in which a client must have sent a request's head, and its body.",
        group=_LIMITS,
        above=0,
    )

    session_bytes: int = option(
        256 << 20,
        "Memory for what sessions (X-Session-ID) keep, all together; 0: none are kept, and the header has no effect.",
        group=_LIMITS,
        at_least=0,
        is_bytes=True,
    )
    session_timeout: float = option(
        3600.0, "Seconds after which a session that nobody used is forgotten.", group=_LIMITS, above=0
    )

    batch_directory: str | None = option(
        None,
        "Where the files of /v1/files and the progress of batches are kept: a server that starts with it goes on.",
        group=_BATCHES,
        unset="a temporary folder, gone when the server ends",
    )
    batch_bytes: int = option(
        8 << 30,
        "Room of the files of all batches, and of the answers of those that run.",
        group=_BATCHES,
        at_least=0,
        is_bytes=True,
    )

    shutdown_timeout: float = option(
        30.0, "Seconds that running requests have to finish after SIGTERM.", group=_LIFE, above=0
    )
    restart_engine: bool = option(
        False, "Load an engine that stopped again, with the weights that it had.", group=_LIFE
    )
    exit_on_engine_death: bool = option(
        False, "End with status 1 when an engine has stopped, for a supervisor to start it anew.", group=_LIFE
    )

    replicas: int | None = option(
        None,
        "Serve by so many engines in processes of their own, on Ray: one dies, and its streams go on at another. "
        "RAY_ADDRESS names a cluster; without it Ray is started here.",
        group=_FLEET,
        unset="one engine, in the server's own process",
        at_least=1,
        at_most=4096,
    )
    max_replicas: int | None = option(
        None,
        "With more to do than --target-ongoing-requests for each, add replicas up to so many; with less, take them "
        "away again.",
        group=_FLEET,
        unset="always --replicas",
        at_least=1,
        at_most=4096,
    )
    target_ongoing_requests: int = option(
        64, "Choices in flight for each replica from which on another is added.", group=_FLEET, at_least=1
    )
    replica_cpus: float = option(
        1.0,
        "Cores of each replica: Ray places it where they are free, and it computes with as many.",
        group=_FLEET,
        above=0,
    )
    replica_gpus: float = option(0.0, "GPUs of each replica.", group=_FLEET, at_least=0)

    log_level: Literal["debug", "info", "warning", "error"] = option(
        "warning", "info has a line for each request, without its text.", group=_LOGS
    )
    log_format: Literal["text", "json"] = option("text", "json: an object a line.", group=_LOGS)
    otlp_traces_endpoint: str | None = option(
        None, "Send OpenTelemetry spans there, as http://host:4318/v1/traces.", group=_LOGS, unset="no spans"
    )

    def __post_init__(self) -> None:
        if not self.models:
            raise RequestError("no model to serve: name at least one", param="models")
        check_options(self)
        object.__setattr__(self, "models", {name: os.fspath(path) for name, path in self.models.items()})
        if self.ssl_certfile is None and (self.ssl_keyfile or self.ssl_ca_certs):
            raise RequestError(
                "TLS needs a certificate: give ssl_certfile beside ssl_keyfile and ssl_ca_certs",
                param="ssl_certfile",
            )
        if self.max_replicas is not None and self.max_replicas < (self.replicas or 1):
            raise RequestError(
                f"max_replicas must be at least replicas, which is {self.replicas or 1}; got {self.max_replicas}",
                param="max_replicas",
            )
        if taken := self.adapters.keys() & self.models.keys():
            raise RequestError(f"lora: {min(taken)!r} is a model's name", param="lora")
        if self.preload is None:
            object.__setattr__(self, "preload", tuple(self.models))

    @property
    def adapters(self) -> dict[str, str]:
        """The folders of the adapters that are loaded at start, by name. Raises RequestError."""
        pairs = [text.partition("=") for text in self.lora]
        if wrong := [
            text for text, (name, _, folder) in zip(self.lora, pairs, strict=True) if not name or not folder
        ]:
            raise RequestError(f"lora must be name=folder, got {wrong[0]!r:.80}", param="lora")
        return {name: folder for name, _, folder in pairs}

    @classmethod
    def from_env(cls, env: Mapping[str, str] | None = None) -> Settings:
        """Return the settings of the environment; without any, the embedded model is served.

        `MYSERVE_MODEL` names what is served, comma separated: a folder or hub id, or `name=folder`. Unset,
        the embedded model is served and, on demand, the ids in `MYSERVE_ALLOW_MODELS`.

        >>> settings = Settings.from_env({"MYSERVE_MODEL": "qwen=models/qwen, org/other"})
        >>> settings.models
        {'qwen': 'models/qwen', 'org/other': 'org/other'}
        >>> list(Settings.from_env({}).models)
        ['myserve-demo', 'sshleifer/tiny-gpt2']
        """
        return cls.read({}, env)

    @classmethod
    def read(
        cls,
        command_line: Mapping[str, object],
        env: Mapping[str, str] | None = None,
        file: str | Path | None = None,
    ) -> Settings:
        """Return the settings that the command line, the environment and a YAML file give, in this order.

        `command_line` has values by the options' field names; None is what was not given. `file`, or else
        `MYSERVE_CONFIG`, names the YAML file. Raises RequestError, which names the option as its source does.
        """
        env = os.environ if env is None else env
        given = Source.command_line(command_line, OPTIONS)
        variables = Source.environment(env, OPTIONS)
        path = file or env.get("MYSERVE_CONFIG")
        written = Source.file(str(path), _yaml(path), OPTIONS) if path else Source({}, {})
        found = read_options(OPTIONS, (given, variables, written))

        def of(kind: type) -> dict[str, Any]:
            return {name: value for name, value in found.items() if name in options_of(kind)}

        names = of(ServedNames)
        as_written = "model" in variables.values and "model" not in given.values
        if (
            len(paths := names.get("model", ())) == 1
            and not names.get("served_model_name")
            and not as_written
        ):
            names["served_model_name"] = (_name_of(paths[0]),)
        models, preload = ServedNames(**names).models()
        engine = EngineConfig(**of(EngineConfig))
        return cls(models=models, preload=preload, engine=engine, **of(Settings))


OPTIONS: Mapping[str, Option] = {
    **options_of(ServedNames),
    **options_of(EngineConfig),
    **options_of(Settings),
}


def _yaml(path: str | Path) -> object:
    try:
        # in the extra [server], as all that serves; the commands that do not serve go without
        import yaml

        values: object = yaml.safe_load(Path(path).read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"the configuration file {path} cannot be read: {error}", param="config") from None
    except yaml.YAMLError as error:
        raise RequestError(f"the configuration file {path} is not YAML: {error}", param="config") from None
    return {} if values is None else values


def _name_and_path(text: str) -> tuple[str, str]:
    """Split name=path; a path that is a folder may hold the sign itself."""
    name, _, path = text.partition("=")
    return (name, path) if path and not Path(text).is_dir() else (text, text)


def _name_of(model: str) -> str:
    """Return a model's served name: a hub id is its own, a folder goes by its last part, a GGUF file by its stem.

    >>> _name_of("Qwen/Qwen3-0.6B"), _name_of("models/Qwen3-0.6B-Q8_0.gguf")
    ('Qwen/Qwen3-0.6B', 'Qwen3-0.6B-Q8_0')
    """
    name, path = _name_and_path(model)
    folder = Path(path)
    if name == path and folder.suffix == ".gguf":
        return folder.stem
    return folder.resolve().name if name == path and folder.is_dir() else name
