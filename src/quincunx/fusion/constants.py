"""Compute once what a network computes from its own tensors only, for the convolutions that use it.

A weight that a forward standardises, scales or reshapes before the convolution is constant in an
inference copy.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from quincunx.fusion.effects import Effects, add_to, added_to, multiplied_by
from quincunx.fusion.nodes import activation, addition, affine_of, tensor_of
from quincunx.layers.changes import changes, module_of
from quincunx.layers.graph import CONVS
from quincunx.layers.perchannel import per_channel
from quincunx.modules import held_at, surely

__all__ = ["fold_constants", "make_modules", "make_norms"]

# deterministic functions and methods, by name
_STEADY = {
    *("add", "sub", "mul", "div", "truediv", "true_divide", "pow", "neg", "matmul", "sqrt", "rsqrt", "exp"),
    *("abs", "mean", "var", "var_mean", "std", "std_mean", "sum", "reshape", "view", "flatten", "permute"),
    *("transpose", "contiguous", "reshape_as", "view_as", "expand", "expand_as", "unsqueeze", "squeeze"),
    *("float", "norm", "normalize", "batch_norm", "softmax", "sigmoid", "clamp", "flip", "rot90", "cat"),
    *("stack", "pad", "einsum", "getitem", "getattr", "size", "type_as", "clone", "maximum", "minimum"),
}
_CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_DEFAULTS: dict[str, Any] = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}


def fold_constants(model: nn.Module, graph: fx.Graph) -> None:
    """Replace nodes that read only the network's own tensors by tensors of the network."""
    changed = set(Effects(model, graph).attributes())
    values: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        if node.op == "get_attr" and node not in changed:
            value = held_at(model, str(node.target))
            if isinstance(value, Tensor):
                values[node] = value.detach()
        elif _steady(node) and node.all_input_nodes and all(n in values for n in node.all_input_nodes):
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: values[n])
            function = getattr(type(args[0]), str(node.target)) if node.op == "call_method" else node.target
            try:
                values[node] = function(*args, **kwargs)
            except (RuntimeError, TypeError, ValueError, IndexError):
                continue  # left to raise where the network calls it
    for node in list(graph.nodes):
        made = node.op != "get_attr" and isinstance(values.get(node), Tensor)
        if made and any(user not in values for user in node.users):
            with graph.inserting_before(node):
                folded = graph.get_attr(add_to(model, "folded", values[node].clone()))
            node.replace_all_uses_with(folded)
    for node in reversed(list(graph.nodes)):
        if node in values and not node.users:
            graph.erase_node(node)


def _steady(node: fx.Node) -> bool:
    if node.op not in ("call_function", "call_method"):
        return False
    name = str(node.target if node.op == "call_method" else getattr(node.target, "__name__", ""))
    if name == "batch_norm":
        return len(node.args) > 2 and node.args[1] is None and node.args[2] is None
    return name in _STEADY and "out" not in node.kwargs


def make_modules(model: nn.Module, graph: fx.Graph) -> None:
    """Replace functional convolutions with the network's own weights by convolution modules."""
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target not in (F.conv2d, torch.conv2d):
            continue
        given = {**_DEFAULTS, **dict(zip(_CONV, node.args, strict=False)), **node.kwargs}
        weight, bias = given.get("weight"), given["bias"]
        settings = [given[name] for name in _CONV[3:]]
        if _holds_nodes(settings) or not _own(weight) or not (bias is None or _own(bias)):
            continue
        own = [None if t is None else tensor_of(model, t) for t in (weight, bias)]
        module = None if own[0] is None else _convolution(own[0], own[1], settings)
        if module is not None and isinstance(given.get("input"), fx.Node):
            name = add_to(model, "conv", module)
            with graph.inserting_before(node):
                call = graph.call_module(name, (given["input"],))
            node.replace_all_uses_with(call)
            graph.erase_node(node)


# of operations in place that were made others
_STANDS_FOR: dict[Any, Callable[..., Any]] = {added_to: operator.add, multiplied_by: operator.mul}


_KEEP_CHANNELS = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)


def make_norms(model: nn.Module, graph: fx.Graph) -> None:
    """Replace what multiplies a convolution's channels by constants, or adds some to them, by batch norms.

    A norm that is written out, such as a frozen one, a bias of its own or a scaled residual branch then rides
    on the convolution as a batch norm does. Several in a row become one.
    """
    for node in list(graph.nodes):
        if changes(model, node):
            continue
        found = per_channel(model, node, kind=_STANDS_FOR.get(node.target))
        like = None if found is None else _of_channels(model, found.source)
        if found is None or like is None:
            continue
        values = [value for value in (found.scale, found.shift) if isinstance(value, Tensor)]
        if any(
            v.numel() not in (1, len(like)) or (v.dtype, v.device) != (like.dtype, like.device)
            for v in values
        ):
            # other types make the map another one's, and other numbers are refused by torch
            continue
        source, scale, shift = found.source, torch.ones_like(like).double(), torch.zeros_like(like).double()
        before = affine_of(model, source) if len(source.users) == 1 else None
        if before is not None:
            (scale, shift), source = before, source.args[0]  # type: ignore[assignment]
        if found.scale is not None:
            scale, shift = scale * found.scale, shift * found.scale
        if found.shift is not None:
            shift = shift + found.shift
        norm = nn.BatchNorm2d(len(like), eps=0.0, device=like.device, dtype=like.dtype).eval()
        norm.weight.data.copy_(scale)
        norm.bias.data.copy_(shift)
        name = add_to(model, "affine", norm.requires_grad_(False))
        with graph.inserting_before(node):
            call = graph.call_module(name, (source,))
        node.replace_all_uses_with(call)
        graph.erase_node(node)
        if not found.source.users and found.source is not source:
            graph.erase_node(found.source)


def _of_channels(model: nn.Module, node: fx.Node) -> Tensor | None:
    """A tensor [C] of the type of a map that surely has four dimensions and C channels."""
    module: Any = module_of(model, node)
    if surely(module, nn.BatchNorm2d) and len(node.args) == 1:
        held = module.running_mean
        return None if held is None else held
    if surely(module, *CONVS):
        weight: Tensor = module.weight.detach()
        return weight.new_empty(module.out_channels)
    if activation(model, node) or surely(module, *_KEEP_CHANNELS):
        (source,) = node.all_input_nodes
        return _of_channels(model, source)
    if (terms := addition(node)) is not None:
        # one channel may be added to several
        known = [like for like in (_of_channels(model, term) for term in terms) if like is not None]
        return max(known, key=len) if known and max(map(len, known)) > 1 else None
    return None


def _own(value: object) -> bool:
    return isinstance(value, fx.Node) and value.op == "get_attr"


def _holds_nodes(values: Any) -> bool:
    found: list[fx.Node] = []
    fx.map_arg(values, found.append)
    return bool(found)


def _convolution(weight: Tensor, bias: Tensor | None, settings: list[Any]) -> nn.Module | None:
    if weight.dim() != 4 or not weight.is_floating_point():
        return None
    stride, padding, dilation, groups = settings
    outputs, inputs, *kernel = weight.shape
    module = nn.utils.skip_init(  # type: ignore[no-untyped-call]
        nn.Conv2d,
        inputs * groups,
        outputs,
        tuple(kernel),
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        bias=bias is not None,
        dtype=weight.dtype,
    )
    module.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        module.bias = nn.Parameter(bias, requires_grad=False)
    return module.eval()  # type: ignore[no-any-return]
