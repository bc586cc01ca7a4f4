"""Compute once what a network computes from its own tensors only, for the convolutions that use it.

A weight that a forward standardises, scales or reshapes before the convolution is constant in an
inference copy.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from quincunx.fusion.effects import Effects, add_to
from quincunx.fusion.nodes import tensor_of
from quincunx.modules import held_at

__all__ = ["fold_constants", "make_modules"]

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
