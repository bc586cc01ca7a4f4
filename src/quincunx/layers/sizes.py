"""Questions that a forward asks about the sizes of its maps, while it is traced with stand-ins.

A forward that branches on a size, ``if x.shape[-1] % 32: raise ValueError(...)``, is two networks. Where
every way through one of the branches raises, the other one is the network, and a :class:`SizeGuard` in its
graph raises for the sizes of the first. Which branch raises is found out by going through both
(:func:`settle`). Whatever was found, the guard asks the question again at each call, so that no input is
answered by the branch that was meant for another one.
"""

from __future__ import annotations

import builtins
import dis
import math
import operator
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from quincunx.layers.onecall import OneCall

__all__ = [
    "Fork",
    "Made",
    "Question",
    "Raised",
    "Run",
    "Settled",
    "Shape",
    "SizeGuard",
    "about_sizes",
    "by_identity",
    "evaluate",
    "identity",
    "is_library",
    "known",
    "mark",
    "pieces_by_size",
    "raised",
    "raised_by_network",
    "settle",
    "sizes_of",
]

# runs of a forward that may be spent on its questions; what is left then stays undecided
_MOST_RUNS = 96
_OPEN, _CLOSE = "\ue000", "\ue001"
_METHODS = {"size", "dim", "ndimension", "numel", "nelement"}
_FUNCTIONS: set[Callable[..., Any]] = {
    *(operator.getitem, operator.add, operator.sub, operator.mul, operator.floordiv, operator.truediv),
    *(operator.mod, operator.pow, operator.neg, operator.pos, operator.abs, operator.invert),
    *(operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge),
    *(operator.and_, operator.or_, operator.xor, operator.lshift, operator.rshift),
    *(operator.iadd, operator.isub, operator.imul, operator.ifloordiv, operator.itruediv, operator.imod),
    *(max, min, round, int, float),
    *(math.ceil, math.floor, math.trunc, math.sqrt, math.log, math.log2, math.pow),
}


# ---------------------------------------------------------------- expressions


@dataclass(frozen=True)
class Shape:
    """The shape of a value of a graph.

    Attributes:
        of: which value: what its node calls, and which of the nodes that call it this is.
    """

    of: str

    def __str__(self) -> str:
        return f"{self.of}.shape"


@dataclass(frozen=True)
class Made:
    """What a function makes of shapes, of what was made of them, and of constants."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]

    def __str__(self) -> str:
        return f"{self.function.__name__}({', '.join(map(str, self.arguments))})"


def about_sizes(node: fx.Node) -> Shape | Made | None:
    """A node as an expression of shapes and constants; None where it depends on anything else."""
    if node.op not in ("call_function", "call_method") or node.kwargs.keys() - {"dim"}:
        return None
    if node.target is getattr and node.args[1] in ("shape", "ndim"):
        shape = _shape(node.args[0])
        return shape if node.args[1] == "shape" or shape is None else Made(len, (shape,))
    if node.op == "call_method":
        return _by_method(node)
    if node.target not in _FUNCTIONS or node.kwargs:
        return None
    found = _converted(node.args)
    return None if found is None else Made(node.target, found)


def sizes_of(node: fx.Node) -> tuple[fx.Node, slice] | None:
    """The value whose sizes a node holds, and which of them: ``x.shape``, ``x.size()``, a slice of these."""
    if node.op not in ("call_function", "call_method") or not node.args:
        return None
    first, *rest = node.args
    if not isinstance(first, fx.Node) or node.kwargs:
        return None
    if (node.target is getattr and rest == ["shape"]) or (node.op == "call_method" and node.target == "size"):
        return None if node.target == "size" and rest else (first, slice(None))
    if node.target is not operator.getitem or not isinstance(rest[0], slice):
        return None
    ends = (rest[0].start, rest[0].stop, rest[0].step)
    whole = sizes_of(first)
    if whole is None or whole[1] != slice(None) or any(type(end) not in (int, type(None)) for end in ends):
        return None
    return whole[0], slice(*ends)


def _shape(value: object) -> Shape | None:
    return Shape(identity(value)) if isinstance(value, fx.Node) else None


def identity(node: fx.Node) -> str:
    """A node's name that does not depend on what was recorded before it and taken back."""
    name, before = _called(node), 0
    for other in node.graph.nodes if node.op != "placeholder" else ():
        if other is node:
            break
        before += _called(other) == name
    return _named(node, before)


