"""How many pieces a value of a graph has, where that can be known while a forward is traced with stand-ins.

A forward that goes through the pieces of a map, ``list(x.chunk(2, 1))``, or through its sizes,
``x.reshape(*x.shape[:2], -1)``, asks Python how many there are. For most pieces the call that makes them says
so; how many sizes a map has follows from the layer that made it, for images in batches. What need not be so
is asked again by a guard in the graph (:mod:`quincunx.layers.sizes`).
"""

from __future__ import annotations

import builtins
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from quincunx.layers.changes import is_torchs_function
from quincunx.layers.sizes import about_sizes, known, pieces_by_size, sizes_of
from quincunx.modules import forward_hooks

__all__ = [
    "KEEPING",
    "KEEPING_LAYERS",
    "Counted",
    "count_in",
    "count_of",
    "is_torchs",
    "numbers_of",
    "pieces_of",
]

# tracing exchanges the function of this name
_isinstance = builtins.isinstance
# modules that run as they are; a user's subclass lives elsewhere and is looked into
_LEAVES = ("torch.nn", "torch.ao.nn", "torch.jit", "torch._dynamo")
# calls that always give two values, and those that do along a dimension
_TWO = ("sort", "topk", "kthvalue", "cummax", "cummin", "mode", "frexp", "aminmax", "std_mean", "var_mean")
_TWO_ALONG = ("max", "min", "median", "nanmedian")
_IN_PIECES = ("chunk", "split", "split_with_sizes", "tensor_split")
_PARTS = (
    *("chunks", "split_size_or_sections", "split_size", "split_sizes"),
    *("indices_or_sections", "indices", "sections"),
)
_NAMES: dict[Any, str] = {
    **{getattr(torch, name): name for name in (*_TWO, *_TWO_ALONG, *_IN_PIECES, "unbind")},
    **{getattr(nn.functional, f"max_pool{n}d_with_indices"): "with_indices" for n in (1, 2, 3)},
    **{getattr(nn.functional, f"adaptive_max_pool{n}d_with_indices"): "with_indices" for n in (1, 2, 3)},
}
_MAX_POOLS = (
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d),
    *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
)


def count_of(value: fx.Proxy) -> int | None:
    """Return of how many pieces a value is, where the call that gives it says so; else None.

    ``chunk`` gives fewer than it was asked for where the size is too small, and a shape has fewer sizes where
    the map has fewer dimensions than is usual behind its layer.

    Example:
        >>> tracer = fx.Tracer()
        >>> tracer.graph = fx.Graph()
        >>> x = tracer.proxy(tracer.graph.placeholder("x"))
        >>> [count_of(y) for y in (x.chunk(4, 1), x.split([1, 2]), x.max(dim=1), x.max(), x.split(4))]
        [4, 2, 2, None, None]
        >>> [count_of(sizes) for sizes in (x.shape[-2:], x.size()[:3], x.shape)]
        [2, 3, None]
    """
    # a bare tracer has no network
    return count_in(value.node, getattr(value.tracer, "root", None) or nn.Module())


def count_in(node: fx.Node, root: nn.Module) -> int | None:
    """Return the same of a node of a network's graph."""
    if (sizes := sizes_of(node)) is not None:
        return _number_of_sizes(*sizes, root)
    if node.target is operator.getitem and _isinstance(node.args[1], slice):
        part: Any = node.args[1]
        number, ends = count_in(node.all_input_nodes[0], root), (part.start, part.stop, part.step)
        plain = all(type(end) in (int, type(None)) for end in ends)
        return None if number is None or not plain else len(range(number)[slice(*ends)])
    name, second = _name_of(node, root), node.args[1] if len(node.args) > 1 else None
    if name in _TWO or name == "with_indices":
        return 2
    if name in _TWO_ALONG:
        return 2 if type(node.kwargs.get("dim", second)) is int else None
    if name not in (*_IN_PIECES, "unbind"):
        return None
    parts: Any = next((node.kwargs[key] for key in _PARTS if key in node.kwargs), second)
    if _isinstance(parts, (list, tuple)):
        return None if name == "chunk" else len(parts) + (name == "tensor_split")
    if name in ("chunk", "tensor_split"):
        return parts if type(parts) is int and parts > 0 else None
    pieces = pieces_by_size(node)
    found: int | None = known(pieces, lambda _: numbers_of(node.all_input_nodes[0], root))
    return found


