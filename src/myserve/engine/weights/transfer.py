"""Tensors that come over the wire: the bytes of one safetensors file, checked as a file of a snapshot is."""

from __future__ import annotations

from typing import Any

from myserve.errors import BadSnapshotError

__all__ = ["tensors_of"]


def tensors_of(data: bytes | bytearray) -> dict[str, Any]:
    """Return the tensors of a safetensors file by name. Raises BadSnapshotError for what is none.

    >>> import torch
    >>> from safetensors.torch import save
    >>> tensors_of(save({"w": torch.ones(2)}))
    {'w': tensor([1., 1.])}
    """
    # torch is imported when a model is
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors: dict[str, Any] = load(bytes(data))
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise BadSnapshotError(f"these bytes are no safetensors file: {reason}") from error
    if not tensors:
        raise BadSnapshotError("the safetensors file has no tensors")
    return tensors
