"""Read pickles as data: nothing that a file names is imported, called or built.

A pickle is a program for a small stack machine. This one knows plain values (numbers, text,
bytes, lists, tuples, dictionaries, sets). A global in a pickle becomes a :class:`Named`. An object built from
one is what the caller's table makes, or a :class:`Made` that only remembers its parts. Time and memory are
linear in the length of the pickle.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Mapping
from typing import IO, Any

from quincunx.reading import memory_left

__all__ = ["Bounded", "Dictionary", "Made", "Makers", "Named", "Opaque", "read_pickle"]

# the most instructions of any pickle, far more than names and tensors need, and the most bytes of memory for
# each (without its text)
_STEPS, _PER_STEP = 1 << 22, 256
# limits of the makers' work, such as copied values: per byte of the pickle, and for any pickle
_WORK_PER_BYTE, _WORK = 16, 1 << 20


class Named:
    """A global in a pickle: a class or a function of a module."""

    __slots__ = ("module", "name")

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name

    def __repr__(self) -> str:
        return f"{self.module}.{self.name}"


class Opaque:
    """Replaces a value that nobody needs, such as a tuple as a key."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "?"


class Dictionary(dict[Any, Any]):
    """Replaces an OrderedDict or a defaultdict, whose attributes do not matter."""


class Made:
    """An object that a pickle builds from a global without a maker.

    Attributes:
        of: the global, or whatever was called instead of one.
        entries: entries that were set, for dictionary types.
        state: its attributes in the pickle.
    """

    __slots__ = ("entries", "of", "state")

    def __init__(self, of: Any) -> None:
        self.of, self.state = of, None
        self.entries: dict[Any, Any] = {}

    def __repr__(self) -> str:
        return repr(self.of) if isinstance(self.of, Named) else "?"


# by module and name: a function of the arguments; if its result has ``build``, that gets the state
Makers = Mapping[tuple[str, str], Callable[..., Any]]


class Bounded:
    """A file that is never asked for more than it holds, whatever a pickle claims."""

    def __init__(self, file: IO[bytes], length: int) -> None:
        self._file, self._length = file, length

    def tell(self) -> int:
        return self._file.tell()

    def read(self, count: int) -> bytes:
        return self._file.read(max(0, min(count, self._length - self._file.tell())))

    def readline(self) -> bytes:
        return self._file.readline()


def read_pickle(
    source: bytes | Bounded,
    length: int,
    *,
    makers: Makers,
    persistent: Callable[[Any], Any] | None = None,
    strict: bool = False,
    old_text_is_bytes: bool = False,
) -> Any:
    """Return the content of a pickle.

    Args:
        source: the pickle; a file is left at its end.
        length: bytes available.
        makers: functions that replace globals.
        persistent: function that replaces persistent ids.
        strict: refuse all other globals.
        old_text_is_bytes: whether text of Python 2 is bytes, or else text in latin-1.

    Raises:
        ValueError: damaged, or not a pickle of plain values and names.

    Example:
        >>> import argparse, pickle
        >>> content = pickle.dumps({"lr": 0.1, "args": argparse.Namespace(depth=20)})
        >>> read_pickle(content, len(content), makers={})
        {'lr': 0.1, 'args': argparse.Namespace}
    """
    machine = _Machine(length, makers, persistent, strict, old_text_is_bytes)
    try:
        return machine.run(source)
    except (IndexError, KeyError, TypeError, AttributeError, OverflowError, AssertionError) as error:
        raise ValueError(f"a damaged pickle ({type(error).__name__}: {str(error)[:80]})") from error


