"""RoPE angles are computed once for every position and looked up in each step."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from myserve.engine.batch_invariance import pointwise
from myserve.engine.memory import huge_pages
from myserve.errors import RequestError

__all__ = ["CHUNK", "look_up_angles", "unscaled_length"]

log = logging.getLogger(__name__)

CHUNK = 4096  # positions computed at once
# Their frequencies follow the longest context of the call, so that one request would change another's numbers.
_FOLLOWS_THE_LONGEST = {"dynamic", "longrope"}


def unscaled_length(config: Any) -> int | None:
    """Return up to which context a LongRoPE model has the angles of short texts; None for all others.

    Beyond it every position has other angles. So it is what is served unless someone asks for more.
    """
    lengths = [
        int(rope["original_max_position_embeddings"])
        for rope in _rope_parameters(config)
        if rope.get("rope_type") == "longrope"
    ]
    return min(lengths, default=None)


def _rope_parameters(config: Any) -> Iterator[Mapping[str, Any]]:
    """One for all layers, or one for each type of layer."""
    found = getattr(config, "rope_parameters", None) or {}
    if "rope_type" in found:
        yield found
    else:
        yield from (rope for rope in found.values() if isinstance(rope, Mapping))


def look_up_angles(model: Any, positions: int) -> int:
    """Give every rotary embedding of a model a table of `positions` rows; return how many there were.

    Where the angles depend on the longest context of a call (dynamic NTK, LongRoPE), they become those of `positions`
    for every request, as vLLM has it: with at most `unscaled_length`, those that transformers has for short texts.
    """
    found: list[Any] = [
        module for module in model.modules() if _is_rotary(module) and _gives_angles(module, model)
    ]
    for module in found:
        module.forward = MethodType(_looked_up(module, positions, model.dtype, model.device), module)
    return len(found)


def _is_rotary(module: Any) -> bool:
    """By what it keeps and its signature, as all rotary embeddings of transformers have them."""
    takes = list(inspect.signature(module.forward).parameters)
    return hasattr(module, "rope_type") and takes in (
        ["x", "position_ids"],
        ["x", "position_ids", "layer_type"],
    )


def _gives_angles(module: Any, model: Any) -> bool:
    """Return whether it gives cosines and sines: DeepSeek-V2's gives complex numbers, and stays as it is."""
    x = torch.empty(0, dtype=model.dtype, device=model.device)
    types = module.rope_type if isinstance(module.rope_type, dict) else [None]
    more = [layer for layer in types if layer][:1]
    with torch.no_grad():
        angles = module.forward(x, torch.zeros(1, 1, dtype=torch.int64, device=model.device), *more)
    return isinstance(angles, tuple)


def _looked_up(module: Any, positions: int, dtype: torch.dtype, device: torch.device) -> Callable[..., Any]:
    theirs: Callable[..., Any] = module.forward
    types = module.rope_type if isinstance(module.rope_type, dict) else {None: module.rope_type}
    x = torch.empty(0, dtype=dtype, device=device)
    tables = {layer: _tables(theirs, x, layer, kind, positions) for layer, kind in types.items()}

    def forward(self: Any, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> Any:
        # of text, a position that grids have (time, height, width) is one number seen three times
        if position_ids.dim() == 3 and position_ids.stride(0) == 0:
            position_ids = position_ids[0]
        if x.dtype != dtype or position_ids.dim() != 2:
            return theirs(x, position_ids, *([layer_type] if layer_type else []))
        if not torch.is_inference_mode_enabled() and int(position_ids.max()) >= positions:  # a trainer's
            raise RequestError(f"position {int(position_ids.max())} is beyond max_model_len ({positions})")
        return tuple(_rows(table, position_ids) for table in tables[layer_type])

    return forward


def _rows(table: Tensor, position_ids: Tensor) -> Tensor:  # [positions, D] by [B, T] -> [B, T, D]
    if pointwise.is_ours(table):
        return pointwise.gather(table, position_ids.contiguous())
    return table[position_ids]


@torch.no_grad()
def _tables(
    theirs: Callable[..., Any], x: Tensor, layer_type: str | None, kind: str, positions: int
) -> tuple[Tensor, ...]:
    """Cosine and sine, [positions, D] each."""
    chunk = CHUNK
    if kind in _FOLLOWS_THE_LONGEST:
        log.info("rotary angles are those of contexts of %d tokens, whatever a request's length", positions)
        chunk = positions
    more = [layer_type] if layer_type else []
    tables: tuple[Tensor, ...] = ()
    for start in range(0, positions, chunk):
        rows = slice(start, min(start + chunk, positions))
        # [1, chunk, D] each
        angles = theirs(x, torch.arange(rows.start, rows.stop, device=x.device)[None], *more)
        tables = tables or tuple(_room(positions, a) for a in angles)
        for table, part in zip(tables, angles, strict=True):
            table[rows] = part[0]
    return tables


def _room(positions: int, angles: Tensor) -> Tensor:
    shape = (positions, angles.shape[-1])
    if angles.device.type == "cpu":
        return huge_pages.zeros(shape, angles.dtype)
    return torch.zeros(shape, dtype=angles.dtype, device=angles.device)
