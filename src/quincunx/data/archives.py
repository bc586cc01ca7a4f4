"""Read tar archives, with any compression, and zip archives. Nothing is written to disk.

A tar archive is read once from start to end, and a header's claims are checked against the data
before memory is allocated: Python's own reader allocates what headers claim, reads again to find links,
and takes quadratic time for some headers.
"""

from __future__ import annotations

import bz2
import gzip
import importlib
import lzma
import posixpath
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

from quincunx.reading import (
    ZIP_DAMAGE,
    bounded,
    open_member,
    read_member,
)

__all__ = ["LARGEST", "Member", "TooLarge", "members", "plain", "resolved"]

# the most bytes of one file that we read from an archive; train.bin of CIFAR-100 has 154 MB
LARGEST = 1 << 28
_BLOCK, _PIECE = 512, 1 << 20
# Images hardly compress. An archive may unpack to this factor of its size, and any
# archive to this many bytes.
_RATIO, _ANY = 200, 1 << 28
# limits of names, and of lists of names and numbers, before a file
_LONGEST_NAME, _LONGEST_LIST = 1 << 16, 1 << 20
_HEAD = 64


class Damaged(ValueError):
    """An archive that cannot be read further."""


class TooLarge(ValueError):
    """A member that is not an image, or is too large for one: it is skipped, the others can be read."""


@dataclass
class Member:
    """A file or a link in an archive; it must be read before the next one is requested.

    Attributes:
        name: its path in the archive.
        size: bytes that it claims.
        target: for a link, the path in the archive that it leads to; None for a file.
        head: reads the first bytes.
        content: reads all bytes; raises TooLarge if it is too large for an image.
    """

    name: str
    size: int
    target: str | None
    head: Callable[[], bytes]
    content: Callable[[], bytes]


def members(root: Path) -> Iterator[Member]:
    """Yield the files and links of an archive, in its order.

    Raises:
        ValueError: not an archive, damaged, cut short, or unpacked far larger than images ever are.
    """
    with root.open("rb") as file:
        length = file.seek(0, 2)
        file.seek(0)
        start = file.read(8)
        file.seek(0)
        zipped = start[:4] in (b"PK\3\4", b"PK\5\6")
        what = f"{root}: not a readable {'zip' if zipped else 'tar'} archive, or cut short"
        found = (_zip if zipped else _tar)(file, length)
        while True:
            with _refused(what):
                member = next(found, None)
            if member is None:
                break
            yield Member(
                member.name,
                member.size,
                member.target,
                # reading a member may reveal the same damage
                partial(_guarded, what, member.head),
                partial(_guarded, what, member.content),
            )


@contextmanager
def _refused(what: str) -> Iterator[None]:
    """Turn damage into a one-sentence error within the context."""
    try:
        yield
    except TooLarge:
        raise
    except (*ZIP_DAMAGE, OSError, MemoryError) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(f"{what} ({reason})") from error


def _guarded(what: str, read: Callable[[], bytes]) -> bytes:
    with _refused(what):
        return read()


def resolved(targets: dict[str, str], files: set[str]) -> dict[str, str]:
    """Return for each link the file that it finally leads to; links to no file are left out.

    Args:
        targets: target of each link.
        files: paths of files, normalised by :func:`plain`.
    """
    ends: dict[str, str | None] = {}
    for name in targets:
        passed = []
        here = name
        # follow each link only once, even if several lead to it
        while here in targets and here not in ends and here not in files:
            ends[here] = None
            passed.append(here)
            here = targets[here]
        end = here if here in files else ends.get(here)
        for link in passed:
            ends[link] = end
    return {name: end for name, end in ends.items() if end is not None}


def plain(name: str) -> str:
    """Return a normalised path."""
    return posixpath.normpath(name)


# ---------------------------------------------------------------- zip


def _zip(file: IO[bytes], length: int) -> Iterator[Member]:
    archive = zipfile.ZipFile(file)
    left = _Left(length)
    for member in archive.infolist():
        if member.is_dir():
            continue
        # members of an honest archive do not overlap
        left.read(member.compress_size)
        name = member.filename.replace("\\", "/")

        def head(member: zipfile.ZipInfo = member) -> bytes:
            with open_member(archive, member, length, what=repr(member.filename[:80])) as content:
                return content.read(_HEAD)

        def content(member: zipfile.ZipInfo = member) -> bytes:
            if member.file_size > LARGEST:
                raise TooLarge(f"{member.file_size:,} bytes, more than any image has")
            left.unpack(member.file_size)
            return read_member(archive, member, length, what=repr(member.filename[:80]), at_most=LARGEST)

        target = None
        if member.external_attr >> 16 & 0o170000 == 0o120000 and member.file_size <= _LONGEST_NAME:
            target = _beside(name, content().decode("utf-8", "replace"))
        yield Member(name, member.file_size, target, head, content)


