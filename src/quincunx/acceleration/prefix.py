"""Run networks that differ only from some layer on: the part before it runs once for all of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from quincunx.fusion.fuse import fuse
from quincunx.fusion.program import Program
from quincunx.layers.graph import traced
from quincunx.layers.kinds import suits
from quincunx.layers.parts import between, call_of, live, read_by
from quincunx.modules import inference_mode_of
from quincunx.surgery.calibration import MOST_KEPT, Batch

__all__ = ["Tails"]


class Tails:
    """Batches of a network up to some layer, from which changed copies of the network continue.

    Both parts run fused, always by the same kernels. A network runs whole if torch.fx cannot trace it, or
    not for data of this kind, if it has hooks, which only its own forward calls, or if its values take too
    much memory to keep.

    Args:
        model: the unchanged network.
        data: its batches; they are read several times.
    """

    def __init__(self, model: nn.Module, data: Iterable[Batch]) -> None:
        self.model, self.data = model, data
        with inference_mode_of(model):
            self.graph = None if _hooked(model) else traced(model)
        # whether the graph is for inputs of this kind
        self.suited = self.graph is None or suits(self.graph, lambda: next(iter(data)).input)
        if not self.suited:
            self.graph = None
        self.wanted = self.at = 0
        self.kept: list[tuple[Any, ...]] = []

    def read(self, data: Iterable[Batch]) -> None:
        """Run these batches from now on."""
        if data is not self.data:
            self.data, self.wanted, self.at, self.kept = data, 0, 0, []

    def go_to(self, names: Sequence[str]) -> None:
        """Keep the values that the first call of a layer with these names, and all later nodes, read."""
        if self.graph is None:
            return
        at = call_of(self.graph, names) or 0
        if at == self.wanted:
            return
        self.wanted = at
        if at < self.at:
            self.at, self.kept = 0, []
        read = live(self.graph, at)
        part = between(self.model, self.graph, self.graph, self.at, at, tuple(read)) if at else None
        if part is None:
            return
        head, kept, held = _fused(part), [], 0
        for values in self._values():
            kept.append(tuple(head(*values)))
            held += sum(v.numel() * v.element_size() for v in kept[-1] if isinstance(v, Tensor))
            if held > MOST_KEPT:
                at, kept = 0, []
                break
        self.at, self.kept = at, kept

    def answers(self, network: nn.Module) -> Iterator[Any]:
        """Yield the outputs of a network, equal to the model up to the layer, for each batch."""
        graph = None if self.graph is None else traced(network)
        tail = None
        if self.graph is not None and graph is not None:
            tail = between(network, self.graph, graph, self.at)
        if tail is None:
            yield from (network(batch.input) for batch in self.data)
            return
        fused = _fused(tail)
        yield from (fused(*values) for values in self._values())

    def inputs(self, network: nn.Module, names: Sequence[str]) -> Iterator[Tensor] | None:
        """Return the inputs of the first call of a layer with these names, batch by batch.

        Args:
            network: equal to the model up to the current position.
            names: the layer's names.

        Returns:
            None if the position is already past the layer, or the network has to run whole.
        """
        graph = None if self.graph is None else self.graph if network is self.model else traced(network)
        if self.graph is None or graph is None or (stop := call_of(graph, names)) is None:
            return None
        part = None
        read = read_by(graph, names)
        if stop >= self.at and read is not None:
            part = between(network, self.graph, graph, self.at, stop, read)
        if part is None:
            return None
        # the part up to here does not read every value that the rest of the network reads
        given = [node for node in part.graph.nodes if node.op == "placeholder"]
        used = [i for i, node in enumerate(given) if node.users]
        for node in given:
            if not node.users:
                part.graph.erase_node(node)
        part.recompile()
        computes = any(node.op.startswith("call") for node in part.graph.nodes)
        head = _fused(part) if computes else part
        return (head(*(values[i] for i in used)) for values in self._values())

    def _values(self) -> Iterable[tuple[Any, ...]]:
        """Return the values read from the current position on."""
        return self.kept if self.at else self._inputs()

    def _inputs(self) -> Iterator[tuple[Tensor]]:
        return ((batch.input.contiguous(memory_format=_layout(batch.input)),) for batch in self.data)


def _fused(part: fx.GraphModule) -> nn.Module:
    # not the faster of torch's kernels and ours: a close call is measured anew in each process, and scores
    # would differ between runs by how their sums are rounded
    fused = fuse(part)
    for module in fused.modules():
        if isinstance(module, Program):
            module.native_only = True
    return fused


def _layout(x: Tensor) -> torch.memory_format:
    return torch.channels_last if x.dim() == 4 else torch.contiguous_format


def _hooked(model: nn.Module) -> bool:
    return any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
