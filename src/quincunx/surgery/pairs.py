"""Find pairs of convolutions in a network's graph with only a norm and an activation between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import fx, nn

from quincunx.layers.activations import ACTIVATION_FUNCTIONS, ACTIVATIONS
from quincunx.layers.counts import Counted, pieces_of
from quincunx.layers.graph import traced
from quincunx.layers.padded import padding_at
from quincunx.layers.perchannel import per_channel
from quincunx.modules import copied, forward_hooks, surely

__all__ = [
    "Pairs",
    "find_pairs",
    "find_pointwise",
    "is_pair",
    "is_strided",
    "keeps_grid",
]

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm)
POINTWISE = (*ACTIVATIONS, nn.ReLU6, nn.Identity, nn.Dropout, nn.Dropout2d, nn.AlphaDropout)
FUNCTIONS = {
    *ACTIVATION_FUNCTIONS,
    *(F.relu_, torch.relu_, F.dropout, "relu", "relu_", "sigmoid", "tanh"),
}
# attributes that a sampled map has in common with the whole one
_SAME_OF_BOTH = ("ndim", "dtype", "device")


@dataclass(frozen=True)
class Pairs:
    """The result of :func:`find_pairs`.

    Attributes:
        found: (first, second) names, in the order of the graph.
        within: for each first name the module in whose graph the pair was found; empty for the network
            itself.
        untraced: name of a module that torch.fx cannot trace -> the reason; its parts were searched one
            by one.
    """

    found: tuple[tuple[str, str], ...]
    within: dict[str, str]
    untraced: dict[str, str]


def find_pairs(network: nn.Module) -> Pairs:
    """Find each convolution whose result only one other reads, through at most a norm and an activation.

    Both are larger than 1 x 1, have stride 1 and keep the map's size, so all three maps have one grid. The
    first may be 1 x 1 if the second is depthwise, as in an inverted residual: there the 1 x 1 has most of
    the pair's multiply-adds. In a chain of such convolutions the first two are a pair, then the next two.
    Of the convolutions that are left, a strided one and the next, on the strided one's grid, are a pair too.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))
        >>> find_pairs(net).found
        (('0', '2'),)
    """
    within: dict[str, str] = {}
    found: dict[str, str] = {}
    untraced: dict[str, str] = {}
    # on a copy, since a forward may store its results, and a tracer's proxies must not stay
    own = copied(network)
    search(own, "", _paired, found, within, untraced)
    search(own, "", _strided_pairs, found, within, {})
    return Pairs(tuple(found.items()), within, untraced)


def find_pointwise(network: nn.Module) -> dict[str, str]:
    """Find each convolution whose result only a 1 x 1 one reads, through at most a norm and an activation.

    Computed at the same positions, the second reads nothing that the first did not compute.

    Returns:
        the first's name -> the second's. Parts that torch.fx cannot trace are searched one by one.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.ReLU6(), nn.Conv2d(8, 4, 1))
        >>> find_pointwise(net)
        {'0': '2'}
    """
    found: dict[str, str] = {}
    search(copied(network), "", _followed, found, {}, {})
    return found


def keeps_grid(module: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Return whether a module is a convolution larger than 1 x 1 that keeps the map's size."""
    return _keeps_size(module) and max(module.kernel_size) > 1


def is_pair(first: nn.Module, second: nn.Module) -> bool:
    """Return whether two convolutions on one grid can be the halves of a spatial bottleneck.

    Example:
        >>> is_pair(nn.Conv2d(8, 48, 1), nn.Conv2d(48, 48, 3, padding=1, groups=48))
        True
        >>> is_pair(nn.Conv2d(8, 48, 1), nn.Conv2d(48, 48, 3, padding=1))
        False
    """
    if not keeps_grid(second):
        return False
    depthwise = second.groups == second.in_channels > 1
    if is_strided(first):
        return depthwise or max(first.kernel_size) > 1
    return keeps_grid(first) or (depthwise and _keeps_size(first))


