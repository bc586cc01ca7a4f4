"""``int`` and ``float`` of sizes and ``len`` of maps, while a forward is traced with stand-ins.

``int(x)`` gives a number whatever ``x`` is, so a stand-in cannot answer it. In the network's own code these
names mean something else while it is traced: of a size they make a value that the graph works out at each
call.
"""

from __future__ import annotations

import dis
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import fx, nn

from quincunx.layers.sizes import about_sizes, is_library

__all__ = ["STAND_INS", "exchanged"]


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

    def __subclasscheck__(cls, other: type) -> bool:
        return issubclass(other, cls.kind)

    def __eq__(cls, other: object) -> bool:
        return other is cls or other is cls.kind

    def __hash__(cls) -> int:
        return hash(cls.kind)

    def __getattr__(cls, name: str) -> Any:
        return getattr(cls.kind, name)


class _Int(metaclass=_Conversion):
    kind = int


class _Float(metaclass=_Conversion):
    kind = float


def _length(value: Any) -> Any:
    if not isinstance(value, fx.Proxy):
        return len(value)
    tracer: Any = value.tracer
    return tracer.length_of(value)


# instructions between the name of isinstance and those of the types that it is given
_FEW = 12

STAND_INS: dict[Callable[..., Any], Any] = {int: _Int, float: _Float, len: _length}


def exchanged(model: nn.Module) -> list[tuple[dict[str, Any], Callable[..., Any]]]:
    """What is exchanged while a network is traced: global names of a file, and a function or type of Python.

    The files are those of the network's modules and of the functions that these name. A file keeps a name to
    which it gives a meaning of its own, or with which this code does anything but call it, and ask by
    ``isinstance``.
    """
    found: dict[int, tuple[dict[str, Any], list[CodeType]]] = {}
    for function in _functions(model):
        names = function.__globals__
        found.setdefault(id(names), (names, []))[1].extend(_inside(function.__code__))
    return [
        (names, kind)
        for names, codes in found.values()
        for kind in STAND_INS
        if kind.__name__ not in names and not any(_is_handed_on(code, kind) for code in codes)
    ]


def _functions(model: nn.Module) -> list[FunctionType]:
    """A network's own code: methods of its modules, functions that they hold, and those that these name."""
    kinds = {kind for module in model.modules() for kind in type(module).__mro__}
    held: list[Mapping[str, Any]] = [vars(kind) for kind in kinds if not is_library(kind.__module__)]
    held += [vars(module) for module in model.modules()]
    todo = [value for names in held for name, value in names.items() if name != "__init__"]
    found: dict[FunctionType, None] = {}
    while todo:
        function = _function(todo.pop())
        if function is None or function in found or is_library(_home(function)):
            continue
        found[function] = None
        names = {name for code in _inside(function.__code__) for name in code.co_names}
        here = [function.__globals__[name] for name in names if name in function.__globals__]
        files = [
            vars(value) for value in here if isinstance(value, ModuleType) and not is_library(value.__name__)
        ]
        todo += here + [file[name] for file in files for name in names if name in file]
    return list(found)


def _home(function: FunctionType) -> str:
    return str(function.__globals__.get("__name__", ""))


def _function(value: Any) -> FunctionType | None:
    """The function behind a method, a property or a decorator; None for what is none of these."""
    kinds = (FunctionType, MethodType, staticmethod, classmethod, property)
    if not isinstance(value, kinds):
        return None
    value = getattr(value, "__func__", getattr(value, "fget", value))
    value = inspect.unwrap(value) if callable(value) else value
    return value if isinstance(value, FunctionType) else None


def _inside(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _inside(constant)


def _is_handed_on(code: CodeType, kind: Callable[..., Any]) -> bool:
    """Whether code does something else with a function or a type than to call it: ``x.to(float)``,
    ``type(x) is int``."""
    if kind.__name__ not in code.co_names:
        return False
    steps = list(dis.get_instructions(code))
    for i, step in enumerate(steps):
        if step.opname == "LOAD_GLOBAL" and step.argval == kind.__name__ and not _is_called(steps, i):
            before = [other.argval for other in steps[max(0, i - _FEW) : i] if other.opname == "LOAD_GLOBAL"]
            if "isinstance" not in before:
                return True
    return False


def _is_called(steps: list[dis.Instruction], at: int) -> bool:
    """Whether what an instruction loads is loaded to be called."""
    if sys.version_info >= (3, 11):
        # the lowest bit says that a call follows
        return bool((steps[at].arg or 0) & 1)
    return steps[at + 1].opname not in ("IS_OP", "LOAD_ATTR", "LOAD_METHOD", "COMPARE_OP", "BUILD_TUPLE")
