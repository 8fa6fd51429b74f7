"""Free memory is what the machine has left or, if that is less, what a container's or the process's limit leaves."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil

__all__ = ["CGROUPS", "OWN_CGROUPS", "V1", "V2", "free_host_memory"]

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")


class _Names(NamedTuple):
    """Names of files of one version of Linux' control groups."""

    limit: str
    usage: str
    reclaimable: str  # in memory.stat: file pages that are dropped before anyone is killed


V1 = _Names("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
V2 = _Names("memory.max", "memory.current", "inactive_file")


def free_host_memory() -> int:
    """Return how many bytes could be taken now without swapping, or being killed for it."""
    free = int(psutil.virtual_memory().available)
    return min([free, *_left_by_limits(CGROUPS, OWN_CGROUPS), *_left_to_process()])


def _left_to_process() -> Iterator[int]:
    """Return what `ulimit -v` leaves: it counts addresses, used or not."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        yield max(0, limit - int(psutil.Process().memory_info().vms))


def _left_by_limits(root: Path, own: Path) -> Iterator[int]:
    """Return what each limit on this process leaves: its own group's, and those of all groups around it."""
    try:
        memberships = [line.split(":", 2) for line in own.read_text().splitlines()]
    except OSError:
        return  # not a Linux
    for _, controllers, path in memberships:
        if controllers in ("", "memory"):
            top, names = (root / "memory", V1) if controllers else (root, V2)
            group = top / path.lstrip("/")
            for folder in (group, *group.parents):
                if folder.is_relative_to(top) and (left := _left(folder, names)) is not None:
                    yield left


def _left(group: Path, names: _Names) -> int | None:
    """None: no limit, or none that can be seen from inside a container."""
    try:
        limit, usage = int((group / names.limit).read_text()), int((group / names.usage).read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # "max" is no number
        return None
    return max(0, limit - usage + int(stat.get(names.reclaimable, 0)))
