"""Describe where a result was made: versions, processor, commit, command."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from quincunx.ops.processor import cpu_name

__all__ = ["environment"]


def environment() -> dict[str, Any]:
    """Return the facts about the environment for a result file. JSON-ready."""
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        # python -m names the file it runs
        "command": shlex.join([Path(sys.argv[0]).name.replace("__main__.py", "quincunx"), *sys.argv[1:]]),
        "commit": _commit(),
        "quincunx": _own_version(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(terse=True),
        "cpu": cpu_name(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def _own_version() -> str | None:
    try:
        return version("quincunx")
    except PackageNotFoundError:
        return None  # run from a checkout that is not installed


def _commit() -> str | None:
    """Return the commit of the package's checkout, with "+" appended if files differ.

    Without a checkout, return the environment variable ``QUINCUNX_COMMIT``, for copies of one; else None.
    """
    elsewhere = os.environ.get("QUINCUNX_COMMIT") or None
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        if git("ls-files", "--error-unmatch", str(Path(__file__).name)) == "":
            return elsewhere
        # a new result file does not change the code
        changed = git("status", "--porcelain", "-uno", "--", ":/", ":(top,exclude)results")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return elsewhere
