"""The race of a draw with its places behind the winner, first to last: noise and quotients are the draw's own."""

from __future__ import annotations

import torch
from torch import Tensor

from myserve.core.noise import BLOCK, block_noise, token_noise

__all__ = ["first_arrivals", "first_torch_arrivals"]

OPENED_AT_FIRST = 32  # blocks: of 2,400, few more can hold one of the first twenty


def first_arrivals(weights: Tensor, key: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return (ids, noise, arrival times) of the first `count` tokens to arrive, first to last; fewer if fewer can.

    The race of `draw_counter` with its places behind the winner: `weights` float32 [V], `key` int64 [1, 4]. As there,
    blocks that cannot hold them stay closed.
    """
    blocks = -(-len(weights) // BLOCK)
    padded = torch.nn.functional.pad(weights, (0, blocks * BLOCK - len(weights))).double().view(blocks, BLOCK)
    least, lane = block_noise(torch.arange(blocks, device=weights.device), key)  # [G]
    earliest = least / padded.amax(-1)
    opened = min(max(OPENED_AT_FIRST, 2 * count), blocks)
    while True:
        block = earliest.topk(opened, largest=False).indices.unsqueeze(1)  # [N, 1]
        ids = block * BLOCK + torch.arange(BLOCK, device=weights.device)  # [N, 64]
        noise = token_noise(ids, key, least[block], lane[block]).flatten()
        times, places = (noise / padded[block[:, 0]].flatten()).topk(min(count, len(noise)), largest=False)
        # no token of another block can come before these blocks' last: all that may hold one of the first
        needed = int((earliest <= times[-1]).sum())
        if needed <= opened:
            can = times.isfinite()
            return ids.flatten()[places[can]], noise[places[can]], times[can]
        opened = needed


def first_torch_arrivals(
    weights: Tensor, generator_state: Tensor, count: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (ids, noise, arrival times) of the first `count` under torch noise, whose draw began at this state."""
    generator = torch.Generator(device=weights.device)
    generator.set_state(generator_state)
    noise = torch.empty_like(weights).exponential_(generator=generator)
    # the draw takes the largest of these quotients: their inverses may round to another order
    ids = (weights / noise).topk(min(count, int((weights > 0).sum()))).indices
    return ids, noise[ids], noise[ids] / weights[ids]
