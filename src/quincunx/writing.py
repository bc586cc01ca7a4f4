"""Write files and folders completely or not at all, even if the process is stopped.

New content is made in its own folder beside the final place, and moved there in one step of the operating
system. Such a folder is locked as long as its process lives, so that a later run can recognise and remove
the folders of killed runs.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save, save_file
from torch import Tensor

try:
    import fcntl
except ImportError:  # not Unix: nothing is locked, and leftovers are not removed
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "cache_folder",
    "file_name",
    "fill_folder",
    "json_text",
    "only_one",
    "restore",
    "storable",
    "work_beside",
    "write_atomically",
    "write_json",
    "write_tensors",
    "write_text",
]

# beside "model": ".model.0123abcd.part" is being written, ".model.0123abcd.old" is the previous folder
_PART, _OLD = "part", "old"
# seconds for which a place may be empty while another process puts a folder there
_PATIENCE = 2.0


def cache_folder() -> Path | None:
    """Return the folder for reproducible data: QUINCUNX_CACHE, else a folder in the user's cache.

    None if QUINCUNX_CACHE is empty: then nothing is cached.
    """
    named = os.environ.get("QUINCUNX_CACHE")
    if named is not None:
        return Path(named).expanduser() if named else None
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "quincunx"


@contextmanager
def only_one(path: Path) -> Iterator[None]:
    """Exclude other processes from this context for the same path, on systems that lock files."""
    descriptor = os.open(path.with_name(f".{path.name}.lock"), os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if fcntl is not None:
            # on a file system without locks the last writer wins
            with suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` make a file in a separate folder, then move it to ``path``.

    If writing fails (for example because the disk is full) the previous file is unchanged. The file's mode is
    0666 less the umask.

    Raises:
        OSError: it cannot be written; names ``path``.
    """
    with work_beside(path) as folder:
        temporary = folder / "content"
        write(temporary)
        _settle(temporary, folder)
        temporary.replace(path)
        _sync(path.parent)


def fill_folder(place: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a new folder, then move it to ``place``, where a folder may exist.

    At every moment the complete old folder or the complete new one exists; if the system cannot exchange two
    folders in one step, :func:`restore` brings the old one back.

    Raises:
        OSError: it cannot be written; names ``place``.
    """
    restore(place)
    with work_beside(place) as folder:
        write(folder)
        for path in folder.iterdir():
            _settle(path, folder)
        _sync(folder)
        _move_into_place(folder, place)
        _sync(place.parent)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    write_atomically(path, lambda temporary: _write_text(temporary, text))


def write_json(path: Path, value: Any) -> None:
    """Write strict JSON (no NaN) atomically, in the layout of :func:`json_text`."""
    write_text(path, json_text(value) + "\n")


# longest line of a value, and of a record in a list
_LINE, _RECORD = 160, 2000


def json_text(value: Any) -> str:
    r"""Return strict JSON that is easy to read and diff: number arrays and short records are one line.

    Raises:
        ValueError: NaN or an infinity.

    Example:
        >>> json_text({"rows": [{"name": "a" * 90}, {"name": "b" * 90}]}).count("\n")
        5
    """
    # as a reader will find it: keys are text, tuples are lists
    return _json_lines(json.loads(json.dumps(value, allow_nan=False)), "\n", _LINE)


def _json_lines(value: Any, margin: str, longest: int) -> str:
    line = json.dumps(value)
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    if len(line) <= longest or not any(isinstance(x, dict | list) for x in items):
        return line
    deeper = margin + "  "
    if isinstance(value, dict):
        inner = [f"{json.dumps(key)}: {_json_lines(x, deeper, _LINE)}" for key, x in value.items()]
        return "{" + deeper + f",{deeper}".join(inner) + margin + "}"
    return "[" + deeper + f",{deeper}".join(_json_lines(x, deeper, _RECORD) for x in value) + margin + "]"


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def write_tensors(path: Path, state: dict[str, Tensor]) -> None:
    """Write a .safetensors file of contiguous tensors that share no memory, not atomically.

    Raises:
        OSError: it cannot be written; the error names the file.
    """
    try:
        # the metadata marks a PyTorch file for other readers
        save_file(state, str(path), metadata={"format": "pt"})
    except SafetensorError as error:
        # the library's error has the system's error number only in its text
        number = re.search(r"\(os error (\d+)\)", str(error))
        code = int(number[1]) if number else errno.EIO
        reason = os.strerror(code) if number else str(error).splitlines()[0]
        raise OSError(code, f"the weights cannot be written ({reason})", str(path)) from error


@cache
def storable(dtype: torch.dtype) -> bool:
    """Return whether the installed format supports a type of numbers."""
    try:
        # one number of any type is at most 16 bytes
        sample = torch.zeros(16, dtype=torch.uint8).view(dtype) if dtype != torch.bool else torch.zeros(1) > 0
        return load(save({"x": sample.contiguous()}))["x"].dtype == dtype
    except (KeyError, ValueError, TypeError, RuntimeError, SafetensorError):
        return False


# ---------------------------------------------------------------- a folder beside a place


@contextmanager
def work_beside(place: Path) -> Iterator[Path]:
    """Provide a new locked folder beside a place within the context; remove leftovers of killed runs.

    Whoever makes something there that a later step moves to ``place`` uses this: a folder of another name
    would stay for ever once its process is killed.

    Raises:
        OSError: as raised within, naming ``place``; what a server did is no fault of it, and stays as it was.
    """
    folder: Path | None = None
    lock = -1
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        _clean(place)
        folder, lock = _locked_folder(place)
        yield folder
    except OSError as error:
        if error.filename is not None and folder is None:
            raise
        # sentences of this package that already say what a server did, or which folder is full
        if isinstance(error, ConnectionError) or (error.errno is None and str(place.parent) in str(error)):
            raise
        # the user knows the place, not the temporary folder
        raise type(error)(error.errno or errno.EIO, error.strerror or str(error), str(place)) from error
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


def _name(place: Path, kind: str) -> Path:
    return place.parent / f".{place.name}.{secrets.token_hex(4)}.{kind}"


def _left(place: Path, kind: str) -> list[Path]:
    """Return the folders of such names beside a place."""
    form = re.compile(rf"\.{re.escape(place.name)}\.[0-9a-f]{{8}}\.{kind}")
    try:
        names = [entry.name for entry in os.scandir(place.parent) if form.fullmatch(entry.name)]
    except OSError:
        return []
    return [place.parent / name for name in sorted(names)]


def _locked_folder(place: Path) -> tuple[Path, int]:
    while True:
        folder = _name(place, _PART)
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        # another process may remove it as a leftover until it is locked
        try:
            lock = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:
            continue
        if _lock(lock) and folder.exists():
            return folder, lock
        os.close(lock)


def _lock(descriptor: int) -> bool:
    """Lock a file as long as this process lives; return False if another process has locked it."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # a file system without locks: no other process gets one either
    return True


@contextmanager
def _of_the_dead(folder: Path) -> Iterator[bool]:
    """Yield whether no living process works on a folder, and keep others from starting."""
    if fcntl is None:
        yield False
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY)
    except OSError:
        yield False
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = True
        except OSError:
            free = False
        yield free
    finally:
        os.close(descriptor)


