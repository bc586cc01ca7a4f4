"""The part of a network around some layers, cut out of copies of it, to be timed without the rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx, nn

from quincunx.layers.graph import traced
from quincunx.layers.parts import between, live
from quincunx.modules import inference_mode_of

__all__ = ["Around", "NoPart"]

# What a replaced layer changes for its neighbours, as maps that stay compact, is within the part: it begins
# with the layer before the first one, and ends behind so many layers after the last.
_AFTER = 2
_LAYERS = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)


class NoPart(Exception):
    """A network has no part around some layers, or not the same as another."""


class Around:
    """The part of a network around some of its layers, and what it reads there.

    Args:
        model: the network.
        graph: its graph.
        names: paths of the layers.
        example: the network's input [N, C, H, W].

    Attributes:
        given: the values that the part reads, for this input.

    Raises:
        NoPart: the part would be the whole network, or cannot be cut out.
    """

    def __init__(self, model: nn.Module, graph: fx.Graph, names: Sequence[str], example: Tensor) -> None:
        nodes = list(graph.nodes)
        calls = [i for i, node in enumerate(nodes) if _is_layer(model, node)]
        own = [i for i, node in enumerate(nodes) if node.op == "call_module" and node.target in names]
        if not own:
            raise NoPart("no call of the layers")
        before, after = [i for i in calls if i < own[0]], [i for i in calls if i > own[-1]]
        self.graph, self.start = graph, before[-1] if before else own[0]
        self.stop = nodes[after[_AFTER]].name if len(after) > _AFTER else None
        if self.stop is None and all(node.op == "placeholder" for node in nodes[: self.start]):
            raise NoPart("the part is the whole network")
        head = between(model, graph, graph, 0, self.start, tuple(live(graph, self.start)))
        if head is None:
            raise NoPart("nothing to cut out")
        with inference_mode_of(model):
            self.given: tuple[Any, ...] = head(example)

    def of(self, network: nn.Module) -> fx.GraphModule:
        """Return this part of a copy of the network that differs only in the layers.

        Raises:
            NoPart: it has no such part.
        """
        if (graph := traced(network)) is None:
            raise NoPart("the copy cannot be traced")
        stop: int | None = None
        wanted: tuple[fx.Node, ...] = ()
        if self.stop is not None:
            stop = next((i for i, node in enumerate(graph.nodes) if node.name == self.stop), None)
            if stop is None:
                raise NoPart("the copy has other layers")
            wanted = tuple(live(graph, stop))
        part = between(network, self.graph, graph, self.start, stop, wanted)
        if part is None:
            raise NoPart("the copy begins otherwise")
        return part


def _is_layer(model: nn.Module, node: fx.Node) -> bool:
    return node.op == "call_module" and isinstance(model.get_submodule(str(node.target)), _LAYERS)
