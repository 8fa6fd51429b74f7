"""Numbers to the device and back: up without waiting, and back in one piece.

A device runs asynchronously until the host asks it for a number; then the host waits for all of it. So what a
step has to say is asked for once. On the CPU nothing waits, and the same code runs, so that it is tested there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["download", "send", "upload"]


def upload(values: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`torch.tensor(values)` on a device, which reads it when it comes to it."""
    return send(torch.tensor(values, dtype=dtype), device)


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on a device. Only from pinned memory may a copy be made later than it is asked for."""
    if device.type == "cpu":
        return tensor
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def download(tensors: Sequence[Tensor]) -> list[Tensor]:
    """All of them on the CPU, by one copy, whatever their types.

    >>> download([torch.tensor([True, False]), torch.tensor([[0.5]]), torch.tensor([7])])
    [tensor([ True, False]), tensor([[0.5000]]), tensor([7])]
    """
    # wide elements first: every tensor then starts at a multiple of its own element
    order = sorted(range(len(tensors)), key=lambda i: -tensors[i].element_size())
    whole = torch.cat([tensors[i].contiguous().view(-1).view(torch.uint8) for i in order]).cpu()
    parts = torch.split(whole, [tensors[i].nbytes for i in order])
    found = {
        i: part.view(tensors[i].dtype).view(tensors[i].shape) for i, part in zip(order, parts, strict=True)
    }
    return [found[i] for i in range(len(tensors))]
