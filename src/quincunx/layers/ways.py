"""Forwards that go on both ways of a branch on sizes: the graphs of both, made one.

``if x.shape != skip.shape: x = F.interpolate(x, size=skip.shape[2:])`` goes on whatever the sizes are. The
network is traced both ways. What the graphs do differently becomes one node, an :class:`Either`, which asks
the question at each call and does what that way does; what they do alike, in front of it and behind it, stays
as it is (:func:`join`). So a network with such a branch has the graph of one without.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeGuard, Union

import torch
from torch import Tensor, fx, nn

from quincunx.layers.changes import ASKS_LAYOUT, changes, is_opaque, name_of, nodes_in
from quincunx.layers.counts import is_torchs
from quincunx.layers.kinds import KindGuard
from quincunx.layers.names import found_at, path_of
from quincunx.layers.onecall import OneCall
from quincunx.layers.sizes import Raised, SizeGuard

__all__ = ["ApartError", "Asked", "Either", "Ways", "join"]

_Read = Union["fx.Node", "_Constant"]
# what these do depends on a mode that copies of them would not follow, or on the layout in memory
_BY_MODE = (nn.modules.dropout._DropoutNd, nn.RReLU)
_NOT_COPIED = (nn.FractionalMaxPool2d, nn.Unflatten)


@dataclass
class Ways:
    """What a forward is told where both ways of a branch go on.

    Attributes:
        path: question -> the answer that is assumed in this run.
        usual: question -> the answer to those that are not in ``path``.
        fixed: question -> its one answer; the graph raises where it has the other.
        closed: questions that are left unanswered.
        ends: question, and where it is asked -> the answer with which the network goes on, and what it raises
            with the other.
        met: the questions of this run that were answered by ``path`` or ``usual``, in order, each once.
        told: what ``met`` holds, and what was asked in parts that turned out to run as they are.
        places: question -> where in the code it is asked.
        comparing: the questions whether two maps have the same sizes.
    """

    path: Mapping[str, bool] = field(default_factory=dict)
    usual: Mapping[str, bool] = field(default_factory=dict)
    fixed: Mapping[str, bool] = field(default_factory=dict)
    closed: frozenset[str] = frozenset()
    ends: Mapping[tuple[str, tuple[str, int]], tuple[bool, Raised]] = field(default_factory=dict)
    met: dict[str, bool] = field(default_factory=dict)
    told: dict[str, bool] = field(default_factory=dict)
    places: dict[str, tuple[str, int]] = field(default_factory=dict)
    comparing: set[str] = field(default_factory=set)

    def again(self, path: Mapping[str, bool]) -> Ways:
        """The same for another run."""
        return Ways(path, self.usual, self.fixed, self.closed, self.ends)


@dataclass(frozen=True)
class Asked(OneCall):
    """Where in a graph a forward asks a question about sizes; gives whether it is so.

    Attributes:
        key: the question.
    """

    key: str
    __name__ = "asked"

    def run(self, value: Any) -> bool:
        return bool(value)


@dataclass(frozen=True)
class _Value:
    """What an arm was given or has made, by its place."""

    place: int


@dataclass(frozen=True)
class _Constant:
    """A constant that the other way has another value for."""

    kind: type
    text: str
    value: Any = field(compare=False)


# that a branch may choose: a factor, a size, that there is no map
_CHOSEN = (int, float, bool, str, type(None), torch.dtype)


@dataclass(frozen=True, eq=False)
class Arm:
    """What a network does on one way of a branch.

    Attributes:
        steps: what is called, in order: a function, the name of a method, or a layer without parameters.
        results: what is read behind the branch: places of values, and constants.
    """

    steps: tuple[tuple[Any, tuple[Any, ...], Mapping[str, Any]], ...]
    results: tuple[Any, ...]

    def __call__(self, given: Sequence[Any]) -> tuple[Any, ...]:
        values = list(given)

        def filled(value: Any) -> Any:
            return values[value.place] if isinstance(value, _Value) else value

        for target, args, kwargs in self.steps:
            args, kwargs = _mapped(args, filled), _mapped(kwargs, filled)
            if isinstance(target, str):
                values.append(getattr(args[0], target)(*args[1:], **kwargs))
            else:
                values.append(target(*args, **kwargs))
        return tuple(filled(result) for result in self.results)

    def __reduce__(self) -> Any:
        steps = [
            (type(target) is str, target if isinstance(target, (str, nn.Module)) else path_of(target), *rest)
            for target, *rest in self.steps
        ]
        return _arm, (steps, self.results)

    @property
    def raises(self) -> bool:
        """Whether it asks whether the network is for these sizes."""
        found = (target for target, *_ in self.steps)
        return any(isinstance(t, (SizeGuard, KindGuard)) or getattr(t, "raises", False) for t in found)


def _arm(steps: Any, results: tuple[Any, ...]) -> Arm:
    def target(is_method: bool, name: Any) -> Any:
        return name if is_method or not isinstance(name, str) else found_at(name)

    return Arm(tuple((target(method, name), *rest) for method, name, *rest in steps), results)


def _mapped(value: Any, function: Callable[[Any], Any]) -> Any:
    """Arguments with each part in them exchanged, in containers of Python's own."""
    if isinstance(value, (tuple, list)) and not hasattr(value, "_fields"):
        made = [_mapped(one, function) for one in value]
        return made if isinstance(value, list) else tuple(made)
    if isinstance(value, dict):
        return {key: _mapped(one, function) for key, one in value.items()}
    if isinstance(value, slice):
        return slice(*(_mapped(one, function) for one in (value.start, value.stop, value.step)))
    return function(value)


