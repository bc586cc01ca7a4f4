"""From a module to a torch.fx graph that surely does what the module does.

torch.fx runs a forward once with stand-ins for its values, so whatever the forward decides in Python is
decided then and for all calls. Here that is watched: a question that only a value could answer (its type,
its hash, whether it is true), a number drawn by chance, autocast switched on within, or state that changes
from call to call end the tracing of the module that did so. Such a module becomes one node, which runs it as
it is; where the network itself is such a module, there is no graph.

Two kinds of questions are answered: whether a size is such that the forward raises
(:mod:`quincunx.layers.sizes`), and of which format or on which device a map is
(:mod:`quincunx.layers.kinds`). The graph asks them again at each call.
"""

from __future__ import annotations

import copy
import operator
import threading
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from quincunx.layers.sizes import Raised, Run, Settled, raised, raised_by_network, settle
from quincunx.layers.tracer import (
    Tracer,
    called_as_modules_are,
    drew,
    random_states,
    reason,
    restore_random_states,
    watching,
)
from quincunx.layers.tried import SIZES, Trying, channels_to_try, without_values
from quincunx.layers.ways import ApartError, Ways, join
from quincunx.modules import computed_tensors, held_at

__all__ = ["Traced", "as_module", "attribute_of", "trace"]

# traces that may be made of a forward that goes two ways, and their nodes
_MOST_WAYS, _MOST_NODES = 256, 40_000
# sizes in a row that show nothing new, after which no more are tried
_USELESS = 6
# sizes that a network has to take for what they have in common to be taken for what all have
_ENOUGH = 12

_LOCK = threading.RLock()


class Traced(fx.Graph):
    """A graph with what its nodes need besides the model.

    Attributes:
        constants: name of a ``get_attr`` node -> a tensor that the forward made, for those that are no part
            of the model.
        whole: name of a module that is one node since it cannot be looked into -> why.
        fixed: arguments that are no inputs of the graph -> their default.
    """

    constants: dict[str, Tensor]
    whole: dict[str, str]
    fixed: dict[str, Any]


def trace(model: nn.Module, leaf: Callable[[nn.Module], bool] | None = None) -> Traced:
    """A network's graph for the arguments that it cannot do without.

    Arguments with a default that is no tensor and no number keep it and are no inputs of the graph; numbers
    neither, where the forward decides something by them. Modules with hooks, and those that cannot be looked
    into, are one node each. The model stays as it is.

    Args:
        model: any module.
        leaf: whether a module is to be one node, besides torch's own layers.

    Raises:
        TypeError: its own forward cannot be traced, or does not do the same at every call.
    """
    name = type(model).__name__
    if not called_as_modules_are(model):
        raise TypeError(f"model: {name} cannot be traced by torch.fx (it has a __call__ of its own)")
    with _LOCK, torch.inference_mode(False), torch.no_grad():
        states = random_states()
        try:
            try:
                graph, again = _trace_settled(model, leaf or (lambda _: False), True)
            except Exception:  # noqa: BLE001 - whatever a forward raises on a stand-in for a number
                graph, again = _trace_settled(model, leaf or (lambda _: False), False)
        except Exception as error:
            raise TypeError(
                f"model: {name} cannot be traced by torch.fx ({reason(error)}); "
                "fuse the parts of it that can be"
            ) from error
        finally:
            restore_random_states(states)
    if _text(graph) != _text(again) or not _equal(graph.constants, again.constants):
        raise TypeError(
            f"model: {name} cannot be traced by torch.fx (it does not do the same at every call); "
            "fuse the parts of it that do"
        )
    return graph


def _trace_settled(
    model: nn.Module, leaf: Callable[[nn.Module], bool], numbers: bool
) -> tuple[Traced, Traced]:
    """Two traces; where a question about sizes is in their way, it is settled first."""
    settled = Settled()
    try:
        found = _trace_twice(model, leaf, numbers, settled)
    except Exception:
        if not settled.met:
            raise
    else:
        if not settled.met:
            return found

    def run(known: Settled, assumed: Mapping[str, bool]) -> Run:
        tracer = Tracer(leaf, {}, numbers, known, assumed)
        scratch = _scratch(model)
        error = None
        with watching(tracer, scratch):
            try:
                tracer.trace(scratch)
            except Exception as e:  # noqa: BLE001 - whatever a forward raises
                error = e
        network = error is not None and not tracer.refused and raised_by_network(error)
        return Run(tracer.asked, raised(error, tracer.values) if error is not None and network else None)

    known = settle(run)
    known.met = False
    try:
        found = _trace_twice(model, leaf, numbers, known)
    except Exception:
        both = _both_ways(model, leaf, numbers, known) if known.met else None
        if both is None:
            raise
        return both
    return (_both_ways(model, leaf, numbers, known) if known.met else None) or found


