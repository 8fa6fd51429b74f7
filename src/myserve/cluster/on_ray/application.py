"""The fleet as an application of Ray Serve, for `serve run myserve.cluster:app` and Serve config files."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Mapping
from typing import Any

from fastapi import FastAPI
from ray import serve

from myserve.cluster.fleet_engine import FleetEngine
from myserve.cluster.on_ray.deployments import ControllerClient, controller_of, replicas_of
from myserve.cluster.one_model import one_model
from myserve.errors import EngineError
from myserve.server.app import create_app
from myserve.server.models.models import ServedModel, serve_engine
from myserve.server.settings import Settings

__all__ = ["FleetIngress", "FleetLoader", "app", "fleet_of"]


def app(args: Mapping[str, Any] | None = None) -> Any:
    """Return the application that the arguments and the environment describe, for `serve run` and Serve config files.

    The names of arguments are those of `myserve serve`'s options: `model`, `replicas`, `max-replicas`, `replica-gpus`,
    `weights-dir` and so on; `ingresses`: how many replicas of the HTTP side. Raises RequestError.
    """
    given = dict(args or {})
    ingresses = int(given.pop("ingresses", 1))
    settings = one_model(Settings.read({name.replace("-", "_"): value for name, value in given.items()}))
    deployment: Any = serve.deployment(
        name="FleetIngress",
        num_replicas=ingresses,
        max_ongoing_requests=100_000,
        graceful_shutdown_timeout_s=settings.shutdown_timeout + 5,
        ray_actor_options={"num_cpus": 1},
    )(serve.ingress(None)(FleetIngress))
    controller, replicas, secret = fleet_of(settings)
    return deployment.bind(settings, secret, controller, replicas)


class FleetIngress:
    """The server's own application, whose engine is the fleet. Serve's proxy is in front of it."""

    def __init__(self, settings: Settings, secret: str, controller: Any, replicas: Any) -> None:
        self._load = FleetLoader(ControllerClient(controller), secret)
        self._settings = settings
        self._replicas = replicas  # held: they are of this application

    def __serve_build_asgi_app__(self) -> FastAPI:  # Serve's own name for it
        return create_app(self._settings, load=self._load)


def fleet_of(settings: Settings, host: str | None = None) -> tuple[Any, Any, str]:
    """Return the bound controller and replicas, and the secret that their channels ask for.

    `host`: where each replica listens; None: at its node's own address, as other machines reach it.
    """
    secret = secrets.token_hex(32)
    controller = controller_of(secret, secrets.token_hex(8))
    return controller, replicas_of(settings, secret, controller, host), secret


class FleetLoader:
    """Stands in `load_model`'s place: it waits for the fleet's first replica, whose engine is the fleet.

    `check` is called while it waits, and raises where the wait is in vain.
    """

    def __init__(
        self, client: ControllerClient, secret: str, check: Callable[[], None] = lambda: None
    ) -> None:
        self._client = client
        self._secret = secret
        self._check = check
        self._is_cancelled = threading.Event()

    def __call__(self, path: str, settings: Settings) -> ServedModel:
        from myserve.engine.weights.loader import load_tokenizer

        tokenizer = load_tokenizer(path, trust_remote_code=settings.engine.trust_remote_code)
        engine = FleetEngine(self._client, self._secret, settings.engine, tokenizer)
        try:
            engine.start(self._wait)
        except BaseException:
            engine.shutdown()
            raise
        return serve_engine(engine, path, settings)

    def cancel(self) -> None:
        """End the wait."""
        self._is_cancelled.set()

    def _wait(self) -> None:
        if self._is_cancelled.wait(0.1):
            raise EngineError("the server was shut down while its replicas started")
        self._check()