@dataclass(frozen=True, eq=False)
class Either(OneCall):
    """What a network does behind a branch, on the way that is so.

    Attributes:
        yes: what it does where the question is true.
        no: what it does else.
    """

    yes: Arm
    no: Arm
    __name__ = "either"

    def run(self, truth: Any, *values: Any) -> tuple[Any, ...]:
        """
        Args:
            truth: the answer.
            values: what either arm reads.

        Returns:
            As many values of each arm.
        """
        return (self.yes if truth else self.no)(values)

    @property
    def raises(self) -> bool:
        """Whether an arm asks whether the network is for these sizes."""
        return self.yes.raises or self.no.raises


class ApartError(Exception):
    """Two ways that cannot be one graph.

    Args:
        key: the question that they answer differently.
    """

    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key


# ---------------------------------------------------------------- two graphs as one


def join(graph: fx.Graph, other: fx.Graph, key: str, answer: bool, root: nn.Module) -> None:
    """Let a graph do what another one does where a question has the other answer.

    Both are of one forward and do the same until it is asked. From there on they are compared between one
    place where it is asked and the next: what they do alike at the end, and then at the beginning, is what
    the network does both ways; the rest is the branch.

    Args:
        graph: is changed.
        other: is used up.
        key: the question.
        answer: with which ``graph`` was made.
        root: what the graphs were traced from.

    Raises:
        ApartError: a branch has layers with parameters, or changes something in place, or a value that only
            one way has is read in another branch.
    """
    _Join(graph, other, key, root).write(answer)


