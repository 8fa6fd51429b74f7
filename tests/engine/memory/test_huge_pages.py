"""Large memory asks for huge pages, and is memory like any other."""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from myserve.engine.config import EngineConfig
from myserve.engine.memory.huge_pages import FilePages, touch, zeros
from myserve.engine.memory.prefault import HUGE_PAGE
from myserve.engine.mixers.recurrent import StateShape
from myserve.engine.runner.device_backend import CPU, LayerShape
from myserve.engine.runner.kv_cache import AHEAD, KEPT_SLOTS, SLOTS_AHEAD, KVCache


@pytest.mark.parametrize("rows", [1, HUGE_PAGE // 8, HUGE_PAGE])
def test_zeros_at_a_cache_line_that_can_be_written(rows: int) -> None:
    x = zeros((rows, 4), torch.bfloat16)
    assert x.data_ptr() % 64 == 0 and not bool(x.any())
    x[-1] = 3
    y = zeros((rows, 4), torch.bfloat16)
    assert not bool(y.any()) and bool((x[-1] == 3).all())


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")
def test_touched_memory_is_there_and_keeps_its_values() -> None:
    x = zeros((16 * HUGE_PAGE,), torch.uint8)
    x[5], before = 7, resident()
    touch(x)
    assert resident() - before > 14 * HUGE_PAGE
    assert x[5] == 7 and int(x.count_nonzero()) == 1


@pytest.mark.own_process
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")
def test_the_cache_behind_the_blocks_in_use_lies_ready_and_no_more() -> None:
    shapes = [LayerShape(kv_heads=4, key_dim=64, value_dim=64)] * 2
    cache = KVCache(shapes, 4096, torch.float32, CPU, EngineConfig(num_blocks=4096))
    block, before = cache.num_bytes // cache.num_blocks, resident()
    ahead, room = AHEAD // cache.block_size * block, 2 * 2 * 2 * HUGE_PAGE
    for num_used in (0, 500):
        while cache.make_ready(num_used):
            pass
        assert num_used * block + ahead - room < resident() - before < num_used * block + ahead + room
    while cache.make_ready(4096):
        pass  # it has an end
    assert not any(bool(tensor.any()) for layer in cache.layers for tensor in layer)


@pytest.mark.own_process
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")
def test_slots_of_states_lie_ready_behind_those_in_use() -> None:
    states = [StateShape((8, 128, 128), torch.float32), StateShape((3, 64), torch.float32)]
    cache = KVCache([], 64, torch.float32, CPU, EngineConfig(max_num_seqs=256, num_blocks=8), states)
    slot, before = sum(state.num_bytes for state in states), resident()
    assert cache.num_state_slots == 512 + KEPT_SLOTS
    for num_used in (0, 200):
        while cache.make_ready(8, num_used):
            pass
        assert abs(resident() - before - (num_used + SLOTS_AHEAD) * slot) < 4 * HUGE_PAGE
    while cache.make_ready(8, cache.num_state_slots):
        pass  # it has an end
    assert not any(bool(tensor.any()) for tensor in cache.states)


@pytest.mark.own_process
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux is asked, and tells")
def test_a_large_tensor_is_marked_for_huge_pages_until_it_is_gone() -> None:
    def marked() -> int:
        flags = [
            line for line in Path("/proc/self/smaps").read_text().splitlines() if line.startswith("VmFlags")
        ]
        return sum(" hg" in line for line in flags)

    gc.collect()  # engines of earlier tests
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


@pytest.mark.own_process
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


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux is asked, and tells")
def test_what_was_written_over_a_files_pages_stays(tmp_path: Path) -> None:
    values = torch.randn(1 << 20)
    save_file({"x": values}, tmp_path / "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        x = file.get_tensor("x")
    x[500_000] = 7.0  # as a model's own code may, when it is loaded
    FilePages().let_go(x)
    assert x[500_000] == 7.0 and int((x != values).sum()) == 1


def in_the_systems_cache(file: Path) -> bool:
    """Whether all of a file is: what `mincore` says of a fresh mapping."""
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, flags=mmap.MAP_PRIVATE) as pages:
        found = (ctypes.c_ubyte * -(-len(pages) // mmap.PAGESIZE))()
        begin = ctypes.c_char.from_buffer(pages)
        ctypes.CDLL(None).mincore(ctypes.byref(begin), ctypes.c_size_t(len(pages)), found)
        del begin
        return all(page & 1 for page in found)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux is asked, and tells")
def test_a_file_that_was_let_go_need_not_be_read_from_the_disk_again(tmp_path: Path) -> None:
    save_file({"x": torch.randn(1 << 20)}, tmp_path / "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        x = file.get_tensor("x")
    os.sync()
    total = x.sum()
    FilePages().let_go(x)
    assert in_the_systems_cache(tmp_path / "model.safetensors") and x.sum() == total


def test_memory_that_is_no_files_stays_as_it_is() -> None:
    files, x = FilePages(), torch.randn(1 << 20)
    copy = x.clone()
    files.let_go(x)
    assert torch.equal(x, copy)
