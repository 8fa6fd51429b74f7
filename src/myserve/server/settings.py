"""What the operator decides, read once, from `Settings(...)` or the environment. No request changes it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from myserve.embedded import embedded_model_path
from myserve.engine.config import EngineConfig
from myserve.errors import RequestError
from myserve.server.parsing.tool_calls import TOOL_STYLES

EMBEDDED_MODEL = "myserve-demo"
DEFAULT_ON_DEMAND = "sshleifer/tiny-gpt2"  # what the seed document's tests ask a bare server for

_TRUE, _FALSE = ("1", "true", "yes", "on"), ("", "0", "false", "no", "off")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Which models are served, how they are loaded, and the server's limits.

    `models` maps served names to folders or hub ids; it is the only place where a name becomes a path. Models
    in `preload` are loaded at start, the others when a request first names them.

    >>> Settings(models={"mine": "models/mine"}).preload
    ('mine',)
    """

    models: Mapping[str, str]
    preload: tuple[str, ...] | None = None  # None: all
    engine: EngineConfig = field(default_factory=EngineConfig)
    force_echo: bool = False  # no model: answer with the prompt itself
    strict: bool = False  # refuse fields that no API knows
    weights_dir: str | None = None  # where snapshots for new weights lie; None: the weights stay as loaded
    tool_style: str = "auto"  # how the models write tool calls; auto: as their chat templates say
    max_body_bytes: int = 64 << 20
    request_timeout: float | None = None  # seconds for an answer; None: as long as it takes
    client_timeout: float = 60.0  # seconds in which a client must have sent a head, and a body
    shutdown_timeout: float = 30.0  # seconds that streams have to finish when the server ends
    restart_engine: bool = False  # load an engine that stopped again, with the weights that it had
    # so that a supervisor starts it anew; else /health is 503 from then on
    exit_on_engine_death: bool = False
    api_keys_file: str | None = None  # None: whoever reaches the port may ask
    admin_keys_file: str | None = None  # of those who may change weights
    ssl_certfile: str | None = None  # a certificate chain, as PEM: HTTPS, and nothing else on the port
    ssl_keyfile: str | None = None  # its private key; None: in the same file
    ssl_keyfile_password: str | None = field(default=None, repr=False)
    ssl_ca_certs: str | None = None  # clients must show a certificate that one of these signed
    otlp_traces_endpoint: str | None = None  # where OpenTelemetry spans go; None: there are none
    cors_origins: tuple[str, ...] = ()  # pages that may ask, as "https://host"; "*": every page

    def __post_init__(self) -> None:
        if not self.models:
            raise RequestError("no model to serve: name at least one", param="models")
        for name in ("max_body_bytes", "request_timeout", "client_timeout", "shutdown_timeout"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise RequestError(f"{name} must be greater than 0, got {value}", param=name)
        if self.ssl_certfile is None and (self.ssl_keyfile or self.ssl_ca_certs):
            raise RequestError(
                "TLS needs a certificate: give ssl_certfile beside ssl_keyfile and ssl_ca_certs",
                param="ssl_certfile",
            )
        if self.tool_style not in TOOL_STYLES:
            raise RequestError(
                f"tool_style must be one of {', '.join(TOOL_STYLES)}, got {self.tool_style!r}",
                param="tool_style",
            )
        if self.preload is None:
            object.__setattr__(self, "preload", tuple(self.models))

    @classmethod
    def from_env(cls, env: Mapping[str, str] | None = None) -> Settings:
        """What the environment asks for; if nothing, the embedded model, and the seed's on demand.

        `MYSERVE_MODEL` names what is served, comma separated: a folder or hub id, or `name=folder`. Unset,
        the embedded model is served and, on demand, the ids in `MYSERVE_ALLOW_MODELS`.

        >>> settings = Settings.from_env({"MYSERVE_MODEL": "qwen=models/qwen, org/other"})
        >>> settings.models
        {'qwen': 'models/qwen', 'org/other': 'org/other'}
        >>> list(Settings.from_env({}).models)
        ['myserve-demo', 'sshleifer/tiny-gpt2']
        """
        env = os.environ if env is None else env
        named = _models(env.get("MYSERVE_MODEL", ""))
        on_demand = {name: name for name in _words(env.get("MYSERVE_ALLOW_MODELS", DEFAULT_ON_DEMAND))}
        bare = {EMBEDDED_MODEL: str(embedded_model_path())}
        return cls(
            models=named or bare | on_demand,
            preload=tuple(named or bare),
            engine=EngineConfig(
                dtype=env.get("MYSERVE_DTYPE", "auto"),
                device=env.get("MYSERVE_DEVICE", "auto"),
                trust_remote_code=_flag(env, "TRUST_REMOTE_CODE"),
            ),
            force_echo=_flag(env, "MYSERVE_FORCE_ECHO"),
            strict=_flag(env, "MYSERVE_STRICT"),
            weights_dir=env.get("MYSERVE_WEIGHTS_DIR") or None,
            tool_style=env.get("MYSERVE_TOOL_STYLE", "auto"),
            api_keys_file=env.get("MYSERVE_API_KEYS_FILE") or None,
            admin_keys_file=env.get("MYSERVE_ADMIN_KEYS_FILE") or None,
            otlp_traces_endpoint=env.get("MYSERVE_OTLP_TRACES_ENDPOINT") or None,
            cors_origins=tuple(_words(env.get("MYSERVE_CORS_ORIGINS", ""))),
        )


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _models(text: str) -> dict[str, str]:
    pairs = (word.partition("=") for word in _words(text))
    return {name: path or name for name, _, path in pairs}


def _flag(env: Mapping[str, str], name: str) -> bool:
    value = env.get(name, "").strip().lower()
    if value not in _TRUE + _FALSE:
        raise RequestError(
            f"{name} must be one of {', '.join(_TRUE + _FALSE[1:])}, got {value!r}", param=name
        )
    return value in _TRUE
