"""New weights over the wire: our own route, and Fireworks' hot load."""

from __future__ import annotations

from typing import Annotated, Literal, NotRequired

from pydantic import Field
from typing_extensions import TypedDict  # pydantic reads no other before Python 3.12

from myserve.wire.base import WireModel

__all__ = [
    "HOT_LOAD",
    "WEIGHTS",
    "HotLoadRequest",
    "HotLoadState",
    "LoadedAdapter",
    "LoadingState",
    "Mode",
    "Replica",
    "Stage",
    "Version",
    "WeightsReport",
    "WeightsRequest",
]

WEIGHTS = "/v1/weights"
HOT_LOAD = "/hot_load/v1/models/hot_load"

Mode = Literal["drain", "keep", "abort"]
# JSON's readers are sure of 63 bits, and the version after this one must fit too
Version = Annotated[int, Field(ge=0, lt=2**63)]
Stage = Literal["idle", "loading", "draining", "done", "error"]


class WeightsRequest(WireModel):
    """`POST /v1/weights`: a folder of safetensors under the server's weights directory.

    >>> WeightsRequest(path="step-7", mode="keep").partial
    False
    """

    path: Annotated[str, Field(min_length=1)]
    model: str | None = None  # None: the first served one
    mode: Mode = "drain"
    partial: bool = False
    version: Version | None = None
    checksum: str | None = None
    new_requests: Literal["wait", "refuse"] = "wait"
    reset_prompt_cache: bool = False


class WeightsReport(TypedDict):
    """The result of an update. Durations in seconds."""

    model: str
    identity: str
    weight_version: int
    checksum: str
    num_tensors: int
    num_bytes: int
    prepare_duration: float
    drain_duration: float
    pause_duration: float
    num_aborted: int


class IncrementalSnapshot(WireModel):
    """A snapshot that has only some of the weights. Whole tensors: no compression is understood."""

    previous_snapshot_identity: str | None = None
    compression_format: Literal["none"] | None = None
    checksum_format: Literal["none", "sha256"] | None = None


class HotLoadRequest(WireModel):
    """`POST /hot_load/v1/models/hot_load`; the last three fields are ours."""

    identity: Annotated[str, Field(min_length=1)]
    reset_prompt_cache: bool = False
    incremental_snapshot_metadata: IncrementalSnapshot | None = None
    mode: Mode = "drain"
    version: Version | None = None
    checksum: str | None = None


class LoadingState(TypedDict):
    stage: Stage
    target_snapshot_identity: str | None
    error: NotRequired[str]


class LoadedAdapter(TypedDict):
    """An adapter that requests may name; the last two are ours."""

    identity: str  # its folder, as it was named
    status: Literal["loaded"]
    name: str
    adapter_version: int


class Replica(TypedDict):
    current_snapshot_identity: str | None  # None: the weights that the server started with
    readiness: bool
    loading_state: LoadingState
    weight_version: int
    checksum: str | None
    loaded_adapters: NotRequired[list[LoadedAdapter]]  # where there are any


class HotLoadState(TypedDict):
    """`GET /hot_load/v1/models/hot_load`: one replica, this server."""

    replicas: list[Replica]
