"""The free memory of a device; a CPU's is the machine's (`available`, which needs no torch)."""

from __future__ import annotations

import torch

from myserve.engine.memory.available import free_host_memory

__all__ = ["free_memory"]


def free_memory(device: torch.device) -> int:
    """Return how many bytes of `device` could be taken now without swapping, or being killed for it."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return free_host_memory()