def _named(node: fx.Node, before: int) -> str:
    # what was changed in place since may have another shape
    changes = sum(u.op == "call_method" and str(u.target).endswith("_") for u in node.users)
    own = str(node.target) if node.op == "placeholder" else f"{_called(node)}#{before}"
    return own + "'" * changes


def by_identity(graph: fx.Graph) -> dict[str, fx.Node]:
    """The values of a graph by the names that :func:`identity` gives them."""
    found: dict[str, fx.Node] = {}
    before: Counter[str] = Counter()
    for node in graph.nodes:
        if node.op != "output":
            name = _called(node)
            found[_named(node, before[name])] = node
            before[name] += 1
    return found


def _called(node: fx.Node) -> str:
    return f"{node.op} {getattr(node.target, '__name__', node.target)}"


def _by_method(node: fx.Node) -> Shape | Made | None:
    """``x.size()``, ``x.size(1)``, ``x.dim()`` and ``x.numel()``."""
    value, *rest = node.args
    rest += list(node.kwargs.values())
    if node.target not in _METHODS or not isinstance(value, fx.Node):
        return None
    if node.target in ("numel", "nelement"):
        shape = about_sizes(value) or _shape(value)
        return Made(_product, (shape,))
    shape = _shape(value)
    if node.target == "size":
        place = _converted(tuple(rest), alone=True)
        return shape if not rest else None if place is None else Made(operator.getitem, (shape, *place))
    return None if rest else Made(len, (shape,))


def pieces_by_size(node: fx.Node) -> Made | None:
    """How many pieces a call of ``chunk``, ``unbind``, or ``split`` into pieces of one size gives, by the
    size that it divides; None for any other node."""
    name = str(getattr(node.target, "__name__", node.target))
    if name not in _DIVIDING:
        return None
    parameters, count = _DIVIDING[name]
    given = dict(zip(parameters, node.args, strict=False)) | dict(node.kwargs)
    first, *how = (given.get(parameter) for parameter in parameters[:-1])
    if name == "split":
        how = [given.get("split_size", *how)]
    shape, dim = _shape(first), given.get("dim", 0)
    if shape is None or type(dim) is not int or any(type(one) is not int or one < 1 for one in how):
        return None
    size = Made(operator.getitem, (shape, dim))
    return size if count is None else Made(count, (size, *how))