class _Join:
    def __init__(self, graph: fx.Graph, other: fx.Graph, key: str, root: nn.Module) -> None:
        self.graph, self.key, self.root = graph, key, root
        self.twin: dict[fx.Node, fx.Node] = {}
        self._hoist(other)
        self.own, self.others = self._parts(graph), self._parts(other)
        if len(self.own) != len(self.others):
            raise self._apart()
        # which branch a node is in
        self.branch: dict[fx.Node, int] = {}
        # where the branch begins, in the parts of both, and where it ends in the parts of each
        self.starts = [0] * len(self.own)
        self.ends: list[tuple[int, int]] = [(0, 0)] * len(self.own)
        self._match()

    def _apart(self) -> ApartError:
        return ApartError(self.key)

    def _hoist(self, other: fx.Graph) -> None:
        """Tensors of the network are read in front of everything."""
        held = {str(n.target): n for n in self.graph.nodes if n.op == "get_attr"}
        inputs = [n for n in self.graph.nodes if n.op == "placeholder"]
        root = self.graph._root if not inputs else inputs[-1]
        for node in other.nodes:
            if node.op == "get_attr" and str(node.target) not in held:
                with self.graph.inserting_after(root):
                    held[str(node.target)] = self.graph.get_attr(str(node.target))
        for node in held.values():
            root.append(node)
        self.twin.update((n, held[str(n.target)]) for n in other.nodes if n.op == "get_attr")

    def _parts(self, graph: fx.Graph) -> list[list[fx.Node]]:
        """Nodes up to where the question is asked first, to where it is asked next, and so on."""
        parts: list[list[fx.Node]] = [[]]
        for node in graph.nodes:
            if node.op != "get_attr":
                parts[-1].append(node)
                if isinstance(node.target, Asked) and node.target.key == self.key:
                    parts.append([])
        return parts

    # ------------------------------------------------------------ what is alike

    def _match(self) -> None:
        for own, other in zip(self.own[0], self.others[0], strict=False):
            self.twin[other] = own
        alike = all(map(self._alike, self.own[0], self.others[0]))
        if len(self.own) < 2 or len(self.own[0]) != len(self.others[0]) or not alike:
            raise self._apart()
        partners: dict[fx.Node, set[fx.Node]] = {}

        def note(own: fx.Node, other: fx.Node) -> bool:
            found = _pairs(_arguments(own), _arguments(other))
            if not self._same_call(own, other) or found is None:
                return False
            for one, another in found:
                if isinstance(one, _Constant) or isinstance(another, _Constant):
                    continue
                partners.setdefault(one, set()).add(another)
                partners.setdefault(another, set()).add(one)
            return True

        for number in reversed(range(1, len(self.own))):
            mine, theirs = self.own[number], self.others[number]
            i, j = len(mine), len(theirs)
            partners.clear()
            while i and j:
                one, another = mine[i - 1], theirs[j - 1]
                # what is read as the same in this part has to be the same
                if partners.get(one, {another}) != {another} or partners.get(another, {one}) != {one}:
                    break
                if not note(one, another):
                    break
                self.twin[another] = one
                i, j = i - 1, j - 1
            self.ends[number] = i, j
            if i == len(mine):
                # the output, or where it is asked again
                raise self._apart()
        for number in range(1, len(self.own)):
            i, j = self.ends[number]
            mine, theirs = self.own[number][:i], self.others[number][:j]
            for one, another in zip(mine, theirs, strict=False):
                if not self._alike(one, another):
                    break
                self.twin[another] = one
                self.starts[number] += 1
            for node in (*mine[self.starts[number] :], *theirs[self.starts[number] :]):
                self.branch[node] = number

    def _alike(self, own: fx.Node, other: fx.Node) -> bool:
        """Whether two nodes do the same with the same values."""
        found = _pairs(_arguments(own), _arguments(other))
        return (
            self._same_call(own, other)
            and found is not None
            and all(self._same_value(one, another) for one, another in found)
        )

    def _same_value(self, own: _Read, other: _Read) -> TypeGuard[fx.Node]:
        return isinstance(own, fx.Node) and isinstance(other, fx.Node) and self.twin.get(other) is own

    def _same_call(self, own: fx.Node, other: fx.Node) -> bool:
        return own.op == other.op and _same(own.target, other.target)

    # ------------------------------------------------------------ what is not

    def write(self, answer: bool) -> None:
        joined = self._joined()
        places = {node: i for i, node in enumerate(self.graph.nodes)}
        made: dict[tuple[int, _Read, _Read], fx.Node] = {}
        arms = {number: self._arms(number, pairs, places) for number, pairs in joined.items()}
        for number, (inputs, own, other) in arms.items():
            asked = self.own[number - 1][-1]
            ways = (own, other) if answer else (other, own)
            if not joined[number] and not own.raises and not other.raises:
                continue
            with self.graph.inserting_after(self._before(number)):
                either = self.graph.call_function(Either(*ways), (asked, *inputs))
            last = either
            for place, pair in enumerate(joined[number]):
                with self.graph.inserting_after(last):
                    last = self.graph.call_function(operator.getitem, (either, place))
                made[(number, *pair)] = last
            for node in (either, *(made[(number, *pair)] for pair in joined[number])):
                node.meta.update({k: v for k, v in asked.meta.items() if k == "nn_module_stack"})
        for number in range(1, len(self.own)):
            i, j = self.ends[number]
            for own_node, other_node in zip(self.own[number][i:], self.others[number][j:], strict=True):

                def value(one: _Read, another: _Read, number: int = number) -> fx.Node:
                    if self._same_value(one, another):
                        return one
                    return made[self._made_in(number, one, another), one, another]

                own_node.args, own_node.kwargs = _replaced(
                    (own_node.args, dict(own_node.kwargs)),
                    (other_node.args, dict(other_node.kwargs)),
                    value,
                )
        for number in reversed(range(1, len(self.own))):
            for node in reversed(self.own[number][self.starts[number] : self.ends[number][0]]):
                self.graph.erase_node(node)

    def _before(self, number: int) -> fx.Node:
        """The node of the graph in front of a branch."""
        start = self.starts[number]
        return self.own[number][start - 1] if start else self.own[number - 1][-1]

    def _joined(self) -> dict[int, list[tuple[_Read, _Read]]]:
        """For each branch the values that are read behind it: one of the graph's, one of the other's."""
        found: dict[int, dict[tuple[_Read, _Read], None]] = {n: {} for n in range(1, len(self.own))}
        for number in found:
            i, j = self.ends[number]
            for own, other in zip(self.own[number][i:], self.others[number][j:], strict=True):
                for one, another in _pairs(_arguments(own), _arguments(other)) or ():
                    if not self._same_value(one, another):
                        found[self._made_in(number, one, another)][one, another] = None
        return {number: list(pairs) for number, pairs in found.items()}

    def _made_in(self, number: int, own: _Read, other: _Read) -> int:
        """The branch behind which a value is chosen that a node behind branch ``number`` reads."""
        nodes = (one for one in (own, other) if isinstance(one, fx.Node))
        of = {self.branch[node] for node in nodes if node in self.branch}
        if len(of) > 1:
            raise self._apart()
        return of.pop() if of else number

    def _arms(
        self, number: int, pairs: list[tuple[_Read, _Read]], places: Mapping[fx.Node, int]
    ) -> tuple[list[fx.Node], Arm, Arm]:
        """What a branch does in either graph, and the values of the graph that it reads."""
        start, (i, j) = self.starts[number], self.ends[number]
        inputs: dict[fx.Node, None] = {}
        sides = (
            (self.own[number][start:i], [one for one, _ in pairs]),
            (self.others[number][start:j], [another for _, another in pairs]),
        )
        for nodes, results in sides:
            inside = set(nodes)
            given = [one for one in results if isinstance(one, fx.Node)]
            for read in (*given, *nodes_in([_arguments(node) for node in nodes])):
                if read not in inside:
                    inputs[self._outside(read)] = None
        before = places[self._before(number)]
        if any(places[node] > before for node in inputs):
            raise self._apart()
        read_outside = list(inputs)
        own, other = (self._arm(nodes, results, read_outside) for nodes, results in sides)
        return read_outside, own, other

    def _outside(self, node: fx.Node) -> fx.Node:
        """The graph's own node for a value that was made in front of a branch."""
        if node in self.branch:
            raise self._apart()
        return self.twin.get(node, node)

    def _arm(self, nodes: list[fx.Node], results: list[_Read], given: list[fx.Node]) -> Arm:
        place: dict[fx.Node, int] = {node: i for i, node in enumerate(given)}
        steps: list[tuple[Any, Any, Any]] = []

        def value(one: Any) -> Any:
            if not isinstance(one, fx.Node):
                return one
            return _Value(place[one if one in place else self.twin[one]])

        for node in nodes:
            target = self._target(node)
            steps.append((target, *_mapped(_arguments(node), value)))
            place[node] = len(given) + len(steps) - 1
        chosen = (one.value if isinstance(one, _Constant) else value(one) for one in results)
        return Arm(tuple(steps), tuple(chosen))

    def _target(self, node: fx.Node) -> Any:
        """What an arm calls.

        Raises:
            ApartError: it keeps something, or changes it.
        """
        if isinstance(node.target, (Asked, Either, SizeGuard, KindGuard)):
            return node.target
        unfit = changes(self.root, node) or is_opaque(self.root, node) or name_of(node) in ASKS_LAYOUT
        if unfit or node.op not in ("call_function", "call_method", "call_module"):
            raise self._apart()
        if node.op == "call_module":
            module = self.root.get_submodule(str(node.target))
            held = next(iter(module.state_dict(keep_vars=True)), None)
            by_mode = isinstance(module, _BY_MODE) and module.training
            if held is not None or not is_torchs(module) or isinstance(module, _NOT_COPIED) or by_mode:
                raise self._apart()
            return copy.deepcopy(module)
        if node.op == "call_method" and node.target in ("view", "view_as"):
            # maps may lie in memory in another order than the network's
            dtype = isinstance(node.args[-1], torch.dtype) or "dtype" in node.kwargs
            return node.target if dtype else str(node.target).replace("view", "reshape")
        return node.target


