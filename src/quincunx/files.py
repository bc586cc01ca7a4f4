"""What holds for every file: claims are bounded by what is there, errors name the file."""

from __future__ import annotations

import hashlib
import lzma
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

__all__ = ["ZIP_DAMAGE", "bounded", "file_name", "memory_left", "naming", "open_member", "read_member"]


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


# what reading a zip archive may raise, besides errors of the operating system
ZIP_DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    EOFError,
    ValueError,
    LookupError,
    OverflowError,
    # an encrypted member; NotImplementedError, an unknown compression, is one as well
    RuntimeError,
)
# what one byte can become when it is unpacked: deflate's format allows no more
_DEFLATE = 1040
_PIECE = 1 << 20
# bytes that lzma may look back, for which unpacking takes memory before the first byte comes
_LARGEST_WINDOW = 1 << 28


def _window(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> int:
    """What a member packed by lzma asks for."""
    file = archive.fp
    if file is None:
        return 0
    file.seek(member.header_offset + 26)
    lengths = struct.unpack("<HH", file.read(4))
    file.seek(sum(lengths), 1)
    # four bytes of version and length, one of settings, then the window
    return int.from_bytes(file.read(9)[5:], "little")


def open_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, length: int, *, what: str) -> IO[bytes]:
    """A member of a zip archive to read from, once what it takes to unpack it is known to be there.

    Args:
        archive, member: what is opened.
        length: bytes of the archive.
        what: the file and the member, which an error begins with.

    Raises:
        ValueError: it claims more than there can be, or is damaged (also what ``ZIP_DAMAGE`` lists).
    """
    bounded(member.compress_size, what=what, at_most=length)
    if member.compress_type == zipfile.ZIP_LZMA:
        bounded(_window(archive, member), what=f"{what}: its window", at_most=_LARGEST_WINDOW)
    return archive.open(member)


def read_member(
    archive: zipfile.ZipFile,
    member: zipfile.ZipInfo,
    length: int,
    *,
    what: str,
    at_most: int | None = None,
) -> bytes:
    """A member of a zip archive, its size bounded before anything is read.

    Args:
        archive, member: what is read.
        length: bytes of the archive.
        what: the file and the member, which an error begins with.
        at_most: bytes that there may be.

    Raises:
        ValueError: it claims more than there can be, or is damaged (also what ``ZIP_DAMAGE`` lists).
    """
    stored = member.compress_type == zipfile.ZIP_STORED
    deflated = member.compress_type == zipfile.ZIP_DEFLATED
    limit = member.compress_size * (1 if stored else _DEFLATE)
    limits = [n for n in (limit if stored or deflated else None, at_most) if n is not None]
    size = bounded(member.file_size, what=what, at_most=min(limits, default=None))
    pieces: list[bytes] = []
    left = size
    with open_member(archive, member, length, what=what) as file:
        # a piece at a time: a call for all of it unpacks what there is, whatever was claimed
        while piece := file.read(min(left + 1, _PIECE)):
            left -= len(piece)
            if left < 0:
                break
            pieces.append(piece)
    if left:
        raise ValueError(f"{what}: has other than the {size:,} bytes that it claims")
    return b"".join(pieces)


def file_name(label: str) -> str:
    """A network's label as a file name that any system takes.

    Example:
        >>> file_name("rsbn20 2/4, width 8")
        'rsbn20-2of4-width-8'
    """
    name = re.sub(r"[^\w.]+", "-", re.sub(r"(\d)/(\d)", r"\1of\2", label)).strip("-.")
    if len(name) <= 80:
        return name
    return f"{name[:70]}-{hashlib.sha256(label.encode()).hexdigest()[:8]}"
