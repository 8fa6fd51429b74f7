"""Loading and unloading of adapters, as vLLM, SGLang, prime-rl and SkyRL ask for it: one body for all of them."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from myserve.wire.base import WireModel
from myserve.wire.weights import Mode

__all__ = ["LoadAdapter", "UnloadAdapter"]

Name = Annotated[str, Field(min_length=1, max_length=256)]


class LoadAdapter(WireModel):
    """A folder in PEFT's format inside the server's weights directory, and the name that requests call it by.

    >>> LoadAdapter(lora_name="step", lora_path="step-7").load_inplace
    False
    """

    # SGLang's: all loaded adapters stay in memory here; vLLM's: an adapter's own tensors say what they are
    HINTS: ClassVar[frozenset[str]] = frozenset({"pinned", "lora_id", "lora_int_id", "is_3d_lora_weight"})

    lora_name: Name
    lora_path: Annotated[str, Field(min_length=1)]
    load_inplace: bool = False  # replace a loaded one of the name
    mode: Mode | None = None  # ours: what becomes of requests in flight with the one before
    model: str | None = None  # ours, of a server with several; None: the first
    base_model_name: str | None = None  # the same, by another server's word


class UnloadAdapter(WireModel):
    """The name of a loaded adapter."""

    HINTS: ClassVar[frozenset[str]] = frozenset({"lora_id", "lora_int_id"})

    lora_name: Name