def _arguments(node: fx.Node) -> tuple[Any, Any]:
    return node.args, dict(node.kwargs)


def _children(value: Any) -> list[Any] | None:
    """The parts of a container of arguments; None for what is none."""
    if isinstance(value, (tuple, list)):
        return list(value)
    if isinstance(value, dict):
        return list(value.values())
    return [value.start, value.stop, value.step] if isinstance(value, slice) else None


def _pairs(one: Any, another: Any) -> list[tuple[_Read, _Read]] | None:
    """The nodes in the same places of two nodes' arguments, and the constants that are not the same there;
    None where these differ otherwise."""
    parts, others = _children(one), _children(another)
    if parts is None and others is None:
        if not isinstance(one, fx.Node) and not isinstance(another, fx.Node) and _same(one, another):
            return []
        both = [_read(one), _read(another)]
        return [(both[0], both[1])] if None not in both else None  # type: ignore[list-item]
    if parts is None or others is None:
        return None
    keys = isinstance(one, dict) and list(one) != list(another)
    if type(one) is not type(another) or len(parts) != len(others) or keys:
        return None
    found: list[tuple[_Read, _Read]] = []
    for part, other in zip(parts, others, strict=True):
        if (inside := _pairs(part, other)) is None:
            return None
        found += inside
    return found


