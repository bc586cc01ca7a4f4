"""What a user's function does, as a digest: whether it was changed since something was computed with it."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from types import CodeType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["digest_of"]

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype)
# larger arrays count by their shape
_MOST_BYTES = 1 << 22
# functions and objects that are looked into, each within the one before at worst
_MOST_OBJECTS = 150
_OURS = ("quincunx.", "torch.", "numpy.")


def digest_of(functions: Iterable[Any]) -> str:
    """Return a digest of functions: of their code, of the functions of the same module that they call, and of
    the numbers, texts, small arrays and containers of these that they read from it or were made with. Of a
    library's functions and of modules the name counts alone.

    Example:
        >>> twice, thrice = (functools.partial(torch.mul, k) for k in (2, 3))
        >>> digest_of([twice]) == digest_of([twice]), digest_of([twice]) == digest_of([thrice])
        (True, False)
    """
    digest = hashlib.sha256()
    # kept alive, so that no two have one number
    seen: dict[int, Any] = {}
    for function in functions:
        for text in _texts(function, seen):
            digest.update(text.encode() + b"\0")
    return digest.hexdigest()[:16]


def _texts(value: Any, seen: dict[int, Any]) -> Iterator[str]:
    if isinstance(value, _PLAIN):
        yield repr(value)
        return
    yield type(value).__qualname__
    if id(value) in seen or len(seen) > _MOST_OBJECTS:
        return
    seen[id(value)] = value
    if isinstance(value, (Tensor, np.ndarray)):
        yield from _of_array(value)
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _texts(key, seen)
            yield from _texts(part, seen)
    elif isinstance(value, (tuple, list)):
        yield str(len(value))
        for part in value:
            yield from _texts(part, seen)
    elif isinstance(value, functools.partial):
        for part in (value.func, value.args, value.keywords):
            yield from _texts(part, seen)
    else:
        yield from _of_callable(value, seen)


def _of_array(value: Any) -> Iterator[str]:
    yield f"{tuple(value.shape)} {value.dtype}"
    if isinstance(value, Tensor):
        if value.is_meta or value.layout is not torch.strided:
            return
        value = value.detach().cpu().reshape(-1).view(torch.uint8) if value.numel() else value
    if 0 < value.nbytes <= _MOST_BYTES:
        yield hashlib.sha256(np.ascontiguousarray(np.asarray(value)).tobytes()).hexdigest()


def _of_callable(value: Any, seen: dict[int, Any]) -> Iterator[str]:
    function = getattr(value, "__func__", value)
    if not hasattr(function, "__code__") and callable(getattr(function, "__wrapped__", None)):
        # a decorator that is no function itself, such as a cache
        function = function.__wrapped__
    kind = function if hasattr(function, "__qualname__") else type(function)
    home = str(getattr(kind, "__module__", ""))
    yield f"{home}.{kind.__qualname__}"
    if home.startswith(_OURS) or isinstance(value, (ModuleType, nn.Module, type)):
        return
    # what a method belongs to, and what an object that is called knows
    owner = getattr(value, "__self__", None if hasattr(function, "__code__") else value)
    if owner is not None and not isinstance(owner, (ModuleType, nn.Module, type)):
        yield from _texts(dict(getattr(owner, "__dict__", {})), seen)
    code = getattr(function, "__code__", None)
    if code is None:
        # an object that is called
        function = vars(type(function)).get("__call__")
        code = getattr(function, "__code__", None)
    if code is None:
        return
    yield from _of_code(code)
    for part in _read_by(function, code):
        yield from _texts(part, seen)


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
        ours = getattr(found, "__module__", None) == function.__module__
        if ours or isinstance(found, (*_PLAIN, tuple, list, dict, Tensor, np.ndarray)):
            yield found
