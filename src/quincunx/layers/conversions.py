"""``int`` and ``float`` of sizes and ``len`` of maps, while a forward is traced with stand-ins.

``int(x)`` gives a number whatever ``x`` is, so a stand-in cannot answer it. In the network's own code these
names mean something else while it is traced: of a size they make a value that the graph works out at each
call.
"""

from __future__ import annotations

import dis
import inspect
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType, MethodType
from typing import Any

from torch import fx, nn

from quincunx.layers.sizes import about_sizes, is_library

__all__ = ["STAND_INS", "convertible", "namespaces"]


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


STAND_INS: dict[Callable[..., Any], Any] = {int: _Int, float: _Float, len: _length}


def namespaces(model: nn.Module) -> list[dict[str, Any]]:
    """The global names of a network's own code: of its modules' classes and of the functions they name."""
    kinds = {kind for module in model.modules() for kind in type(module).__mro__}
    todo = [value for kind in kinds if not is_library(kind.__module__) for value in vars(kind).values()]
    todo += [value for module in model.modules() for value in vars(module).values()]
    found: dict[int, dict[str, Any]] = {}
    seen: set[Any] = set()
    while todo:
        function = _function(todo.pop())
        if function is None or function in seen:
            continue
        seen.add(function)
        names = function.__globals__
        if not is_library(str(names.get("__name__", ""))):
            found[id(names)] = names
            todo += [names[name] for name in _names(function.__code__) if name in names]
    return list(found.values())


def convertible(names: dict[str, Any]) -> list[Callable[..., Any]]:
    """What may be exchanged in a namespace: it gives its name no meaning of its own, and asks nowhere whether
    something is the very type."""
    own = [value for value in names.values() if isinstance(value, (FunctionType, type))]
    codes = {code for value in own for code in _codes(value, str(names.get("__name__", "")))}
    return [
        kind
        for kind in STAND_INS
        if kind.__name__ not in names and not any(_is_asked(c, kind) for c in codes)
    ]


def _codes(value: Any, home: str) -> Iterator[CodeType]:
    """The code that a module defines in a function or a class."""
    if getattr(value, "__module__", None) != home:
        return
    for one in vars(value).values() if isinstance(value, type) else (value,):
        if (function := _function(one)) is not None:
            yield from _inside(function.__code__)


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


def _names(code: CodeType) -> set[str]:
    return {name for one in _inside(code) for name in one.co_names}


def _is_asked(code: CodeType, kind: Callable[..., Any]) -> bool:
    """Whether code compares something with a function or a type by ``is``."""
    if kind.__name__ not in code.co_names:
        return False
    steps = list(dis.get_instructions(code))
    loads = [
        i for i, step in enumerate(steps) if step.opname == "LOAD_GLOBAL" and step.argval == kind.__name__
    ]
    return any(steps[i + 1].opname == "IS_OP" for i in loads if i + 1 < len(steps))
