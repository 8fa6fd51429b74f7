"""The weights that compute now, read back from where they lie: their checksums, and values that are none of theirs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from myserve.engine.batch_invariance.grouped_linear import GroupedLinear
from myserve.engine.batch_invariance.left_factors import HEADS, HeadFactors
from myserve.engine.batch_invariance.linear import PackedWeight
from myserve.engine.batch_invariance.own_matrices import exact_weights
from myserve.engine.batch_invariance.patch import ExactLinear
from myserve.engine.memory.huge_pages import FilePages
from myserve.engine.weights.plan import WeightNames
from myserve.errors import EngineError

__all__ = ["checksums_of", "current_weights", "places_of_weights", "zeros_like_weights"]


def current_weights(model: nn.Module, names: WeightNames) -> Iterator[tuple[str, Tensor]]:
    """Yield every weight under transformers' name, one at a time, with the values that the model multiplies by.

    Of tied weights each name has its own: an embedding and a packed head are two places in memory.
    """
    found: set[str] = set()
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        for name, tensor in _weights_of(prefix, module):
            if name in names.infos and name not in found:
                found.add(name)
                yield name, tensor.detach().to("cpu", names.infos[name].dtype).contiguous()
    if missing := sorted(names.infos.keys() - found):
        raise EngineError(f"{missing[0]} could not be read back")


def _weights_of(prefix: str, module: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield a module's own weights; packed ones first, as what stands in their place has no values."""
    if isinstance(module, ExactLinear):
        weight = module.packed.unpacked()
        yield prefix + "weight", weight.T if module.is_transposed else weight
        yield prefix + "bias", module.packed.bias[: module.out_features]
        return
    for name, own in exact_weights(module).items():
        yield prefix + name, own.packed.unpacked()
    if isinstance(module, GroupedLinear):
        yield prefix + "weight", torch.stack([one.unpacked() for one in module.packed_each])
    for name in HEADS:
        if isinstance(factors := getattr(module, name, None), HeadFactors):
            yield prefix + name, torch.stack([one.unpacked() for one in factors.packed])  # [H, N, K]
    if hasattr(module, "packed_down"):
        up = "gate_up_proj" if module.has_gate else "up_proj"
        for name, packed in ((up, module.packed_up), ("down_proj", module.packed_down)):
            stacked = torch.stack([one.unpacked() for one in packed])  # [E, N, K]
            yield prefix + name, stacked.transpose(1, 2) if module.is_transposed else stacked
    for name, tensor in module.state_dict(keep_vars=True).items():
        if "." not in name:
            yield prefix + name, tensor


def places_of_weights(model: nn.Module) -> Iterator[Tensor]:
    """Yield the tensors in whose memory the weights lie, packed or not; some may share it.

    What is a mapped file's is left out: the system drops its pages when it needs them.
    """
    files = FilePages()
    for module in model.modules():
        packed: list[PackedWeight] = []
        if isinstance(module, ExactLinear):
            packed.append(module.packed)
        packed += [own.packed for own in exact_weights(module).values()]
        for name in ("packed_up", "packed_down", "packed_each"):
            packed += getattr(module, name, ())
        for name in HEADS:
            packed += getattr(getattr(module, name, None), "packed", ())
        for one in packed:
            yield one.weight
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu" and not files.hold(tensor):
            yield tensor.detach()


def checksums_of(model: nn.Module, names: WeightNames) -> dict[str, str]:
    """Return SHA-256 of each weight's bytes, by name."""
    return {
        name: hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy().data).hexdigest()
        for name, tensor in current_weights(model, names)
    }


def zeros_like_weights(names: WeightNames) -> dict[str, Tensor]:
    """Return a state dict of zeros: what an update must have replaced whole."""
    return {
        name: torch.zeros(info.shape, dtype=info.dtype)
        for name, info in names.infos.items()
        if info.dtype.is_floating_point
    }
