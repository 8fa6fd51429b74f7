"""SGLang's control plane: the fields of requests, as its server reads them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from myserve.wire.base import WireModel
from myserve.wire.peers import Refused

__all__ = [
    "AbortRequest",
    "ContinueGeneration",
    "MemoryTags",
    "PauseGeneration",
    "UpdateWeightsFromDisk",
    "UpdateWeightsFromTensor",
    "WeightsChecker",
]

Label = Annotated[str, Field(min_length=1, max_length=256)]


class PauseGeneration(WireModel):
    """`POST /pause_generation`: end requests, take their keys and values, or leave them as they are."""

    mode: Literal["abort", "retract", "in_place"] = "abort"
    model: str | None = None


class ContinueGeneration(WireModel):
    """`POST /continue_generation`."""

    HINTS: ClassVar[frozenset[str]] = frozenset({"torch_empty_cache"})

    model: str | None = None


class AbortRequest(WireModel):
    """`POST /abort_request`: requests whose id is `rid`, or a batch's whose ids begin with it; or all."""

    HINTS: ClassVar[frozenset[str]] = frozenset({"finished_reason", "abort_message"})

    rid: str | None = None
    abort_all: bool = False
    model: str | None = None


class _Update(WireModel):
    # GPU practice: nothing here is cached by an allocator, captured in a graph, or drafted by a model of its own
    HINTS: ClassVar[frozenset[str]] = frozenset(
        {"torch_empty_cache", "recapture_cuda_graph", "disable_draft_model", "is_async", "token_step"}
    )

    abort_all_requests: bool = False
    weight_version: Label | None = None
    flush_cache: bool = True
    model: str | None = None


class UpdateWeightsFromDisk(_Update):
    """`POST /update_weights_from_disk`: a folder inside the server's weights directory.

    >>> UpdateWeightsFromDisk(model_path="step-7", weight_version="7").abort_all_requests
    False
    """

    REFUSED: ClassVar[Mapping[str, Refused]] = {"manifest": Refused(({},), "model_path")}

    model_path: Annotated[str, Field(min_length=1)]
    load_format: Literal["auto", "safetensors"] | None = None
    keep_pause: bool = False


class UpdateWeightsFromTensor(_Update):
    """`POST /update_weights_from_tensor`: safetensors files in base64. Pickles are code, and are never read."""

    serialized_named_tensors: Annotated[tuple[str, ...], Field(min_length=1)]
    load_format: str | None = None


class MemoryTags(WireModel):
    """`POST /release_memory_occupation` and `/resume_memory_occupation`. Without tags, all of it."""

    tags: tuple[Literal["kv_cache", "weights"], ...] | None = None
    model: str | None = None


class WeightsChecker(WireModel):
    """`POST /weights_checker`."""

    HINTS: ClassVar[frozenset[str]] = frozenset({"allow_quant_error", "selector"})

    action: Literal["checksum", "snapshot", "reset_tensors", "reset", "compare"] = "checksum"
    model: str | None = None
