"""Read existing files, our own or others', and check every claim in them.

One reader serves all JSON files: a missing or wrong value ends in one sentence that names the file
and the place in it.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import math
import os
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

__all__ = [
    "ZIP_DAMAGE",
    "Entry",
    "Unreadable",
    "bounded",
    "differing_fields",
    "memory_left",
    "naming",
    "one_line",
    "open_member",
    "read_json",
    "read_member",
    "read_sealed",
    "read_tensors",
    "sealed",
    "sha256_of",
    "shown",
]

# memory that one byte of JSON can become: "{}," makes an empty dictionary
_PER_BYTE = 24
_SHOWN = 120


class Unreadable(ValueError):
    """An image or an item that cannot be read. A search must not take it for a fault of its candidate."""


def read_json(path: Path) -> Any:
    """Return the content of a JSON file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not JSON, not a file, or too large for the memory.
    """
    with naming(path):
        size = _size(path)
        bounded(size * _PER_BYTE, what=f"{path}: a JSON file of {size:,} bytes")
        content = path.read_bytes()
    try:
        return json.loads(content.decode("utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a JSON file ({one_line(error)})") from error


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of strict JSON")


def _size(path: Path) -> int:
    """Return the bytes of a file; refuse a pipe or a device, which would never end."""
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{path}: expected a file")
    return found.st_size


def shown(value: object) -> str:
    """Return a value for an error message: on one line, and cut if it is long."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def one_line(error: BaseException) -> str:
    """Return an exception's message on one line, or else its class."""
    # torch appends the C++ location over several lines
    text = str(error).partition("\nException raised from")[0]
    return " ".join(text.split())[:500] or type(error).__name__


class Entry:
    """A value in a JSON file, and its place there.

    Args:
        value: the value.
        file: the file's name.
        at: the place in the file, for errors.

    Example:
        >>> entry = Entry({"rows": [{"loss": "low"}]}, "scores.json")
        >>> entry["rows"].items()[0]["loss"].number()
        Traceback (most recent call last):
        ...
        ValueError: scores.json: incomplete or altered, rows[0].loss: expected a number, got 'low'
    """

    def __init__(self, value: Any, file: Path | str, at: str = "") -> None:
        self.value, self.file, self.at = value, file, at

    def wrong(self, expected: str) -> ValueError:
        """Return an error that says what was expected here."""
        return self._error(f"expected {expected}, got {shown(self.value)}")

    def _error(self, what: str) -> ValueError:
        at = f"{self.at}: " if self.at else ""
        return ValueError(f"{self.file}: incomplete or altered, {at}{what}")

    def __getitem__(self, key: str) -> Entry:
        """Return an object's value under a name.

        Raises:
            ValueError: not an object, or one without that name.
        """
        found = self.object()
        if key not in found:
            raise self._error(f"{key!r} is missing")
        return self._child(key)

    def __contains__(self, key: str) -> bool:
        return key in self.object()

    def get(self, key: str, default: Any) -> Entry:
        """Return an object's value under a name, or else a default."""
        return self._child(key) if key in self.object() else Entry(default, self.file, self._at(key))

    def object(self) -> dict[str, Any]:
        """Return the value, which must be an object."""
        if not isinstance(self.value, dict):
            raise self.wrong("an object")
        return self.value

    def entries(self) -> Iterator[tuple[str, Entry]]:
        """Return the names and values of an object."""
        return ((key, self._child(key)) for key in self.object())

    def items(self, count: int | None = None) -> list[Entry]:
        """Return the values of a list, which must have ``count`` of them if that is given."""
        if not isinstance(self.value, list) or (count is not None and len(self.value) != count):
            raise self.wrong("a list" if count is None else f"a list of {count}")
        return [Entry(v, self.file, f"{self.at}[{number}]") for number, v in enumerate(self.value)]

    def text(self, *allowed: str) -> str:
        """Return the value, which must be text, one of ``allowed`` if any are given."""
        if not isinstance(self.value, str) or (allowed and self.value not in allowed):
            raise self.wrong(" or ".join(allowed) or "text")
        return self.value

    def integer(self, least: int = -(2**63)) -> int:
        """Return the value, which must be a whole number of 64 bits."""
        if type(self.value) is not int or not least <= self.value < 2**63:
            raise self.wrong("a whole number" if least < 0 else f"a whole number of at least {least}")
        return self.value

    def number(self, least: float = -math.inf) -> float:
        """Return the value, which must be a finite number."""
        if type(self.value) not in (int, float) or not abs(self.value) < 2**63 or self.value < least:
            raise self.wrong("a number" if least < 0 else f"a number of at least {least:g}")
        return float(self.value)

    def boolean(self) -> bool:
        """Return the value, which must be true or false."""
        if not isinstance(self.value, bool):
            raise self.wrong("true or false")
        return self.value

    def missing(self) -> bool:
        """Return whether the value is null."""
        return self.value is None

    def _child(self, key: str) -> Entry:
        return Entry(self.value[key], self.file, self._at(key))

    def _at(self, key: str) -> str:
        name = key if key.replace("_", "").isalnum() and len(key) < _SHOWN else shown(key)
        return f"{self.at}.{name}" if self.at else name


