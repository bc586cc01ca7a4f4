"""The name of the processor."""

from __future__ import annotations

import platform
from functools import lru_cache
from pathlib import Path

__all__ = ["cpu_name"]

# what /proc/cpuinfo says beside the name, on x86 and on ARM, and how we say it
_NUMBERS = {
    "cpu family": "family",
    "model": "model",
    "stepping": "stepping",
    "CPU implementer": "implementer",
    "CPU part": "part",
}


@lru_cache(maxsize=1)
def cpu_name() -> str:
    """Return the processor's name as the system reports it, with the numbers of its generation if told.

    A virtual machine may name all generations alike ("AMD EPYC"); the numbers tell them apart.
    """
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""  # not Linux
    return described(text) or platform.processor() or platform.machine()


def described(cpuinfo: str) -> str:
    """Return the name of the first processor in the text of /proc/cpuinfo, "" if it tells nothing."""
    first, *_ = cpuinfo.strip().split("\n\n")
    facts = {
        key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())
    }
    numbers = ", ".join(f"{word} {facts[key]}" for key, word in _NUMBERS.items() if facts.get(key))
    name = facts.get("model name", "")
    return f"{name} ({numbers})" if name and numbers else name or numbers