_MARK = object()
_SCALARS = (str, bytes, bool, float, type(None))
# instructions whose argument is the value
_VALUES = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "BINBYTES",
    "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8",
}  # fmt: skip
_OLD_TEXT = {"STRING", "BINSTRING", "SHORT_BINSTRING"}
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_DICT": dict,
    "EMPTY_SET": set,
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class _Machine:
    def __init__(
        self,
        length: int,
        makers: Makers,
        persistent: Callable[[Any], Any] | None,
        strict: bool,
        old_text_is_bytes: bool,
    ) -> None:
        self._makers, self._persistent, self._strict = makers, persistent, strict
        self._old_text_is_bytes = old_text_is_bytes
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._work = _WORK + _WORK_PER_BYTE * length

    def run(self, source: bytes | Bounded) -> Any:
        steps = min(_STEPS, memory_left() // 2 // _PER_STEP)
        stack = self._stack
        # the machine's own errors describe damage well enough
        argument: Any
        for step, (opcode, argument, _) in enumerate(pickletools.genops(source)):  # type: ignore[arg-type]
            if step > steps:
                raise ValueError(f"more than {steps:,} instructions")
            name = opcode.name
            if name in _VALUES:
                stack.append(argument)
            elif name in _OLD_TEXT:
                stack.append(argument.encode("latin-1") if self._old_text_is_bytes else argument)
            elif name in _CONSTANTS:
                stack.append(_CONSTANTS[name]())
            elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
                self._memo[argument] = stack[-1]
            elif name == "MEMOIZE":
                self._memo[len(self._memo)] = stack[-1]
            elif name in ("GET", "BINGET", "LONG_BINGET"):
                stack.append(self._memo[argument])
            elif name == "STOP":
                return stack[-1]
            elif name not in ("PROTO", "FRAME"):
                self._do(name, argument)
        raise ValueError("no end")

    def _do(self, name: str, argument: Any) -> None:
        stack = self._stack
        if name == "MARK":
            stack.append(_MARK)
        elif name == "POP":
            stack.pop()
        elif name == "POP_MARK":
            self._to_mark()
        elif name == "DUP":
            stack.append(stack[-1])
        elif name in _TUPLES:
            count = _TUPLES[name]
            stack[-count:] = [tuple(stack[-count:])]
        elif name in ("TUPLE", "LIST", "FROZENSET", "DICT"):
            stack.append(self._gathered(name, self._to_mark()))
        elif name in ("APPEND", "APPENDS", "ADDITEMS"):
            found = [stack.pop()] if name == "APPEND" else self._to_mark()
            self._extend(stack[-1], found)
        elif name in ("SETITEM", "SETITEMS"):
            if name == "SETITEM":
                value = stack.pop()
                found = [stack.pop(), value]
            else:
                found = self._to_mark()
            self._set(stack[-1], found)
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            if name == "GLOBAL":
                module, _, of = argument.partition(" ")
            else:
                of, module = stack.pop(), stack.pop()
            stack.append(self._named(module, of))
        elif name in ("REDUCE", "NEWOBJ"):
            arguments, of = stack.pop(), stack.pop()
            stack.append(self._made(of, arguments))
        elif name == "NEWOBJ_EX":
            _, arguments, of = stack.pop(), stack.pop(), stack.pop()
            stack.append(self._made(of, arguments))
        elif name == "INST":
            module, _, of = argument.partition(" ")
            stack.append(self._made(self._named(module, of), tuple(self._to_mark())))
        elif name == "OBJ":
            of, *arguments = self._to_mark()
            stack.append(self._made(of, tuple(arguments)))
        elif name == "BUILD":
            state = stack.pop()
            self._build(stack[-1], state)
        elif name in ("PERSID", "BINPERSID"):
            identity = argument if name == "PERSID" else stack.pop()
            if self._persistent is None:
                raise ValueError("it asks for what is not in it")
            stack.append(self._persistent(identity))
        else:
            raise ValueError(f"it uses {name}, which is refused")

    def _to_mark(self) -> list[Any]:
        """Pop the values above the last mark, and the mark."""
        stack = self._stack
        place = len(stack) - 1
        while stack[place] is not _MARK:
            place -= 1
            if place < 0:
                raise ValueError("no mark")
        found = stack[place + 1 :]
        del stack[place:]
        return found

    def _gathered(self, name: str, found: list[Any]) -> Any:
        if name == "TUPLE":
            return tuple(found)
        if name == "LIST":
            return found
        if name == "FROZENSET":
            return frozenset(map(_key, found))
        made: dict[Any, Any] = {}
        self._set(made, found)
        return made

    def _extend(self, target: Any, found: list[Any]) -> None:
        if isinstance(target, list):
            target.extend(found)
        elif isinstance(target, set):
            target.update(map(_key, found))
        elif not isinstance(target, Made):
            raise ValueError(f"items for a {type(target).__name__}")

    def _set(self, target: Any, found: list[Any]) -> None:
        if len(found) % 2:
            raise ValueError("a key without a value")
        entries = target.entries if isinstance(target, Made) else target
        if not isinstance(entries, dict):
            raise ValueError(f"entries for a {type(target).__name__}")
        for place in range(0, len(found), 2):
            entries[_key(found[place])] = found[place + 1]

    def _named(self, module: Any, name: Any) -> Named:
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError("a name that is no text")
        if self._strict and (module, name) not in self._makers:
            raise ValueError(f"it asks for {module[:80]}.{name[:80]}, which is refused")
        return Named(module, name)

    def _made(self, of: Any, arguments: Any) -> Any:
        if not isinstance(arguments, tuple):
            raise ValueError("arguments that are no tuple")
        if isinstance(of, Named):
            maker = self._makers.get((of.module, of.name))
            if maker is not None:
                # a maker may copy its arguments, so their size counts as work
                sized = (item for item in arguments if isinstance(item, str | bytes | list | tuple))
                self._work -= 1 + sum(map(len, sized))
                if self._work < 0:
                    raise ValueError("it makes more than a file of its length holds")
                return maker(*arguments)
        elif not isinstance(of, Made):
            raise ValueError(f"it calls a {type(of).__name__}")
        return Made(of)

    def _build(self, target: Any, state: Any) -> None:
        build = getattr(target, "build", None)
        if build is not None:
            build(state)
        elif isinstance(target, Made):
            target.state = state
        elif not isinstance(target, Dictionary):
            raise ValueError(f"attributes for what has no attribute, a {type(target).__name__}")


def _key(value: Any) -> Any:
    """Return a key that can be hashed in constant time; others become an :class:`Opaque`."""
    small = isinstance(value, int) and value.bit_length() <= 64
    return value if small or isinstance(value, _SCALARS) else Opaque()
