"""Capture of the experts that each row of a forward pass went to, where a layer's experts are called, when asked for.

A capture at the experts, and not at the routers, has what was really used, whatever a model's router is like.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from myserve.core.transfer import upload
from myserve.engine.outputs import RoutingShape

__all__ = ["RoutedExperts", "RoutingCapture", "moe_layers", "routing_shape"]


def moe_layers(model: nn.Module) -> list[tuple[nn.Module, Any]]:
    """Return each layer's block with the module in it that holds the experts, as transformers builds them, in order."""
    return [
        (block, child)
        for block in model.modules()
        for child in block.children()
        if hasattr(child, "_is_expert_parallel")
    ]


def routing_shape(model: Any) -> RoutingShape | None:
    """Return the shape of this model's routing; None for a dense one."""
    layers = moe_layers(model)
    experts_per_token = getattr(model.config, "num_experts_per_tok", None)
    if not layers or experts_per_token is None:
        return None
    return RoutingShape(len(layers), int(experts_per_token), max(int(e.num_experts) for _, e in layers))


class RoutedExperts:
    """Captures the routing of one model's layers during the forward passes whose requests ask for it."""

    def __init__(self, model: nn.Module) -> None:
        self.shape = routing_shape(model)
        self._experts = [experts for _, experts in moe_layers(model)]

    @contextmanager
    def capturing(self, wanted: bool) -> Iterator[RoutingCapture]:
        """Capture what the forward passes inside this block use; where it is not wanted, the model is not touched."""
        captured = RoutingCapture(self.shape if wanted else None)
        hooks = [m.register_forward_pre_hook(captured.take) for m in self._experts] if wanted else []
        try:
            yield captured
        finally:
            for hook in hooks:
                hook.remove()


class RoutingCapture:
    """The expert ids of a step's forward passes, in their order: a tensor [T, k] a layer and pass."""

    def __init__(self, shape: RoutingShape | None, first_row: int = 0) -> None:
        self._shape = shape
        self._first = first_row
        self._layers: list[Tensor] = []

    def take(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Keep the expert ids [T, k], the second argument of a layer's experts: states [T, D] are the first."""
        self._layers.append(args[1])

    def from_row(self, first: int) -> RoutingCapture:
        """Return the rows from `first` on."""
        rest = RoutingCapture(self._shape, self._first + first)
        rest._layers = self._layers
        return rest

    def rows(self, wanted: Sequence[int]) -> list[bytes] | list[None]:
        """Return the packed rows `wanted`, each as bytes; None for each where no request asked."""
        if self._shape is None or not wanted:
            return [None] * len(wanted)
        size = self._shape.num_moe_layers
        assert len(self._layers) % size == 0 < len(self._layers), (
            "a layer's experts were not called as a module"
        )
        passes = [self._layers[first : first + size] for first in range(0, len(self._layers), size)]
        ids = torch.cat([torch.stack(layers, dim=1) for layers in passes])  # [T, num_moe_layers, k]
        index = upload(wanted, torch.int64, ids.device) + self._first
        raw = ids[index].cpu().numpy().astype(self._shape.numpy_dtype).tobytes()
        row = len(raw) // len(wanted)
        return [raw[start : start + row] for start in range(0, len(raw), row)]
