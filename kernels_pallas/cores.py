"""How many cores this process may use. Nothing here imports jax: who sets the process up asks before it is there."""

import functools
import math
import os
from pathlib import Path


def cores() -> int:
    """Those of the affinity mask, and no more than a container's quota lets compute at once, rounded up."""
    lent = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    allowed = quota()
    return lent if allowed is None else min(lent, max(1, math.ceil(allowed)))


@functools.cache
def quota(root: Path = Path("/")) -> float | None:
    """Cores' worth of time that the control groups of this process give it (`docker --cpus`), None without a limit.

    A thread more than that is stopped for the rest of a period, tens of milliseconds. A group is bound by those above
    it as well. Reads Linux's groups of both versions where they are usually mounted, below /sys/fs/cgroup; the first
    version's also as `cpu,cpuacct`.

    root: where `proc` and `sys` are.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text(errors="surrogateescape").splitlines()
    except OSError:
        return None
    mount, limits = root / "sys/fs/cgroup", []
    for _, controllers, path in (line.split(":", 2) for line in lines if line.count(":") >= 2):
        if not controllers:
            limits += [_limit(group / "cpu.max") for group in _groups(mount, path)]
        elif "cpu" in controllers.split(","):
            names = "cpu.cfs_quota_us", "cpu.cfs_period_us"
            hierarchies = {mount / "cpu", mount / controllers}
            groups = [group for hierarchy in hierarchies for group in _groups(hierarchy, path)]
            limits += [_limit(*(group / name for name in names)) for group in groups]
    return min((limit for limit in limits if limit is not None), default=None)


def _groups(mount: Path, path: str) -> list[Path]:
    """A group's folder and those above it; the topmost is a container's own, where `path` is told from outside."""
    group = mount / path.lstrip("/")
    return [group, *group.parents[: len(group.parts) - len(mount.parts)]]


def _limit(*files: Path) -> float | None:
    """Microseconds in a period, and the period's: in one file or two."""
    try:
        taken, period = (int(number) for file in files for number in file.read_text().split())
    except (OSError, ValueError):  # no such file; "max"
        return None
    return taken / period if taken > 0 and period > 0 else None
