"""Train a calibrated network as it will compute in eight bits: its weights and maps rounded in each pass."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call

from quincunx.fusion.calibrate import steps_of
from quincunx.fusion.steps import Follower, Step
from quincunx.layers.eightbits import (
    Quantisation,
    decode_weight,
    encode_weight,
    note_quantisation,
    quantisation_of,
)
from quincunx.layers.graph import trace
from quincunx.ops.int8 import Grid

__all__ = ["computing_rounded"]


@contextmanager
def computing_rounded(model: nn.Module) -> Iterator[None]:
    r"""Within: a network of :func:`quincunx.calibrate` computes as it will in eight bits, in float32.

    Weights are rounded to q s and maps to their grids where the fused network stores integers. A gradient
    passes the rounding unchanged, y = x + (q(x) - x) with the bracket a constant (the straight-through
    estimator; Bengio et al., arXiv:1308.3432), so that the real weights behind train. What corrected the
    biases of the rounded weights is dropped: training does that. A network without a record computes as ever.

    Not rounded are weights that a forward computes, and maps within one module: between a pooling and its
    convolution (spatial bottlenecks by average pooling), and before a fitted fill.

    Args:
        model: on the CPU; in any mode. Its parameters and ``state_dict`` stay what they are.

    Raises:
        ValueError: the record is of another network.

    Example:
        >>> small = qx.calibrate(qx.networks.build("rrn8").eval(), torch.rand(16, 3, 16, 16), max_drop=100)
        >>> x = torch.rand(2, 3, 16, 16)
        >>> with computing_rounded(small):
        ...     trained = small(x)
        >>> torch.allclose(qx.fuse(small, torch.int8, force=True)(x), trained, atol=0.05)
        True
    """
    record = quantisation_of(model)
    if record is None:
        yield
        return
    shifts = {name: None if s is None else torch.zeros_like(s) for name, s in record.shifts.items()}
    record = dataclasses.replace(record, shifts=shifts)
    graph = _rounded_graph(model, record)
    note_quantisation(model, record)
    # of the instance: its modules, parameters and hooks stay as they are
    model.__dict__["forward"] = graph.forward
    try:
        yield
    finally:
        del model.__dict__["forward"]


class _Rounded(nn.Module):
    """A convolution with rounded weights."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        # a list, so that the convolution stays the network's own
        self.conv = [conv]

    def forward(self, *arguments: Any) -> Any:
        (conv,) = self.conv
        weight: Tensor = conv.weight  # type: ignore[assignment]
        near = decode_weight(conv, *encode_weight(conv, weight))
        if 1 in weight.shape:
            # lies in memory in several ways at once; its gradient is to lie as it does itself
            weight = weight.as_strided(weight.shape, weight.stride())
        return functional_call(conv, {"weight": weight + (near - weight).detach()}, arguments)


class _RoundedMap(nn.Module):
    """A map on its grid."""

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        self.grid = grid

    def forward(self, x: Tensor) -> Tensor:
        return x + (self.grid.decode(self.grid.encode(x.detach())) - x).detach()


def _rounded_graph(model: nn.Module, record: Quantisation) -> fx.GraphModule:
    steps = steps_of(model, record)
    low = {
        step.writes[0]: step
        for step in steps
        if isinstance(step, Step) and record.shifts.get(step.writes[0]) is not None
    }
    everywhere, seconds = _stored(steps, low, record.grids)
    graph = trace(model)
    modules: dict[str, Any] = {}

    def add(module: nn.Module) -> str:
        modules[name := f"rounded_{len(modules)}"] = module
        return name

    wanted = {(step.layer, step.source) for step in low.values()}
    for node in list(graph.nodes):
        source = node.args[0] if node.args else None
        if node.op != "call_module" or not isinstance(source, fx.Node):
            continue
        sources = {read for layer, read in wanted if layer == node.target}
        if not sources or (source.name not in sources and len(sources) > 1):
            continue
        node.target = add(_Rounded(model.get_submodule(str(node.target))))
        if source.name in record.grids and source.name not in everywhere:
            with graph.inserting_before(node):
                made = graph.call_module(add(_RoundedMap(record.grids[source.name])), (source,))
            node.args = (made, *node.args[1:])
    for node in [node for node in graph.nodes if node.name in everywhere]:
        with graph.inserting_after(node):
            made = graph.call_module(add(_RoundedMap(record.grids[node.name])), (node,))
        exact = seconds.get(node.name)
        node.replace_all_uses_with(
            made, lambda user, made=made, exact=exact: user is not made and not _leads_to(user, exact)
        )
    for node in graph.nodes:
        name = str(node.target)
        if node.op in ("call_module", "get_attr") and name not in modules:
            found = graph.constants.get(name)
            modules[name] = operator.attrgetter(name)(model) if found is None else found
    return fx.GraphModule(modules, graph, type(model).__name__)


def _leads_to(user: fx.Node, name: str | None) -> bool:
    """Whether a node is the second output of a step, or the norm before it: both read the exact map."""
    return name is not None and (user.name == name or [u.name for u in user.users] == [name])


def _stored(
    steps: list[Step | Follower], low: Mapping[str, Step], grids: Mapping[str, Grid]
) -> tuple[set[str], dict[str, str]]:
    """The maps that all readers see rounded, and by map the name of a second one that is made of it."""
    written: set[str] = set()
    integers: set[str] = set()
    seconds: dict[str, str] = {}
    for step in steps:
        if isinstance(step, Follower):
            if step.kind in ("maxpool", "concat") and written.issuperset(step.sources):
                written.add(step.out)
                integers.update(step.sources)
        elif step.writes[0] in low and step.source in grids:
            written.update(name for name in step.writes if name in grids)
            integers.add(step.source)
            integers.update(name for name in step.reads if name in written)
            if step.out is not None and step.out2 is not None:
                seconds[step.out] = step.out2
    return written & integers, seconds
