"""What holds for every file: claims are bounded by what is there, errors name the file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["bounded", "memory_left", "naming"]


def memory_left() -> int:
    """Bytes of memory that this machine can still give, at least 1 MiB; 1 GiB where it does not say."""
    try:
        left = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return 1 << 30
    return max(int(left), 1 << 20)


def bounded(claimed: int, *, what: str, at_most: int | None = None) -> int:
    """A number of bytes that a file claims, if there can be as many.

    Args:
        claimed: bytes, as the file says.
        what: the file and the part of it, which the error begins with.
        at_most: what the file itself can hold of it, where that is known; always no more than half of the
            memory that is left.

    Raises:
        ValueError: negative, or more than that.
    """
    limit = memory_left() // 2
    limit = limit if at_most is None else min(limit, at_most)
    if not 0 <= claimed <= limit:
        raise ValueError(f"{what}: claims {claimed:,} bytes, of which there can be {limit:,} at most")
    return claimed


@contextmanager
def naming(path: Path | str) -> Iterator[None]:
    """Within: an error of the operating system that does not name a file names this one."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            raise type(error)(error.errno, error.strerror or str(error), str(path)) from error
        raise
