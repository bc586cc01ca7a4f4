"""A fused network as a module: it can be copied and pickled, and refuses arguments it was not made for."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate
from torch.utils import _pytree as pytree

from quincunx.layers.names import found_at, path_of

__all__ = [
    "Fused",
    "copied_argument",
    "match_layout",
    "same_argument",
    "tensor_argument",
]

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


def same_argument(value: Any, fixed: Any, name: str) -> None:
    """
    Raises:
        TypeError: an argument has another value than the one that it was fixed to.
    """
    simple = isinstance(value, (bool, int, float, str, tuple))
    if value is not fixed and not (simple and type(value) is type(fixed) and value == fixed):
        text = f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise TypeError(f"{name}={text}: this network was fused for {name}={fixed!r}, its default")


def tensor_argument(value: Any, name: str) -> Any:
    """Return the argument.

    Raises:
        TypeError: it is not a tensor, although the forward checked for one when it was traced.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: this network was fused for a tensor, got {type(value).__name__}")
    return value


def match_layout(value: Any, like: Any) -> Any:
    """Return a map in the memory order of the network's input.

    Programs return channels_last; a caller that takes a view of a map may rely on the other order.
    """
    if not isinstance(value, Tensor) or value.dim() != 4 or not isinstance(like, Tensor):
        return value
    return value.contiguous() if like.is_contiguous() else value


def copied_argument(value: Any) -> Any:
    """Copy an argument, including all tensors in it."""
    return pytree.tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, value)


class Fused(fx.GraphModule):
    """The module that :func:`quincunx.fuse` returns.

    torch.fx would trace its code again when pickled, which loses in-place operations and its
    hooks; this class writes its nodes one by one instead.
    """

    def carry_hooks(self, model: nn.Module) -> None:
        """Run a network's own hooks, those around its whole forward."""
        for name in _HOOKS:
            setattr(self, name, copy.copy(getattr(model, name)))

    def __reduce__(self) -> Any:
        return _rebuilt, (self._parts(),)

    def __deepcopy__(self, memo: dict[int, Any]) -> Fused:
        return _rebuilt(copy.deepcopy(self._parts(), memo))

    def _parts(self) -> dict[str, Any]:
        return {
            "name": self.__class__.__name__,
            "modules": dict(self._modules),
            "parameters": dict(self._parameters),
            "buffers": dict(self._buffers),
            "nodes": [_written(node) for node in self.graph.nodes],
            "meta": dict(self.meta),
            "hooks": {name: getattr(self, name) for name in _HOOKS},
            "training": self.training,
        }


class _Name(str):
    """A node, by name."""

    __slots__ = ()


def _written(node: fx.Node) -> tuple[Any, ...]:
    target = node.target if isinstance(node.target, str) else path_of(node.target)
    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: _Name(n.name))
    return node.op, node.name, target, _plain(args), _plain(kwargs)


def _plain(values: Any) -> Any:
    """Convert torch.fx's own containers to Python's."""
    if isinstance(values, tuple) and not hasattr(values, "_fields"):
        return tuple(_plain(value) for value in values)
    if isinstance(values, list):
        return [_plain(value) for value in values]
    return {k: _plain(v) for k, v in values.items()} if isinstance(values, dict) else values


def _rebuilt(parts: Mapping[str, Any]) -> Fused:
    root, graph = nn.Module(), fx.Graph()
    nodes: dict[str, fx.Node] = {}
    for name, module in parts["modules"].items():
        root.add_module(name, module)
    for name, parameter in parts["parameters"].items():
        root.register_parameter(name, parameter)
    for name, buffer in parts["buffers"].items():
        root.register_buffer(name, buffer)
    for op, name, target, args, kwargs in parts["nodes"]:
        args, kwargs = map_aggregate((args, kwargs), lambda a: nodes[a] if type(a) is _Name else a)
        function = found_at(target) if op == "call_function" and isinstance(target, str) else target
        nodes[name] = graph.create_node(op, function, args, kwargs, name)
    result = Fused(root, graph, parts["name"])
    result.meta.update(parts["meta"])
    for name, hooks in parts["hooks"].items():
        setattr(result, name, hooks)
    return result.train(parts["training"])


# for tracing a fused network's code again
torch.fx.wrap("same_argument")
torch.fx.wrap("tensor_argument")
torch.fx.wrap("copied_argument")
torch.fx.wrap("match_layout")
