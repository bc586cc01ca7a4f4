"""Train any network with its batch norms, additions and activations joined, without changing the network."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from quincunx.layers.norms import NormAct2d, has_global_hooks
from quincunx.layers.tracing import trace
from quincunx.modules import first_line, surely

__all__ = ["JoinedNorms", "join_norms"]

_MODULES: dict[type[nn.Module], str] = {nn.ReLU: "relu", nn.ReLU6: "relu6"}
_FUNCTIONS: dict[Any, str] = {
    **dict.fromkeys((F.relu, torch.relu, torch.relu_, "relu", "relu_"), "relu"),
    F.relu6: "relu6",
}
_ADDS = {operator.add, torch.add, "add"}
_ADDS_IN_PLACE = {operator.iadd, "add_"}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class JoinedNorms:
    """A network's call for training steps, in which norms are joined with what follows them.

    It computes what the network computes, with the network's own layers, weights and statistics. Where the
    network has changed since, by hooks, other modules or another mode, it calls the network itself.

    Attributes:
        network: the network.
        joined: how many batch norms are joined with at least an addition or an activation.
        reason: why none are; empty otherwise.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network, self.joined, self.reason = network, 0, ""
        self._graph: fx.GraphModule | None = None
        self._state = _state_of(network)
        if type(network).__module__.startswith("quincunx.networks."):
            self.reason = "the networks of this package join their norms themselves"
            return
        if "forward" in network.__dict__:
            self.reason = "its forward is its own, not its class's"
            return
        if self._state is None:
            self.reason = "hooks of its modules see the maps between them"
            return
        try:
            self._graph, self.joined = _join(network)
        except TypeError as error:
            self.reason = first_line(error)
        if not self.joined:
            self._graph = None
            self.reason = self.reason or "no batch norm is followed by an addition or a ReLU alone"

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        if self._graph is None or named or len(inputs) != 1 or _state_of(self.network) != self._state:
            return self.network(*inputs, **named)
        return self._graph(*inputs)


def join_norms(network: nn.Module) -> JoinedNorms:
    """Return a call of a network for training steps, with norms, additions and activations joined.

    torch.fx traces the network in its present mode. A ``BatchNorm2d`` whose result only a ReLU, a ReLU6
    or an addition reads becomes one :class:`~quincunx.layers.norms.NormAct2d` together with these; a ReLU may
    follow the addition. Parameters, ``state_dict`` and optimisers stay those of the network.

    Args:
        network: a network in training mode, in channels_last, on the CPU.

    Returns:
        The call. Where nothing can be joined it calls the network, and its ``reason`` says why.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> step = join_norms(network)
        >>> step(torch.randn(2, 3, 8, 8)).shape, step.joined
        (torch.Size([2, 8, 6, 6]), 1)
    """
    return JoinedNorms(network)


def _state_of(network: nn.Module) -> tuple[Any, ...] | None:
    """Return what a graph of a network depends on; None if hooks run between its modules."""
    if has_global_hooks():
        return None
    found: list[Any] = []
    for module in network.modules():
        if any(getattr(module, name) for name in _HOOKS):
            return None
        found += (id(module), module.training, module.__dict__.get("forward"))
    return tuple(found)


def _is_layer(module: nn.Module) -> bool:
    own = type(module).__module__
    return own.startswith("quincunx.") and not own.startswith("quincunx.networks")


def _join(network: nn.Module) -> tuple[fx.GraphModule, int]:
    graph = trace(network, _is_layer)
    modules: dict[str, Any] = {}
    joined = 0
    for node in list(graph.nodes):
        norm = _module_of(network, node)
        if type(norm) is not nn.BatchNorm2d or len(node.args) != 1 or node.kwargs:
            continue
        last, shortcut, activation = _followed(network, node)
        name = f"joined_{len(modules)}"
        modules[name] = NormAct2d(norm, activation)
        with graph.inserting_before(last):
            inputs = (node.args[0],) if shortcut is None else (node.args[0], shortcut)
            made = graph.call_module(name, inputs)
        last.replace_all_uses_with(made)
        joined += last is not node
        while last is not node:
            before = next(n for n in last.all_input_nodes if n is not shortcut)
            graph.erase_node(last)
            last = before
        graph.erase_node(node)
    used = dict.fromkeys(str(n.target) for n in graph.nodes if n.op in ("call_module", "get_attr"))
    for name in used:
        if name not in modules:
            modules[name] = graph.constants.get(name, None)
            if modules[name] is None:
                modules[name] = operator.attrgetter(name)(network)
    return fx.GraphModule({name: modules[name] for name in used}, graph, type(network).__name__), joined


def _followed(network: nn.Module, norm: fx.Node) -> tuple[fx.Node, fx.Node | None, str]:
    """Return the last node that joins a norm, the map that is added, and the activation."""
    last, shortcut, activation = norm, None, "none"
    reader = _only_reader(norm)
    if reader is not None and (other := _added(reader, norm)) is not None:
        last, shortcut, reader = reader, other, _only_reader(reader)
    if reader is not None and (found := _activation(network, reader)) is not None:
        last, activation = reader, found
    if any(_writes(network, node) for node in _between(norm, last, shortcut)):
        return norm, None, "none"
    return last, shortcut, activation


def _between(first: fx.Node, last: fx.Node, shortcut: fx.Node | None) -> list[fx.Node]:
    """Return the nodes from one to another that stay: the norm is computed behind them from now on."""
    gone, found, node = {last}, [], first.next
    if shortcut is not None:
        gone |= {n for n in last.all_input_nodes if n is not shortcut and n is not first}
    while first is not last and node is not last:
        if node not in gone:
            found.append(node)
        node = node.next
    return found


def _only_reader(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _added(node: fx.Node, norm: fx.Node) -> fx.Node | None:
    """Return what a node adds to a norm's result, without changing what others read."""
    if node.op not in ("call_function", "call_method") or node.kwargs or len(node.args) != 2:
        return None
    first, second = node.args
    if not isinstance(first, fx.Node) or not isinstance(second, fx.Node) or first is second:
        return None
    if node.target in _ADDS:
        return second if first is norm else first
    return second if node.target in _ADDS_IN_PLACE and first is norm else None


def _activation(network: nn.Module, node: fx.Node) -> str | None:
    module = _module_of(network, node)
    if module is not None:
        if len(node.args) != 1 or node.kwargs:
            return None
        return next((name for kind, name in _MODULES.items() if type(module) is kind), None)
    if node.op not in ("call_function", "call_method") or node.kwargs.keys() - {"inplace"}:
        return None
    return _FUNCTIONS.get(node.target) if len(node.all_input_nodes) == 1 else None


def _module_of(network: nn.Module, node: fx.Node) -> nn.Module | None:
    return network.get_submodule(str(node.target)) if node.op == "call_module" else None


_PURE: tuple[type[nn.Module], ...] = (nn.Conv2d, nn.BatchNorm2d, nn.AvgPool2d, nn.MaxPool2d, nn.Identity)
_PURE_FUNCTIONS: set[Callable[..., Any]] = {
    F.pad,
    F.avg_pool2d,
    operator.getitem,
    operator.add,
    torch.cat,
    getattr,
}


def _writes(network: nn.Module, node: fx.Node) -> bool:
    """Return whether a node may change a map in place: all but a few that surely do not."""
    if node.op == "get_attr":
        return False
    module = _module_of(network, node)
    if module is not None:
        kind = type(module)
        return not (
            surely(module, *_PURE) or kind is NormAct2d or kind.__module__.startswith("quincunx.layers.")
        )
    return node.op != "call_function" or node.target not in _PURE_FUNCTIONS
