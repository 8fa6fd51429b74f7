"""Deployments of Ray Serve, which starts, watches, scales and ends these; every token goes past it, over channels."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import socket
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy
from ray.serve.schema import LoggingConfig

from myserve.cluster.channel import error_from, error_to, pack, unpack
from myserve.cluster.controller import Controller, ControllerLostError
from myserve.cluster.messages import Member, Members, Standing
from myserve.cluster.on_ray.store import RayStore
from myserve.errors import EngineError, MyserveError
from myserve.server.settings import Settings

__all__ = ["ControllerClient", "controller_of", "replicas_of"]

log = logging.getLogger("myserve.cluster")

HEARTBEAT_SECONDS = 1.0
LEAVE_SECONDS = 2.0
QUIET = LoggingConfig(enable_access_log=False)  # a heartbeat a second is no access
CONTROLLER, REPLICA = "FleetController", "FleetReplica"


class FleetController:
    """The deployment of `Controller`: one replica, which Serve starts again where it dies."""

    def __init__(self, secret: str, fleet: str) -> None:
        self._controller = Controller(secret, RayStore(fleet))

    async def call(self, method: str, body: bytes) -> bytes:
        """Call a method; the answer, or the error, as bytes: Ray would wrap an error in one of its own."""
        args, options = unpack(body)
        try:
            return pack((await getattr(self._controller, method)(*args, **options), None))
        except MyserveError as error:
            return pack((None, error_to(error)))


class ControllerClient:
    """Calls the controller through its handle, from any event loop. Raises what it raises, ControllerLostError."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    async def _call(self, method: str, *args: Any, **options: Any) -> Any:
        try:
            answer, error = unpack(await self._handle.call.remote(method, pack((args, options))))
        except asyncio.CancelledError:
            raise
        except Exception as lost:
            raise ControllerLostError(f"the fleet's controller was lost: {type(lost).__name__}") from lost
        if error is not None:
            raise error_from(error)
        return answer

    async def heartbeat(self, member: Member) -> Standing:
        standing: Standing = await self._call("heartbeat", member)
        return standing

    async def members(self, known: str) -> Members:
        members: Members = await self._call("members", known)
        return members

    async def leave(self, name: str) -> None:
        await self._call("leave", name)

    async def update_weights(self, name: str, **options: Any) -> dict[str, Any]:
        report: dict[str, Any] = await self._call("update_weights", name, **options)
        return report

    async def change_adapter(self, change: Any) -> Any:
        return await self._call("change_adapter", change)

    async def everywhere(self, method: str, **args: Any) -> None:
        await self._call("everywhere", method, **args)


