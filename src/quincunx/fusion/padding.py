"""Padding by other values than zeros becomes a node in front of its convolution, which then is a step."""

from __future__ import annotations

import copy
from typing import Any

import torch.nn.functional as F
from torch import fx, nn

from quincunx.layers.changes import module_of
from quincunx.layers.padded import (
    continued,
    continued_cosets,
    padded_by_size,
    pads_by_size,
    sides_of,
    without_padding,
)
from quincunx.layers.paired import PairedDown2d, PairedUp2d
from quincunx.layers.sampled import SampledConvTranspose2d, SampledDown2d
from quincunx.modules import forward_hooks, surely

__all__ = ["know_by_size", "pad_apart"]


def know_by_size(model: nn.Module) -> None:
    """Exchange timm's convolutions that pad by the size of their map for our own, which are known."""
    for module in list(model.modules()):
        if not pads_by_size(module) or forward_hooks(module):
            continue
        ours = padded_by_size(module)
        # a module in several places stays one
        for path in [path for path, part in model.named_modules(remove_duplicate=False) if part is module]:
            model.set_submodule(path, ours)


def pad_apart(model: nn.Module, graph: fx.Graph) -> None:
    """Give each convolution that pads by other values than zeros its padding as a node of the graph.

    A transposed half reads a sampled map that is continued beyond its grid. Where the positions of that are
    no cosets for every size, the half stays a module.
    """
    for node in list(graph.nodes):
        module: Any = module_of(model, node)
        if module is None or getattr(module, "padding_mode", "zeros") == "zeros" or forward_hooks(module):
            continue
        if node.kwargs or not node.args or not isinstance(node.args[0], fx.Node):
            continue
        if surely(module, nn.Conv2d) and sides_of(module) is not None:
            if module.padding_mode == "circular":
                continue  # torch's padding would make a map of another layout, which a head may view
            _put_apart(model, graph, node, without_padding(module), sides_of(module), module.padding_mode)
        elif surely(module, SampledDown2d, PairedDown2d):
            plain = copy.copy(module)
            plain.borders, plain.padding_mode = (0, 0, 0, 0), "zeros"
            _put_apart(model, graph, node, plain, module.borders, module.padding_mode)
        elif surely(module, SampledConvTranspose2d, PairedUp2d) and len(node.args) == 2:
            _continue(model, graph, node, module)


def _put_apart(
    model: nn.Module, graph: fx.Graph, node: fx.Node, module: nn.Module, sides: Any, mode: str
) -> None:
    top, bottom, left, right = sides
    with graph.inserting_before(node):
        padded = graph.call_function(F.pad, (node.args[0], (left, right, top, bottom), mode))
    node.args = (padded, *node.args[1:])
    _call_instead(model, node, module)


def _continue(model: nn.Module, graph: fx.Graph, node: fx.Node, module: Any) -> None:
    sides, mode = module.borders, module.padding_mode
    sampling = continued_cosets(module.sampling, sides, mode)
    if sampling is None:
        return
    y, size = node.args
    with graph.inserting_before(node):
        longer = graph.call_function(continued, (y, module.sampling.spec, size, sides, mode))
    node.args = (longer, size)
    made = SampledConvTranspose2d(
        module.in_channels,
        module.out_channels,
        module.kernel_size,
        sampling=sampling,
        padding=module.reach,
        dilation=module.dilation,
        groups=module.groups,
        bias=module.bias is not None,
    )
    made.weight, made.bias = module.weight, module.bias
    _call_instead(model, node, made.train(module.training))


def _call_instead(model: nn.Module, node: fx.Node, module: nn.Module) -> None:
    """Let a node call another module, which lies beside the one that it called."""
    path = f"{node.target}_without_padding"
    parent, _, last = path.rpartition(".")
    model.get_submodule(parent).add_module(last, module)
    node.target = path
