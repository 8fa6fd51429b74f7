"""The replicas behind an engine, where it is a fleet: what `/metrics` and `/version` show of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from myserve.engine.meters import EngineLoad, EngineMeters

__all__ = ["ReplicaStatusLike", "ReplicaView", "card_of", "replicas_of"]


class ReplicaStatusLike(Protocol):
    """The last words of a replica."""

    @property
    def load(self) -> EngineLoad: ...
    @property
    def meters(self) -> EngineMeters: ...
    @property
    def weight_version(self) -> int: ...
    @property
    def is_alive(self) -> bool: ...
    @property
    def is_paused(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class ReplicaView:
    """A replica: what it said last, and what this ingress has sent there."""

    host: str
    bits: str  # its class: replicas of one class give the same bits
    status: ReplicaStatusLike
    requests: Mapping[str, int]  # by the reason of their route
    prompt_tokens: int
    hit_tokens: int
    is_leaving: bool
    is_behind: bool = False  # it lacks what the fleet has published, and gets no requests
    num_restarts: int = 0  # one that is started again is another replica

    @property
    def engine(self) -> ReplicaStatusLike:
        """The status, under the name that the table of metrics has for it."""
        return self.status

    @property
    def state(self) -> str:
        if self.is_leaving or not self.status.is_alive:
            return "leaving"
        if self.is_behind:
            return "behind"
        return "paused" if self.status.is_paused else "ready"


def replicas_of(engine: object) -> Mapping[str, ReplicaView] | None:
    """Return the replicas of a fleet by name; None for an engine in this process."""
    replicas: Mapping[str, ReplicaView] | None = getattr(engine, "replicas", None)
    return replicas


def card_of(name: str, replica: ReplicaView) -> dict[str, Any]:
    """Return what `/version` says of a replica."""
    load = replica.status.load
    return {
        "name": name,
        "host": replica.host,
        "class": replica.bits,
        "state": replica.state,
        "weight_version": replica.status.weight_version,
        "num_running": load.num_running,
        "num_waiting": load.num_waiting,
        "requests": dict(replica.requests),
        "prompt_tokens": replica.prompt_tokens,
        "hit_tokens": replica.hit_tokens,
    }
