"""What the nodes of a traced network are: which ones a convolution can take along, and which ones can read
maps in compact form.
"""

from __future__ import annotations

import inspect
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from quincunx.fusion.effects import added_to
from quincunx.fusion.epilogues import Activation
from quincunx.layers.activations import ACTIVATIONS
from quincunx.layers.blocks import PairedFill2d
from quincunx.layers.changes import module_of
from quincunx.layers.graph import CONVS
from quincunx.layers.padded import PaddedBySize2d
from quincunx.layers.paired import PairedDown2d, PairedUp2d, grid_size
from quincunx.layers.quantised import QuantConv2d
from quincunx.modules import held_at, known_class, surely
from quincunx.ops.geometry import Geometry

__all__ = [
    "activation",
    "addition",
    "affine_of",
    "by_position",
    "drop_nothings",
    "give_sizes",
    "grid_of",
    "is_map",
    "padded_channels",
    "size_of",
    "slope_of",
    "subsampled",
    "tensor_of",
]

_ADDS = {operator.add, torch.add, added_to, "add"}
_MODULES: dict[type[nn.Module], Activation] = {
    nn.ReLU: Activation.RELU,
    nn.Hardtanh: Activation.RELU6,
    nn.LeakyReLU: Activation.LEAKY,
    nn.PReLU: Activation.LEAKY,
    nn.Hardsigmoid: Activation.HARDSIGMOID,
    nn.Hardswish: Activation.HARDSWISH,
    nn.Sigmoid: Activation.SIGMOID,
    nn.SiLU: Activation.SILU,
    nn.GELU: Activation.GELU,
}
_FUNCTIONS: dict[Any, Activation] = {
    **dict.fromkeys((F.relu, torch.relu, "relu"), Activation.RELU),
    **dict.fromkeys((F.sigmoid, torch.sigmoid, "sigmoid"), Activation.SIGMOID),
    F.relu6: Activation.RELU6,
    F.leaky_relu: Activation.LEAKY,
    F.hardsigmoid: Activation.HARDSIGMOID,
    F.hardswish: Activation.HARDSWISH,
    F.silu: Activation.SILU,
}
_GELUS = {"none": Activation.GELU, "tanh": Activation.GELU_TANH}
_POOLINGS = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
# of the rank of their first argument
_KEEP_RANK = {F.avg_pool2d, F.adaptive_avg_pool2d, F.interpolate, F.pad, F.batch_norm, torch.batch_norm}
_NOTHING = (nn.Identity, nn.Dropout, nn.Dropout2d, nn.Dropout1d, nn.AlphaDropout)
_DROPOUTS = {F.dropout, F.dropout1d, F.dropout2d, F.alpha_dropout, F.feature_alpha_dropout}


def by_position(model: nn.Module, graph: fx.Graph) -> None:
    """Arguments by name, of modules that are known, become arguments by position."""
    known = (*CONVS, nn.BatchNorm2d, nn.Linear, *ACTIVATIONS, nn.ReLU6, *_NOTHING, *_POOLINGS)
    for node in graph.nodes:
        module = module_of(model, node)
        if node.kwargs and module is not None and (found := known_class(module, known)) is not None:
            bound = inspect.signature(found.forward).bind(module, *node.args, **node.kwargs)
            node.args, node.kwargs = tuple(bound.args[1:]), dict(bound.kwargs)