def _both_ways(
    model: nn.Module, leaf: Callable[[nn.Module], bool], numbers: bool, settled: Settled
) -> tuple[Traced, Traced] | None:
    """The graph of a forward that goes on both ways of a branch; None where there is none.

    A branch that cannot be in a graph (it has layers with parameters, say) is guarded: where it asks whether
    two maps are as large as each other, it is answered as images of all sizes that were tried have it. If
    they differ, or are few, and where it asks anything else, what asks is left to run as it is. Only where
    that is the network itself, all questions are answered in that way.
    """
    try:
        return _followed(model, leaf, numbers, settled, asks_alone=False)
    except fx.proxy.TraceError:
        # what asks is the network itself
        pass
    try:
        return _followed(model, leaf, numbers, settled, asks_alone=True)
    except fx.proxy.TraceError:
        return None


def _followed(
    model: nn.Module, leaf: Callable[[nn.Module], bool], numbers: bool, settled: Settled, asks_alone: bool
) -> tuple[Traced, Traced] | None:
    """The graph of a forward as images of several sizes have it; None where there is none.

    Args:
        asks_alone: whether all questions are answered as the sizes that were tried have it.

    Raises:
        TraceError: the network itself asks what is left unanswered.
    """
    tried, others = _tried(model, leaf, numbers, settled, asks_alone)
    seen: dict[str, set[bool]] = {}
    for ways in (*tried, *others):
        for key, answer in ways.told.items():
            seen.setdefault(key, set()).add(answer)
    usual = {key: answer for ways in reversed(tried) for key, answer in ways.told.items()}
    places = {key: place for ways in tried for key, place in ways.places.items()}
    comparing = {key for ways in tried for key in ways.comparing} if len(tried) >= _ENOUGH else set()
    sure = {key for key in usual if len(seen[key]) == 1 and (asks_alone or key in comparing)}
    fixed: dict[str, bool] = {}
    closed: set[str] = set()
    ends: dict[tuple[str, tuple[str, int]], tuple[bool, Raised]] = {}
    while tried:
        ways = Ways(usual=usual, fixed=fixed, closed=frozenset(closed), ends=ends)
        try:
            return _Runs(model, leaf, numbers, settled, ways).all()
        except _RaisesError as error:
            ends.update(error.ends)
        except ApartError as error:
            # of the same code, such as a block's that is there many times, others will not do either
            alike = {key for key in usual if places[key] == places.get(error.key)} | {error.key}
            if error.key in sure:
                fixed.update({key: usual[key] for key in alike & sure})
            else:
                closed |= alike - sure
        except _ManyError:
            if sure <= fixed.keys():
                return None
            fixed.update({key: usual[key] for key in sure})
    return None


def _tried(
    model: nn.Module, leaf: Callable[[nn.Module], bool], numbers: bool, settled: Settled, everything: bool
) -> tuple[list[Ways], list[Ways]]:
    """What a forward's questions are for images of several sizes: of those that the network takes, and of
    those for which it raises or cannot be followed."""
    taken: list[Ways] = []
    ended: list[Ways] = []
    mode = without_values()

    def run(channels: int, images: int, *sides: int) -> Ways | None:
        ways = Ways()
        tracer = Trying((images, channels, *sides), mode, leaf, {}, numbers, settled, ways=ways)
        scratch = _scratch(model)
        with watching(tracer, scratch):
            try:
                tracer.trace(scratch)
            except Exception:  # noqa: BLE001 - whatever a forward raises
                refused = True
            else:
                refused = bool(tracer.refused)
        if refused and not tracer.failed:
            ended.append(ways)
        return None if refused or tracer.failed else ways

    for channels in channels_to_try(model):
        known: set[tuple[str, bool]] = set()
        useless = 0
        for size in SIZES:
            ways = run(channels, *size)
            if ways is not None:
                taken.append(ways)
                useless = 0 if set(ways.told.items()) - known else useless + 1
                known.update(ways.told.items())
            compared = {key for ways in taken for key in ways.comparing}
            both = all({(key, True), (key, False)} <= known for key in compared)
            if useless >= _USELESS and both and not everything:
                break
        if taken:
            break
    return taken, ended


