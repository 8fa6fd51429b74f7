"""Rotary angles looked up by position: what a model computes anew in every step, computed once for every position."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from myserve.engine import memory, pointwise

log = logging.getLogger(__name__)

CHUNK = 4096  # positions computed at once
# Their frequencies follow the longest context of the call, so that one request would change another's numbers.
_FOLLOWS_THE_LONGEST = {"dynamic", "longrope"}


def look_up_angles(model: Any, positions: int) -> int:
    """Gives every rotary embedding of a CPU model a table of `positions` rows; how many there were.

    Where the angles depend on the longest context of a call (dynamic NTK, LongRoPE), they become those of `positions`
    for everyone, as vLLM has it: a shorter `max_model_len` gives what transformers computes for short texts.
    """
    if model.device.type != "cpu":
        return 0
    found: list[Any] = [module for module in model.modules() if _is_rotary(module)]
    for module in found:
        module.forward = MethodType(_looked_up(module, positions, model.dtype), module)
    return len(found)


def _is_rotary(module: Any) -> bool:
    """By what it keeps and its signature, as all rotary embeddings of transformers have them."""
    takes = list(inspect.signature(module.forward).parameters)
    return hasattr(module, "rope_type") and takes in (
        ["x", "position_ids"],
        ["x", "position_ids", "layer_type"],
    )


def _looked_up(module: Any, positions: int, dtype: torch.dtype) -> Callable[..., Any]:
    theirs: Callable[..., Any] = module.forward
    types = module.rope_type if isinstance(module.rope_type, dict) else {None: module.rope_type}
    tables = {layer: _table(theirs, layer, kind, positions, dtype) for layer, kind in types.items()}

    def forward(self: Any, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> Any:
        known = x.dtype == dtype and position_ids.dim() == 2 and position_ids.shape[0] == 1
        if not (known and position_ids.is_contiguous() and torch.is_inference_mode_enabled()):
            return theirs(x, position_ids, *([layer_type] if layer_type else []))
        return tuple(pointwise.gather(table, position_ids) for table in tables[layer_type])

    return forward


@torch.no_grad()
def _table(
    theirs: Callable[..., Any], layer_type: str | None, kind: str, positions: int, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """Cosine and sine, [positions, D] each."""
    chunk = CHUNK
    if kind in _FOLLOWS_THE_LONGEST:
        log.info("rotary angles are those of contexts of %d tokens, whatever a request's length", positions)
        chunk = positions
    x, more = torch.empty(0, dtype=dtype), [layer_type] if layer_type else []
    tables: tuple[Tensor, ...] = ()
    for start in range(0, positions, chunk):
        rows = slice(start, min(start + chunk, positions))
        angles = theirs(x, torch.arange(rows.start, rows.stop)[None], *more)  # [1, chunk, D] each
        tables = tables or tuple(memory.zeros((positions, a.shape[-1]), dtype) for a in angles)
        for table, part in zip(tables, angles, strict=True):
            table[rows] = part[0]
    return tables
