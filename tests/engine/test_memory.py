"""Large memory asks for huge pages, and is memory like any other."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from myserve.engine.memory import HUGE_PAGE, FilePages, zeros


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


def resident_file_pages() -> int:
    """KiB."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssFile:")[2].split()[0])


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux is asked, and tells")
def test_a_files_pages_are_given_back_and_can_be_read_again(tmp_path: Path) -> None:
    values = torch.randn(1 << 21)  # 8 MiB
    save_file({"x": values, "y": values + 1}, tmp_path / "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        x, y = file.get_tensor("x"), file.get_tensor("y")
    assert torch.equal(x, values) and torch.equal(y, values + 1)
    before = resident_file_pages()
    FilePages().let_go(x)
    assert resident_file_pages() <= before - 8000, "the other tensor's pages stay"
    assert torch.equal(x, values) and torch.equal(y, values + 1)


def test_memory_that_is_no_files_stays_as_it_is() -> None:
    files, x = FilePages(), torch.randn(1 << 20)
    copy = x.clone()
    files.let_go(x)
    assert torch.equal(x, copy)
