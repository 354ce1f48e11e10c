"""What the operating system says of memory: this process's, and what the machine has left. No MLX."""

from __future__ import annotations

import ctypes
import os
import sys
from contextlib import suppress
from pathlib import Path

_CGROUPS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current"), "inactive_file"),
    (
        Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
        Path("/sys/fs/cgroup/memory/memory.usage_in_bytes"),
        "total_inactive_file",
    ),
)
_MEMINFO = Path("/proc/meminfo")
_STATM = Path("/proc/self/statm")
_FOOTPRINT_AT = 7  # of the 64-bit words that follow the 16 bytes of ri_uuid in macOS' struct rusage_info_v0


def process_bytes() -> int:
    """What the system charges this process with: macOS' physical footprint, Linux' resident set; 0 if it can't tell."""
    if sys.platform == "darwin":
        return _mac_footprint()
    try:
        return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError, ValueError):
        return 0


def trim() -> None:
    """Gives the system the pages of freed memory that glibc keeps below what is still in use; nothing elsewhere."""
    if sys.platform != "linux":
        return
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def free_bytes() -> int | None:
    """What the machine, or the container, can still give without swapping; None if it can't tell."""
    if sys.platform == "darwin":
        return _mac_free()
    found = [size for size in (_available(), *map(_container_free, range(len(_CGROUPS)))) if size is not None]
    return min(found, default=None)


def _available() -> int | None:
    try:
        lines = _MEMINFO.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _container_free(version: int) -> int | None:
    """Within the container's limit, pages of files that nobody uses counted as free."""
    limit, used, idle = _CGROUPS[version]
    try:
        most, now = limit.read_text().strip(), int(used.read_text())
        stat = dict(line.split() for line in (used.parent / "memory.stat").read_text().splitlines())
        return int(most) - now + int(stat.get(idle, 0)) if most.isdigit() and int(most) < 2**60 else None
    except (OSError, ValueError):
        return None


def _mac_footprint() -> int:
    words = (ctypes.c_uint64 * 64)()
    if ctypes.CDLL(None).proc_pid_rusage(os.getpid(), 0, ctypes.byref(words)):
        return 0
    return int(words[2 + _FOOTPRINT_AT])


def _mac_free() -> int | None:
    level, size = ctypes.c_int(0), ctypes.c_size_t(4)
    if ctypes.CDLL(None).sysctlbyname(b"kern.memorystatus_level", ctypes.byref(level), ctypes.byref(size), None, 0):
        return None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * level.value // 100
