"""Published archives: a folder that stores them, and a download with a checksum."""

from __future__ import annotations

import hashlib
import http.client
import os
import shutil
import urllib.request
from collections.abc import Callable
from pathlib import Path

from quincunx.data import memory
from quincunx.writing import cache_folder, work_beside

# bytes so far, and total bytes or None if unknown
Progress = Callable[[int, int | None], None]

_SECONDS = 30
_CHUNK = 1 << 20


def data_folder() -> Path:
    """Return the folder for archives: QUINCUNX_DATA, else the cache folder, else ~/.cache/quincunx."""
    named = os.environ.get("QUINCUNX_DATA")
    return Path(named).expanduser() if named else cache_folder() or Path.home() / ".cache" / "quincunx"


def check_sum(path: Path, expected: str) -> None:
    """Compare a file's MD5 with the published one.

    Raises:
        ValueError: they differ.
    """
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    if digest.hexdigest() != expected:
        raise ValueError(
            f"{path}: has the checksum (MD5) {digest.hexdigest()}, expected {expected}; it is cut short or "
            "altered, so remove it and fetch it again"
        )


def fetch(url: str, expected: str, progress: Progress | None = None) -> Path:
    """Download an archive into the data folder; it gets its name only after its checksum was verified.

    Args:
        url: of the archive.
        expected: its MD5.
        progress: called with the bytes so far and total bytes (None if the server does not say).

    Raises:
        ConnectionError: it cannot be downloaded; the message says which file to put where.
        ValueError: the download differs from the published file.
        OSError: the folder cannot be written, or the disk is too small.
    """
    folder = data_folder()
    path = folder / url.rpartition("/")[2]
    with work_beside(path) as fresh:
        temporary = fresh / path.name
        try:
            with temporary.open("wb") as file:
                _receive(url, path, file.write, progress)
            check_sum(temporary, expected)
        except ValueError as error:
            # the message must not mention the temporary file, which is deleted by then
            reason = str(error).partition(": ")[2].partition(", so remove")[0]
            raise ValueError(f"{url}: {reason}") from error
        temporary.replace(path)
    return path


def _receive(url: str, path: Path, write: Callable[[bytes], object], progress: Progress | None) -> None:
    try:
        answer = urllib.request.urlopen(url, timeout=_SECONDS)
    except (OSError, http.client.HTTPException) as error:
        raise _unreachable(url, path, error) from error
    with answer:
        named = answer.headers.get("Content-Length", "")
        total = int(named) if named.isdecimal() else None
        free = shutil.disk_usage(path.parent).free
        if total is not None and total > free:
            raise OSError(
                f"{path.parent}: {path.name} needs {memory.gigabytes(total)} of disk, "
                f"{memory.gigabytes(free)} are free"
            )
        done = 0
        while True:
            try:
                chunk = answer.read(_CHUNK)
            except (OSError, http.client.HTTPException) as error:
                raise _unreachable(url, path, error) from error
            if not chunk:
                break
            write(chunk)
            done += len(chunk)
            if progress is not None:
                progress(done, total)
        if total is not None and done < total:
            raise _unreachable(url, path, f"the connection ended after {done} of {total} bytes")


def _unreachable(url: str, path: Path, reason: object) -> ConnectionError:
    return ConnectionError(
        f"{path.name} is not in {path.parent} and could not be downloaded ({reason}); "
        f"fetch {url} and put it there"
    )
