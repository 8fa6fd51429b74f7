"""Messages between replicas, ingress and controller."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec
from msgspec import Struct

from myserve.cluster.journal import Change
from myserve.engine.meters import EngineLoad, EngineMeters
from myserve.engine.outputs import FinishReason, PromptLogprob, RequestMetrics, RoutingShape, TokenOutput
from myserve.engine.scheduling.adapter import AdapterVersion

__all__ = [
    "Entry",
    "Member",
    "Members",
    "ReplicaFacts",
    "ReplicaStatus",
    "Standing",
    "read_entries",
    "write_entries",
]


class Entry(Struct, frozen=True, array_like=True):
    """One step's result for one choice: a `StepOutcome` on its way."""

    request: int  # as the ingress has numbered it
    index: int
    token: TokenOutput | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    hides_token: bool = False
    error: bytes | None = None  # `channel.error_to`
    prompt_logprobs: tuple[PromptLogprob, ...] | None = None
    metrics: RequestMetrics | None = None  # with the first token, and with the last


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(list[Entry])


def write_entries(entries: list[Entry]) -> bytes:
    """Return entries as bytes; every number keeps its bits.

    >>> entry = Entry(3, 0, token=TokenOutput(7, -0.1, float("-inf")))
    >>> read_entries(write_entries([entry])) == [entry]
    True
    """
    return _encoder.encode(entries)


def read_entries(body: bytes) -> list[Entry]:
    return _decoder.decode(body)


@dataclass(frozen=True, slots=True)
class ReplicaFacts:
    """Facts of a replica's whole life: its model's numbers, and how it computes."""

    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    routing_shape: RoutingShape | None
    exactness: Mapping[str, str | int | bool]
    quantization: Mapping[str, Any]
    bits: str  # its class: replicas of one class have given the same bits for the same probe


@dataclass(frozen=True, slots=True)
class ReplicaStatus:
    """A replica as it is now."""

    facts: ReplicaFacts
    weight_version: int
    is_alive: bool
    is_paused: bool
    released: frozenset[str] = frozenset()
    load: EngineLoad = field(default_factory=EngineLoad)
    meters: EngineMeters = field(default_factory=EngineMeters)
    adapters: Mapping[str, AdapterVersion] = field(default_factory=dict)

    @property
    def exactness(self) -> Mapping[str, str | int | bool]:
        return self.facts.exactness


@dataclass(frozen=True, slots=True)
class Member:
    """A replica of the fleet: where it listens, its class and its weights."""

    name: str
    host: str
    port: int
    bits: str
    weight_version: int
    num_adapter_changes: int = 0


@dataclass(frozen=True, slots=True)
class Standing:
    """The controller's answer to a replica that calls. `missing`: what it has to change before it is a member."""

    is_member: bool = False
    is_expelled: bool = False
    missing: tuple[Change, ...] = ()
    paused: str | None = None
    released: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Members:
    """The fleet as the controller knows it. `generation` differs whenever anything else does."""

    generation: str
    members: tuple[Member, ...]
    weight_version: int  # the published one
    phase: Literal["idle", "prepare", "swap"] = "idle"
    checksum: str | None = None  # of the published weights
    # that run and are not at what is published: they take no requests until they are members again
    outside: frozenset[str] = frozenset()
