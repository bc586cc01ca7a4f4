"""Whether two maps have the same sizes, whatever the images are, as the layers between them have it.

``if x.shape != y.shape: x = self.project(x)`` asks in each block what its convolutions decide: one of stride
1 that pads by half of its kernel keeps a map's sides, and its channels are known. No image has to be asked
about.
"""

from __future__ import annotations

import operator
from typing import Any

from torch import fx, nn

from quincunx.layers.attributes import ConvLike
from quincunx.layers.changes import is_torchs_function
from quincunx.layers.counts import KEEPING, KEEPING_LAYERS, channels_of
from quincunx.layers.padded import padding_at
from quincunx.layers.paired import PairedUp2d
from quincunx.layers.sizes import Made, Shape, about_sizes, by_identity
from quincunx.modules import forward_hooks

__all__ = ["compares_maps", "decided"]

# of the calls that keep the number of dimensions, those that may change a map's sides
_CHANGING = {
    "interpolate",
    "pad",
    "max_pool2d",
    "avg_pool2d",
    "conv2d",
    "adaptive_avg_pool2d",
    "permute",
    "cat",
}
# methods that give a map other sizes in place
_RESHAPING = {
    *(
        "squeeze_",
        "unsqueeze_",
        "t_",
        "transpose_",
        "swapaxes_",
        "resize_",
        "resize_as_",
        "set_",
        "as_strided_",
    )
}


def decided(expression: Any, graph: fx.Graph, root: nn.Module) -> bool | None:
    """Return the answer to a question whether sizes of two maps are equal, for images of any size.

    Args:
        expression: the question.
        graph: what was traced up to there.
        root: the network.

    Returns:
        None where the layers do not say it.
    """
    if not compares_maps(expression):
        return None
    (one, place), (other, _) = map(_read, expression.arguments)
    nodes = by_identity(graph)
    if one is None or other is None or one.of not in nodes or other.of not in nodes:
        return None
    if any(node.op == "call_method" and node.target in _RESHAPING for node in nodes.values()):
        return None
    equal = _equal(nodes[one.of], nodes[other.of], place, root)
    return None if equal is None else equal == (expression.function is operator.eq)


def compares_maps(expression: Any) -> bool:
    """Return whether a question is whether two maps have the same sizes, or one of them."""
    if not isinstance(expression, Made) or expression.function not in (operator.eq, operator.ne):
        return False
    (one, place), (other, place_of_other) = map(_read, expression.arguments)
    return one is not None and other is not None and place == place_of_other


def _read(value: Any) -> tuple[Shape | None, Any]:
    """The shape that an expression reads, and which of its sizes: a place, the bounds of a slice, or all."""
    if isinstance(value, Shape):
        return value, None
    if not isinstance(value, Made) or value.function is not operator.getitem:
        return None, None
    shape, place = value.arguments
    if isinstance(place, Made):
        plain = place.function is slice and all(type(a) in (int, type(None)) for a in place.arguments)
        place = place.arguments if plain else None
    return (shape, place) if isinstance(shape, Shape) and place is not None else (None, None)


def _equal(one: fx.Node, other: fx.Node, place: Any, root: nn.Module) -> bool | None:
    channels = channels_of(one, root), channels_of(other, root)
    known = None not in channels
    if place is None and known and channels[0] != channels[1]:
        return False
    same = one is other or (known and channels[0] == channels[1])
    if _origin(one, root) is not _origin(other, root) or (_has_channels(place) and not same):
        return None
    return True


def _has_channels(place: Any) -> bool:
    """Whether sizes that are read may be those of channels, of images in batches or alone."""
    if place is None or type(place) is int:
        return place in (None, 0, 1, -3, -4)
    start, *_ = place
    return start not in (2, 3, -1, -2)


def _origin(node: fx.Node, root: nn.Module) -> fx.Node:
    """The value farthest in front whose images and sides a value is sure to have."""
    if "origin" not in node.meta:
        read = [other for other in node.all_input_nodes if about_sizes(other) is None]
        channels = {channels_of(other, root) for other in read}
        # of several that are as large none is broadcast
        fit = len(read) == 1 or (len(channels) == 1 and None not in channels)
        origins = {_origin(other, root) for other in read} if fit and _keeps(node, root) else set()
        node.meta["origin"] = origins.pop() if len(origins) == 1 else node
    found: fx.Node = node.meta["origin"]
    return found


def _keeps(node: fx.Node, root: nn.Module) -> bool:
    """Whether what a node gives has the sides of what it reads."""
    if node.op != "call_module":
        name = str(getattr(node.target, "__name__", node.target))
        torchs = node.op == "call_method" or (node.op == "call_function" and is_torchs_function(node.target))
        return torchs and name in KEEPING - _CHANGING
    module = root.get_submodule(str(node.target))
    if forward_hooks(module) or "forward" in vars(module):
        return False
    if type(module) in KEEPING_LAYERS:
        return True
    ours = type(module).__module__.startswith("quincunx.layers.") and isinstance(module, ConvLike)
    if type(module) is not nn.Conv2d and not ours:
        return False
    conv: Any = module
    if conv.transposed:
        # of ours the second half of a pair, which fills the grid that the first one read
        return isinstance(module, PairedUp2d)
    reach = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    top, bottom, left, right = padding_at(conv)
    # a kernel that was exchanged may have another size
    weight = module._parameters.get("weight")
    own = ours or (weight is not None and tuple(weight.shape[2:]) == conv.kernel_size)
    return own and set(conv.stride) == {1} and [top + bottom, left + right] == reach
