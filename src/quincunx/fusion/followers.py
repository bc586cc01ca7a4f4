"""What may stand between the convolutions of a program: pointwise operations, pooling, concatenation."""

from __future__ import annotations

import operator
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from quincunx.fusion.effects import added_to, multiplied_by
from quincunx.fusion.nodes import (
    affine_of,
    in_place,
)
from quincunx.fusion.steps import Follower
from quincunx.layers.activations import ACTIVATION_FUNCTIONS, ACTIVATIONS
from quincunx.layers.changes import module_of
from quincunx.layers.names import found_at, path_of
from quincunx.modules import surely
from quincunx.ops.geometry import Geometry

__all__ = ["follower"]

# of each position by itself, in evaluation mode
_POINTWISE_MODULES = (*ACTIVATIONS, nn.LocalResponseNorm)


_POINTWISE_FUNCTIONS = {
    *ACTIVATION_FUNCTIONS,
    F.local_response_norm,
    *(operator.add, operator.sub, operator.mul, torch.add, torch.sub, torch.mul, torch.maximum),
    *(added_to, multiplied_by),
}


_POINTWISE_METHODS = {"relu", "sigmoid", "tanh", "add", "sub", "mul"}


_POOLING = ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")


@dataclass(frozen=True)
class _Applied:
    """A function of maps and of constants behind them."""

    function: Callable[..., Tensor]
    rest: tuple[Any, ...]
    named: dict[str, Any]

    def __call__(self, *maps: Tensor) -> Tensor:
        return self.function(*maps, *self.rest, **self.named)

    def __reduce__(self) -> Any:
        return _applied, (path_of(self.function), self.rest, dict(self.named))


def _applied(function: Any, rest: tuple[Any, ...], named: dict[str, Any]) -> _Applied:
    return _Applied(found_at(function) if isinstance(function, str) else function, rest, named)


def _concatenated(*maps: Tensor) -> Tensor:
    return torch.cat(maps, 1)


def follower(
    model: nn.Module,
    node: fx.Node,
    compact: Mapping[fx.Node, str],
    written: Container[fx.Node] = (),
    joins: bool = False,
) -> tuple[Follower, str] | None:
    """A node as a step between convolutions, and the fill of its result; None if torch may as well run it.

    Args:
        compact: the fill of each map that is stored in compact form.
        written: maps that steps write.
        joins: whether concatenations of whole maps are wanted, too: in eight bits they are copies of bytes.
    """
    maps = node.all_input_nodes
    if (
        joins
        and maps
        and all(n in written and n not in compact for n in maps)
        and (found := _concatenation(node))
    ):
        return found, ""
    if len(maps) == 1 and maps[0] in written and (found := _max_pooling(model, node)) is not None:
        # in torch it would also store indices, and convert maps of another format
        return found, ""
    if not maps or not all(other in compact for other in maps):
        return None
    if (found := _max_pooling(model, node)) is not None or (found := _mean(model, node)) is not None:
        return found, ""
    fill = compact[maps[0]]
    if any(compact[other] != fill for other in maps):
        return None
    found = _concatenation(node) or _pointwise(model, node)
    return None if found is None else (found, fill)


def _names(maps: Sequence[object]) -> tuple[str, ...] | None:
    """Of maps; None if there is none, or something else among them."""
    names = tuple(other.name for other in maps if isinstance(other, fx.Node))
    return names if names and len(names) == len(maps) else None


def _constants(values: Iterable[object]) -> bool:
    return all(value is None or isinstance(value, (bool, int, float, str)) for value in values)


def _pointwise(model: nn.Module, node: fx.Node) -> Follower | None:
    module, count = module_of(model, node), len(node.args)
    while count and not isinstance(node.args[count - 1], fx.Node):
        count -= 1
    sources, rest = _names(node.args[:count]), node.args[count:]
    if sources is None or not _constants((*rest, *node.kwargs.values())):
        return None
    function: Callable[..., Tensor]
    if in_place(node) or getattr(module, "inplace", False):
        return None
    if surely(module, *_POINTWISE_MODULES) or (module is not None and affine_of(model, node) is not None):
        if module is None or rest or node.kwargs:
            return None
        function = module
    elif node.op == "call_function" and node.target in _POINTWISE_FUNCTIONS:
        function = _Applied(node.target, rest, node.kwargs)
    elif node.op == "call_method" and node.target in _POINTWISE_METHODS:
        function = _Applied(getattr(Tensor, str(node.target)), rest, node.kwargs)
    else:
        return None
    return Follower("pointwise", sources, function, node.name)


