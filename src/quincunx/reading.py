"""Files that were written before, by us or by somebody else: every claim in them is checked.

One reader for all JSON files: what is missing or of another kind ends in one sentence that names the file
and the place in it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from quincunx.files import bounded, naming

__all__ = [
    "Entry",
    "difference",
    "read_json",
    "read_sealed",
    "read_tensors",
    "reason_of",
    "sealed",
    "sha256_of",
    "shown",
]

# memory that one byte of JSON can become: "{}," makes an empty dictionary
_PER_BYTE = 24
_SHOWN = 120


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not JSON, no file at all, or one that memory cannot hold.
    """
    with naming(path):
        size = _size(path)
        bounded(size * _PER_BYTE, what=f"{path}: a JSON file of {size:,} bytes")
        content = path.read_bytes()
    try:
        return json.loads(content.decode("utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a JSON file ({reason_of(error)})") from error


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of strict JSON")


def _size(path: Path) -> int:
    """Bytes of a file; a pipe or a device would never end."""
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{path}: expected a file")
    return found.st_size


def shown(value: object) -> str:
    """A value in an error's sentence: on one line, and cut where it is long."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def reason_of(error: BaseException) -> str:
    """What an exception says, on one line, or else its class."""
    # torch appends where it was raised, line after line
    text = str(error).partition("\nException raised from")[0]
    return " ".join(text.split())[:500] or type(error).__name__


class Entry:
    """A value in a JSON file, and where it is there.

    Args:
        value: what the file holds.
        file: its name.
        at: the place in it, for errors.

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
        """The error that says what was expected here."""
        return self._error(f"expected {expected}, got {shown(self.value)}")

    def _error(self, what: str) -> ValueError:
        at = f"{self.at}: " if self.at else ""
        return ValueError(f"{self.file}: incomplete or altered, {at}{what}")

    def __getitem__(self, key: str) -> Entry:
        """What an object has under a name.

        Raises:
            ValueError: no object, or without that name.
        """
        found = self.object()
        if key not in found:
            raise self._error(f"{key!r} is missing")
        return self._child(key)

    def __contains__(self, key: str) -> bool:
        return key in self.object()

    def get(self, key: str, default: Any) -> Entry:
        """What an object has under a name, or else a default."""
        return self._child(key) if key in self.object() else Entry(default, self.file, self._at(key))

    def object(self) -> dict[str, Any]:
        """The object that stands here."""
        if not isinstance(self.value, dict):
            raise self.wrong("an object")
        return self.value

    def entries(self) -> Iterator[tuple[str, Entry]]:
        """Names and values of an object."""
        return ((key, self._child(key)) for key in self.object())

    def items(self, count: int | None = None) -> list[Entry]:
        """The values of a list, of ``count`` of them if that is given."""
        if not isinstance(self.value, list) or (count is not None and len(self.value) != count):
            raise self.wrong("a list" if count is None else f"a list of {count}")
        return [Entry(v, self.file, f"{self.at}[{number}]") for number, v in enumerate(self.value)]

    def text(self, *allowed: str) -> str:
        """The text that stands here, one of those allowed if any are given."""
        if not isinstance(self.value, str) or (allowed and self.value not in allowed):
            raise self.wrong(" or ".join(allowed) or "text")
        return self.value

    def integer(self, least: int = -(2**63)) -> int:
        """The whole number that stands here, of 64 bits."""
        if type(self.value) is not int or not least <= self.value < 2**63:
            raise self.wrong("a whole number" if least < 0 else f"a whole number of at least {least}")
        return self.value

    def number(self, least: float = -math.inf) -> float:
        """The finite number that stands here."""
        if type(self.value) not in (int, float) or not abs(self.value) < 2**63 or self.value < least:
            raise self.wrong("a number" if least < 0 else f"a number of at least {least:g}")
        return float(self.value)

    def boolean(self) -> bool:
        """The true or false that stands here."""
        if not isinstance(self.value, bool):
            raise self.wrong("true or false")
        return self.value

    def missing(self) -> bool:
        """Whether null stands here."""
        return self.value is None

    def _child(self, key: str) -> Entry:
        return Entry(self.value[key], self.file, self._at(key))

    def _at(self, key: str) -> str:
        name = key if key.replace("_", "").isalnum() and len(key) < _SHOWN else shown(key)
        return f"{self.at}.{name}" if self.at else name


def difference(theirs: Any, ours: Any) -> str:
    """The fields in which two descriptions differ, as a sentence's end."""
    if not isinstance(theirs, dict) or not isinstance(ours, dict):
        return f"was {shown(theirs)}, now {shown(ours)}"
    found = []
    for key in {**theirs, **ours}:
        one, other = theirs.get(key), ours.get(key)
        if one != other:
            # of two nested descriptions only what differs
            nested = (
                isinstance(one, dict)
                and isinstance(other, dict)
                and not {"name", "factory"}.isdisjoint({**one, **other})
            )
            name = key if key.isidentifier() else shown(key)
            found.append(
                f"{name} {difference(one, other) if nested else f'was {shown(one)}, now {shown(other)}'}"
            )
    return ", ".join(found)


# ---------------------------------------------------------------- content that nobody altered


def sealed(content: dict[str, Any]) -> dict[str, Any]:
    """JSON-ready content with the hash of it, so that damage is seen; :func:`read_sealed` checks it."""
    return {**content, "sha256": _seal(content)}


def read_sealed(path: Path) -> Entry:
    """What a file of :func:`sealed` content holds.

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
    # numbers are written back as they were read, and the order of names means nothing
    try:
        text = json.dumps(content, sort_keys=True, allow_nan=False)
    except RecursionError:
        return ""
    return hashlib.sha256(text.encode()).hexdigest()


def sha256_of(path: Path) -> str:
    """The hash of a file, whose size memory could hold."""
    digest = hashlib.sha256()
    with naming(path):
        bounded(_size(path), what=str(path))
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def read_tensors(path: Path, *, what: str | None = None) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, which can be no larger than the file.

    Args:
        path: the file.
        what: what a refusal begins with; the path by default.

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
            raise ValueError(f"{what}: damaged, or no file of tensors ({reason_of(error)})") from error