def drop_nothings(model: nn.Module, graph: fx.Graph) -> None:
    for node in list(graph.nodes):
        module = module_of(model, node)
        nothing = surely(module, *_NOTHING) and module is not None and not module.training
        if node.op == "call_function" and node.target in _DROPOUTS:
            bound = inspect.signature(node.target).bind(*node.args, **node.kwargs)
            nothing = bound.arguments.get("training", True) is False
        if nothing and node.args and isinstance(node.args[0], fx.Node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def give_sizes(model: nn.Module, graph: fx.Graph) -> None:
    """Second halves of pairs are told the size of the first's input, which else is noted at run time."""
    for node in list(graph.nodes):
        module = module_of(model, node)
        if not isinstance(module, (PairedUp2d, PairedFill2d)) or len(node.args) != 1:
            continue
        if (first := _first_of(model, node, module)) is not None:
            with graph.inserting_before(node):
                shape = graph.call_function(getattr, (first.args[0], "shape"))
                size = graph.call_function(operator.getitem, (shape, slice(2, None, None)))
                half: Any = module_of(model, first)
                if half.changes:
                    size = graph.call_function(grid_size, (size, *half.changes))
                node.args = (*node.args, size)


def _first_of(model: nn.Module, node: fx.Node, second: PairedUp2d | PairedFill2d) -> fx.Node | None:
    """The call of a pair's first half that a call of its second half reads.

    Raises:
        TypeError: it reads several, of maps that may have several sizes.
    """
    found: set[fx.Node] = set()
    grid = second.grid_seen if isinstance(second, PairedFill2d) else second.grid
    seen, todo = {node}, list(node.all_input_nodes)
    while todo:
        other = todo.pop()
        module = module_of(model, other)
        if isinstance(module, PairedDown2d) and module.grid is grid:
            found.add(other)
        elif other not in seen:
            todo += other.all_input_nodes
        seen.add(other)
    if len(found) > 1:
        raise TypeError(f"model: {node.target!r} cannot be fused: it reads several maps of its first half")
    return found.pop() if found else None


# ---------------------------------------------------------------- what a node is


def activation(model: nn.Module, node: fx.Node) -> Activation:
    """The activation that a node is, of those that a step's epilogue has; NONE for anything else."""
    module: Any = module_of(model, node)
    if getattr(module, "inplace", False) or in_place(node):
        return Activation.NONE
    if node.op == "call_module":
        found = known_class(module, tuple(_MODULES)) if len(node.args) == 1 else None
        if found is nn.Hardtanh:
            six = (module.min_val, module.max_val) == (0.0, 6.0)
            return Activation.RELU6 if six else Activation.NONE
        if found is nn.GELU:
            return _GELUS.get(module.approximate, Activation.NONE)
        return Activation.NONE if found is None else _MODULES[found]
    if node.op not in ("call_function", "call_method"):
        return Activation.NONE
    if node.target is F.gelu and not node.kwargs.keys() - {"input", "approximate"}:
        return _GELUS.get(str(node.kwargs.get("approximate", "none")), Activation.NONE)
    known = not node.kwargs.keys() - {"input", "inplace", "negative_slope"}
    return _FUNCTIONS.get(node.target, Activation.NONE) if known else Activation.NONE


def slope_of(model: nn.Module, node: fx.Node, like: Tensor, channels: int) -> Tensor | None:
    """What a leaky ReLU or a PReLU multiplies negative values by, float32, for each channel.

    Args:
        like: a weight whose type the map has.

    Returns:
        None where torch has to say that it does not fit, or where only the network's call knows it.
    """
    module: Any = module_of(model, node)
    if surely(module, nn.PReLU):
        weight = module.weight.detach()
        fits = weight.numel() in (1, channels) and (weight.dtype, weight.device) == (like.dtype, like.device)
        return weight.float().expand(channels).contiguous() if fits else None
    if surely(module, nn.LeakyReLU):
        slope = module.negative_slope
    else:
        given = dict(zip(("input", "negative_slope"), node.args, strict=False)) | node.kwargs
        slope = given.get("negative_slope", 0.01)
    if not isinstance(slope, (int, float)):
        return None
    return torch.full((channels,), float(slope), device=like.device)


def in_place(node: fx.Node) -> bool:
    """Whether a call of one of torch's activation functions changes what it is given."""
    return bool(node.kwargs.get("inplace")) or (len(node.args) > 1 and node.args[-1] is True)


def addition(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The two maps that a node adds."""
    if node.op not in ("call_function", "call_method") or node.target not in _ADDS or node.kwargs:
        return None
    if len(node.args) == 2 and all(isinstance(a, fx.Node) for a in node.args):
        return node.args[0], node.args[1]  # type: ignore[return-value]
    return None


def affine_of(
    model: nn.Module, node: fx.Node, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor] | None:
    """(scale, shift) of a batch norm in evaluation mode, float64.

    Args:
        dtype: of the maps, where that is known; torch normalises maps in bfloat16 with statistics in
            float32 too, and nothing else that is mixed.
    """
    norm = module_of(model, node)
    if surely(norm, nn.BatchNorm2d) and norm is not None and not norm.training and len(node.args) == 1:
        found = norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps
    elif node.op == "call_function" and node.target in (F.batch_norm, torch.batch_norm):
        found = _functional_norm(model, node)
    else:
        return None
    mean, variance, weight, bias, eps = found
    kinds = {t.dtype for t in (mean, variance, weight, bias) if isinstance(t, Tensor)}
    allowed = {torch.float32, torch.bfloat16} if dtype in (None, torch.bfloat16) else {dtype}
    if mean is None or variance is None or len(kinds) != 1 or not kinds <= allowed:
        return None
    scale = (variance.double() + eps).rsqrt()  # type: ignore[operator]
    if weight is not None:
        scale = scale * weight.double()  # type: ignore[operator]
    shift = -mean.double() * scale  # type: ignore[operator]
    return scale, shift + bias.double() if bias is not None else shift  # type: ignore[operator]


_NORM = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")


def _functional_norm(model: nn.Module, node: fx.Node) -> tuple[Any, ...]:
    """(mean, variance, weight, bias, eps) of a call of ``F.batch_norm`` on the network's own tensors."""
    if node.target is F.batch_norm:
        given = dict(zip(_NORM, node.args, strict=False)) | node.kwargs
    else:
        # torch.batch_norm has another order
        order = ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps")
        given = dict(zip(order, node.args, strict=False)) | node.kwargs
    tensors = [given.get(name) for name in _NORM[1:5]]
    own = all(t is None or (isinstance(t, fx.Node) and t.op == "get_attr") for t in tensors)
    eps = given.get("eps", 1e-5)
    if not own or given.get("training", False) or not isinstance(eps, float):
        return None, None, None, None, 0.0
    values = (None if t is None else tensor_of(model, t) for t in tensors)  # type: ignore[arg-type]
    return (*values, eps)


def tensor_of(model: nn.Module, node: fx.Node) -> Tensor:
    """The network's own tensor that a ``get_attr`` node is."""
    found: Tensor = held_at(model, str(node.target))
    return found.detach()


def subsampled(node: fx.Node) -> tuple[fx.Node, int] | None:
    """A node x[:, :, ::s, ::s] as (x, s)."""
    if node.target is not operator.getitem or not isinstance(node.args[1], tuple):
        return None
    whole = slice(None, None, None)
    index = node.args[1]
    steps = [i.step for i in index[2:] if isinstance(i, slice) and i.start is None and i.stop is None]
    if len(index) != 4 or index[:2] != (whole, whole) or len(steps) != 2 or steps[0] != steps[1]:
        return None
    return (node.args[0], steps[0]) if isinstance(steps[0], int) and steps[0] > 1 else None  # type: ignore[return-value]


def padded_channels(node: fx.Node) -> tuple[fx.Node, int] | None:
    """The map that a node pads with zero channels behind its own, and how many."""
    if node.target is not F.pad or len(node.args) != 2:
        return None
    if node.kwargs.get("mode", "constant") != "constant" or node.kwargs.get("value"):
        return None
    amounts = node.args[1]
    zero = isinstance(amounts, tuple) and len(amounts) == 6 and not any(amounts[:5])
    if not zero or not isinstance(amounts[5], int) or amounts[5] < 0:  # type: ignore[index]
        return None
    return node.args[0], amounts[5]  # type: ignore[return-value,index]


def grid_of(node: object) -> tuple[fx.Node, Geometry | None] | None:
    """The map and the convolution of it whose grid an argument is the size of; no convolution: its own."""
    if not isinstance(node, fx.Node) or node.target is not grid_size:
        return None if (found := size_of(node)) is None else (found, None)
    found = size_of(node.args[0])
    return None if found is None else (found, Geometry.make(*node.args[1:]))  # type: ignore[arg-type]


def size_of(node: object) -> fx.Node | None:
    """The map whose height and width an argument is: x.shape[2:], x.shape[-2:] or x.size()[2:]."""
    if not isinstance(node, fx.Node) or node.target is not operator.getitem:
        return None
    shape, index = node.args
    if index not in (slice(2, None, None), slice(-2, None, None)) or not isinstance(shape, fx.Node):
        return None
    is_shape = shape.target is getattr and shape.args[1] == "shape"
    is_size = shape.op == "call_method" and shape.target == "size" and len(shape.args) == 1
    return shape.args[0] if is_shape or is_size else None  # type: ignore[return-value]


def is_map(model: nn.Module, node: fx.Node) -> bool:
    """Whether a node is surely a 4-D map: what a step reads or a module of maps returns."""
    maps = (*CONVS, PaddedBySize2d, QuantConv2d, nn.BatchNorm2d, nn.MaxPool2d, nn.AvgPool2d)
    if surely(module_of(model, node), *maps):
        return True
    if activation(model, node) or addition(node) is not None:
        return any(is_map(model, a) for a in node.all_input_nodes)
    if node.target in _KEEP_RANK and node.args and isinstance(node.args[0], fx.Node):
        return is_map(model, node.args[0])
    return any(surely(module_of(model, user), *maps) for user in node.users)


# ---------------------------------------------------------------- what reads maps in compact form