def _concatenation(node: fx.Node) -> Follower | None:
    if node.target not in (torch.cat, torch.concat) or set(node.kwargs) - {"dim"}:
        return None
    maps, dim = node.args[0] if node.args else None, node.kwargs.get("dim", 0)
    if len(node.args) > 1:
        dim = node.args[1]
    sources = _names(maps) if dim in (1, -3) and isinstance(maps, Sequence) else None
    return None if sources is None else Follower("concat", sources, _concatenated, node.name)


def _max_pooling(model: nn.Module, node: fx.Node) -> Follower | None:
    module = module_of(model, node)
    if surely(module, nn.MaxPool2d) and len(node.args) == 1:
        given = {name: getattr(module, name) for name in _POOLING[1:]}
    elif node.op == "call_function" and node.target in (F.max_pool2d, torch.max_pool2d):
        given = dict(zip(_POOLING, node.args, strict=False)) | node.kwargs
        given.pop("input", None)
    else:
        return None
    kernel = _both(given["kernel_size"])
    stride = _both(given.get("stride") or given["kernel_size"])
    padding, dilation = _both(given.get("padding", 0)), _both(given.get("dilation", 1))
    if kernel is None or stride is None or padding is None or dilation is None:
        return None
    # what torch refuses is left to it
    fits = all(2 * padding[i] <= kernel[i] for i in (0, 1)) and min(*kernel, *stride, *dilation) > 0
    if given.get("return_indices", False) or not fits or min(padding) < 0:
        return None
    window = Geometry(kernel, stride, (padding[0], padding[0], padding[1], padding[1]), dilation)
    function = _Applied(F.max_pool2d, (), given)
    source = node.all_input_nodes[0].name
    return Follower("maxpool", (source,), function, node.name, window, bool(given.get("ceil_mode", False)))


def _both(value: object) -> tuple[int, int] | None:
    """An integer or a pair of them as (vertical, horizontal)."""
    values = tuple(value) if isinstance(value, Sequence) else (value, value)
    first, *others = values * 2 if len(values) == 1 else values
    if len(others) != 1 or not isinstance(first, int) or not isinstance(others[0], int):
        return None
    return first, others[0]


def _mean(model: nn.Module, node: fx.Node) -> Follower | None:
    """The mean over all positions."""
    module, x = module_of(model, node), node.all_input_nodes[0]
    keepdim: object = True
    function: Callable[..., Tensor]
    if surely(module, nn.AdaptiveAvgPool2d) and _both(module.output_size) == (1, 1):  # type: ignore[union-attr]
        function = module  # type: ignore[assignment]
    elif node.target is F.adaptive_avg_pool2d and len(node.args) == 2 and _both(node.args[1]) == (1, 1):
        function = _Applied(F.adaptive_avg_pool2d, (1,), {})
    elif node.target in (torch.mean, "mean") and node.op in ("call_function", "call_method"):
        named = dict(zip(("input", "dim", "keepdim"), node.args, strict=False)) | node.kwargs
        dims, keepdim = named.get("dim"), named.get("keepdim", False)
        places = [d % 4 if isinstance(d, int) else 0 for d in dims] if isinstance(dims, Sequence) else []
        two = sorted(places) == [2, 3]
        if not two or not isinstance(keepdim, bool) or set(named) - {"input", "self", "dim", "keepdim"}:
            return None
        function = _Applied(torch.mean, (), {"dim": (2, 3), "keepdim": keepdim})
    else:
        return None
    return Follower("mean", (x.name,), function, node.name, keepdim=bool(keepdim))