class _ManyError(Exception):
    """A forward goes more ways than are tried."""


class _RaisesError(Exception):
    """A forward raises on one of its ways, with one answer to a question that is asked there only."""

    def __init__(self, key: str, place: tuple[str, int], answer: bool, otherwise: Raised) -> None:
        super().__init__(key)
        self.ends = {(key, place): (answer, otherwise)}


class _Runs:
    """The ways that a forward goes, each traced, and made one graph.

    Args:
        model: the network.
        leaf: whether a module is one node.
        numbers: whether arguments whose default is a number stay arguments.
        settled: what is known of its questions.
        ways: what is answered where nothing else is said.
    """

    def __init__(
        self,
        model: nn.Module,
        leaf: Callable[[nn.Module], bool],
        numbers: bool,
        settled: Settled,
        ways: Ways,
    ) -> None:
        self.model, self.given, self.ways = model, (leaf, numbers, settled), ways
        self.whole: dict[str, str] = {}
        self.constants: dict[str, Tensor] = {}
        self.count = self.nodes = 0

    def all(self) -> tuple[Traced, Traced]:
        """
        Raises:
            ApartError: a question whose two ways cannot be in one graph.
            _ManyError: there are too many.
            TraceError: the forward cannot be traced.
        """
        leaf, numbers, settled = self.given
        made: list[Ways] = []

        def ways() -> Ways:
            made.append(self.ways.again({}))
            return made[-1]

        graph, again = _trace_twice(self.model, leaf, numbers, settled, ways)
        self.whole, self.constants = graph.whole, graph.constants
        if _text(graph) == _text(again):
            self._join(graph, {}, made[-2].met)
            return graph, graph
        return graph, again

    def _join(self, graph: Traced, path: dict[str, bool], met: Mapping[str, bool]) -> None:
        """Let a graph of one path do what the network does on all that begin like it."""
        asked = list(met.items())
        for place in reversed(range(len(path), len(asked))):
            key, answer = asked[place]
            other = self._run(key, {**dict(asked[:place]), key: not answer})
            join(graph, other, key, answer, self.model)

    def _run(self, key: str, path: dict[str, bool]) -> Traced:
        """The graph of the paths that begin with some answers, the last of which is to a question."""
        leaf, numbers, settled = self.given
        ways = self.ways.again(path)
        self.count += 1
        if self.count > _MOST_WAYS or self.nodes > _MOST_NODES:
            raise _ManyError
        # with assumed answers it is noted what texts say of sizes
        tracer = Tracer(leaf, self.whole, numbers, settled, {}, ways)
        try:
            scratch = _scratch(self.model)
            graph = _trace_once(scratch, tracer)
            # what it keeps from one call to the next shows in the second
            again = _trace_once(
                scratch, Tracer(leaf, self.whole, numbers, settled, {}, self.ways.again(path))
            )
        except Exception as error:
            if raised_by_network(error) and not tracer.refused and [*ways.met] == [*path]:
                end = raised(error, tracer.values)
                raise _RaisesError(key, ways.places[key], not path[key], end) from error
            raise ApartError(key) from error
        self.nodes += len(graph.nodes)
        if _text(graph) != _text(again) or not _equal(graph.constants, again.constants):
            raise fx.proxy.TraceError("it does not do the same at every call")
        alike = graph.whole.keys() == self.whole.keys() and _equal(graph.constants, self.constants)
        if not alike or list(ways.met)[: len(path)] != [*path]:
            raise ApartError(key)
        self._join(graph, path, ways.met)
        return graph


def _trace_twice(
    model: nn.Module,
    leaf: Callable[[nn.Module], bool],
    numbers: bool,
    settled: Settled,
    ways: Callable[[], Ways | None] = lambda: None,
) -> tuple[Traced, Traced]:
    """Two traces of one copy: what it keeps from one call to the next shows in the second.

    A module that can be looked into at the first call only, as one that fills a cache, runs as it is.
    """
    whole: dict[str, str] = {}
    while True:
        scratch = _scratch(model)
        tracers = (Tracer(leaf, whole, numbers, settled, ways=ways()) for _ in range(2))
        first, second = (_trace_once(scratch, tracer) for tracer in tracers)
        found = {**second.whole, **first.whole}
        if set(found) == set(whole) or set(first.whole) == set(second.whole):
            return first, second
        whole = found


