"""How many CPUs and how much memory this process may use, containers taken into account."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

# Whisper's matrices are too small to keep more threads than this busy.
MAX_THREADS = 32
PROC = Path("/proc")
CGROUPS = Path("/sys/fs/cgroup")


def threads(cap: int = MAX_THREADS) -> int:
    """The number of threads to compute with: CPU affinity, the container's quota and `cap`.

    Not cached: the affinity may be set after the import, and before the first use.
    """
    quota = cpu_quota()
    allowed = affinity() if quota is None else min(affinity(), math.ceil(quota))
    return max(1, min(allowed, cap))


def affinity() -> int:
    """The number of CPUs that this process may be scheduled on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_quota(proc: Path = PROC, cgroups: Path = CGROUPS) -> float | None:
    """The container's limit in CPUs (cgroup v1 or v2; 1.5 is one and a half), None if unlimited."""
    quotas = []
    for folder in _cgroup_folders("cpu", proc, cgroups):
        quota, period = (_text(folder / "cpu.max").split() + ["", ""])[:2]  # v2: "150000 100000"
        if not quota:
            quota = _text(folder / "cpu.cfs_quota_us")
            period = _text(folder / "cpu.cfs_period_us")
        # Unlimited is "max" in v2 and -1 in v1.
        if quota.isdigit() and period.isdigit() and int(period) > 0:
            quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def times_throttled(proc: Path = PROC, cgroups: Path = CGROUPS) -> int:
    """How often processes of the container have been stopped because its quota was used up."""
    folders = _cgroup_folders("cpu", proc, cgroups)
    return sum(_counter(folder / "cpu.stat", "nr_throttled") for folder in folders)


def available_memory(proc: Path = PROC, cgroups: Path = CGROUPS) -> int | None:
    """The bytes this process could still take without swapping, None where that is unknown."""
    candidates = []
    for line in _text(proc / "meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            candidates.append(int(line.split()[1]) * 1024)
    for folder in _cgroup_folders("memory", proc, cgroups):
        limit = _text(folder / "memory.max") or _text(folder / "memory.limit_in_bytes")
        used = _text(folder / "memory.current") or _text(folder / "memory.usage_in_bytes")
        if limit.isdigit() and used.isdigit():
            # Pages of files read long ago count as used, and are given up on demand.
            cached = _counter(folder / "memory.stat", "inactive_file", "total_inactive_file")
            candidates.append(max(0, int(limit) - int(used) + cached))
    return min(candidates, default=None)


def _counter(statistics: Path, *names: str) -> int:
    """The first counter of one of these names in a cgroup's file, 0 where there is none."""
    for line in _text(statistics).splitlines():
        name, _, value = line.partition(" ")
        if name in names:
            return int(value)
    return 0


def _cgroup_folders(controller: str, proc: Path, cgroups: Path) -> Iterator[Path]:
    """The cgroup folders that limit this process: its own and all above it, to the mount.

    In a container the path of /proc/self/cgroup may be the host's, and not exist here; the limits
    then stand in the mount itself, which is why all folders up to it are looked at.
    """
    for line in _text(proc / "self" / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # v2: one hierarchy for all controllers
            mount = cgroups
        elif controller in controllers.split(","):
            mount = cgroups / controller
        else:
            continue
        inner = mount / path.strip("/")
        yield from (folder for folder in (inner, *inner.parents) if folder.is_relative_to(mount))


def _text(path: Path) -> str:
    """The file's text without surrounding white space, or "" where it cannot be read."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""