def _chunks(size: int, number: int) -> int:
    each = -(-size // number)
    return -(-size // each) if each else number


def _splits(size: int, each: int) -> int:
    return max(1, -(-size // each))


# what calls that divide a map are given, and how many pieces that makes of a size; of ``unbind`` each
_DIVIDING: dict[str, tuple[tuple[str, ...], Callable[..., int] | None]] = {
    "chunk": (("input", "chunks", "dim"), _chunks),
    "split": (("tensor", "split_size_or_sections", "dim"), _splits),
    "unbind": (("input", "dim"), None),
}


def _product(shape: Any) -> int:
    return math.prod(shape)  # torch.fx exchanges functions of math while it traces


def _converted(values: Any, alone: bool = False) -> Any:
    """Arguments with expressions for their nodes; None where one is of another kind.

    Args:
        alone: whether constants are enough.
    """
    found = []

    def convert(value: Any) -> Any:
        if isinstance(value, fx.Node):
            found.append(about_sizes(value))
            return found[-1]
        if isinstance(value, slice):
            # slices cannot be hashed
            return Made(slice, tuple(convert(part) for part in (value.start, value.stop, value.step)))
        if isinstance(value, (tuple, list)):
            return tuple(convert(part) for part in value)
        if value is not None and not isinstance(value, (bool, int, float, str)):
            found.append(None)
        return value

    made = convert(values)
    return None if any(part is None for part in found) or not (found or alone) else made


class _UnknownError(Exception):
    """A shape that is not there in the branch that was taken."""


def evaluate(expression: Any, shapes: Mapping[str, Any]) -> Any:
    """What an expression is for some shapes."""
    if isinstance(expression, Shape):
        if expression.of not in shapes:
            raise _UnknownError(expression.of)
        return shapes[expression.of]
    if isinstance(expression, Made):
        return expression.function(*(evaluate(value, shapes) for value in expression.arguments))
    if isinstance(expression, tuple):
        return tuple(evaluate(part, shapes) for part in expression)
    return expression


class _Known:
    """What is known of a shape: how many sizes it has, and the second of them."""

    def __init__(self, of: str, dimensions: int | None, channels: int | None) -> None:
        self.of, self.dimensions, self.channels = of, dimensions, channels

    def __len__(self) -> int:
        if self.dimensions is None:
            raise _UnknownError(self.of)
        return self.dimensions

    def __getitem__(self, place: Any) -> int:
        second = place == 1 or (type(place) is int and place < 0 and place == 1 - len(self))
        if self.channels is None or not second:
            raise _UnknownError(self.of)
        return self.channels

    def __eq__(self, other: object) -> bool:
        raise _UnknownError(self.of)

    __hash__ = None  # type: ignore[assignment]


def known(expression: Any, of: Callable[[str], tuple[int | None, int | None]]) -> Any:
    """What an expression is, where numbers of dimensions and channels decide it; None where they do not.

    Args:
        of: these two numbers of a value by its name.
    """
    if isinstance(expression, Shape):
        return None
    try:
        return evaluate(expression, {name: _Known(name, *of(name)) for name in _leaves(expression)})
    except (_UnknownError, TypeError):
        # a shape as a whole is asked for
        return None


def _leaves(expression: Any) -> set[str]:
    """The values whose shapes an expression reads."""
    if isinstance(expression, Shape):
        return {expression.of}
    parts: Any = ()
    if isinstance(expression, Made):
        parts = expression.arguments
    elif isinstance(expression, tuple):
        parts = expression
    elif isinstance(expression, Fork):
        parts = (expression.question, expression.no, expression.yes)
    elif isinstance(expression, Raised):
        parts = expression.values
    return set().union(*(_leaves(part) for part in parts))


# ---------------------------------------------------------------- what a branch raises


@dataclass(frozen=True)
class Raised:
    """An error that a branch ends with.

    Attributes:
        kind: its class, or the nearest of Python's own classes.
        text: what it says, with marks for what depends on sizes.
        values: what the marks stand for, with the format of each.
    """

    kind: type[Exception]
    text: str
    values: tuple[tuple[Any, str], ...] = ()

    def error(self, shapes: Mapping[str, Any]) -> Exception:
        """The error for some shapes."""
        text = self.text
        for place, (value, form) in enumerate(self.values):
            mark = f"{_OPEN}{place}{_CLOSE}"
            if mark in text:
                text = text.replace(mark, _written(value, form, shapes))
        return self.kind(text) if text else self.kind()


def _written(value: Any, form: str, shapes: Mapping[str, Any]) -> str:
    try:
        return format(evaluate(value, shapes), form)
    except _UnknownError:
        return "?"


@dataclass(frozen=True)
class Fork:
    """A branch that asks another question; both of its ends raise."""

    question: Shape | Made
    no: Fork | Raised
    yes: Fork | Raised

    def error(self, shapes: Mapping[str, Any]) -> Exception:
        """The error for some shapes."""
        try:
            way = self.yes if evaluate(self.question, shapes) else self.no
        except _UnknownError:
            way = self.no
        return way.error(shapes)


def mark(values: list[tuple[Any, str]], value: Shape | Made, form: str) -> str:
    """What stands in a text for a value that is known only when the network runs."""
    values.append((value, form))
    return f"{_OPEN}{len(values) - 1}{_CLOSE}"


def raised(error: BaseException, values: list[tuple[Any, str]]) -> Raised:
    """An error of the network as what a guard raises."""
    kind: Any = next(c for c in type(error).__mro__ if getattr(builtins, c.__name__, None) is c)
    # a KeyError prints its text in quotes, and some ask for more than a text
    plain = (ArithmeticError, AssertionError, RuntimeError, TypeError, ValueError)
    if not issubclass(kind, plain) or issubclass(kind, UnicodeError):
        kind = RuntimeError
    name = "" if kind is type(error) else f"{type(error).__name__}: "
    return Raised(kind, name + str(error), tuple(values))


def raised_by_network(error: BaseException) -> bool:
    """Whether an error comes from a ``raise`` or an ``assert`` in a network's own code.

    What Python raises by itself, or a library, may be due to the stand-ins that a forward is traced with.
    """
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    if last is None:
        return False
    home = str(last.tb_frame.f_globals.get("__name__", ""))
    if is_library(home):
        return False
    return dis.opname[last.tb_frame.f_code.co_code[last.tb_lasti]] in ("RAISE_VARARGS", "RERAISE")


def is_library(home: str) -> bool:
    """Whether a module is Python's, torch's, or a part of this library that holds no networks."""
    package = home.split(".")[0]
    library = package in sys.stdlib_module_names or package in ("torch", "numpy")
    return library or (package == "quincunx" and not home.startswith("quincunx.networks"))


# ---------------------------------------------------------------- guards


@dataclass(frozen=True)
class SizeGuard(OneCall):
    """Raises what the network raises for sizes that go another way than the one that was traced.

    Attributes:
        question: what the forward branches on.
        answer: what it is on the way that was traced.
        otherwise: what the other way ends with.
        reads: the values whose shapes it is given.
    """

    question: Shape | Made
    answer: bool
    otherwise: Fork | Raised
    reads: tuple[str, ...]
    __name__ = "size_guard"

    @classmethod
    def of(
        cls, question: Shape | Made, answer: bool, otherwise: Fork | Raised, graph: fx.Graph
    ) -> tuple[SizeGuard, tuple[fx.Node, ...]]:
        """A guard, and the nodes whose shapes it reads."""
        wanted = sorted(_leaves(question) | _leaves(otherwise))
        there = by_identity(graph) if wanted else {}
        reads = tuple(name for name in wanted if name in there)
        return cls(question, answer, otherwise, reads), tuple(there[name] for name in reads)

    def run(self, *shapes: Any) -> None:
        """
        Raises:
            Exception: of the kind and with the text that the network has for these sizes.
        """
        known = dict(zip(self.reads, shapes, strict=True))
        if bool(evaluate(self.question, known)) != self.answer:
            raise self.otherwise.error(known)


# ---------------------------------------------------------------- which branch raises


@dataclass(frozen=True)
class Question:
    """A question that a forward asked, and what it was told.

    Attributes:
        place: where in the code it was asked.
    """

    expression: Shape | Made
    answer: bool
    place: tuple[str, int]

    @property
    def key(self) -> str:
        return str(self.expression)


@dataclass
class Run:
    """What a forward did when some answers were assumed.

    Attributes:
        asked: the questions that nothing is known about yet, in order, each once.
        raised: the error that it ended with; None where it went on, or where it cannot be told.
    """

    asked: list[Question]
    raised: Raised | None


@dataclass
class Settled:
    """What is known about a forward's questions.

    Attributes:
        answers: question -> the answer with which the network goes on, and what it raises with the other.
        barred: questions with which it goes on, or raises, either way.
        places: where in the code these were asked, and what was answered at other places the last time.
        met: whether a question about sizes was left unanswered.
    """

    answers: dict[str, tuple[bool, Fork | Raised]] = field(default_factory=dict)
    barred: set[str] = field(default_factory=set)
    places: dict[tuple[str, int], bool | None] = field(default_factory=dict)
    met: bool = False

    def bar(self, question: Question) -> None:
        self.barred.add(question.key)
        self.places[question.place] = None

    def is_barred(self, key: str, place: tuple[str, int]) -> bool:
        """Whether a question has no branch that surely raises, or was asked where another one had none."""
        return key in self.barred or self.places.get(place, False) is None

    def settle(self, question: Question, answer: bool, otherwise: Fork | Raised) -> None:
        self.answers[question.key] = answer, otherwise
        self.places[question.place] = answer


class _EnoughError(Exception):
    """The runs are spent."""


def settle(run: Callable[[Settled, Mapping[str, bool]], Run]) -> Settled:
    """Find out which of a forward's questions about sizes have one branch that raises.

    Args:
        run: runs the forward with the answers that are known, and others that are assumed.
    """
    found, count = Settled(), 0

    def trial(assumed: Mapping[str, bool]) -> Run:
        nonlocal count
        count += 1
        if count > _MOST_RUNS:
            raise _EnoughError
        return run(found, assumed)

    def ends(assumed: Mapping[str, bool], known: Run | None = None) -> Fork | Raised | None:
        """What all ways end with that begin with some answers; None if one of them goes on."""
        this = known or trial(assumed)
        if this.raised is None:
            return None
        further = next((q for q in this.asked if q.key not in assumed), None)
        if further is None:
            return this.raised
        here = ends({**assumed, further.key: further.answer}, this)
        other = None if here is None else ends({**assumed, further.key: not further.answer})
        if here is None or other is None:
            return None
        return Fork(further.expression, *((other, here) if further.answer else (here, other)))

    try:
        while (this := trial({})).asked:
            # a way that goes on shows all of its questions at once
            for question in this.asked if this.raised is None else this.asked[:1]:
                here = ends({question.key: question.answer}, this)
                other = ends({question.key: not question.answer})
                if here is None and other is not None:
                    found.settle(question, question.answer, other)
                elif other is None and here is not None:
                    found.settle(question, not question.answer, here)
                    break
                else:
                    # where all raises, whatever is answered, a part may do so on stand-ins
                    found.bar(question if here is None else this.asked[-1])
                    break
    except _EnoughError:
        pass
    return found