class _Left:
    """Counts the bytes that may still be read from an archive and unpacked from it."""

    def __init__(self, length: int) -> None:
        self._packed, self._unpacked = 2 * length, _RATIO * length + _ANY

    def read(self, count: int) -> None:
        self._packed -= count
        if self._packed < 0:
            raise Damaged("its members overlap")

    def unpack(self, count: int) -> None:
        self._unpacked -= count
        if self._unpacked < 0:
            raise Damaged(f"it unpacks to more than {_RATIO} times its size, as no images do")


# ---------------------------------------------------------------- tar


class _Stream:
    """The unpacked bytes of a tar archive, from start to end."""

    def __init__(self, file: IO[bytes], length: int) -> None:
        self._file, packed = _unpacking(file)
        self._end = None if packed else length
        self._left = _Left(length)
        self.place = 0

    def check(self, count: int) -> None:
        """Refuse a size that the rest of the file cannot hold, if its length is known."""
        if self._end is not None and count > self._end - self.place:
            raise Damaged(f"{count:,} bytes at byte {self.place:,} of {self._end:,}")

    def read(self, count: int) -> bytes:
        """Read this many bytes, fewer at the end."""
        if count <= _PIECE:
            return self._some(count)
        found = bytearray()
        while count > 0 and (piece := self._some(min(count, _PIECE))):
            found += piece
            count -= len(piece)
        return bytes(found)

    def _some(self, count: int) -> bytes:
        found = self._file.read(count)
        # a file may return less than it has
        while len(found) < count and (more := self._file.read(count - len(found))):
            found += more
        self._left.unpack(len(found))
        self.place += len(found)
        return found

    def skip(self, count: int) -> None:
        self.check(count)
        while count > 0:
            found = len(self._some(min(count, _PIECE)))
            if not found:
                raise Damaged(f"it ends at byte {self.place:,}")
            count -= found


def _unpacking(file: IO[bytes]) -> tuple[IO[bytes], bool]:
    """Return a decompressed view of a file, and whether it was compressed."""
    start = file.read(6)
    file.seek(0)
    found: Any = None
    if start.startswith(b"\x1f\x8b"):
        found = gzip.GzipFile(fileobj=file)
    elif start.startswith(b"BZh"):
        found = bz2.BZ2File(file)
    elif start.startswith((b"\xfd7zXZ\0", b"\x5d\0\0")):
        found = _Lzma(file)
    elif start.startswith(b"\x28\xb5\x2f\xfd"):
        try:
            # since Python 3.14
            found = importlib.import_module("compression.zstd").ZstdFile(file)
        except ImportError as error:
            raise Damaged(
                "compressed by zstd, which this Python does not read; gz, bz2 and xz it does"
            ) from error
    return (file, False) if found is None else (found, True)


