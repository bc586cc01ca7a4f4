"""Read the pickles of CIFAR's python archives without running anything that a file names."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from quincunx import pickles

__all__ = ["Array", "read_cifar_pickle"]


@dataclass(frozen=True)
class Array:
    """An array of bytes as described by a pickle: shape, and content in row-major order."""

    shape: tuple[int, ...]
    content: bytes


class _Type:
    """Replaces a numpy.dtype: it keeps its arguments and builds nothing."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def build(self, state: Any) -> None:
        # byte order and fields, which bytes do not have
        pass


class _Pending:
    """Replaces the array that a pickle creates empty and then fills."""

    array: Array | None = None

    def __init__(self, *_: Any) -> None:
        pass

    def build(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) != 5:
            raise ValueError("an array that is filled with something else")
        version, shape, kind, by_columns, content = state
        name = kind.arguments[0] if isinstance(kind, _Type) and kind.arguments else None
        # compare types first: a value from the file may be equal to anything
        if version != 1 or name not in ("u1", b"u1") or type(by_columns) not in (bool, int) or by_columns:
            raise ValueError("an array that is not of bytes in row-major order")
        if not isinstance(shape, tuple) or not all(type(n) is int and 0 <= n < 2**40 for n in shape[:4]):
            raise ValueError("an array without a shape")
        if not isinstance(content, bytes) or len(shape) > 4 or math.prod(shape) != len(content):
            raise ValueError(f"an array of {str(shape)[:80]} with other content")
        self.array = Array(shape, content)


def _bytes(text: Any, coding: Any) -> bytes:
    """Decode the form in which Python 3 writes bytes for Python 2."""
    if not isinstance(text, str) or coding not in ("latin1", "latin-1"):
        raise ValueError("bytes that are written in an unusual way")
    return text.encode("latin-1")


def _no_values(*_: Any) -> Any:
    raise ValueError("it makes an array in a way that the official files do not use")


# all names in the official files; numpy's own functions are not called
_MAKERS: pickles.Makers = {
    ("numpy.core.multiarray", "_reconstruct"): _Pending,
    ("numpy._core.multiarray", "_reconstruct"): _Pending,
    ("numpy", "ndarray"): _no_values,
    ("numpy", "dtype"): _Type,
    ("_codecs", "encode"): _bytes,
}


def read_cifar_pickle(name: str, content: bytes) -> dict[str, Any]:
    """Return a pickled dictionary of plain values and :class:`Array`, with text keys.

    Args:
        name: of the file, for messages.
        content: of the file.

    Raises:
        ValueError: a damaged file, or one that asks for anything but arrays of bytes.

    Example:
        >>> import pickle
        >>> read_cifar_pickle("x", pickle.dumps({"a": [1, 2]}))
        {'a': [1, 2]}
        >>> read_cifar_pickle("x", pickle.dumps(print))
        Traceback (most recent call last):
        ValueError: x: not a file of CIFAR's python archives (it asks for builtins.print, which is refused)
    """
    try:
        # text of Python 2 stays bytes
        found = pickles.read_pickle(
            content, len(content), makers=_MAKERS, strict=True, old_text_is_bytes=True
        )
    except ValueError as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{name}: not a file of CIFAR's python archives ({reason})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{name}: not a file of CIFAR's python archives (no dictionary)")
    return {
        key.decode("utf-8", "replace") if isinstance(key, bytes) else str(key)[:200]: (
            value.array if isinstance(value, _Pending) else value
        )
        for key, value in found.items()
    }