def _clean(place: Path) -> None:
    """Remove leftovers of killed runs beside a place."""
    kinds = (_PART, _OLD) if place.exists() else (_PART,)
    for folder in [folder for kind in kinds for folder in _left(place, kind)]:
        with _of_the_dead(folder) as dead:
            if dead:
                shutil.rmtree(folder, ignore_errors=True)


def _settle(path: Path, folder: Path) -> None:
    """Set the mode that the umask leaves, as the folder shows it, and flush every byte to disk."""
    path.chmod(folder.stat().st_mode & 0o666)
    _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---------------------------------------------------------------- one folder in another's place


def _move_into_place(fresh: Path, place: Path) -> None:
    if not place.exists():
        try:
            fresh.rename(place)
            return
        except OSError as error:
            # another process was faster
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
    if not _exchange(fresh, place):
        _replace(fresh, place)


def _replace(fresh: Path, place: Path) -> None:
    """Replace a folder without an exchange: move the old one aside, and back if that fails."""
    lock = os.open(place, os.O_RDONLY)
    try:
        # so that processes that look for it meanwhile wait for us
        _lock(lock)
        old = _name(place, _OLD)
        place.rename(old)
        try:
            fresh.rename(place)
        finally:
            # after any error, including Ctrl-C
            if not place.exists():
                old.rename(place)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        os.close(lock)


def restore(place: Path) -> None:
    """Bring back a folder that a killed process had moved aside, if its place is empty."""
    ends = time.monotonic() + _PATIENCE
    while not place.exists() and (left := _left(place, _OLD)):
        with _of_the_dead(left[-1]) as dead:
            if dead and not place.exists():
                with suppress(OSError):
                    left[-1].rename(place)
                return
        if time.monotonic() > ends:
            return
        time.sleep(0.01)


# error codes of systems without the exchange
_LACKING = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EXDEV, errno.EPERM}


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two folders in one step; return False if the system or the file system cannot."""
    call = _exchange_call()
    if call is None:
        return False
    if call(os.fsencode(one), os.fsencode(other)) == 0:
        return True
    code = ctypes.get_errno()
    if code in _LACKING:
        return False
    raise OSError(code, os.strerror(code), str(other))


@cache
def _exchange_call() -> Callable[[bytes, bytes], int] | None:
    try:
        library = ctypes.CDLL(None, use_errno=True)
        if sys.platform == "darwin":
            swap = library.renamex_np
            return lambda one, other: int(swap(one, other, 2))  # RENAME_SWAP
        renameat2 = library.renameat2
    except (AttributeError, OSError, TypeError):
        return None
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return lambda one, other: int(renameat2(here, one, here, other, exchange))


def file_name(label: str) -> str:
    """Return a network's label as a file name that is valid on any system.

    Example:
        >>> file_name("rsbn20 2/4, width 8")
        'rsbn20-2of4-width-8'
    """
    name = re.sub(r"[^\w.]+", "-", re.sub(r"(\d)/(\d)", r"\1of\2", label)).strip("-.")
    if len(name) <= 80:
        return name
    return f"{name[:70]}-{hashlib.sha256(label.encode()).hexdigest()[:8]}"
