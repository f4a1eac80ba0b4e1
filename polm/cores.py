"""How many CPU cores this process may use."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


def count_cores() -> int:
    """The cores that the scheduler allows this process, and no more than its container's quota; at least 1."""
    allowed = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return max(1, min(allowed, read_quota(CGROUP) or allowed))


def read_quota(cgroup: Path) -> int | None:
    """Cores' worth of time that a container may use, rounded up (cgroup version 2, else 1); None without a limit."""
    for names in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        try:
            words = " ".join((cgroup / name).read_text(encoding="ascii") for name in names).split()
            quota, period = int(words[0]), int(words[1])
        except (OSError, ValueError, IndexError):
            continue  # not of this version, or `max`: no limit
        if quota > 0 and period > 0:
            return math.ceil(quota / period)
    return None
