"""Training checkpoints on disk, one writer per folder; only tensors and plain values are unpickled."""

from __future__ import annotations

import io
import math
import pickle
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from filelock import FileLock, Timeout

from quincunx.data.memory import gigabytes
from quincunx.pickles import Dictionary, Makers, Named, read_pickle
from quincunx.reading import (
    ZIP_DAMAGE,
    bounded,
    naming,
    one_line,
    read_member,
)
from quincunx.writing import write_atomically

__all__ = ["check_disk", "only_writer", "read_checkpoint", "write_checkpoint"]

_FORMAT = "quincunx-checkpoint"
_VERSION = 2


def write_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write a training state, completely or not at all."""
    # Python's errors distinguish a full disk from a defect; torch's own writer's do not
    buffer = io.BytesIO()
    torch.save({"format": _FORMAT, "version": _VERSION, **content}, buffer)
    write_atomically(path, lambda temporary: _write(temporary, buffer.getbuffer()))


def _write(path: Path, content: memoryview) -> None:
    path.write_bytes(content)


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Lock a folder against other processes that use this lock, within the context.

    Raises:
        BlockingIOError: another process is writing to it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # keep the file: deleting it could give two others a lock each
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
    """Check that a folder's disk has ``needed`` bytes left.

    Raises:
        OSError: it has fewer.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise OSError(
            f"{folder}: checkpoints and the trained network need {gigabytes(needed)} of disk, "
            f"{gigabytes(free)} are free there"
        )


# exceptions of zipfile and torch.load for damaged or foreign files
_UNREADABLE = (*ZIP_DAMAGE, pickle.UnpicklingError, TypeError, AttributeError, MemoryError, SystemError)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Return a training checkpoint's content; only tensors and plain values are unpickled.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a corrupt or foreign file, or one that claims more than it holds.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    if not path.is_file():
        raise ValueError(f"{path}: expected a file")
    try:
        with naming(path), path.open("rb") as file:
            # torch silently reads damaged weights, and trusts claimed sizes
            _check_claims(path, file)
            file.seek(0)
            content = torch.load(file, map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        if isinstance(error, OSError) and not isinstance(error, zipfile.BadZipFile):
            raise
        raise ValueError(f"{path}: corrupt, or no checkpoint of quincunx ({one_line(error)})") from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise ValueError(f"{path}: no checkpoint of quincunx")
    version = content.get("version")
    if type(version) is not int or version != _VERSION:
        raise ValueError(f"{path}: version {version!r}, but this program reads {_VERSION}"[:500])
    return content


def _check_claims(path: Path, file: IO[bytes]) -> None:
    """Refuse a file with a damaged member, or a tensor that claims more numbers than are stored.

    Raises:
        ValueError: there is one (also the exceptions in ``ZIP_DAMAGE``).
    """
    length = bounded(file.seek(0, io.SEEK_END), what=str(path))
    with zipfile.ZipFile(file) as archive:
        left = length
        sizes: dict[str, int] = {}
        pickled: zipfile.ZipInfo | None = None
        for member in archive.infolist():
            # torch stores members uncompressed; compressed ones could be longer than the file
            if member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size:
                raise ValueError(f"{member.filename[:80]!r} is compressed")
            left -= member.compress_size
            if left < 0:
                raise ValueError("its members overlap")
            sizes[member.filename.partition("/")[2]] = member.file_size
            if member.filename.endswith("/data.pkl"):
                pickled = member
        if (damaged := archive.testzip()) is not None:
            raise ValueError(f"{damaged[:80]!r} is damaged")
        if pickled is None:
            raise ValueError("it has no data.pkl")
        content = read_member(archive, pickled, length, what=f"{path}: data.pkl")
    read_pickle(content, len(content), makers=_MAKERS, persistent=lambda block: _stored(block, sizes))


def _stored(block: Any, sizes: Mapping[str, int]) -> int:
    """Return the bytes of the numbers that a persistent id refers to, after checking that they exist."""
    if not isinstance(block, tuple) or len(block) != 5 or not isinstance(block[1], Named):
        raise ValueError("a reference to no numbers")
    width, key, count = _WIDTHS.get(block[1].name), block[2], block[4]
    if width is None or type(count) is not int or not isinstance(key, str):
        raise ValueError("a reference to numbers of no kind")
    if sizes.get(f"data/{key}", -1) != count * width:
        raise ValueError(f"{count:,} numbers are claimed, of which {key[:40]!r} has others")
    return count * width


def _tensor(stored: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> None:
    """Check that a tensor claims no more than is stored for it; nothing replaces it."""
    if type(stored) is not int or len(shape) != len(stride) or len(shape) > 64:
        raise ValueError("a tensor without numbers")
    if not all(type(number) is int and 0 <= number < 2**62 for number in (offset, *shape, *stride)):
        raise ValueError("a tensor whose size is no number")
    # each number takes at least a byte
    if math.prod(shape) > stored:
        raise ValueError(f"a tensor of {tuple(shape)} claims more than its {stored:,} stored bytes")


# the names that a quincunx checkpoint may contain
_MAKERS: Makers = {
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("collections", "OrderedDict"): Dictionary,
}
_WIDTHS = {
    **{
        f"{name}Storage": width for name, width in (("Double", 8), ("Float", 4), ("Half", 2), ("BFloat16", 2))
    },
    **{f"{name}Storage": width for name, width in (("Long", 8), ("Int", 4), ("Short", 2), ("Char", 1))},
    **{f"{name}Storage": width for name, width in (("Byte", 1), ("Bool", 1))},
    **{f"Complex{name}Storage": width for name, width in (("Float", 8), ("Double", 16))},
}
