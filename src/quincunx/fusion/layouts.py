"""Weights of what ``fuse`` leaves to torch, in the layout in memory of the maps that they meet.

oneDNN takes a map in channels_last with a weight in either layout, but puts a weight that lies otherwise in
order at every call; for the 7 x 7 head of a VGG network that takes longer than the convolution.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quincunx.fusion.program import Program
from quincunx.modules import surely

__all__ = ["LaidOut", "LaidOutTransposed", "lay_out_weights"]


def lay_out_weights(fused: nn.Module) -> None:
    """Let convolutions that run in torch read weights in the layout of their maps.

    Each has its weight in channels_last besides, from the first map on that is: maps come as the network's
    input does, and who looks at the layout of a convolution's result sees the same one as before.
    """
    steps = {part for m in fused.modules() if isinstance(m, Program) for part in m.modules()}
    for module in [m for m in fused.modules() if m not in steps]:
        plain = getattr(type(module), "_conv_forward", None) is nn.Conv2d._conv_forward
        if plain and "_conv_forward" not in vars(module):
            module._conv_forward = LaidOut(module)  # type: ignore[assignment]
        elif surely(module, nn.ConvTranspose2d):
            module.forward = LaidOutTransposed(module)


class LaidOut:
    """A convolution's arithmetic with its weight in the layout of the map that it is given.

    Args:
        conv: whose ``_conv_forward`` this is to be.
    """

    def __init__(self, conv: Any) -> None:
        self.conv = conv
        self.kept: tuple[Any, Tensor] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"conv": self.conv, "kept": None}

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        conv, padding = self.conv, self.conv.padding
        if conv.padding_mode != "zeros":  # which may make a map of another layout
            x, padding = F.pad(x, conv._reversed_padding_repeated_twice, mode=conv.padding_mode), 0
        weight = self.weight_for(x, weight)
        return F.conv2d(x, weight, bias, conv.stride, padding, conv.dilation, conv.groups)

    def weight_for(self, x: Tensor, weight: Tensor) -> Tensor:
        """The weight; where it lies otherwise than a map in channels_last, the same values in that layout."""
        last = torch.channels_last
        # what stands for a weight while a compiler or an exporter traces lies in no memory
        if torch.compiler.is_compiling() or type(weight) not in (Tensor, nn.Parameter):
            return weight
        follows = x.dim() == 4 and x.is_contiguous(memory_format=last) and not x.is_contiguous()
        # what a subclass makes anew at each call is not worth keeping
        own = weight is self.conv._parameters.get("weight") and not weight.is_inference()
        if not follows or not own or weight.requires_grad or weight.is_contiguous(memory_format=last):
            return weight
        state = (weight.data_ptr(), weight._version, weight.dtype, weight.device)
        kept = self.kept  # another thread may put another one in its place
        if kept is not None and kept[0] == state:
            return kept[1]
        with torch.inference_mode(False):
            arranged: Tensor = weight.detach().contiguous(memory_format=last)
        self.kept = state, arranged
        return arranged


class LaidOutTransposed(LaidOut):
    """The same for a transposed convolution, whose whole ``forward`` this is to be."""

    def __call__(self, x: Tensor, output_size: Any = None) -> Tensor:  # type: ignore[override]
        conv = self.conv
        where = conv.stride, conv.padding
        added = conv._output_padding(x, output_size, *where, conv.kernel_size, 2, conv.dilation)
        weight = self.weight_for(x, conv.weight)
        return F.conv_transpose2d(x, weight, conv.bias, *where, added, conv.groups, conv.dilation)