def _scratch(model: nn.Module) -> nn.Module:
    """A copy that a forward may leave stand-ins in; it shares the parameters."""
    scratch = copy.deepcopy(model, computed_tensors(model) | {id(p): p for p in model.parameters()})
    for name, part in scratch.named_modules():
        own = vars(part).get("forward")
        if own is not None and getattr(own, "__self__", None) is not part:
            # the copy would run what belongs to the original
            raise TypeError(f"the forward of {name or 'it'!r} was exchanged for a function of another object")
    forward = vars(scratch).pop("forward", None)
    if forward is not None:
        # torch.fx reads the class's forward, a call takes the instance's
        scratch.__class__ = type(type(model).__name__, (type(model),), {"forward": forward.__func__})
    return scratch


def _trace_once(scratch: nn.Module, tracer: Tracer) -> Traced:
    states, kept, known = random_states(), _versions(scratch), set(vars(scratch))
    with watching(tracer, scratch):
        graph = cast(Traced, tracer.trace(scratch))
    if tracer.refused:
        raise fx.proxy.TraceError(tracer.refused)
    if drew(states):
        raise fx.proxy.TraceError("it draws random numbers")
    now = _versions(scratch)
    for name, (tensor, *facts) in kept.items():
        inside = any(name.startswith(f"{whole}.") for whole in tracer.whole)
        if not inside and (name not in now or now[name][0] is not tensor or now[name][1:] != tuple(facts)):
            raise fx.proxy.TraceError(f"it changes its own {name}")
    targets = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    graph.constants = {name: vars(scratch).pop(name) for name in targets & set(vars(scratch)) - known}
    graph.whole, graph.fixed = tracer.whole, tracer.fixed
    return graph


def _versions(module: nn.Module) -> dict[str, tuple[Tensor, int, int]]:
    """All tensors that a module and its parts hold by name, where each lies and how often it was written."""
    found = {}
    for path, part in module.named_modules():
        held = {**part._parameters, **part._buffers, **vars(part)}
        for name, value in held.items():
            if isinstance(value, Tensor) and not value.is_inference():
                place = value.data_ptr() if value.layout is torch.strided else 0
                found[f"{path}.{name}" if path else name] = (value, place, value._version)
    return found


def _bits(tensor: Tensor) -> Tensor:
    """A tensor's bytes, where it has any: values that are no number are not equal to themselves."""
    dense = tensor.layout is torch.strided and not tensor.is_quantized and not tensor.is_meta
    return (
        tensor.detach().resolve_conj().reshape(-1).view(torch.uint8) if dense and tensor.numel() else tensor
    )


def _text(graph: fx.Graph) -> list[str]:
    return [f"{n.op} {n.name} {n.target} {n.args} {n.kwargs}" for n in graph.nodes]


def _equal(some: dict[str, Tensor], others: dict[str, Tensor]) -> bool:
    def same(a: Tensor, b: Tensor) -> bool:
        alike = (a.shape, a.dtype, a.device, a.layout) == (b.shape, b.dtype, b.device, b.layout)
        return alike and torch.equal(_bits(a), _bits(b))

    return some.keys() == others.keys() and all(same(some[name], others[name]) for name in some)


def attribute_of(model: nn.Module, node: fx.Node) -> Any:
    """Return what a ``get_attr`` node stands for: a constant that the forward made, or the network's own.

    Raises:
        AttributeError: neither has it.
    """
    made = getattr(node.graph, "constants", {}).get(str(node.target))
    return held_at(model, str(node.target)) if made is None else made


def as_module(model: nn.Module, graph: fx.Graph, constants: dict[str, Tensor]) -> fx.GraphModule:
    """A graph of a model's nodes as a module, which shares the model's layers."""
    used = dict.fromkeys(str(n.target) for n in graph.nodes if n.op in ("call_module", "get_attr"))
    root = {name: constants[name] if name in constants else operator.attrgetter(name)(model) for name in used}
    return fx.GraphModule(root, graph, type(model).__name__)
