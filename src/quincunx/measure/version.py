"""What is installed: version, commit and back ends, found without importing torch, which takes seconds."""

from __future__ import annotations

import os
import subprocess
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

__all__ = ["COMMIT", "commit", "installed_back_ends", "own_version", "version_line"]

COMMIT = Path(__file__).with_name("commit.txt")
"""Written into wheels and source distributions, which have no checkout."""


def own_version() -> str | None:
    """Return the version of the installed package; None for a checkout that is only on the path."""
    try:
        return version("quincunx")
    except PackageNotFoundError:
        return None


def commit() -> str | None:
    """Return the commit of the package's checkout, with "+" appended if files differ.

    Without a checkout, return the environment variable ``QUINCUNX_COMMIT``, for copies of one, else the
    commit that the package was built from, else None.
    """

    def git(*arguments: str) -> str:
        here = Path(__file__).resolve().parent
        return subprocess.run(
            ["git", *arguments], cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        if git("ls-files", "--error-unmatch", Path(__file__).name):
            # a new result file does not change the code
            changed = git("status", "--porcelain", "-uno", "--", ":/", ":(top,exclude)results")
            return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        pass
    named = os.environ.get("QUINCUNX_COMMIT")
    return named or (COMMIT.read_text(encoding="utf-8").strip() if COMMIT.is_file() else None)


def installed_back_ends() -> list[str]:
    """Return the back ends that are installed; whether one serves a device is what ``qx.backend`` says."""
    found = ["native"] if find_spec("quincunx._native") is not None else []
    with suppress(PackageNotFoundError):
        found.append(f"triton {version('triton')}")
    return [*found, "reference"]


def version_line() -> str:
    """Return what ``quincunx --version`` prints.

    Example:
        >>> version_line().startswith(f"quincunx {own_version()}")
        True
    """
    return (
        f"quincunx {own_version()} (commit {commit() or 'unknown'}), torch {version('torch')}, "
        f"back ends: {', '.join(installed_back_ends())}"
    )
