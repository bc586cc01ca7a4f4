"""Describe where a result was made: versions, processor, commit, command."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from quincunx.measure.latency import round_scale
from quincunx.measure.version import commit, own_version
from quincunx.ops.processor import cpu_name

__all__ = ["environment"]


def environment() -> dict[str, Any]:
    """Return the facts about the environment for a result file. JSON-ready.

    ``round_scale`` is there only where rounds of timing were not of the usual length.
    """
    scale = round_scale()
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        # python -m names the file it runs
        "command": shlex.join([Path(sys.argv[0]).name.replace("__main__.py", "quincunx"), *sys.argv[1:]]),
        "commit": commit(),
        "quincunx": own_version(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(terse=True),
        "cpu": cpu_name(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        **({} if scale == 1 else {"round_scale": scale}),
    }
