"""Measure available memory, and refuse early if it is too little."""

from __future__ import annotations

import os
from pathlib import Path

_GROUP = Path("/sys/fs/cgroup")


def available() -> int:
    """Return the bytes that this process could still allocate without swapping."""
    free = _of_machine()
    group = _of_group()
    return free if group is None else min(free, group)


def _of_machine() -> int:
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _of_group() -> int | None:
    """Return what a container's own limit leaves; None without one."""
    try:
        limit = (_GROUP / "memory.max").read_text(encoding="ascii").strip()
        used = int((_GROUP / "memory.current").read_text(encoding="ascii"))
        facts = dict(
            line.split() for line in (_GROUP / "memory.stat").read_text(encoding="ascii").splitlines()
        )
    except OSError:
        return None
    # cached files count as used, but are freed on demand
    return None if limit == "max" else int(limit) - used + int(facts.get("inactive_file", 0))


def needed(images: int, pixels: int, channels: int = 3) -> int:
    """Return the bytes needed to load this many images: they are held twice while parts are assembled."""
    return 2 * images * pixels * channels


def check(name: str, bytes_needed: int, remedy: str, free: int | None = None) -> None:
    """Check that a number of bytes fits into the ``free`` bytes, by default those of this process.

    Raises:
        ValueError: it does not fit; ``remedy`` says what to do instead.
    """
    free = available() if free is None else free
    if bytes_needed > free:
        raise ValueError(
            f"{name}: needs {gigabytes(bytes_needed)} of memory, {gigabytes(free)} are free; {remedy}"
        )


def gigabytes(count: int) -> str:
    return f"{count / 2**30:.1f} GB" if count >= 2**30 // 10 else f"{count / 2**20:.1f} MB"
