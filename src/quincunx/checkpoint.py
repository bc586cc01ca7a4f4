"""Checkpoints of training on disk, one writer a folder; only tensors and plain values are unpickled."""

from __future__ import annotations

import io
import pickle
import shutil
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from quincunx.artifact import write_atomically
from quincunx.data.memory import gigabytes

__all__ = ["check_disk", "only_writer", "read_checkpoint", "write_checkpoint"]

_FORMAT = "quincunx-checkpoint"
_VERSION = 2


def write_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write a training state, whole or not at all."""
    # written by Python, whose errors tell a full disk from a defect; torch's own writer does not
    buffer = io.BytesIO()
    torch.save({"format": _FORMAT, "version": _VERSION, **content}, buffer)
    write_atomically(path, lambda temporary: _write(temporary, buffer.getbuffer()))


def _write(path: Path, content: memoryview) -> None:
    path.write_bytes(content)


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Within: no other process that asks may write to the folder.

    Raises:
        BlockingIOError: another one is writing to it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # the file stays: whoever removed it could leave two others with a lock each
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise BlockingIOError(
            f"{folder}: another run is writing to it; give this one another --out"
        ) from None
    try:
        yield
    finally:
        lock.release()


def check_disk(folder: Path, needed: int) -> None:
    """Refuse a folder whose disk has not ``needed`` bytes left.

    Raises:
        OSError: it has less.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise OSError(
            f"{folder}: checkpoints and the trained network need {gigabytes(needed)} of disk, "
            f"{gigabytes(free)} are free there"
        )


# what zipfile and torch.load raise on damaged or foreign files
_UNREADABLE = (
    zipfile.BadZipFile,
    zlib.error,
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A training checkpoint's content; only tensors and plain values are ever unpickled.

    Raises:
        ValueError: a corrupt or foreign file.
    """
    try:
        # torch itself reads damaged weights without a word
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"{damaged} is damaged")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path}: corrupt, or no checkpoint of quincunx ({reason})") from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise ValueError(f"{path}: no checkpoint of quincunx")
    if content.get("version") != _VERSION:
        raise ValueError(f"{path}: version {content.get('version')!r}, but this program reads {_VERSION}")
    return content
