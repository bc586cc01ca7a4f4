"""``int``, ``float`` and ``len`` while a forward is traced with stand-ins.

``int(x)`` gives a number whatever ``x`` is, so a stand-in cannot answer it. In the functions that a network's
forward runs these names mean something else while it is traced: of a size they make a value that the graph
works out at each call. The functions keep their code but for the name that is looked up; nobody else's code
in the same file changes.
"""

from __future__ import annotations

import builtins
import dis
import inspect
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache, partial
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import fx, nn

from quincunx.layers.sizes import about_sizes, is_library

__all__ = ["converting", "functions_of", "handed_on"]

_PREFIX = "__quincunx_"


class _Conversion(type):
    """The type of stand-ins for a type: all but calls with sizes is as of the type itself."""

    kind: type

    def __call__(cls, *given: Any, **named: Any) -> Any:
        value: Any = given[0] if len(given) == 1 and not named else None
        if not isinstance(value, fx.Proxy) or about_sizes(value.node) is None:
            return cls.kind(*given, **named)
        # a forward may count by what layers say
        tracer: Any = value.tracer
        known = tracer.number_of(about_sizes(value.node))
        if known is not None:
            return cls.kind(known)
        return value.tracer.create_proxy("call_function", cls.kind, given, {})

    def __instancecheck__(cls, value: object) -> bool:
        return isinstance(value, cls.kind)


class _Int(metaclass=_Conversion):
    kind = int


class _Float(metaclass=_Conversion):
    kind = float


def _length(value: Any) -> Any:
    if not isinstance(value, fx.Proxy):
        return len(value)
    tracer: Any = value.tracer
    return tracer.length_of(value)


def _of_a_size(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def watched(value: Any) -> Any:
        if isinstance(value, fx.Proxy) and about_sizes(value.node) is not None:
            return value.tracer.create_proxy("call_function", function, (value,), {})
        return function(value)

    return watched


_STAND_INS: dict[Any, Any] = {int: _Int, float: _Float, len: _length}
_STAND_INS.update({f: _of_a_size(f) for f in (math.ceil, math.floor, math.trunc, math.sqrt)})


@contextmanager
def converting(model: nn.Module) -> Iterator[None]:
    """Let the functions that a network's forward runs make values of the graph by ``int`` and the like.

    A function keeps a name that its file gives another meaning, or with which it does anything but call it,
    and ask by ``isinstance``.
    """
    own: list[tuple[FunctionType, CodeType]] = []
    added: list[tuple[dict[str, Any], str]] = []
    try:
        for function in functions_of(model) if sys.version_info >= (3, 11) else ():
            meant = {name: _STAND_INS[value] for name, value in _meanings(function)}
            if meant:
                own.append((function, function.__code__))
                for name, value in meant.items():
                    if _PREFIX + name not in function.__globals__:
                        added.append((function.__globals__, _PREFIX + name))
                        function.__globals__[_PREFIX + name] = value
                function.__code__ = _renamed(function.__code__, set(meant))
        yield
    finally:
        for function, code in own:
            function.__code__ = code
        for names, name in added:
            del names[name]


def _meanings(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """The names in a function that mean what can be converted."""
    codes = list(_inside(function.__code__))
    for name in {name for code in codes for name in code.co_names}:
        value = function.__globals__.get(name, getattr(builtins, name, None))
        known = isinstance(value, (type, FunctionType)) or inspect.isbuiltin(value)
        if known and value in _STAND_INS and not any(handed_on(code, name) for code in codes):
            yield name, value


def functions_of(model: nn.Module) -> list[FunctionType]:
    """A network's own code: methods of its modules, and of other objects and functions that they hold, and
    the functions that these name."""
    objects = [*model.modules()]
    objects += [one for module in model.modules() for value in vars(module).values() for one in _parts(value)]
    kinds = {kind for one in objects for kind in type(one).__mro__}
    held: list[Mapping[str, Any]] = [vars(kind) for kind in kinds if not is_library(kind.__module__)]
    todo = [value for names in held for name, value in names.items() if name != "__init__"] + objects
    found: dict[FunctionType, None] = {}
    while todo:
        function = _function(todo.pop())
        if function is None or function in found or is_library(_home(function)):
            continue
        found[function] = None
        names = {name for code in _inside(function.__code__) for name in code.co_names}
        here = [function.__globals__[name] for name in names if name in function.__globals__]
        files = [vars(v) for v in here if isinstance(v, ModuleType) and not is_library(v.__name__)]
        todo += here + [file[name] for file in files for name in names if name in file]
        todo += [value for cell in function.__closure__ or () for value in _contents(cell)]
    return list(found)


def _parts(value: Any, depth: int = 3) -> list[Any]:
    """What an attribute holds: itself, or what is in it."""
    if not isinstance(value, (list, tuple, dict)) or not depth:
        return [value]
    inside = value.values() if isinstance(value, dict) else value
    return [part for one in inside for part in _parts(one, depth - 1)]


def _contents(cell: CellType) -> list[Any]:
    try:
        return [cell.cell_contents]
    except ValueError:
        # it is empty still
        return []


def _home(function: FunctionType) -> str:
    return str(function.__globals__.get("__name__", ""))


def _function(value: Any) -> FunctionType | None:
    """The function behind a method, a property or a decorator; None for what is none of these."""
    kinds = (FunctionType, MethodType, staticmethod, classmethod, property, partial)
    if not isinstance(value, kinds):
        return None
    value = getattr(value, "__func__", getattr(value, "fget", getattr(value, "func", value)))
    value = inspect.unwrap(value) if callable(value) else value
    return value if isinstance(value, FunctionType) else None


def _inside(code: CodeType) -> Iterator[CodeType]:
    """A function's code and that of the functions in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _inside(constant)


def _renamed(code: CodeType, names: set[str]) -> CodeType:
    constants = tuple(_renamed(one, names) if isinstance(one, CodeType) else one for one in code.co_consts)
    renamed = tuple(_PREFIX + name if name in names else name for name in code.co_names)
    return code.replace(co_names=renamed, co_consts=constants)


@lru_cache(maxsize=4096)
def handed_on(code: CodeType, name: str) -> bool:
    """Whether code does something else with a global name than to call what it means, or to ask
    ``isinstance`` for it: ``x.to(float)``, ``type(x) is int``; also where it has another meaning as well, as
    in ``x.float()``."""
    steps = [step for step in dis.get_instructions(code) if step.opname not in ("PRECALL", "CACHE")]
    called = None
    for i, step in enumerate(steps):
        calls = step.opname == "LOAD_GLOBAL" and bool((step.arg or 0) & 1)
        if step.argval == name and step.opname != "LOAD_CONST":
            if step.opname != "LOAD_GLOBAL":
                return True
            if not calls and not (called == "isinstance" and _ends_call(steps[i + 1 :])):
                return True
        called = step.argval if calls else called
    return False


def _ends_call(steps: list[dis.Instruction]) -> bool:
    """Whether a type that was loaded is the last of what a call of two arguments is given, alone or in a
    tuple."""
    for step in steps:
        if step.opname == "CALL":
            return step.arg == 2
        if step.opname not in ("LOAD_GLOBAL", "LOAD_ATTR", "BUILD_TUPLE"):
            return False
    return False
