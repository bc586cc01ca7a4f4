"""The pickles of CIFAR's python archives, read without running anything that a file names."""

from __future__ import annotations

import io
import math
import pickle
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Array:
    """An array of bytes, as a pickle describes it: shape, and content in row-major order."""

    shape: tuple[int, ...]
    content: bytes


class _Type:
    """Stands for a numpy.dtype: what it was called with is kept, nothing is built."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        # byte order and fields, which bytes do not have
        pass


class _Pending:
    """Stands for the array that a pickle makes empty and then fills."""

    array: Array | None = None

    def __setstate__(self, state: Any) -> None:
        version, shape, kind, by_columns, content = state
        name = kind.arguments[0] if isinstance(kind, _Type) and kind.arguments else None
        if version != 1 or name not in ("u1", b"u1") or by_columns not in (False, 0):
            raise pickle.UnpicklingError("an array that is not of bytes in row-major order")
        if not isinstance(shape, tuple) or not all(type(n) is int and n >= 0 for n in shape):
            raise pickle.UnpicklingError("an array without a shape")
        if not isinstance(content, bytes) or math.prod(shape) != len(content):
            raise pickle.UnpicklingError(f"an array of {shape} with other content")
        self.array = Array(shape, content)


# What a pickle gets for a name can be called and nothing else: without attributes it cannot be changed.


class _Ndarray:
    __slots__ = ()


class _Dtype:
    __slots__ = ()

    def __call__(self, *arguments: Any) -> _Type:
        return _Type(*arguments)


class _Reconstruct:
    __slots__ = ()

    def __call__(self, *_: Any) -> _Pending:
        return _Pending()


# all that the official files name; numpy's own functions are not called
_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"): _Reconstruct(),
    ("numpy._core.multiarray", "_reconstruct"): _Reconstruct(),
    ("numpy", "ndarray"): _Ndarray(),
    ("numpy", "dtype"): _Dtype(),
}


class _Restricted(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is refused")
        return _ALLOWED[module, name]


# what the unpickler raises on damaged files, besides its own error
_DAMAGE = (
    pickle.UnpicklingError,
    EOFError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    OverflowError,
    MemoryError,
    RecursionError,
)


def read_pickle(name: str, content: bytes) -> dict[str, Any]:
    """A pickled dictionary of plain values and :class:`Array`, its keys as text.

    Args:
        name: of the file, for messages.
        content: of the file.

    Raises:
        ValueError: a damaged file, or one that asks for anything but arrays of bytes.

    Example:
        >>> read_pickle("x", pickle.dumps({"a": [1, 2]}))
        {'a': [1, 2]}
        >>> read_pickle("x", pickle.dumps(print))
        Traceback (most recent call last):
        ValueError: x: not a file of CIFAR's python archives (it asks for builtins.print, which is refused)
    """
    try:
        # text of Python 2 stays bytes
        found = _Restricted(io.BytesIO(content), encoding="bytes").load()
    except _DAMAGE as error:
        raise ValueError(f"{name}: not a file of CIFAR's python archives ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{name}: not a file of CIFAR's python archives (no dictionary)")
    return {
        key.decode("utf-8", "replace") if isinstance(key, bytes) else str(key): (
            value.array if isinstance(value, _Pending) else value
        )
        for key, value in found.items()
    }
