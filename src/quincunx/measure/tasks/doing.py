"""What a user's function does, as a digest: whether it was changed since something was computed with it."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Iterator
from contextlib import suppress
from types import CodeType
from typing import Any

import torch

__all__ = ["digest_of"]

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype)


def digest_of(functions: Iterable[Any]) -> str:
    """Return a digest of functions: of their code, of the functions of the same module that they call, and of
    the numbers and texts that they read from it or were made with. Of a library's functions, and of objects
    that are called, the name counts alone.

    Example:
        >>> twice, thrice = (lambda y, t, k=k: k * (y - t) for k in (2, 3))
        >>> digest_of([twice]) == digest_of([twice]), digest_of([twice]) == digest_of([thrice])
        (True, False)
    """
    return hashlib.sha256("\n".join(_text(one, ()) for one in functions).encode()).hexdigest()[:16]


def _text(value: Any, seen: tuple[int, ...]) -> str:
    if isinstance(value, _PLAIN):
        return repr(value)
    if isinstance(value, (tuple, list)):
        return "|".join(_text(part, seen) for part in value)
    if isinstance(value, functools.partial):
        return "|".join(_text(part, seen) for part in (value.func, *value.args, *value.keywords.values()))
    value = getattr(value, "__func__", value)
    kind = value if hasattr(value, "__qualname__") else type(value)
    name = f"{kind.__module__}.{kind.__qualname__}"
    code = getattr(value, "__code__", None)
    if code is None or id(value) in seen or str(kind.__module__).startswith(("quincunx.", "torch.")):
        return name
    return "|".join(
        [name, *_of_code(code), *(_text(one, (*seen, id(value))) for one in _read_by(value, code))]
    )


def _of_code(code: CodeType) -> Iterator[str]:
    yield code.co_code.hex()
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _of_code(constant)
        elif isinstance(constant, frozenset):
            # in another order in each process
            yield from sorted(map(repr, constant))
        else:
            yield repr(constant)


def _names_in(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names_in(constant)


def _read_by(function: Any, code: CodeType) -> Iterator[Any]:
    """What a function was made with, and what it reads from its module."""
    for cell in function.__closure__ or ():
        # it may not be filled yet
        with suppress(ValueError):
            yield cell.cell_contents
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    for name in dict.fromkeys(_names_in(code)):
        found = function.__globals__.get(name)
        if isinstance(found, _PLAIN) or getattr(found, "__module__", None) == function.__module__:
            yield found
