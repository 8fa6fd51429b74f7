"""`myserve serve --replicas N`: Ray is started here, or joined where RAY_ADDRESS says, and ended with the server.

HTTP stays with our own server: TLS, limits and timeouts mean what they mean without a fleet.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from myserve.errors import EngineError, RequestError
from myserve.server.models.models import ModelLoader, ServedModel
from myserve.server.settings import Settings

__all__ = ["local_fleet"]

log = logging.getLogger("myserve.cluster")

REACH_SECONDS = 5.0
OBJECT_STORE_BYTES = 128 << 20  # nothing of ours goes through it
NEEDS_RAY = "--replicas needs Ray, which the other installs leave out: pip install 'myserve[ray]'"


@contextmanager
def local_fleet(settings: Settings) -> Iterator[ModelLoader]:
    """Connect to Ray, and yield what loads the model: it deploys the replicas and waits for them.

    On leaving, the application is deleted; a Ray that was started here is ended, with all its processes. Raises
    RequestError for an address where no Ray is, and for more replicas than there is room for; KeyboardInterrupt where
    SIGINT or SIGTERM comes before it yields.
    """
    address = os.environ.get("RAY_ADDRESS") or None
    if address == "local":  # Ray's own word for one that is started here
        address = None
    if address is not None:
        # known before Ray is imported, which would ask for a minute
        _check_reached(address)
        _show_the_token_that_is_there()
    try:
        # read when Ray is imported
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        # replicas are the server: Ray would have them yield to every other process
        os.environ.setdefault("RAY_worker_niceness", "0")
        import ray
    except ModuleNotFoundError as error:
        raise RequestError(f"{NEEDS_RAY}  (missing: {error.name})") from error

    if address is None and not settings.replica_gpus:
        # known before anything is started; how many GPUs there are is Ray's to find out
        _check_room({"CPU": os.cpu_count() or 1}, settings)
    name = f"myserve-{secrets.token_hex(4)}"
    # until it is known: what others began is theirs to end
    found_serve = True
    try:
        try:
            _connect(ray, address, settings)
            found_serve = _serve_runs()
            _check_room(ray.cluster_resources(), settings)
        except SystemExit:  # Ray's own answer to SIGTERM
            raise KeyboardInterrupt from None
        # a Ray of one machine: no other one need reach the replicas
        yield _LocalLoader(settings, name, host="127.0.0.1" if address is None else None)
    finally:
        if ray.is_initialized() and address is not None:
            _delete(name, and_serve=not found_serve)
        # also of a start that was interrupted
        ray.shutdown()


def _check_reached(address: str) -> None:
    """Raise RequestError for an address of Ray's where nobody listens, or that is none."""
    if address == "auto":  # of the Ray that runs on this machine
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or "://" in host:
        raise RequestError(
            f"RAY_ADDRESS must be host:port of a Ray head (as `ray start --head` prints it), auto, or local; "
            f"got {address!r:.200}"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=REACH_SECONDS).close()
    except OSError as error:
        raise RequestError(
            f"no Ray is reached at RAY_ADDRESS={address}: {error.strerror or error}"
        ) from error


def _show_the_token_that_is_there() -> None:
    """Have Ray send its token where there is one, as `ray start` asks for it then; a cluster without passes it over."""
    named = "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ
    if named or (Path.home() / ".ray" / "auth_token").exists():
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def _connect(ray: Any, address: str | None, settings: Settings) -> None:
    quiet = {"log_to_driver": settings.log_level == "debug", "logging_level": logging.ERROR}
    if address is not None:
        began = time.monotonic()
        try:
            ray.init(address=address, **quiet)
        except (ConnectionError, ValueError, RuntimeError, TimeoutError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise RequestError(
                f"no Ray is reached at RAY_ADDRESS={address} ({time.monotonic() - began:.0f} s): {reason}; "
                "one that asks for a token takes RAY_AUTH_MODE=token and RAY_AUTH_TOKEN"
            ) from error
        return
    for is_last in (False, True):
        try:
            # Ray makes this machine's own address of it (`resolve_ip_for_localhost`): docs/scale.md says to firewall it
            ray.init(
                address="local",
                num_cpus=os.cpu_count() or 1,
                include_dashboard=False,
                dashboard_host="127.0.0.1",
                object_store_memory=OBJECT_STORE_BYTES,
                _node_ip_address="127.0.0.1",
                **quiet,
            )
            return
        except Exception as error:
            # Ray grants its processes 30 s, too few on a busy machine; a second time their files are in memory
            ray.shutdown()
            if is_last:
                raise EngineError(f"Ray did not start on this machine: {error}") from error


def _check_room(there: Mapping[str, float], settings: Settings) -> None:
    """Raise RequestError where the replicas ask for more than there is: Ray would wait for it without end."""
    number = settings.replicas or 1
    for kind, each in (("CPU", settings.replica_cpus), ("GPU", settings.replica_gpus)):
        if number * each > there.get(kind, 0.0):
            raise RequestError(
                f"{number} replicas ask for {number * each:g} {kind}s, and there are {there.get(kind, 0.0):g}; "
                f"ask for fewer, or for less with --replica-{kind.lower()}s",
                param="replicas",
            )


class _LocalLoader:
    """Deploys the replicas on the Ray that is connected, then waits for the first of them."""

    def __init__(self, settings: Settings, name: str, host: str | None) -> None:
        self._settings = settings
        self._name = name
        self._host = host
        self._waiting: Any = None
        self._is_cancelled = False

    def __call__(self, path: str, settings: Settings) -> ServedModel:
        from ray import serve

        from myserve.cluster.on_ray.application import FleetLoader, fleet_of
        from myserve.cluster.on_ray.deployments import CONTROLLER, ControllerClient

        _, replicas, secret = fleet_of(self._settings, self._host)
        serve.start(proxy_location="Disabled")
        target = serve.RunTarget(replicas, name=self._name, route_prefix=None)
        serve.run_many([target], wait_for_applications_running=False)
        client = ControllerClient(serve.get_deployment_handle(CONTROLLER, self._name))
        self._waiting = FleetLoader(client, secret, self._check)
        if self._is_cancelled:
            self._waiting.cancel()
        model: ServedModel = self._waiting(path, settings)
        return model

    def cancel(self) -> None:
        self._is_cancelled = True
        if self._waiting is not None:
            self._waiting.cancel()

    def _check(self) -> None:
        from ray import serve

        state = serve.status().applications.get(self._name)
        if state is not None and state.status == "DEPLOY_FAILED":
            raise EngineError(f"the replicas did not start: {_reason(state)}")


def _reason(state: Any) -> str:
    """Return the last words of a deployment's failure, which is a trace of another process."""
    told = "\n".join([state.message, *(d.message for d in state.deployments.values())])
    lines = [
        line.strip() for line in told.splitlines() if re.match(r"\s*[\w.]*(Error|Exception)\b.*: ", line)
    ]
    return lines[-1] if lines else " ".join(told.split())[-300:]


def _serve_runs() -> bool:
    """Return whether Ray Serve runs on the cluster that is connected."""
    import ray

    actors = ray.util.list_named_actors(all_namespaces=True)
    return any(actor["name"] == "SERVE_CONTROLLER_ACTOR" for actor in actors)


def _delete(name: str, *, and_serve: bool) -> None:
    """Delete the application; `and_serve`: and Serve, which has no HTTP proxy, where nobody else has come to use it."""
    from ray import serve

    try:
        serve.delete(name)
        if and_serve and not serve.status().applications:
            serve.shutdown()
    except Exception as error:
        log.warning("the application %s was not deleted from Ray: %s", name, error)
