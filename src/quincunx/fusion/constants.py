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
from quincunx.layers.perchannel import PerChannel, per_channel
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
    on the convolution before or after it as a batch norm does. Several in a row become one.
    """
    made: set[fx.Node] = set()
    for node in list(graph.nodes):
        chain = [] if node in made else _chain(model, node)
        if not chain:
            continue
        first, last = chain[0][1].source, chain[-1][0]
        like = _of_channels(model, first)
        if like is None or not all(_suits(found, like) for _, found in chain):
            continue
        alone = len(first.users) == 1
        before = affine_of(model, first) if alone else None
        # elsewhere torch adds and multiplies faster than it normalises
        if not (
            before or (alone and surely(module_of(model, first), *CONVS)) or _leads_to_convs(model, last)
        ):
            continue
        scale, shift = torch.ones_like(like).double(), torch.zeros_like(like).double()
        source = first
        if before is not None:
            (scale, shift), source = before, first.args[0]  # type: ignore[assignment]
        for _, found in chain:
            if found.scale is not None:
                scale, shift = scale * found.scale, shift * found.scale
            if found.shift is not None:
                shift = shift + found.shift
        norm = nn.BatchNorm2d(len(like), eps=0.0, device=like.device, dtype=like.dtype).eval()
        norm.weight.data.copy_(scale)
        norm.bias.data.copy_(shift)
        name = add_to(model, "affine", norm.requires_grad_(False))
        # where the map is read first: it may be changed in place after that
        with graph.inserting_before(node if before is None else first):
            call = graph.call_module(name, (source,))
        last.replace_all_uses_with(call)
        made.update(step for step, _ in chain)
        for step in reversed([*([first] if before is not None else []), *(step for step, _ in chain)]):
            graph.erase_node(step)


def _chain(model: nn.Module, node: fx.Node) -> list[tuple[fx.Node, PerChannel]]:
    """A node that does the same to all positions of a map, and those behind it that nothing else reads."""
    chain: list[tuple[fx.Node, PerChannel]] = []
    found = _out_of_place(model, node)
    while found is not None and (not chain or found.source is chain[-1][0]):
        chain.append((node, found))
        if len(node.users) != 1:
            break
        (node,) = node.users
        found = _out_of_place(model, node)
    return chain


def _out_of_place(model: nn.Module, node: fx.Node) -> PerChannel | None:
    return None if changes(model, node) else per_channel(model, node, kind=_STANDS_FOR.get(node.target))


def _suits(found: PerChannel, like: Tensor) -> bool:
    """Whether the constants are of a map's type and channels: torch refuses others, or changes the type."""
    values = [value for value in (found.scale, found.shift) if isinstance(value, Tensor)]
    return all(
        v.numel() in (1, len(like)) and (v.dtype, v.device) == (like.dtype, like.device) for v in values
    )


def _leads_to_convs(model: nn.Module, node: fx.Node) -> bool:
    """Whether only convolutions read a map, or what an activation makes of it."""
    users = list(node.users)
    if len(users) == 1 and activation(model, users[0]):
        users = list(users[0].users)
    return bool(users) and all(surely(module_of(model, user), *CONVS) for user in users)


def _of_channels(model: nn.Module, node: fx.Node) -> Tensor | None:
    """A tensor [C] of the type of a map that surely has four dimensions and C channels."""
    module: Any = module_of(model, node)
    if surely(module, nn.BatchNorm2d) and len(node.args) == 1:
        return module.running_mean  # type: ignore[no-any-return]
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
