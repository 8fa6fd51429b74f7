"""A container's limit counts, in both versions of control groups, its parents' too."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
import torch

from myserve.engine.config import EngineConfig
from myserve.engine.memory import available as module
from myserve.engine.memory.device import free_memory
from myserve.engine.runner import device_backend
from myserve.engine.runner.kv_cache import KVCache

MIB = 1 << 20
CPU = torch.device("cpu")


def group(folder: Path, limit: str, usage: int, inactive: int, *, v1: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if v1 else ("memory.max", "memory.current")
    (folder / names[0]).write_text(limit + "\n")
    (folder / names[1]).write_text(f"{usage}\n")
    own = f"inactive_file {inactive}\n" if not v1 else f"inactive_file 1\ntotal_inactive_file {inactive}\n"
    (folder / "memory.stat").write_text("anon 5\n" + own)


@pytest.fixture(params=[False, True], ids=["v2", "v1"])
def limited(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A group with 100 MiB, 60 of them in use and 10 of those reclaimable, in one with room; its parent's folder."""
    v1 = request.param
    root = tmp_path / "cgroup"
    top = root / "memory" if v1 else root
    group(top / "slice" / "own", str(100 * MIB), 60 * MIB, 10 * MIB, v1=v1)
    group(top / "slice", str(900 * MIB), 100 * MIB, 0, v1=v1)
    group(top, "max" if not v1 else str(2**63 - 4096), 0, 0, v1=v1)
    own = tmp_path / "own"
    own.write_text("3:cpuset:/\n2:memory:/slice/own\n0::/\n" if v1 else "0::/slice/own\n")
    monkeypatch.setattr(module, "CGROUPS", root)
    monkeypatch.setattr(module, "OWN_CGROUPS", own)
    return top / "slice"


def test_a_limit_leaves_what_it_leaves(limited: Path) -> None:
    assert free_memory(CPU) == 50 * MIB


def test_the_tightest_limit_counts(limited: Path) -> None:
    (limited / "memory.stat").write_text("")
    for name in ("memory.max", "memory.limit_in_bytes"):
        if (limited / name).exists():
            (limited / name).write_text(str(101 * MIB))
    assert free_memory(CPU) == 1 * MIB


def test_without_a_limit_the_machine_is_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "own"
    for text in ("0::/gone\n", "2:memory:/gone\n"):
        own.write_text(text)
        monkeypatch.setattr(module, "CGROUPS", tmp_path)
        monkeypatch.setattr(module, "OWN_CGROUPS", own)
        available = psutil.virtual_memory().available
        assert abs(free_memory(CPU) - available) < available // 10
    own.unlink()
    assert free_memory(CPU) > 0


def test_the_cache_is_sized_by_what_is_left(limited: Path) -> None:
    shapes = [device_backend.LayerShape(kv_heads=2, key_dim=64, value_dim=64)] * 2
    cache = KVCache(shapes, 40960, torch.float32, device_backend.CPU, EngineConfig())
    assert 12 * MIB < cache.num_bytes <= 50 * MIB // 4
