"""The activations that a step applies to its output: their numbers, and what they are in torch.

The kernels have the same numbers (``Activation`` in csrc/kernel_api.h).
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Activation", "apply"]


class Activation(IntEnum):
    """LEAKY is both leaky ReLU and PReLU: a slope for each channel."""

    NONE = 0
    RELU = 1
    RELU6 = 2
    LEAKY = 3
    HARDSIGMOID = 4
    HARDSWISH = 5
    SIGMOID = 6
    SILU = 7
    GELU = 8
    GELU_TANH = 9


_FUNCTIONS: dict[int, Callable[[Tensor], Tensor]] = {
    Activation.RELU: F.relu,
    Activation.RELU6: F.relu6,
    Activation.HARDSIGMOID: F.hardsigmoid,
    Activation.HARDSWISH: F.hardswish,
    Activation.SIGMOID: torch.sigmoid,
    Activation.SILU: F.silu,
    Activation.GELU: F.gelu,
    Activation.GELU_TANH: partial(F.gelu, approximate="tanh"),
}


# of a map that nobody else reads
_IN_PLACE: dict[int, Callable[[Tensor], Tensor]] = {
    Activation.RELU: torch.relu_,
    Activation.RELU6: partial(F.relu6, inplace=True),
    Activation.HARDSIGMOID: partial(F.hardsigmoid, inplace=True),
    Activation.HARDSWISH: partial(F.hardswish, inplace=True),
    Activation.SIGMOID: torch.sigmoid_,
    Activation.SILU: partial(F.silu, inplace=True),
}


def apply(kind: int, out: Tensor, slope: Tensor | None = None, *, own: bool = False) -> Tensor:
    """An activation of a map [N, C, H, W].

    Args:
        slope: of ``LEAKY``, what negative values are multiplied by, [C].
        own: whether nobody else reads the map, so that the result may take its place.

    Example:
        >>> apply(Activation.LEAKY, torch.tensor([[[[-2.0]], [[3.0]]]]), torch.tensor([0.5, 0.1])).flatten()
        tensor([-1.,  3.])
    """
    if kind == Activation.NONE:
        return out
    if kind == Activation.LEAKY and slope is not None:
        return F.prelu(out, slope.to(out.dtype))
    return (_IN_PLACE if own and kind in _IN_PLACE else _FUNCTIONS)[kind](out)
