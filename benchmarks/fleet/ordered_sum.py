"""An all-reduce whose bits do not depend on the number of ranks: sums of fixed pieces, added in a fixed order.

What tensor parallel needs of a sum: a row-parallel product is cut into `PIECES` along its inner dimension, whoever
computes them; every rank gathers all pieces' partial sums and adds them in the order of the pieces. gloo's own
all-reduce adds what each rank has summed already, which differs with the number of ranks.
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist

__all__ = ["PIECES", "ordered_all_reduce", "row_parallel"]

PIECES = 8  # of the inner dimension; ranks divide them
WIDTH = 8 * 123  # the inner dimension of the example


def ordered_all_reduce(partials: torch.Tensor) -> torch.Tensor:
    """Return the sum of all ranks' partial sums [P, ...], piece by piece: P pieces a rank, in the order of ranks."""
    gathered = [torch.empty_like(partials) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, partials.contiguous())
    total = torch.zeros_like(partials[0])
    for piece in torch.cat(gathered):  # [PIECES, ...]
        total += piece
    return total


def row_parallel(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return x [T, K] times weight [K, N], of which this rank computes its share of the pieces of K."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    size = x.shape[1] // PIECES
    own = range(rank * PIECES // ranks, (rank + 1) * PIECES // ranks)
    return ordered_all_reduce(
        torch.stack([x[:, i * size : (i + 1) * size] @ weight[i * size : (i + 1) * size] for i in own])
    )


def main() -> None:
    """Run as rank `argv[1]` of `argv[2]`, by the file `argv[3]`: print the digests of both kinds of sum."""
    rank, ranks, file = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=ranks)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    # No power of two: a library may cut a product at 256 by itself, as two ranks would cut 512
    x, weight = torch.randn(5, WIDTH), torch.randn(WIDTH, 64)
    own = slice(rank * WIDTH // ranks, (rank + 1) * WIDTH // ranks)
    usual = x[:, own] @ weight[own]
    dist.all_reduce(usual)
    for name, value in (("ordered", row_parallel(x, weight)), ("usual", usual)):
        print(name, value.view(torch.int32).sum(dtype=torch.int64).item(), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