def _name_of(node: fx.Node, root: nn.Module) -> str:
    """The name under which the tables above hold a call; empty for what is in none."""
    if node.op == "call_module":
        pool = root.get_submodule(str(node.target))
        indexed = type(pool) in _MAX_POOLS and getattr(pool, "return_indices", False)
        return "with_indices" if indexed else ""
    if node.op == "call_function":
        return _NAMES.get(node.target, "")
    return str(node.target) if node.op == "call_method" else ""


# pieces that have as many dimensions as what they are pieces of
_WHOLE = (*_IN_PIECES, "sort", "topk", "cummax", "cummin", "with_indices")
# dimensions of what a layer gives, and functions that keep those of what they read
_DIMENSIONS: dict[type[nn.Module], int] = {
    **dict.fromkeys((nn.BatchNorm2d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.PixelShuffle), 4),
    **dict.fromkeys((nn.BatchNorm3d, nn.MaxPool3d, nn.AvgPool3d, nn.AdaptiveAvgPool3d), 5),
}
_KEEP_DIMENSIONS = (
    *(nn.ReLU, nn.ReLU6, nn.SiLU, nn.GELU, nn.ELU, nn.LeakyReLU, nn.PReLU, nn.Sigmoid, nn.Tanh, nn.Mish),
    *(nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Dropout, nn.Dropout2d, nn.Identity, nn.Softmax),
    *(nn.GroupNorm, nn.LayerNorm, nn.InstanceNorm2d, nn.Upsample, nn.ZeroPad2d, nn.ReflectionPad2d),
)
# layers whose map is as large as the one they read
KEEPING_LAYERS = {
    *(nn.BatchNorm2d, nn.BatchNorm3d, *_KEEP_DIMENSIONS),
} - {nn.Upsample, nn.ZeroPad2d, nn.ReflectionPad2d}
KEEPING = {
    *("relu", "relu_", "relu6", "silu", "gelu", "elu", "leaky_relu", "sigmoid", "tanh", "mish", "hardswish"),
    *("hardsigmoid", "hardtanh", "dropout", "softmax", "clamp", "contiguous", "clone", "float", "to", "cat"),
    *("add", "sub", "mul", "truediv", "div", "iadd", "isub", "imul", "add_", "mul_", "neg", "exp", "sqrt"),
    *("interpolate", "pad", "batch_norm", "group_norm", "layer_norm", "max_pool2d", "avg_pool2d", "conv2d"),
    *("adaptive_avg_pool2d", "flip", "roll", "permute"),
}


def dimensions_of(node: fx.Node, root: nn.Module) -> int | None:
    """Return how many dimensions a value has, if its images come in batches as is usual; None if unknown."""
    return _noted("dimensions", _dimensions, node, root)


def _noted(
    what: str, work: Callable[[fx.Node, nn.Module], int | None], node: fx.Node, root: nn.Module
) -> int | None:
    # asked again for each way to a value, of which there are many
    if what not in node.meta:
        node.meta[what] = work(node, root)
    found: int | None = node.meta[what]
    return found


def _dimensions(node: fx.Node, root: nn.Module) -> int | None:
    if node.op == "call_module":
        return _dimensions_behind(root.get_submodule(str(node.target)), node, root)
    if node.op == "get_attr":
        # tensors that the forward made are not there yet
        held = dict(root.named_parameters()) | dict(root.named_buffers())
        tensor = held.get(str(node.target))
        return None if tensor is None else tensor.dim()
    if node.op not in ("call_function", "call_method"):
        return None
    if about_sizes(node) is not None:
        # a number, or sizes that stand for numbers
        return 0
    name, read = str(getattr(node.target, "__name__", node.target)), list(node.all_input_nodes)
    if name == "getitem":
        kept = type(node.args[1]) is int and _name_of(read[0], root) in _WHOLE
        return dimensions_of(read[0].all_input_nodes[0], root) if kept else None
    own = node.op == "call_function" and not is_torchs_function(node.target)
    if name not in KEEPING or "keepdim" in node.kwargs or own:
        return None
    found = [dimensions_of(other, root) for other in read]
    known = [one for one in found if one is not None]
    # what is joined has the dimensions of each; other operands may have more than those that are known
    return max(known, default=None) if name == "cat" or len(known) == len(found) else None


def channels_of(node: fx.Node, root: nn.Module) -> int | None:
    """Return the size of a map's second dimension, where its layers say it; None if unknown."""
    return _noted("channels", _channels, node, root)


def numbers_of(node: fx.Node, root: nn.Module) -> tuple[int | None, int | None]:
    """Return how many dimensions and channels a value has; None for what is unknown."""
    return dimensions_of(node, root), channels_of(node, root)


