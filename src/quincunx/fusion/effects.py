"""Side effects of the nodes of a traced network: memory that they change or share.

A node that changes a tensor in place changes it for every holder of the same memory: under its own name,
another name, or through a view. An operation that provably affects one value only is made out-of-place here
(:func:`make_pure`); for all others :class:`Effects` says which nodes must not be reordered.
"""

from __future__ import annotations

import copy
import inspect
import operator
from collections.abc import Callable, Iterable
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from quincunx.layers.changes import (
    ASKS_LAYOUT,
    AUGMENTED,
    changes,
    is_opaque,
    is_torchs_function,
    module_of,
    name_of,
    nodes_in,
    parameter_of,
    submodule,
)
from quincunx.layers.kinds import KindGuard
from quincunx.layers.sizes import SizeGuard
from quincunx.layers.ways import Either
from quincunx.modules import surely

__all__ = [
    "Effects",
    "add_to",
    "added_to",
    "drop_unread",
    "forget_layout",
    "make_pure",
    "may_raise",
    "multiplied_by",
    "surely_changes",
]

# elementwise; with an inplace flag that makes them change their input
_SWITCHED = (
    *(nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.SiLU, nn.Mish),
    *(nn.Hardswish, nn.Hardsigmoid, nn.Threshold, nn.RReLU),
)
# their result always has its own memory
_FRESH_MODULES = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    *(nn.Linear, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm, nn.LayerNorm),
    *(nn.InstanceNorm2d, nn.LocalResponseNorm, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d),
    *(nn.GELU, nn.Sigmoid, nn.Tanh, nn.Softplus, nn.PReLU, nn.Softmax, nn.Upsample),
)
_FRESH = {
    *("add", "sub", "mul", "div", "true_divide", "truediv", "floordiv", "pow", "neg", "matmul", "maximum"),
    *("minimum", "relu", "relu6", "sigmoid", "tanh", "leaky_relu", "elu", "selu", "celu", "gelu", "silu"),
    *("mish", "softplus", "hardtanh", "hardswish", "hardsigmoid", "clamp", "exp", "sqrt", "rsqrt", "abs"),
    *("conv2d", "conv_transpose2d", "linear", "batch_norm", "layer_norm", "group_norm", "cat", "concat"),
    *("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "interpolate", "softmax", "mean", "sum", "stack"),
    *(
        "local_response_norm",
        "window_means",
        "clone",
        "added_to",
        "multiplied_by",
        "copied_argument",
        "new_zeros",
    ),
    *("new_ones", "zeros_like", "ones_like", "where", "masked_fill", "argmax", "normalize"),
}
# attributes of a tensor that share none of its memory
_FACTS = {"shape", "dtype", "device", "ndim", "is_cuda", "size", "dim", "numel", "layout", "requires_grad"}
# a view or a copy, depending on the memory layout
_BY_LAYOUT = {
    *("reshape", "reshape_as", "flatten", "ravel", "contiguous", "view", "view_as", "unflatten"),
    # what it does may be one of these
    "either",
}
_PURE_METHODS = {"relu_": "relu", "sigmoid_": "sigmoid", "tanh_": "tanh"}
_PURE_FUNCTIONS = {
    torch.relu_: torch.relu,
    torch.sigmoid_: torch.sigmoid,
    torch.tanh_: torch.tanh,
    F.relu_: F.relu,
    F.leaky_relu_: F.leaky_relu,
    F.elu_: F.elu,
    F.selu_: F.selu,
    F.celu_: F.celu,
    F.hardtanh_: F.hardtanh,
}


def added_to(changed: Tensor, other: Tensor) -> Tensor:
    """Return the value of ``changed`` after ``changed += other``, in new memory.

    Raises:
        RuntimeError: torch's error for shapes that do not match.
    """
    result: Tensor = _instead(changed, changed + other, Tensor.add_, other)
    return result


def multiplied_by(changed: Tensor, other: Tensor) -> Tensor:
    """Return the value of ``changed`` after ``changed *= other``, in new memory.

    Raises:
        RuntimeError: torch's error for shapes that do not match.
    """
    result: Tensor = _instead(changed, changed * other, Tensor.mul_, other)
    return result


def _instead(changed: Any, result: Any, in_place: Callable[..., Tensor], other: Any) -> Any:
    """The result, or where it has another form what the operation in place makes of a copy."""
    if isinstance(result, Tensor) and isinstance(changed, Tensor):
        same = result.shape == changed.shape and result.dtype == changed.dtype
        return result if same else in_place(changed.clone(), other)
    return result


# ---------------------------------------------------------------- changed and shared memory


def surely_changes(model: nn.Module, node: fx.Node) -> bool:
    """Return whether a node certainly changes a value: a function that cannot be inspected might not."""
    return not is_opaque(model, node) and bool(changes(model, node))


def forget_layout(model: nn.Module, graph: fx.Graph) -> None:
    """Prepare a graph for maps in another memory order than the network's.

    Raises:
        TypeError: the forward asks for a map's memory layout, or writes to a value that is a view in one
            order and a copy in another.
    """
    effects, origins = Effects(model, graph), _Origins(model, graph)
    for node in graph.nodes:
        name = name_of(node)
        if name in ASKS_LAYOUT and any(n.op != "get_attr" for n in node.all_input_nodes):
            raise TypeError(
                f"model: {type(model).__name__} cannot be fused: its forward asks for the layout of a map in "
                f"memory ({name}), which is another one here"
            )
        origins.check(effects, node)
        viewed = node.op == "call_method" and node.target in ("view", "view_as")
        if viewed and not isinstance(node.args[-1], torch.dtype) and "dtype" not in node.kwargs:
            node.target = str(node.target).replace("view", "reshape")


def is_guard(node: fx.Node) -> bool:
    """Whether a node gives nothing, and is there to raise for sizes and kinds that the graph is not for."""
    return node.op == "call_function" and isinstance(node.target, (SizeGuard, KindGuard))


def may_raise(node: fx.Node) -> bool:
    """Whether a node raises for sizes and kinds that the graph is not for, whoever reads what it gives."""
    return is_guard(node) or (isinstance(node.target, Either) and node.target.raises)


def _lies_by_layout(model: nn.Module, node: fx.Node) -> bool:
    """Return whether a value is a view or a copy of another one, depending on the memory layout."""
    moved = name_of(node) == "to" and "memory_format" in node.kwargs
    return moved or name_of(node) in _BY_LAYOUT or surely(submodule(model, node), nn.Flatten, nn.Unflatten)


class _Origins:
    """The values in whose memory each value may lie.

    Attributes:
        sure: the nearest that have their own memory, or are a view or a copy depending on the layout.
        any: also the values behind those.
    """

    def __init__(self, model: nn.Module, graph: fx.Graph) -> None:
        self.model = model
        self.any: dict[fx.Node, frozenset[fx.Node]] = {}
        self.sure: dict[fx.Node, frozenset[fx.Node]] = {}
        for node in graph.nodes:
            shared = _shares(model, node)
            cut = _lies_by_layout(model, node)
            for found, others in ((self.any, shared), (self.sure, [] if cut else shared)):
                found[node] = frozenset().union(*(found[other] for other in others)) or frozenset({node})

    def check(self, effects: Effects, node: fx.Node) -> None:
        """Refuse a node that may change a value which is a view or a copy, depending on the layout, of a
        value that is read later, or the other way round.

        Raises:
            TypeError: it may.
        """
        for value in changes(self.model, node):
            for other in effects.classes.get(value, ()):
                later = any(effects.order[user] > effects.order[node] for user in other.users)
                link = self._between(value, other) if later and other is not value else None
                if link is not None:
                    raise TypeError(
                        f"model: {type(self.model).__name__} cannot be fused: {node.name} may change in "
                        f"place a map that is read later, of which {link.name} is a view or a copy as "
                        "memory's layout has it"
                    )

    def _between(self, one: fx.Node, other: fx.Node) -> fx.Node | None:
        """Return the layout-dependent node that decides whether two values share memory, or None."""
        for a, b in product(self.sure[one], self.sure[other]):
            if a is not b and self.any[a] & self.any[b]:
                return b if _lies_by_layout(self.model, b) else a
        return None


def drop_unread(model: nn.Module, graph: fx.Graph) -> None:
    """Remove values that no node reads, such as the values of assertions."""
    for node in reversed(list(graph.nodes)):
        value = node.op in ("call_function", "call_method", "get_attr")
        if value and not node.users and not may_raise(node) and not changes(model, node):
            graph.erase_node(node)


def _shares(model: nn.Module, node: fx.Node) -> list[fx.Node]:
    """Return the values whose memory a node's result may share."""
    if node.op in ("placeholder", "get_attr", "output") or is_guard(node):
        return []
    if node.op == "call_module":
        module = module_of(model, node)
        home = type(module).__module__ if module is not None else ""
        own = home.startswith("quincunx.") and not home.startswith("quincunx.networks")
        fresh = module is not None and (own or surely(module, *_FRESH_MODULES))
        switched = module is not None and surely(module, *_SWITCHED) and not getattr(module, "inplace", False)
        return [] if fresh or switched else node.all_input_nodes
    name = str(node.target if node.op == "call_method" else getattr(node.target, "__name__", node.target))
    if node.target is getattr:
        return [] if node.args[1] in _FACTS else node.all_input_nodes
    if name in _FACTS or (name in _FRESH and not changes(model, node) and is_torchs_function(node.target)):
        return []
    if node.op == "call_method" or node.target in AUGMENTED or node.target is operator.getitem:
        return nodes_in(node.args[:1])  # only its own tensor, whatever else it reads
    return node.all_input_nodes


class _Classes:
    """Groups values that may share memory."""

    def __init__(self) -> None:
        self.members: dict[fx.Node, set[fx.Node]] = {}
        self.attributes: dict[str, fx.Node] = {}

    def add(self, model: nn.Module, node: fx.Node) -> None:
        others = _shares(model, node)
        if node.op == "get_attr":
            others = [self.attributes.setdefault(str(node.target), node)]
        merged = {node}.union(*(self.members.get(other, {other}) for other in others))
        for member in merged:
            self.members[member] = merged


# ---------------------------------------------------------------- made out-of-place


def make_pure(model: nn.Module, graph: fx.Graph) -> None:
    """Make in-place activations and additions out-of-place if no other value holds the changed memory.

    Later readers of the changed value read the result instead. A module's flag is handled separately
    for each of its calls: another call of the same module may have to stay in place.
    """
    order = {node: i for i, node in enumerate(graph.nodes)}
    classes = _Classes()
    pure: dict[str, str] = {}
    for node in list(graph.nodes):
        changed = changes(model, node)
        if len(changed) == 1 and _alone(classes, changed[0], node, order) and _purify(model, node, pure):
            for user in list(changed[0].users):
                if order[user] > order[node]:
                    user.replace_input_with(changed[0], node)
        classes.add(model, node)


def _alone(classes: _Classes, value: fx.Node, at: fx.Node, order: dict[fx.Node, int]) -> bool:
    """Return whether no other value that shares a value's memory is read after a node."""
    members = classes.members.get(value, {value})
    if any(member.op == "get_attr" for member in members):
        return False
    return not any(order[user] > order[at] for member in members - {value} for user in member.users)


def _purify(model: nn.Module, node: fx.Node, pure: dict[str, str]) -> bool:
    """Make a node return a new value instead of changing its first argument, if its kind allows it."""
    module = module_of(model, node)
    if module is not None and surely(module, *_SWITCHED):
        name = str(node.target)
        if name not in pure:
            twin = copy.copy(module)
            twin.inplace = False  # type: ignore[assignment]
            pure[name] = add_to(model, "pure", twin)
        node.target = pure[name]
        return True
    if node.op == "call_method" and node.target in _PURE_METHODS and "out" not in node.kwargs:
        node.target = _PURE_METHODS[node.target]
        return True
    added = node.target is operator.iadd or (node.op == "call_method" and node.target == "add_")
    times = node.target is operator.imul or (node.op == "call_method" and node.target == "mul_")
    if (added or times) and len(node.args) == 2 and not node.kwargs:
        node.op, node.target = "call_function", added_to if added else multiplied_by
        return True
    if node.op == "call_function" and node.target in _PURE_FUNCTIONS:
        node.target = _PURE_FUNCTIONS[node.target]
        return True
    if node.op == "call_function" and inspect.isfunction(node.target) and parameter_of(node, "inplace"):
        if getattr(F, node.target.__name__, None) is not node.target or "dropout" in node.target.__name__:
            return False
        place = list(inspect.signature(node.target).parameters).index("inplace")
        if place < len(node.args):
            node.args = (*node.args[:place], False, *node.args[place + 1 :])
        else:
            node.kwargs = {**node.kwargs, "inplace": False}
        return True
    return False


def add_to(model: nn.Module, name: str, value: nn.Module | Tensor) -> str:
    """Register a module or a buffer under a new name, and return the name."""
    number = 0
    while hasattr(model, free := f"_{name}{number}"):
        number += 1
    if isinstance(value, Tensor):
        model.register_buffer(free, value)
    else:
        model.add_module(free, value)
    return free


# ---------------------------------------------------------------- order of nodes


class Effects:
    """Where memory is changed in a graph, and which values are affected.

    Args:
        model: the model of the graph.
        graph: its nodes keep their order.
    """

    def __init__(self, model: nn.Module, graph: fx.Graph) -> None:
        self.order = {node: i for i, node in enumerate(graph.nodes)}
        classes = _Classes()
        for node in graph.nodes:
            classes.add(model, node)
        self.classes = classes.members
        self.changed: dict[fx.Node, set[fx.Node]] = {}
        for node in graph.nodes:
            found = changes(model, node)
            if found:
                self.changed[node] = set().union(*(self.classes.get(value, {value}) for value in found))
        self._places: dict[fx.Node, list[int]] = {}
        for node, values in self.changed.items():
            for value in values:
                self._places.setdefault(value, []).append(self.order[node])

    def between(self, value: fx.Node, first: fx.Node, last: fx.Node) -> bool:
        """Return whether a value may change after one node has run and before another one runs."""
        return any(self.order[first] < at < self.order[last] for at in self._places.get(value, ()))

    def arguments(self) -> list[fx.Node]:
        """Return the network's own arguments that may be changed."""
        changed = set().union(*self.changed.values()) if self.changed else set()
        return [node for node in self.order if node.op == "placeholder" and node in changed]

    def attributes(self) -> Iterable[fx.Node]:
        """Return the network's own tensors that may be changed."""
        changed = set().union(*self.changed.values()) if self.changed else set()
        return [node for node in self.order if node.op == "get_attr" and node in changed]