class FleetReplica:
    """The deployment of `ReplicaServer`: an engine that is healthy once it has the fleet's weights."""

    # Serve awaits it, which Python's own typing does not know
    async def __init__(  # type: ignore[misc]
        self, settings: Settings, secret: str, controller: Any, host: str | None = None
    ) -> None:
        self._host = host
        self._controller = ControllerClient(controller)
        self._settings = settings
        self._is_leaving = False
        self._expelled = False
        self._server: Any = await asyncio.to_thread(self._load, secret)
        self._name = f"{socket.gethostname()}-{secrets.token_hex(3)}"
        await self._join()
        self._beating = asyncio.ensure_future(self._beat())

    def _load(self, secret: str) -> Any:
        from myserve.cluster.replica import ReplicaServer
        from myserve.engine.engine import Engine
        from myserve.server.models.models import load_adapters

        path = next(iter(self._settings.models.values()))
        config = self._settings.engine
        if config.threads is None and not self._settings.replica_gpus:
            config = replace(config, threads=max(1, int(self._settings.replica_cpus)))
        engine = Engine.from_pretrained(path, config)
        load_adapters(engine, self._settings)
        engine.start()
        server = ReplicaServer(engine, secret, host=self._host or _own_address())
        server.start()
        return server

    @property
    def _member(self) -> Member:
        server = self._server
        return Member(
            self._name,
            server.host,
            server.port,
            server.bits,
            server.engine.weight_version,
            server.num_adapter_changes,
        )

    async def _join(self) -> None:
        """Take what the fleet has published, and wait to be in the list."""
        while True:
            told = self._member
            try:
                standing = await self._controller.heartbeat(told)
            except ControllerLostError as error:
                log.warning("%s", error)
            else:
                await self._catch_up(told, standing)
                if standing.is_member:
                    return
            await asyncio.sleep(0.2)

    async def _catch_up(self, told: Member, standing: Standing) -> None:
        server = self._server
        # what has changed since it was told need not be lacking any more: the next call says
        if standing.missing and self._member == told:
            await asyncio.wrap_future(server.run(server.apply(standing.missing)))
        if standing.released and not server.engine.released:
            await server.engine.release_memory(standing.released)
        if standing.paused is not None and not server.engine.is_paused:
            await server.engine.pause("keep")

    async def _beat(self) -> None:
        while not self._is_leaving:
            try:
                told = self._member
                standing = await self._controller.heartbeat(told)
                self._expelled = standing.is_expelled
                await self._catch_up(told, standing)
            except Exception as error:
                log.warning("a heartbeat failed: %s", error)
            await asyncio.sleep(HEARTBEAT_SECONDS)

    async def check_health(self) -> None:
        """Raise where the engine has died, is not exact, or is not at the fleet's weights: Serve replaces it."""
        engine = self._server.engine
        if self._expelled:
            raise EngineError("it did not take the weights that the fleet has")
        if not engine.is_alive:
            raise EngineError("its engine has stopped")
        if self._settings.engine.exact == "on" and not engine.exactness["rows_are_independent"]:
            raise EngineError("its rows depend on their batch: it would not give the bits of the others")

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Tell Serve the choices in flight, which do not come through its own handles."""
        return {"ongoing": float(self._server.num_in_flight)}

    async def __del__(self) -> None:
        """Leave: streams go on elsewhere, or to their ends here where there is no other replica."""
        self._is_leaving = True
        # where the whole application is deleted the controller goes as well, and Serve would wait for another
        with contextlib.suppress(ControllerLostError, TimeoutError):
            await asyncio.wait_for(self._controller.leave(self._name), LEAVE_SECONDS)
        self._server.leave()
        for _ in range(round(self._settings.shutdown_timeout / 0.1)):
            await asyncio.sleep(0.1)
            if not self._server.num_in_flight:
                break
        await asyncio.to_thread(self._server.close)


def _own_address() -> str:
    """Return the address of this node, as the others reach it."""
    import ray

    return str(ray.util.get_node_ip_address())


def _desired(context: Any) -> int:
    told = context.aggregated_metrics.get("ongoing", {})
    target = context.config.target_ongoing_requests
    wanted = -(-sum(told.values()) // target) if told else context.current_num_replicas
    return int(
        min(max(wanted, context.capacity_adjusted_min_replicas), context.capacity_adjusted_max_replicas)
    )


def one_deployment(context: Any) -> tuple[int, dict[str, Any]]:
    """Serve's autoscaling policy: enough replicas that each has `target_ongoing_requests` choices at most."""
    return _desired(context), {}


def controller_of(secret: str, fleet: str) -> Any:
    """Return the bound deployment of the controller of the fleet of this name."""
    deployment: Callable[..., Any] = serve.deployment(
        name=CONTROLLER,
        num_replicas=1,
        max_ongoing_requests=100_000,
        health_check_period_s=2,
        graceful_shutdown_timeout_s=1,
        graceful_shutdown_wait_loop_s=0.1,
        ray_actor_options={"num_cpus": 0},
        logging_config=QUIET,
    )(FleetController)
    return deployment.bind(secret, fleet)  # type: ignore[attr-defined]


def replicas_of(settings: Settings, secret: str, controller: Any, host: str | None = None) -> Any:
    """Return the bound deployment of the replicas. `host`: where each listens; None: at its node's own address."""
    number = settings.replicas or 1
    most = settings.max_replicas
    scaling: dict[str, Any] = {"num_replicas": number}
    if most is not None:
        scaling = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=number,
                max_replicas=most,
                initial_replicas=number,
                target_ongoing_requests=settings.target_ongoing_requests,
                policy=AutoscalingPolicy(policy_function="myserve.cluster.on_ray.deployments:one_deployment"),
            )
        }
    deployment: Any = serve.deployment(
        name=REPLICA,
        max_ongoing_requests=1000,
        health_check_period_s=2,
        health_check_timeout_s=20,
        graceful_shutdown_timeout_s=settings.shutdown_timeout + 5,
        graceful_shutdown_wait_loop_s=0.2,
        ray_actor_options={"num_cpus": settings.replica_cpus, "num_gpus": settings.replica_gpus},
        logging_config=QUIET,
        **scaling,
    )(FleetReplica)
    return deployment.bind(settings, secret, controller, host)
