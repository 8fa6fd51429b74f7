"""Compiles every kernel into Numba's cache, or reads it from there: `python -m myserve.engine.kernels.warm`."""

from __future__ import annotations

import torch

from myserve.core.compiled import fast_path
from myserve.engine.kernels import pointwise
from myserve.engine.kernels.attend import attend_kernel
from myserve.engine.kernels.gemm import linear_kernel
from myserve.engine.kernels.replay import replay_kernel
from myserve.engine.kernels.store import store_kernel


def warm(*dtypes: torch.dtype) -> None:
    """Reads every kernel for these types from Numba's cache (half a second), or compiles it (some seconds, once)."""
    fast_path.warm_up()
    replay_kernel()
    for dtype in dtypes:
        attend_kernel(dtype), store_kernel(dtype), linear_kernel(dtype)
        pointwise.warm(dtype)


if __name__ == "__main__":
    warm(torch.bfloat16, torch.float32)