class _Lzma:
    """Unpacks xz and lzma with a bounded window; the file chooses the window's size."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._unpack = lzma.LZMADecompressor(memlimit=LARGEST)

    def read(self, count: int) -> bytes:
        while True:
            if self._unpack.eof:
                # another stream may follow after zeros
                rest = (self._unpack.unused_data or self._file.read(_PIECE)).lstrip(b"\0")
                if not rest:
                    return b""
                self._unpack = lzma.LZMADecompressor(memlimit=LARGEST)
            elif self._unpack.needs_input:
                rest = self._file.read(1 << 16)
                if not rest:
                    raise EOFError("it ends before its end mark")
            else:
                rest = b""
            if found := self._unpack.decompress(rest, count):
                return found


@dataclass
class _Extended:
    """The values that extended headers set for the next header."""

    name: str | None = None
    target: str | None = None
    size: int | None = None
    sparse: bool = False


def _tar(file: IO[bytes], length: int) -> Iterator[Member]:
    stream = _Stream(file, length)
    claims = _Extended()
    while True:
        place = stream.place
        header = stream.read(_BLOCK)
        if header == bytes(_BLOCK):
            break
        if len(header) < _BLOCK or not _sound(header):
            raise Damaged(f"no end after byte {place}" if place else "no archive of a known kind: tar or zip")
        kind, size = header[156:157], _number(header[124:136])
        if kind in b"LKxXg":
            content = _listed(stream, kind, size)
            if kind == b"L":
                claims.name = _text(content)
            elif kind == b"K":
                claims.target = _text(content)
            elif kind != b"g":
                _read_list(content, claims)
            continue
        name = claims.name if claims.name is not None else _name(header)
        size = size if claims.size is None else claims.size
        target, sparse = claims.target, claims.sparse or kind == b"S"
        if target is None:
            target = _text(header[157:257])
        claims = _Extended()
        if kind == b"S":
            further = header[482:483]
            while further not in (b"\0", b""):
                further = stream.read(_BLOCK)[504:505]
        # an old way to mark a folder
        folder = kind == b"5" or (kind == b"\0" and name.endswith("/"))
        if kind == b"1":
            yield Member(name, 0, plain(target), bytes, bytes)
        elif kind == b"2":
            yield Member(name, 0, _beside(name, target), bytes, bytes)
        elif kind in b"0\0007S" and not folder:
            yield from _file(stream, name, size, sparse)
        elif kind not in b"3456" and not folder:
            stream.skip(size + -size % _BLOCK)
    # a compressed file's checksum is only checked at its very end
    while stream.read(_PIECE):
        pass


def _file(stream: _Stream, name: str, size: int, sparse: bool) -> Iterator[Member]:
    stream.check(size)
    start = bytearray()
    begin = stream.place

    def head() -> bytes:
        if stream.place == begin:
            start.extend(stream.read(min(size, _HEAD)))
        return bytes(start)

    def content() -> bytes:
        if sparse:
            raise TooLarge("a file with holes (sparse), which is not read")
        if size > LARGEST:
            raise TooLarge(f"{size:,} bytes, more than any image has")
        bounded(size, what=repr(name[:80]))
        found = head() if start else b""
        found += stream.read(size - len(found))
        if len(found) < size:
            raise Damaged(f"it ends at byte {stream.place:,}")
        return found

    yield Member(name, size, None, head, content)
    stream.skip(size + -size % _BLOCK - (stream.place - begin))


def _listed(stream: _Stream, kind: bytes, size: int) -> bytes:
    """Return the content of a header that describes the next one."""
    if size > (_LONGEST_NAME if kind in b"LK" else _LONGEST_LIST):
        raise Damaged(f"{size:,} bytes of names")
    content = stream.read(size)
    stream.skip(-size % _BLOCK)
    if len(content) < size:
        raise Damaged(f"it ends at byte {stream.place:,}")
    return content


def _read_list(content: bytes, claims: _Extended) -> None:
    """Read pax entries "LENGTH KEY=VALUE"."""
    place = 0
    while place < len(content):
        space = content.find(b" ", place, place + 20)
        length = content[place : max(space, place)]
        if not length.isdigit() or not space - place + 1 < int(length) <= len(content) - place:
            raise Damaged(f"a list of names that is damaged at byte {place}")
        key, _, value = content[space + 1 : place + int(length) - 1].partition(b"=")
        place += int(length)
        if key == b"path" and not claims.sparse:
            claims.name = _text(value)
        elif key == b"linkpath":
            claims.target = _text(value)
        elif key == b"size":
            if not value.isdigit() or len(value) > 20:
                raise Damaged("a size that is no number")
            claims.size = int(value)
        elif key.startswith(b"GNU.sparse."):
            claims.sparse = True
            if key == b"GNU.sparse.name":
                claims.name = _text(value)


def _sound(header: bytes) -> bool:
    """Return whether a header's checksum matches its bytes, signed or unsigned."""
    try:
        claims = _number(header[148:156])
    except Damaged:
        return False
    others = header[:148] + header[156:]
    total = 8 * ord(" ") + sum(others)
    return claims in (total, total - 256 * sum(byte > 127 for byte in others))


def _number(field: bytes) -> int:
    """Read octal digits, or a base-256 number after a byte 128."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.partition(b"\0")[0].strip()
    try:
        found = int(digits or b"0", 8)
    except ValueError as error:
        raise Damaged("a header whose size is no number") from error
    if found < 0:
        raise Damaged("a header with a negative size")
    return found


def _name(header: bytes) -> str:
    name = _text(header[:100])
    prefix = _text(header[345:500]) if header[257:263] == b"ustar\0" else ""
    return f"{prefix}/{name}" if prefix else name


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _beside(name: str, target: str) -> str:
    """Return the target of a symbolic link as a path in the archive."""
    return plain(posixpath.join(posixpath.dirname(name), target))
