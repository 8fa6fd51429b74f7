"""vLLM's RL control plane: pausing, and weights in several parts between a start and a finish."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from myserve.errors import RequestError
from myserve.wire.base import WireModel
from myserve.wire.weights import Mode

__all__ = [
    "AbortRequests",
    "FinishWeightUpdate",
    "PauseModeVLLM",
    "StartWeightUpdate",
    "UpdateWeights",
    "WeightChecker",
    "WeightTransferInit",
    "WeightVersionUpdate",
]

PauseModeVLLM = Literal["abort", "wait", "keep"]
Label = Annotated[str, Field(min_length=1, max_length=256)]


class AbortRequests(WireModel):
    """`POST /abort_requests`. Without ids, or with an empty list, every request in flight."""

    request_ids: tuple[str, ...] | None = None
    model: str | None = None


class WeightTransferInit(WireModel):
    """`POST /init_weight_transfer_engine`: what a process group is made with. `backend` "http" is ours."""

    init_info: dict[str, Any]
    model: str | None = None


class StartWeightUpdate(WireModel):
    """`POST /start_weight_update`."""

    model: str | None = None


class UpdateWeights(WireModel):
    """`POST /update_weights`: a folder (prime-rl's), or the tensors of one part of an update.

    >>> UpdateWeights(weight_dir="step_7").tensors is None
    True
    """

    weight_dir: Annotated[str, Field(min_length=1)] | None = None
    # vLLM's names, dtypes and shapes, and ours: {"safetensors": base64 of a file}
    update_info: dict[str, Any] | None = None
    mode: Mode | None = None
    weight_version: Label | None = None
    model: str | None = None

    def check(self) -> None:
        """Raise RequestError unless exactly one source of weights is named."""
        if (self.weight_dir is None) == (self.update_info is None):
            raise RequestError("send either weight_dir or update_info", param="update_info")

    @property
    def tensors(self) -> str | None:
        """Return the base64 of a safetensors file, where that is what was sent."""
        sent = None if self.update_info is None else self.update_info.get("safetensors")
        return sent if isinstance(sent, str) else None


class FinishWeightUpdate(WireModel):
    """`POST /finish_weight_update`. `weight_version`: what the weights are called in answers from then on."""

    weight_version: Label | None = None
    mode: Mode | None = None
    model: str | None = None


class WeightVersionUpdate(WireModel):
    """`POST /update_weight_version`, vLLM's and SGLang's: another name for the weights that are served."""

    new_version: Label
    # SGLang's default is true; here requests are aborted only where it is asked for
    abort_all_requests: bool = False
    model: str | None = None


class WeightChecker(WireModel):
    """`POST /weight_checker`."""

    action: Literal["checksum", "reset", "compare"]
    baseline: Mapping[str, str] | None = None
    model: str | None = None

    def check(self) -> None:
        """Raise RequestError for a comparison with nothing."""
        if self.action == "compare" and self.baseline is None:
            raise RequestError("action 'compare' requires a 'baseline' object", param="baseline")
