"""PyTorch's vector math (oneMKL's VML) is asked by one thread alone before several ask it at once: decision 0007."""

from __future__ import annotations

import torch


def initialize() -> None:
    """Has the library find out what CPU this is, which it does at its first call and without a lock.

    Until then threads that share a large cosine may each take a part of it to another precision. One number is
    computed by one thread; every later call finds its answer, whichever function it is of.
    """
    torch.zeros(1, dtype=torch.float32, device="cpu").cos()
