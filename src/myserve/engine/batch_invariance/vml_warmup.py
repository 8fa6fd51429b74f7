"""oneMKL VML's CPU dispatch is racy, so it is initialised on one thread: decision 0007."""

from __future__ import annotations

import torch

__all__ = ["initialize"]


def initialize() -> None:
    """Have the library detect the CPU, which it does at its first call and without a lock.

    Until then threads that share a large cosine may each take a part of it to another precision. One number is
    computed by one thread; every later call finds its answer, whichever function it is of.
    """
    torch.zeros(1, dtype=torch.float32, device="cpu").cos()
