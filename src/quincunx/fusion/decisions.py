"""What was measured to be faster on this machine: decisions of a process, and kept on disk for later ones.

A decision that a measurement left in no doubt is kept in the cache folder, in one file for each processor,
instruction set, build of the kernels and version of torch; it is measured again wherever one of them differs.
``QUINCUNX_CACHE`` names the folder; set to nothing it turns the file off, and ``quincunx cache --clear``
removes it.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from quincunx.ops import backend, native
from quincunx.ops.processor import cpu_name
from quincunx.reading import read_json
from quincunx.writing import cache_folder, only_one, write_json

__all__ = ["decision", "decisions_file", "forget"]

# a ratio beyond this, either way, is no chance and is kept on disk
_CLEAR = 1.2

_LOCK = threading.RLock()
_KNOWN: dict[str, float] = {}


def decision(key: tuple[Any, ...], measure: Callable[[], float]) -> float:
    """The ratio measured for a key: by this process, by an earlier one, or now.

    Args:
        key: what the measurement depends on besides the machine; numbers and text.
        measure: makes the ratio, such as by :func:`quincunx.fusion.faster.speed_ratio`.
    """
    name = " ".join(map(str, key))
    with _LOCK:
        found = _KNOWN.get(name)
        if found is None:
            found = _kept(str(path)).get(name) if (path := decisions_file()) else None
        if found is None:
            found = measure()
            if path is not None and not 1 / _CLEAR < found < _CLEAR:
                _keep(path, name, found)
        _KNOWN[name] = found
    return found


def decisions_file() -> Path | None:
    """Where decisions for this processor are kept; None where they are not."""
    folder = cache_folder()
    return None if folder is None else folder / "decisions" / f"{_machine()}.json"


def forget() -> None:
    """Forget what this process measured or read; the file stays."""
    with _LOCK:
        _KNOWN.clear()
        _kept.cache_clear()


@lru_cache(maxsize=1)
def _machine() -> str:
    serving = backend()
    parts = [cpu_name(), serving.name, serving.isa, torch.__version__, native.build()]
    return hashlib.sha256(" | ".join(map(str, parts)).encode()).hexdigest()[:16]


@lru_cache(maxsize=4)
def _kept(path: str) -> dict[str, float]:
    # a file that another version wrote, or that is damaged, is no reason to stop: all is measured again
    with suppress(OSError, ValueError, TypeError, AttributeError):
        content = read_json(Path(path))["ratios"]
        return {str(name): float(ratio) for name, ratio in content.items() if float(ratio) > 0}
    return {}


def _keep(path: Path, name: str, ratio: float) -> None:
    # a cache that cannot be written costs a measurement, and nothing else
    with suppress(OSError, ValueError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with only_one(path):
            _kept.cache_clear()
            ratios = {**_kept(str(path)), name: ratio}
            write_json(path, {"cpu": cpu_name(), "isa": backend().isa, "ratios": ratios})
        _kept.cache_clear()