def _read(value: Any) -> _Read | None:
    if isinstance(value, fx.Node):
        return value
    return _Constant(type(value), repr(value), value) if isinstance(value, _CHOSEN) else None


def _replaced(one: Any, another: Any, value: Callable[[_Read, _Read], fx.Node]) -> Any:
    """The first of two equal forms of arguments, with what a function makes of both where they read
    something, or have other constants."""
    parts, others = _children(one), _children(another)
    if parts is None or others is None:
        pairs = _pairs(one, another)
        return value(*pairs[0]) if pairs else one
    made = [_replaced(part, other, value) for part, other in zip(parts, others, strict=True)]
    if isinstance(one, dict):
        return dict(zip(one, made, strict=True))
    if isinstance(one, slice):
        return slice(*made)
    return made if isinstance(one, list) else tuple(made)


def _same(one: Any, another: Any) -> bool:
    """Whether two targets, or two constants, are the same."""
    if isinstance(one, (Either, Arm)):
        return type(one) is type(another) and all(map(_same, _contents(one), _contents(another)))
    if isinstance(one, nn.Module):
        return type(one) is type(another) and _same(vars(one), vars(another))
    if isinstance(one, dict) and isinstance(another, dict) and list(one) != list(another):
        return False
    parts, others = _children(one), _children(another)
    if parts is not None and others is not None:
        return type(one) is type(another) and len(parts) == len(others) and all(map(_same, parts, others))
    if isinstance(one, Tensor) or isinstance(another, Tensor):
        return one is another
    # zeros of both signs are equal
    written = isinstance(one, (float, complex)) and repr(one) != repr(another)
    return type(one) is type(another) and bool(one == another) and not written


def _contents(of: Either | Arm) -> Iterator[Any]:
    if isinstance(of, Either):
        return iter((of.yes, of.no))
    # ends of unequal length differ
    return iter((len(of.steps), *of.steps, of.results))
