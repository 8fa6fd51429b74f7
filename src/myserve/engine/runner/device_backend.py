"""The differences between devices, in one place: attention, pages, what records a step, what the self-test tries."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from myserve.engine.kernels.attend import BLOCK_SIZE
from myserve.engine.mixers import attention
from myserve.engine.mixers.attention_pass import AttentionCall
from myserve.engine.mixers.device_pages import (
    FLASH_BLOCK,
    PLAIN_BLOCK,
    DevicePages,
    Heads,
    VarlenAttention,
    find_flash,
    library_attention,
)
from myserve.engine.steps.cuda_graphs import Graphs
from myserve.engine.steps.fixed_rows import FIXED_ROWS, keep_sums_whole
from myserve.engine.steps.recorder import Recorder
from myserve.engine.steps.recordings import MOST_REQUESTS, Record

__all__ = ["CPU", "DeviceBackend", "LayerShape", "backend_for", "device_backend", "heads_of", "layer_shapes"]


class LayerShape(NamedTuple):
    """The keys and values that one call of attention keeps."""

    kv_heads: int
    key_dim: int
    value_dim: int


@dataclass(frozen=True, slots=True)
class DeviceBackend:
    """Choose the engine's means of computing on one device."""

    device: torch.device
    attention: str  # for the report: "kernels", "flash", or "gathered" and why
    block_size: int  # tokens of a page
    pages: DevicePages | None  # None: the cache is our CPU kernels'
    packs: bool  # whether products are our CPU kernels', exact by construction
    # records a model's steps, with memory of its own; None: steps run as they are
    recorder: Callable[[nn.Module], Record] | None
    # how many rows each forward pass has, to be tried in order; 0: as many as there are
    settings: tuple[int, ...]

    def allocate_layer(self, num_blocks: int, shape: LayerShape, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return K and V of one layer, zeroed; `cache[b]` is block b. Both have the wider of the two widths."""
        width = max(shape.key_dim, shape.value_dim)
        if self.pages is None:
            return attention.allocate_layer(num_blocks, shape.kv_heads, width, dtype)
        return self.pages.allocate(num_blocks, self.block_size, shape.kv_heads, width, dtype, self.device)

    def bytes_per_block(self, shape: LayerShape, dtype: torch.dtype) -> int:
        """Return the bytes of a block of one layer, K and V together."""
        width = max(shape.key_dim, shape.value_dim)
        if self.pages is None:
            return attention.bytes_per_block(shape.kv_heads, width, dtype)
        return 2 * self.block_size * shape.kv_heads * width * dtype.itemsize


CPU = DeviceBackend(
    device=torch.device("cpu"),
    attention="kernels",
    block_size=BLOCK_SIZE,
    pages=None,
    packs=True,
    recorder=Recorder,
    settings=(0,),
)


def backend_for(
    calls: Sequence[AttentionCall], dtype: torch.dtype, device: torch.device, *, exact: bool
) -> DeviceBackend:
    """Return the backend of a model that attends so. `exact`: also sets, for the process, what sums on a GPU need."""
    if device.type == "cpu":
        return CPU
    if exact and device.type == "cuda":
        keep_sums_whole()
    varlen = library_attention() if device.type == "cuda" else None
    return device_backend(heads_of(calls, dtype), device, varlen)


def device_backend(heads: Heads, device: torch.device, varlen: VarlenAttention | None) -> DeviceBackend:
    """Return the backend of a device without our kernels. Where nothing is gathered, steps can be recorded."""
    flash, found = find_flash(heads, device, varlen)
    return DeviceBackend(
        device=device,
        attention=found,
        block_size=PLAIN_BLOCK if flash is None else FLASH_BLOCK,
        pages=DevicePages(flash),
        packs=False,
        recorder=None if flash is None or device.type != "cuda" else lambda _: Graphs(device, MOST_REQUESTS),
        settings=(0, FIXED_ROWS),
    )


def heads_of(calls: Sequence[AttentionCall], dtype: torch.dtype) -> Heads:
    """Return what a model's attention is on; of layers that differ, the first's, and that they do."""
    first = calls[0]
    shapes = {(call.heads, call.kv_heads, call.key_dim, call.value_dim) for call in calls}
    return Heads(
        heads=first.heads,
        kv_heads=first.kv_heads,
        head_dim=first.key_dim,
        dtype=dtype,
        softcap=max(call.softcap for call in calls),
        sinks=any(call.sinks for call in calls),
        uniform=len(shapes) == 1 and first.key_dim == first.value_dim,
    )


def layer_shapes(calls: Sequence[AttentionCall]) -> list[LayerShape]:
    """Return what each call of attention keeps.

    >>> layer_shapes([AttentionCall(torch.nn.Identity(), 4, 2, 24, 12, 0)])
    [LayerShape(kv_heads=2, key_dim=24, value_dim=12)]
    """
    return [LayerShape(call.kv_heads, call.key_dim, call.value_dim) for call in calls]
