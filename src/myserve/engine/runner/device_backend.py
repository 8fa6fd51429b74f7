"""What differs from device to device, in one place: who attends over which pages, who records, what is tried."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from myserve.engine.kernels.attend import BLOCK_SIZE
from myserve.engine.mixers import attention
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


@dataclass(frozen=True, slots=True)
class DeviceBackend:
    """How the engine computes on one device."""

    device: torch.device
    attention: str  # for the report: "kernels", "flash", or "gathered" and why
    block_size: int  # tokens of a page
    pages: DevicePages | None  # None: the cache is our CPU kernels'
    packs: bool  # whether products are our CPU kernels', exact by construction
    # records steps, with memory of its own; None: steps run as they are
    recorder: Callable[[], Record] | None
    # how many rows each forward pass has, to be tried in order; 0: as many as there are
    settings: tuple[int, ...]

    def allocate_layer(
        self, num_blocks: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """K and V of one layer, zeroed; `cache[b]` is block b."""
        if self.pages is None:
            return attention.allocate_layer(num_blocks, num_kv_heads, head_dim, dtype)
        return self.pages.allocate(num_blocks, self.block_size, num_kv_heads, head_dim, dtype, self.device)

    def bytes_per_block(self, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
        """Of one layer, K and V together."""
        if self.pages is None:
            return attention.bytes_per_block(num_kv_heads, head_dim, dtype)
        return 2 * self.block_size * num_kv_heads * head_dim * dtype.itemsize


CPU = DeviceBackend(
    device=torch.device("cpu"),
    attention="kernels",
    block_size=BLOCK_SIZE,
    pages=None,
    packs=True,
    recorder=Recorder,
    settings=(0,),
)


def backend_for(model: Any, device: torch.device, *, exact: bool) -> DeviceBackend:
    """Of a loaded model. `exact`: also sets, for the process, what sums on a GPU need."""
    if device.type == "cpu":
        return CPU
    if exact and device.type == "cuda":
        keep_sums_whole()
    varlen = library_attention() if device.type == "cuda" else None
    return device_backend(heads_of(model), device, varlen)


def device_backend(heads: Heads, device: torch.device, varlen: VarlenAttention | None) -> DeviceBackend:
    """Of a device that our kernels do not run on. Where nothing is gathered, steps can be recorded."""
    flash, found = find_flash(heads, device, varlen)
    return DeviceBackend(
        device=device,
        attention=found,
        block_size=PLAIN_BLOCK if flash is None else FLASH_BLOCK,
        pages=DevicePages(flash),
        packs=False,
        recorder=None if flash is None or device.type != "cuda" else lambda: Graphs(device, MOST_REQUESTS),
        settings=(0, FIXED_ROWS),
    )


def heads_of(model: Any) -> Heads:
    """What a model's attention is on, by its config and its parameters."""
    config = model.config
    return Heads(
        heads=config.num_attention_heads,
        kv_heads=kv_heads(config),
        head_dim=head_size(config),
        dtype=model.dtype,
        softcap=getattr(config, "attn_logit_softcapping", None) or 0.0,
        sinks=any(name.endswith("sinks") for name, _ in model.named_parameters()),
    )


def kv_heads(hf_config: Any) -> int:
    return int(getattr(hf_config, "num_key_value_heads", None) or hf_config.num_attention_heads)


def head_size(hf_config: Any) -> int:
    return int(getattr(hf_config, "head_dim", None) or hf_config.hidden_size // hf_config.num_attention_heads)
