"""Run a network from layer to layer: what its layers read is computed from what an earlier layer read.

A fit reads each layer's inputs on all the data, layer after layer. Running the network from its own input for
each of them would take as many forwards as there are layers; a walk takes one, as long as memory allows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from quincunx.layers.graph import traced
from quincunx.layers.parts import between, call_of, description, live, read_by
from quincunx.layers.tracing import attribute_of
from quincunx.modules import evaluation, forward_hooks

__all__ = ["Leg", "Walk"]

# bytes of values between layers that a walk keeps
MOST_KEPT = 1 << 30
# what makes a node's value: the node with the versions of what it names, and these modules, tensors or values
_State = tuple[tuple[Any, ...], tuple[Any, ...]]


@dataclass
class _Kept:
    """The values of a batch that are live in front of a node.

    Attributes:
        mark: of the batch's input.
        at: the node's position.
        values: what later nodes read.
        bytes: what they take.
    """

    mark: str
    at: int
    values: tuple[Any, ...]
    bytes: int


class Walk:
    """The values of each batch at the layer that was asked for last, from which the next one continues.

    They are dropped where the network has been changed before that layer, and computed anew for a batch of
    other values, as a loader that shuffles gives.

    Args:
        most: bytes that are kept; batches beyond run from the network's own input.
    """

    def __init__(self, most: int | None = None) -> None:
        self.most = MOST_KEPT if most is None else most
        self.held = 0
        self.kept: dict[int, _Kept] = {}
        self.states: list[_State] = []
        self.traced: tuple[list[nn.Module], fx.Graph] | None = None
        self.lost = False

    def leg(self, network: nn.Module, names: Sequence[str]) -> Leg | None:
        """Return a pass that gives the inputs of the first call of a layer with these names.

        None if only the network's own forward can: torch.fx cannot trace it, or it has hooks.
        """
        modules = list(network.modules())
        if self.lost or any(map(forward_hooks, modules)):
            return None
        if self.traced is None or not _all_same(self.traced[0], modules):
            with evaluation(network):
                found = traced(network)
            if found is None:
                self.forget()
                return None
            self.traced = modules, found
        graph = self.traced[1]
        at, read = call_of(graph, names), read_by(graph, names)
        if at is None or read is None:
            return None
        self._remember(network, graph, at)
        return Leg(self, network, graph, at, read)

    def _remember(self, network: nn.Module, graph: fx.Graph, at: int) -> None:
        """Drop values that do not hold any more, or that are of later layers."""
        states = [_state(network, node) for node in list(graph.nodes)[:at]]
        same = 0
        for old, new in zip(self.states, states, strict=False):
            if not _same(old, new):
                break
            same += 1
        for index in [index for index, kept in self.kept.items() if kept.at > same]:
            self.drop(index)
        self.states = states

    def keep(self, index: int, kept: _Kept) -> None:
        """Keep a batch's values in place of earlier ones, if there is room."""
        before = self.kept.get(index)
        room = self.most - self.held + (0 if before is None else before.bytes)
        if kept.bytes <= room:
            self.drop(index)
            self.kept[index] = kept
            self.held += kept.bytes

    def drop(self, index: int) -> None:
        """Forget a batch's values."""
        if index in self.kept:
            self.held -= self.kept.pop(index).bytes

    def forget(self) -> None:
        """Keep nothing from now on."""
        self.kept.clear()
        self.held, self.lost = 0, True


class Leg:
    """One pass of a :class:`Walk` to a layer."""

    def __init__(self, walk: Walk, network: nn.Module, graph: fx.Graph, at: int, read: fx.Node) -> None:
        self.walk, self.network, self.graph, self.at = walk, network, graph, at
        self.wanted = tuple(live(graph, at))
        self.place = self.wanted.index(read)
        self.parts: dict[int, Callable[..., Any] | None] = {}

    def input(self, index: int, given: Tensor, mark: str) -> Tensor | None:
        """Return the layer's input for a batch, a copy.

        Args:
            index: the batch's number.
            given: the network's only argument.
            mark: what tells its values from others.

        Returns:
            None if it cannot be had from here.
        """
        kept = self.walk.kept.get(index)
        start, values = 0, (given,)
        if kept is not None and kept.mark == mark:
            start, values = kept.at, kept.values
        if start < self.at:
            part = self._part(start)
            if part is None:
                return None
            before = _versions(values)
            try:
                found = part(*values)
            except Exception:  # noqa: BLE001 - a user's network may raise anything
                # the network's own forward says it better, or can do it
                self.walk.forget()
                return None
            if _versions(values) != before:
                # an operation in place has changed what it started from
                self.walk.drop(index)
            self.walk.keep(index, _Kept(mark, self.at, found, _bytes(found)))
            values = found
        seen = values[self.place]
        return seen.clone() if isinstance(seen, Tensor) else None

    def _part(self, start: int) -> Callable[..., Any] | None:
        if start not in self.parts:
            self.parts[start] = between(self.network, self.graph, self.graph, start, self.at, self.wanted)
        return self.parts[start]


def _all_same(ones: Sequence[object], others: Sequence[object]) -> bool:
    return len(ones) == len(others) and all(a is b for a, b in zip(ones, others, strict=True))


def _state(network: nn.Module, node: fx.Node) -> _State:
    named: tuple[Any, ...] = ()
    if node.op == "call_module":
        module = network.get_submodule(str(node.target))
        named = (module, *module.parameters(), *module.buffers())
    elif node.op == "get_attr":
        named = (attribute_of(network, node),)
    return (description(node), str(node.args), str(node.kwargs), *_versions(named)), named


def _same(old: _State, new: _State) -> bool:
    """Return whether two states are of the same objects with the same versions."""
    return old[0] == new[0] and _all_same(old[1], new[1])


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in pytree.tree_leaves(values) if isinstance(value, Tensor)]


def _versions(values: Any) -> list[int]:
    return [_version(tensor) for tensor in _tensors(values)]


def _bytes(values: Any) -> int:
    """Return the bytes of memory behind values; views of one tensor share it."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors(values)}
    return sum(storages.values())
