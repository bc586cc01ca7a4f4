"""Attributes that a network's forward may read from a layer, for the modules that replace it.

A forward that casts its input to ``conv.weight.dtype``, or views a map by ``conv.out_channels``, keeps
working. Settings are plain attributes; if a module has no parameter of that name, ``weight`` is the
kernel that it is equivalent to.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quincunx.ops.geometry import Padding, expand_padding, two_integers

__all__ = [
    "CONV_ATTRIBUTES",
    "LINEAR_ATTRIBUTES",
    "ConvLike",
    "kernel_of_bottleneck",
    "kernel_of_halves",
    "torch_padding",
]

LINEAR_ATTRIBUTES = ("in_features", "out_features", "weight", "bias")
CONV_ATTRIBUTES = (
    *("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"),
    *("padding_mode", "transposed", "output_padding", "weight", "bias"),
)


def torch_padding(
    value: Padding, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> str | tuple[int, ...]:
    """Return ``padding`` in the form of ``nn.Conv2d``: a word or (vertical, horizontal).

    Unequal sides, which torch supports only by the word, are (top, bottom, left, right) if no word fits.

    Example:
        >>> torch_padding(1, (3, 3), (1, 1), (1, 1)), torch_padding((1, 1, 0, 0), (3, 1), (1, 1), (1, 1))
        ((1, 1), (1, 0))
    """
    if isinstance(value, str):
        return value
    sides = expand_padding(value, kernel, stride, dilation)
    if sides[::2] == sides[1::2]:
        return sides[::2]
    same = tuple(stride) == (1, 1) and sides == expand_padding("same", kernel, stride, dilation)
    return "same" if same else sides


class ConvLike(nn.Module):
    """A module with the settings of the zero-padded ``nn.Conv2d`` that it replaces.

    Example:
        >>> layer = ConvLike()
        >>> layer.settle(3, 8, 5, padding=2)
        >>> layer.kernel_size, layer.padding, layer.stride, layer.transposed
        ((5, 5), (2, 2), (1, 1), False)
    """

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: str | tuple[int, ...]
    dilation: tuple[int, int]
    groups: int
    padding_mode: str
    transposed: bool
    output_padding: tuple[int, int]

    def settle(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        *,
        stride: int | Sequence[int] = 1,
        padding: Padding = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
    ) -> None:
        """Store the settings, with the values and types that ``nn.Conv2d`` gives them."""
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size = two_integers("kernel_size", kernel_size, 1)
        self.stride, self.dilation = two_integers("stride", stride, 1), two_integers("dilation", dilation, 1)
        self.padding = torch_padding(padding, self.kernel_size, self.stride, self.dilation)
        self.padding_mode, self.transposed, self.output_padding = "zeros", False, (0, 0)


def kernel_of_halves(vertical: Tensor, horizontal: Tensor, groups: int) -> Tensor:
    r"""Return W [O, C / groups, dh, dw] of a d x 1 and a 1 x d convolution with K channels per group between.

    .. math:: W_{n,c,i,j} = \sum_k V_{k,c,i}\, T_{n,k,j}

    Example:
        >>> kernel_of_halves(torch.ones(2, 3, 3, 1), torch.ones(4, 2, 1, 5), 1).shape
        torch.Size([4, 3, 3, 5])
    """
    v = vertical.reshape(groups, -1, *vertical.shape[1:3])
    t = horizontal.reshape(groups, -1, horizontal.shape[1], horizontal.shape[3])
    return torch.einsum("gkci,gnkj->gncij", v, t).flatten(0, 1)


def kernel_of_bottleneck(down: Tensor, up: Tensor, groups: int, density: float) -> Tensor:
    """Return the approximate kernel [O, C / groups, kh, kw] of a sampled and then a transposed convolution.

    Their exact kernel differs from position to position and is larger than each of theirs; this is the
    mean over all positions, cropped to the size of one.

    Example:
        >>> kernel_of_bottleneck(torch.ones(2, 3, 3, 3), torch.ones(2, 4, 3, 3), 1, 0.5)[0, 0, 1]
        tensor([6., 9., 6.])
    """
    height, width = down.shape[2:]
    joined = [
        F.conv2d(first.transpose(0, 1), second.transpose(0, 1), padding=(height // 2, width // 2))
        for first, second in zip(down.chunk(groups), up.chunk(groups), strict=True)
    ]
    return torch.cat([part.transpose(0, 1) for part in joined])[:, :, :height, :width] * density
