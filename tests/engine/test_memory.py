"""Large memory asks for huge pages, and is memory like any other."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import pytest
import torch

from myserve.engine.memory import HUGE_PAGE, zeros


@pytest.mark.parametrize("rows", [1, HUGE_PAGE // 8, HUGE_PAGE])
def test_zeros_at_a_cache_line_that_can_be_written(rows: int) -> None:
    x = zeros((rows, 4), torch.bfloat16)
    assert x.data_ptr() % 64 == 0 and not bool(x.any())
    x[-1] = 3
    y = zeros((rows, 4), torch.bfloat16)
    assert not bool(y.any()) and bool((x[-1] == 3).all())


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux is asked, and tells")
def test_a_large_tensor_is_marked_for_huge_pages_until_it_is_gone() -> None:
    def marked() -> int:
        flags = [
            line for line in Path("/proc/self/smaps").read_text().splitlines() if line.startswith("VmFlags")
        ]
        return sum(" hg" in line for line in flags)

    before = marked()
    small, large = zeros((16,), torch.float32), zeros((HUGE_PAGE,), torch.float32)
    assert marked() == before + 1
    part = large[: HUGE_PAGE // 2]
    del large
    assert marked() == before + 1, "a view keeps it"
    del part, small
    gc.collect()
    assert marked() == before
