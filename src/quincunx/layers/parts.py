"""Parts of a network's graph: from the values that are live at one node to those that are live at another."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx, nn

from quincunx.layers.tracing import as_module

__all__ = ["between", "call_of", "description", "live", "read_by"]


def call_of(graph: fx.Graph, names: Sequence[str]) -> int | None:
    """Return the position at which the first call of a module with these names begins."""
    return next((i for i, node in enumerate(graph.nodes) if _within(node, names)), None)


def read_by(graph: fx.Graph, names: Sequence[str]) -> fx.Node | None:
    """Return what the first call of a module with these names reads; None if that is not a single value."""
    inside = {node for node in graph.nodes if _within(node, names)}
    read = {one for node in inside for one in node.all_input_nodes if one not in inside}
    return read.pop() if len(read) == 1 else None


def _within(node: fx.Node, names: Sequence[str]) -> bool:
    """Return whether a node is the call of a module with one of these names, or a part of its first call."""
    # a module of several layers is not a single node
    return any(name in node.meta.get("nn_module_stack", ()) for name in names)


def between(
    network: nn.Module,
    original: fx.Graph,
    graph: fx.Graph,
    start: int,
    stop: int | None = None,
    wanted: fx.Node | tuple[fx.Node, ...] = (),
) -> fx.GraphModule | None:
    """Return the nodes of a network from ``start`` on, and before ``stop``, as a function of their inputs.

    Args:
        original: the graph whose nodes before ``start`` were run.
        graph: the network's own graph, with the same nodes up to there.
        wanted: the values to return at ``stop``.

    Returns:
        The function; it returns the network's output, or ``wanted`` at ``stop``. None if the
        graphs differ before ``start``, or if a value that is read was not kept.
    """
    before = list(original.nodes)[:start]
    nodes = list(graph.nodes)
    if [description(node) for node in nodes[:start]] != [description(node) for node in before]:
        return None
    result = fx.Graph()
    own = dict(zip(before, nodes, strict=False))
    copied = {own[node]: result.placeholder(node.name) for node in live(original, start)}
    try:
        for node in nodes[start:stop]:
            copied[node] = result.node_copy(node, lambda n: copied[n])
        if stop is not None:
            result.output(fx.map_arg(wanted, lambda n: copied[n]))
    except KeyError:
        return None
    return as_module(network, result, getattr(graph, "constants", {}))


def description(node: fx.Node) -> tuple[str, str, str]:
    return node.op, node.name, str(node.target)


def live(graph: fx.Graph, at: int) -> list[fx.Node]:
    """Return the nodes before a position that a later node reads."""
    nodes = list(graph.nodes)
    later = set(nodes[at:])
    return [node for node in nodes[:at] if later.intersection(node.users)]