def _channels(node: fx.Node, root: nn.Module) -> int | None:
    read = list(node.all_input_nodes)
    if node.op == "call_module":
        module = root.get_submodule(str(node.target))
        if (_dimensions_behind(module, node, root) or 0) < 4 or type(module) is nn.PixelShuffle:
            return None
        own: Any = getattr(module, "out_channels", getattr(module, "num_features", None))
        # torch.fx gives a stand-in for the attribute
        weight = module._parameters.get("weight")
        if is_torchs(module) and type(own) is int and weight is not None:
            # as the weight has it, which may have been pruned
            groups: Any = getattr(module, "groups", 1)
            transposed = getattr(module, "transposed", False)
            return int(weight.shape[1] * groups if transposed else weight.shape[0])
        return own if type(own) is int else channels_of(read[0], root)
    if node.op not in ("call_function", "call_method") or about_sizes(node) is not None:
        return None
    name = str(getattr(node.target, "__name__", node.target))
    if node.op == "call_function" and not is_torchs_function(node.target):
        return None
    found = [channels_of(other, root) for other in read]
    if name == "cat":
        parts: Any = node.args[0] if node.args else None
        dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
        listed = _isinstance(parts, (list, tuple)) and all(_isinstance(part, fx.Node) for part in parts)
        each = [channels_of(part, root) for part in parts] if listed else [None]
        return sum(each) if dim == 1 and None not in each else None  # type: ignore[arg-type]
    kept = name in KEEPING and name not in ("pad", "permute", "conv2d")
    return found[0] if kept and found and found == found[:1] * len(found) else None


def _dimensions_behind(module: nn.Module, node: fx.Node, root: nn.Module) -> int | None:
    if forward_hooks(module) or "forward" in vars(module):
        return None
    kind = type(module)
    if kind in _KEEP_DIMENSIONS:
        return dimensions_of(node.all_input_nodes[0], root) if len(node.all_input_nodes) == 1 else None
    if kind in _DIMENSIONS:
        return None if getattr(module, "return_indices", False) else _DIMENSIONS[kind]
    kernel: Any = getattr(module, "kernel_size", ())
    # convolutions of torch and of this library
    ours = is_torchs(module) or kind.__module__.startswith("quincunx.")
    return len(kernel) + 2 if ours and type(kernel) is tuple and hasattr(module, "out_channels") else None


def _number_of_sizes(value: fx.Node, part: slice, root: nn.Module) -> int | None:
    dimensions = dimensions_of(value, root)
    start: int = part.start or 0
    stop: int | None = part.stop
    if dimensions is None and part.step in (None, 1):
        if stop is None and start < 0:
            return -start
        if stop is not None and (start < 0) == (stop < 0):
            return max(0, stop - start)
    if dimensions is None:
        inputs = [node for node in value.graph.nodes if node.op == "placeholder"]
        dimensions = _dimensions_of_images(root) if inputs == [value] else None
    return None if dimensions is None else len(range(dimensions)[part])


def _dimensions_of_images(root: nn.Module) -> int | None:
    """How many dimensions a network's images have by its convolutions, in batches; None without any."""
    kernels: Any = (getattr(m, "kernel_size", None) for m in root.modules() if hasattr(m, "out_channels"))
    found = {len(kernel) + 2 for kernel in kernels if type(kernel) is tuple}
    return found.pop() if len(found) == 1 else None


def pieces_of(value: fx.Proxy) -> list[fx.Proxy] | None:
    """Return the pieces of a value, where :func:`count_of` knows how many; a forward may loop through these.

    Where ``chunk`` gives fewer, the graph raises an IndexError at a missing piece that is used.

    Returns:
        As many stand-ins; None for any other value.

    Example:
        >>> tracer = fx.Tracer()
        >>> tracer.graph = fx.Graph()
        >>> x = tracer.proxy(tracer.graph.placeholder("x"))
        >>> len(pieces_of(x.chunk(4, 1)) or []), pieces_of(x.relu())
        (4, None)
    """
    if (number := count_of(value)) is None:
        return None
    return [
        value.tracer.create_proxy("call_function", operator.getitem, (value, i), {}) for i in range(number)
    ]


class Counted(fx.Proxy):
    """A stand-in that knows its length where :func:`count_of` does; ``list`` asks for it."""

    def __len__(self) -> int:
        number = count_of(self)
        if number is None:
            raise fx.proxy.TraceError("it asks for the length of a value that is known only when it runs")
        return number


def is_torchs(m: nn.Module) -> bool:
    return type(m).__module__.startswith(_LEAVES) and not _isinstance(m, nn.Sequential)
