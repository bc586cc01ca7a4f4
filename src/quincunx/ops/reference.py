"""The specification of the operators in eager PyTorch: any device, any dtype.

A dense convolution gathered at the computed positions; a scatter to zeros, then the dense transposed
convolution. Slow on purpose: it does every multiplication, and the other back ends are tested
against it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

from quincunx.ops.bits import unpack_signs
from quincunx.ops.contract import CHANNELS_LAST
from quincunx.ops.geometry import Geometry
from quincunx.ops.lookup import decoded
from quincunx.ops.plan import nearest_index, position_index

__all__ = ["binary_conv", "collect", "conv", "conv_filled", "conv_transpose", "conv_weight", "fill", "lookup"]


def _pad(x: Tensor, padding: Sequence[int]) -> Tensor:
    top, bottom, left, right = padding
    return F.pad(x, (left, right, top, bottom)) if any(padding) else x


def _gather(x: Tensor, index: Tensor) -> Tensor:
    """Rows of a dense map as a sampled map in channels_last."""
    rows = x.flatten(2).index_select(2, index.to(x.device))
    return rows.unsqueeze(3).contiguous(memory_format=CHANNELS_LAST)


def _scatter(y: Tensor, index: Tensor, size: tuple[int, int]) -> Tensor:
    """A sampled map on a grid that is zero elsewhere."""
    flat = y.new_zeros((y.shape[0], y.shape[1], size[0] * size[1]))
    filled = flat.index_copy(2, index.to(y.device), y.squeeze(3))
    return filled.view(y.shape[0], y.shape[1], *size)


def _empty_map(like: Tensor, height: int, width: int) -> Tensor:
    shape = (like.shape[0], like.shape[1], height, width)
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=CHANNELS_LAST)


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    sampling: str,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    dense = F.conv2d(_pad(x, padding), weight, bias, tuple(stride), 0, tuple(dilation), groups)
    return _gather(dense, position_index(sampling, dense.shape[2], dense.shape[3]))


def conv_transpose(
    y: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    size: Sequence[int],
    sampling: str,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    height, width = size
    grid = Geometry.make(weight.shape[2:], stride, padding, dilation).grid(height, width)
    scattered = _scatter(y, position_index(sampling, *grid), grid)
    full = F.conv_transpose2d(scattered, weight, None, tuple(stride), 0, 0, groups, tuple(dilation))
    # positions that no kernel reaches lie beyond the full map and are zero
    top, _, left, _ = padding
    z = F.pad(full, (-left, width + left - full.shape[3], -top, height + top - full.shape[2]))
    if bias is not None:
        z = z + bias.view(1, -1, 1, 1)
    return z.contiguous(memory_format=CHANNELS_LAST)


def conv_weight(
    x: Tensor,
    y: Tensor,
    kernel: Sequence[int],
    sampling: str,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    grid = Geometry.make(kernel, stride, padding, dilation).grid(x.shape[2], x.shape[3])
    scattered = _scatter(y, position_index(sampling, *grid), grid)
    shape = torch.Size((y.shape[1], x.shape[1] // groups, kernel[0], kernel[1]))
    laid = CHANNELS_LAST if x.is_cuda else torch.contiguous_format
    if x.shape[0] == 0:
        return x.new_zeros(shape).contiguous(memory_format=laid)
    padded = _pad(x, padding)
    gradient: Tensor = conv2d_weight(  # type: ignore[no-untyped-call]
        padded, shape, scattered, tuple(stride), 0, tuple(dilation), groups
    )
    return gradient.contiguous(memory_format=laid)


def fill(y: Tensor, sampling: str, size: Sequence[int]) -> Tensor:
    height, width = size
    index = nearest_index(sampling, height, width).to(y.device)
    # position by position: in channels_last all channels of one lie together. Written in place, so
    # that the result is no view, which nobody could change in place
    dense = _empty_map(y, height, width)
    out = dense.permute(0, 2, 3, 1).view(y.shape[0], height * width, y.shape[1])
    torch.index_select(y.squeeze(3).transpose(1, 2), 1, index, out=out)
    return dense


def conv_filled(
    y: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    source: str,
    size: Sequence[int],
    sampling: str,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    return conv(fill(y, source, size), weight, bias, sampling, stride, padding, dilation, groups)


def collect(z: Tensor, sampling: str) -> Tensor:
    """The adjoint of ``fill``: positions that share a computed value add their entries."""
    height, width = z.shape[2:]
    index = nearest_index(sampling, height, width).to(z.device)
    m = int(position_index(sampling, height, width).shape[0])
    sums = _empty_map(z, m, 1).zero_()
    sums.squeeze(3).transpose(1, 2).index_add_(1, index, z.permute(0, 2, 3, 1).flatten(1, 2))
    return sums


def lookup(
    x: Tensor,
    codebooks: Tensor,
    assignments: Tensor,
    bias: Tensor | None,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """The codebooks decoded to a weight, and a convolution with it."""
    weight = decoded(codebooks, assignments, x.shape[1] // groups, kernel, groups)
    y = F.conv2d(_pad(x, padding), weight, bias, tuple(stride), 0, tuple(dilation), groups)
    return y.contiguous(memory_format=CHANNELS_LAST)


def binary_conv(
    x: Tensor,
    bits: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    weight = unpack_signs(bits, (x.shape[1] // groups, *kernel), x.dtype)
    y = F.conv2d(_pad(x, padding), weight, None, tuple(stride), 0, tuple(dilation), groups)
    if scale is not None:
        y = y * scale.to(y.dtype).view(-1, 1, 1)
    if bias is not None:
        y = y + bias.to(y.dtype).view(-1, 1, 1)
    return y.contiguous(memory_format=CHANNELS_LAST)
