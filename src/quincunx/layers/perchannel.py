"""A number, or a constant for each channel, that a map is multiplied by or added to: norms written out."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from quincunx.layers.tracing import attribute_of

__all__ = ["PerChannel", "per_channel"]

_TIMES = {operator.mul, operator.imul, torch.mul, torch.multiply, "mul", "mul_", "multiply"}
_OVER = {operator.truediv, operator.itruediv, torch.div, torch.true_divide, "div", "div_", "true_divide"}
_PLUS = {operator.add, operator.iadd, torch.add, "add", "add_"}
_MINUS = {operator.sub, operator.isub, torch.sub, torch.subtract, "sub", "sub_", "subtract"}


@dataclass(frozen=True)
class PerChannel:
    """What a node does to each position of a map by itself: y = scale x + shift.

    Attributes:
        source: the map.
        scale, shift: a number or a tensor [C]; None for none of it.
    """

    source: fx.Node
    scale: Tensor | float | None = None
    shift: Tensor | float | None = None


def per_channel(
    root: nn.Module, node: fx.Node, last: bool = False, kind: Callable[..., Any] | None = None
) -> PerChannel | None:
    """Return a node as what it does to each channel of one map, None for any other.

    Args:
        root: whose tensors the graph names.
        node: of the graph; in place or not.
        last: whether maps are [N, H, W, C].
        kind: of torch's or Python's operators, the one that the node's function stands for.
    """
    if node.op not in ("call_function", "call_method") or len(node.args) != 2 or node.kwargs:
        return None
    kind = node.target if kind is None else kind  # type: ignore[assignment]
    one, other = node.args
    if kind in _TIMES or kind in _PLUS:
        turned = not isinstance(one, fx.Node) or one.op == "get_attr"
        one, other = (other, one) if turned else (one, other)
    elif kind not in _OVER and kind not in _MINUS:
        return None
    if not isinstance(one, fx.Node) or one.op == "get_attr":
        return None
    constant = _constant(root, node, other, last)
    if constant is None:
        return None
    if kind in _TIMES:
        return PerChannel(one, scale=constant)
    if kind in _OVER:
        return PerChannel(one, scale=1 / constant) if bool(torch.as_tensor(constant).all()) else None
    return PerChannel(one, shift=constant if kind in _PLUS else -constant)


def _constant(root: nn.Module, node: fx.Node, given: Any, last: bool) -> Tensor | float | None:
    """A number, or a tensor of one value for each channel."""
    if isinstance(given, (int, float)) and not isinstance(given, bool):
        return float(given) if math.isfinite(given) else None
    if not isinstance(given, fx.Node) or given.op != "get_attr":
        return None
    try:
        value = attribute_of(root, given)
    except AttributeError:
        return None
    if not isinstance(value, Tensor) or not value.is_floating_point() or not bool(value.isfinite().all()):
        return None
    # of the dimensions of a map, those from its channels on
    behind = value.shape[-1:] if last else value.shape[-3:]
    fits = value.numel() == 1 or behind == (value.numel(), *([] if last else [1, 1]))
    return value.detach().flatten() if fits and value.dim() <= 4 else None