def is_strided(module: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Return whether a module is certainly a convolution with a stride."""
    return isinstance(module, nn.Conv2d) and surely(module, nn.Conv2d) and set(module.stride) != {1}


def _keeps_size(module: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Return whether a module is a convolution of odd size that keeps the map's size."""
    if not isinstance(module, nn.Conv2d) or not surely(module, nn.Conv2d):
        return False
    if set(module.stride) != {1}:
        return False
    if any(size % 2 == 0 for size in module.kernel_size):
        return False
    half = [d * (k - 1) // 2 for k, d in zip(module.kernel_size, module.dilation, strict=True)]
    return padding_at(module) == (half[0], half[0], half[1], half[1])


def search(
    module: nn.Module,
    name: str,
    match: Callable[[nn.Module, fx.Graph], Iterator[tuple[str, str]]],
    found: dict[str, str],
    within: dict[str, str],
    untraced: dict[str, str],
) -> None:
    if not any(isinstance(part, nn.Conv2d) for part in module.modules()):
        return
    try:
        graph = _Tracer().trace(module)
    except Exception as error:  # noqa: BLE001 - a user's forward may fail in any way on a proxy
        if (whole := traced(module)) is not None:
            # it branches on sizes, say
            _add(name, match(module, whole), found, within)
            for part in whole.whole:
                search(module.get_submodule(part), _joined(name, part), match, found, within, untraced)
            return
        if getattr(type(module), "forward", None) is not _NO_FORWARD:  # a list of modules is none of its own
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            # what follows the first sentence is about torch.fx
            reason = reason.partition(". ")[0]
            untraced[name] = f"{type(module).__name__} cannot be traced by torch.fx ({reason})"
        for child_name, child in module.named_children():
            search(child, _joined(name, child_name), match, found, within, untraced)
        return
    _add(name, match(module, graph), found, within)


def _joined(name: str, part: str) -> str:
    return f"{name}.{part}" if name else part


def _add(name: str, pairs: Iterator[tuple[str, str]], found: dict[str, str], within: dict[str, str]) -> None:
    for first, second in pairs:
        ends = [_joined(name, end) for end in (first, second)]
        if not {*found, *found.values()} & set(ends):
            found[ends[0]] = ends[1]
            within[ends[0]] = name


# what a module without a forward has, such as an nn.ModuleList
_NO_FORWARD = nn.Module.forward


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        own = type(m).__module__
        layer = own.startswith("quincunx.") and not own.startswith("quincunx.networks")
        return layer or super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        last, stack = next(iter(reversed(self.graph.nodes)), None), dict(self.module_stack)
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            if any(isinstance(part, nn.Conv2d) for part in m.modules()):
                raise
            # without a convolution there is no need to look into it: it becomes one node
            for node in reversed(list(self.graph.nodes)):
                if node is last:
                    break
                self.graph.erase_node(node)
            self.module_stack.clear()
            self.module_stack.update(stack)
            return self.create_proxy("call_module", self.path_of_module(m), args, kwargs)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return Counted(node, self)

    def iter(self, obj: fx.Proxy) -> Iterator[fx.Proxy]:
        pieces = pieces_of(obj)
        if pieces is None:
            raise fx.proxy.TraceError(
                "it goes through a value in a loop, whose length is known only when it runs"
            )
        return iter(pieces)


def _paired(module: nn.Module, graph: fx.Graph) -> Iterator[tuple[str, str]]:
    yield from _pairs_from(module, graph, _keeps_size)


def _strided_pairs(module: nn.Module, graph: fx.Graph) -> Iterator[tuple[str, str]]:
    yield from _pairs_from(module, graph, is_strided)


def _pairs_from(
    module: nn.Module, graph: fx.Graph, starts: Callable[[nn.Module], bool]
) -> Iterator[tuple[str, str]]:
    calls = [str(node.target) for node in graph.nodes if node.op == "call_module"]
    for node in graph.nodes:
        start = node.op == "call_module" and starts(module.get_submodule(str(node.target)))
        if start and (second := _second_of(module, node)) is not None:
            names = str(node.target), str(second.target)
            if all(calls.count(name) == 1 for name in names) and not hooked(module, *names):
                yield names


def _followed(module: nn.Module, graph: fx.Graph) -> Iterator[tuple[str, str]]:
    calls = [str(node.target) for node in graph.nodes if node.op == "call_module"]
    for node in graph.nodes:
        if node.op != "call_module" or not surely(module.get_submodule(str(node.target)), nn.Conv2d):
            continue
        second = _next_conv(module, node)
        if second is None or keeps_grid(module.get_submodule(str(second.target))):
            continue
        names = str(node.target), str(second.target)
        if all(calls.count(name) == 1 for name in names) and not hooked(module, *names):
            yield names


def hooked(module: nn.Module, first: str, second: str) -> bool:
    """Return whether a hook of a container of only one of the two modules sees the map between them."""
    around = [{name.rsplit(".", n)[0] for n in range(1, name.count(".") + 1)} for name in (first, second)]
    return any(forward_hooks(module.get_submodule(name)) for name in around[0] ^ around[1])


def _is_conv(module: nn.Module, node: fx.Node) -> bool:
    return node.op == "call_module" and _keeps_size(module.get_submodule(str(node.target)))


def _second_of(module: nn.Module, node: fx.Node) -> fx.Node | None:
    second = _next_conv(module, node)
    ends = [module.get_submodule(str(end.target)) for end in (node, second) if end is not None]
    return second if len(ends) == 2 and is_pair(*ends) else None


def _next_conv(module: nn.Module, node: fx.Node) -> fx.Node | None:
    users = readers(node)
    while len(users) == 1:
        (node,) = users
        if _is_conv(module, node):
            return node
        if not _passes(module, node):
            return None
        users = readers(node)
    return None


def readers(node: fx.Node) -> list[fx.Node]:
    """Return the nodes that read a map's values; a sampled map answers the others as the whole map does."""
    return [
        user
        for user in node.users
        if not (user.op == "call_function" and user.target is getattr and user.args[1] in _SAME_OF_BOTH)
    ]


def _passes(module: nn.Module, node: fx.Node) -> bool:
    if per_channel(module, node) is not None:
        return True
    first, *others = node.all_input_nodes
    if node.target is F.batch_norm and node.args[:1] == (first,):  # of a norm whose forward was traced
        return all(other.op == "get_attr" for other in others)
    if others:
        return False
    if node.op == "call_module":
        between = module.get_submodule(str(node.target))
        # a hook expects the whole map
        return surely(between, *POINTWISE, *NORMS) and not forward_hooks(between)
    return node.op in ("call_function", "call_method") and node.target in FUNCTIONS