def differing_fields(theirs: Any, ours: Any) -> str:
    """Return the fields in which two descriptions differ, as the end of a sentence."""
    if not isinstance(theirs, dict) or not isinstance(ours, dict):
        return f"was {shown(theirs)}, now {shown(ours)}"
    found = []
    for key in {**theirs, **ours}:
        one, other = theirs.get(key), ours.get(key)
        if one != other:
            # for nested descriptions list only the differences
            nested = (
                isinstance(one, dict)
                and isinstance(other, dict)
                and not {"name", "factory"}.isdisjoint({**one, **other})
            )
            name = key if key.isidentifier() else shown(key)
            told = differing_fields(one, other) if nested else f"was {shown(one)}, now {shown(other)}"
            found.append(f"{name} {told}")
    return ", ".join(found)


# ---------------------------------------------------------------- sealed content


def sealed(content: dict[str, Any]) -> dict[str, Any]:
    """Return JSON-ready content with its hash, which reveals damage; :func:`read_sealed` checks it."""
    return {**content, "sha256": _seal(content)}


def read_sealed(path: Path) -> Entry:
    """Return the content of a file of :func:`sealed` content.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, altered, or written by another program.
    """
    entry = Entry(read_json(path), path)
    content = dict(entry.object())
    if entry["sha256"].text() != _seal({key: value for key, value in content.items() if key != "sha256"}):
        raise ValueError(f"{path}: damaged or altered, its SHA-256 is not that of its content")
    return entry


def _seal(content: dict[str, Any]) -> str:
    # numbers are written back as they were read, and the order of names does not matter
    try:
        text = json.dumps(content, sort_keys=True, allow_nan=False)
    except RecursionError:
        return ""
    return hashlib.sha256(text.encode()).hexdigest()


def sha256_of(path: Path) -> str:
    """Return the hash of a file, after checking that its size fits in memory."""
    digest = hashlib.sha256()
    with naming(path):
        bounded(_size(path), what=str(path))
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def read_tensors(path: Path, *, what: str | None = None) -> dict[str, Tensor]:
    """Return the tensors of a .safetensors file, which cannot be larger than the file.

    Args:
        path: the file.
        what: the start of an error message; by default the path.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, or of another format.
    """
    what = str(path) if what is None else what
    with naming(path):
        size = bounded(_size(path), what=what)
        with path.open("rb") as file:
            head = int.from_bytes(file.read(8), "little")
        bounded(head * _PER_BYTE, what=f"{what}: its head", at_most=max(0, size - 8) * _PER_BYTE)
        try:
            return load_file(str(path))
        except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError, AttributeError) as error:
            raise ValueError(f"{what}: damaged, or no file of tensors ({one_line(error)})") from error


def memory_left() -> int:
    """Return the bytes of memory that this machine can still give, at least 1 MiB; 1 GiB if unknown."""
    try:
        left = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return 1 << 30
    return max(int(left), 1 << 20)


def bounded(claimed: int, *, what: str, at_most: int | None = None) -> int:
    """Return a number of bytes that a file claims, after checking that it is possible.

    Args:
        claimed: bytes, as in the file.
        what: the file and the part of it, which start the error message.
        at_most: the most that the file itself can hold, if known; half of the free
            memory is always a limit.

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
    """Add this file's name to errors of the operating system that name no file, within the context."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            raise type(error)(error.errno, error.strerror or str(error), str(path)) from error
        raise


# exceptions of reading a zip archive, besides errors of the operating system
ZIP_DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    EOFError,
    ValueError,
    LookupError,
    OverflowError,
    # an encrypted member; NotImplementedError, for an unknown compression, is a subclass
    RuntimeError,
)


# the most bytes that one byte can unpack to in deflate's format
_DEFLATE = 1040


_PIECE = 1 << 20


# the largest window of lzma, which is allocated before the first byte is unpacked
_LARGEST_WINDOW = 1 << 28


def _window(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> int:
    """Return the window size that a member packed by lzma asks for."""
    file = archive.fp
    if file is None:
        return 0
    file.seek(member.header_offset + 26)
    lengths = struct.unpack("<HH", file.read(4))
    file.seek(sum(lengths), 1)
    # four bytes of version and length, one of settings, then the window
    return int.from_bytes(file.read(9)[5:], "little")


def open_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, length: int, *, what: str) -> IO[bytes]:
    """Open a member of a zip archive, after checking that it can be unpacked in memory.

    Args:
        archive: the archive.
        member: the member to open.
        length: bytes of the archive.
        what: the file and the member, which start an error message.

    Raises:
        ValueError: it claims more than is possible, or is damaged (also the exceptions in ``ZIP_DAMAGE``).
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
    """Return a member of a zip archive, after checking its size.

    Args:
        archive: the archive.
        member: the member to read.
        length: bytes of the archive.
        what: the file and the member, which start an error message.
        at_most: the most bytes allowed.

    Raises:
        ValueError: it claims more than is possible, or is damaged (also the exceptions in ``ZIP_DAMAGE``).
    """
    stored = member.compress_type == zipfile.ZIP_STORED
    deflated = member.compress_type == zipfile.ZIP_DEFLATED
    limit = member.compress_size * (1 if stored else _DEFLATE)
    limits = [n for n in (limit if stored or deflated else None, at_most) if n is not None]
    size = bounded(member.file_size, what=what, at_most=min(limits, default=None))
    pieces: list[bytes] = []
    left = size
    with open_member(archive, member, length, what=what) as file:
        # read piece by piece: a single call would unpack everything, whatever was claimed
        while piece := file.read(min(left + 1, _PIECE)):
            left -= len(piece)
            if left < 0:
                break
            pieces.append(piece)
    if left:
        raise ValueError(f"{what}: has other than the {size:,} bytes that it claims")
    return b"".join(pieces)
