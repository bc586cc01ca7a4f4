"""Find depthwise convolutions behind which everything is pointwise, up to a last 1 x 1 layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import fx, nn

from quincunx.layers.perchannel import per_channel
from quincunx.modules import copied, forward_hooks, padding_of, surely
from quincunx.surgery.pairs import FUNCTIONS, NORMS, POINTWISE, hooked, keeps_grid, readers, search

__all__ = ["find_blocks", "is_block", "is_pointwise"]

# the channels' place among the dimensions of a map
_FIRST, _LAST = "first", "last"
_TURNS = {(_FIRST, (0, 2, 3, 1)): _LAST, (_LAST, (0, 3, 1, 2)): _FIRST}


def find_blocks(network: nn.Module) -> tuple[dict[str, str], dict[str, str]]:
    """Find each depthwise convolution whose values only pointwise operations read, and the last 1 x 1 layer.

    The ConvNeXt block: depthwise 7 x 7, a norm over the channels, 1 x 1, GELU, 1 x 1. What lies between may
    be permuted to [N, H, W, C], with linear layers and layer norms, or be 1 x 1 convolutions, batch norms and
    activations; norms over the channels of [N, C, H, W] are found by their permutations. The result of the
    last layer may be read by anything.

    Returns:
        the first's name -> the last's; and for each first the module in whose graph it was found, empty for
        the network itself. Parts that torch.fx cannot trace are searched one by one.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(8, 8, 7, padding=3, groups=8), nn.Conv2d(8, 32, 1), nn.GELU(),
        ...                     nn.Conv2d(32, 8, 1))
        >>> find_blocks(net)[0]
        {'0': '3'}
    """
    found: dict[str, str] = {}
    within: dict[str, str] = {}
    search(copied(network), "", _blocks, found, within, {})
    return found, within


def is_block(first: nn.Module, last: nn.Module) -> bool:
    """Return whether two layers are of the kinds that :func:`find_blocks` finds."""
    return keeps_grid(first) and first.groups == first.in_channels > 1 and is_pointwise(last)


def is_pointwise(module: nn.Module) -> bool:
    """Return whether a module is certainly a linear layer, or a 1 x 1 convolution of one group."""
    if surely(module, nn.Linear):
        return True
    if not isinstance(module, nn.Conv2d) or not surely(module, nn.Conv2d):
        return False
    alone = module.kernel_size == (1, 1) and module.stride == (1, 1) and module.groups == 1
    return alone and padding_of(module) == (0, 0, 0, 0)


def _blocks(module: nn.Module, graph: fx.Graph) -> Iterator[tuple[str, str]]:
    calls = [str(node.target) for node in graph.nodes if node.op == "call_module"]
    for node in graph.nodes:
        if node.op != "call_module" or (last := _last_of(module, node)) is None:
            continue
        names = str(node.target), str(last.target)
        if all(calls.count(name) == 1 for name in names) and not hooked(module, *names):
            yield names


def _last_of(module: nn.Module, node: fx.Node) -> fx.Node | None:
    """Return the last 1 x 1 layer that reads a depthwise convolution's values position by position."""
    first = module.get_submodule(str(node.target))
    if not keeps_grid(first) or not first.groups == first.in_channels > 1:
        return None
    last, form = None, _FIRST
    while len(users := readers(node)) == 1:
        (node,) = users
        turned = _turned(node, form)
        if turned is not None:
            form = turned
        elif _is_layer(module, node, form):
            last = node
        elif not _by_position(module, node, form):
            break
    return last


def _turned(node: fx.Node, form: str) -> str | None:
    """Return the place of the channels behind a permutation that moves them, or None."""
    function = node.op == "call_function" and node.target is torch.permute
    if not function and not (node.op == "call_method" and node.target == "permute"):
        return None
    given = [*node.args[1:], *node.kwargs.values()]
    order = given[0] if len(given) == 1 and isinstance(given[0], Sequence) else given
    return _TURNS.get((form, tuple(order)))  # type: ignore[arg-type]


def _is_layer(module: nn.Module, node: fx.Node, form: str) -> bool:
    if node.op != "call_module" or len(node.args) != 1 or node.kwargs:
        return False
    layer = module.get_submodule(str(node.target))
    # a linear layer joins the values of the last dimension
    return (
        is_pointwise(layer) and isinstance(layer, nn.Linear) == (form == _LAST) and not forward_hooks(layer)
    )


def _by_position(module: nn.Module, node: fx.Node, form: str) -> bool:
    """Return whether a node changes each position by itself, without a parameter for each."""
    if per_channel(module, node, form == _LAST) is not None:
        return True
    maps = [other for other in node.all_input_nodes if other.op != "get_attr"]
    if len(maps) != 1 or node.args[:1] != (maps[0],):
        return False
    if node.target is F.layer_norm:
        shape = node.args[1] if len(node.args) > 1 else node.kwargs.get("normalized_shape")
        return form == _LAST and isinstance(shape, Sequence) and len(shape) == 1
    if node.op == "call_module":
        layer = module.get_submodule(str(node.target))
        if forward_hooks(layer):
            return False
        if isinstance(layer, nn.LayerNorm) and surely(layer, nn.LayerNorm):
            return form == _LAST and len(layer.normalized_shape) == 1
        return surely(layer, *POINTWISE) or (form == _FIRST and surely(layer, *NORMS))
    return len(node.all_input_nodes) == 1 and node.target in FUNCTIONS
