"""The specification of the operators in eager PyTorch: any device, any dtype.

A dense convolution gathered at the computed positions; a scatter to zeros, then the dense transposed
convolution. Slow on purpose: it does every multiplication, and the other back ends are tested
against it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

from quincunx.ops.bits import unpack_signs
from quincunx.ops.contract import CHANNELS_LAST
from quincunx.ops.geometry import Geometry
from quincunx.ops.lookup import decoded
from quincunx.ops.norm import computed as norm_act
from quincunx.ops.norm import returned as norm_act_backward
from quincunx.ops.plan import FillPlan, fill_plan, nearest_index, position_index

__all__ = [
    "binary_conv",
    "collect",
    "collect_fitted",
    "conv",
    "conv_filled",
    "conv_transpose",
    "conv_weight",
    "fill",
    "fill_fitted",
    "fill_fitted_weight",
    "lookup",
    "norm_act",
    "norm_act_backward",
]


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
    dense = F.conv2d(_pad(x, padding), weight.to(x.dtype), bias, tuple(stride), 0, tuple(dilation), groups)
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
    shortcut: Tensor | None = None,
) -> Tensor:
    height, width = size
    grid = Geometry.make(weight.shape[2:], stride, padding, dilation).grid(height, width)
    scattered = _scatter(y, position_index(sampling, *grid), grid)
    full = F.conv_transpose2d(
        scattered, weight.to(y.dtype), None, tuple(stride), 0, 0, groups, tuple(dilation)
    )
    # positions that no kernel reaches lie beyond the full map and are zero
    top, _, left, _ = padding
    z = F.pad(full, (-left, width + left - full.shape[3], -top, height + top - full.shape[2]))
    if bias is not None:
        z = z + bias.view(1, -1, 1, 1)
    if shortcut is not None:
        z = z + shortcut
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
    channels_last: bool = False,
    wide: bool = False,
) -> Tensor:
    if wide:
        x, y = x.float(), y.float()
    grid = Geometry.make(kernel, stride, padding, dilation).grid(x.shape[2], x.shape[3])
    scattered = _scatter(y, position_index(sampling, *grid), grid)
    shape = torch.Size((y.shape[1], x.shape[1] // groups, kernel[0], kernel[1]))
    layout = CHANNELS_LAST if x.is_cuda or channels_last else torch.contiguous_format
    if x.shape[0] == 0:
        return x.new_zeros(shape).contiguous(memory_format=layout)
    padded = _pad(x, padding)
    gradient: Tensor = conv2d_weight(  # type: ignore[no-untyped-call]
        padded, shape, scattered, tuple(stride), 0, tuple(dilation), groups
    )
    return gradient.contiguous(memory_format=layout)


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


class _FillTables:
    """A fill's tables on a device: kept there, since what is captured as a graph may not be copied to it."""

    def __init__(self, plan: FillPlan, device: torch.device) -> None:
        self.plan = plan
        self.computed, self.skipped = plan.computed.to(device), plan.skipped.to(device)
        self.kinds = plan.kinds[plan.skipped].long().to(device)
        # for each tap: the computed positions that it reads, and which of the skipped ones have it
        self.taps: list[tuple[Tensor, Tensor]] = []
        for tap in range(plan.taps):
            index = plan.index[plan.skipped, tap].long()
            there = (index >= 0).nonzero().flatten()
            self.taps.append((index[there].to(device), there.to(device)))


@lru_cache(maxsize=1024)
def _fill_tables(spec: str, height: int, width: int, reach: int, device: torch.device) -> _FillTables:
    with torch.inference_mode(False):
        return _FillTables(fill_plan(spec, height, width, reach), device)


def fill_fitted(
    y: Tensor, weight: Tensor, bias: Tensor | None, sampling: str, size: Sequence[int], reach: int
) -> Tensor:
    """Sums are made in float32 at least and rounded once."""
    tables = _fill_tables(sampling, int(size[0]), int(size[1]), reach, y.device)
    tables.plan.check(weight.shape, None if bias is None else bias.shape, y.shape)
    wide, kinds = torch.promote_types(y.dtype, torch.float32), tables.kinds
    rows = y.squeeze(3).transpose(1, 2)
    total = rows.new_zeros((y.shape[0], len(kinds), y.shape[1]), dtype=wide)
    if bias is not None:
        total += bias.to(wide)[kinds]
    for tap, (index, there) in enumerate(tables.taps):
        read = rows.index_select(1, index).to(wide)
        total.index_add_(1, there, read * weight[:, tap].to(wide)[kinds[there]])
    dense = _empty_map(y, *tables.plan.size)
    out = dense.permute(0, 2, 3, 1).view(y.shape[0], -1, y.shape[1])
    out.index_copy_(1, tables.computed, rows)
    out.index_copy_(1, tables.skipped, total.to(y.dtype))
    return dense


def collect_fitted(z: Tensor, weight: Tensor, sampling: str, reach: int) -> Tensor:
    """The adjoint of ``fill_fitted`` without its bias."""
    tables = _fill_tables(sampling, int(z.shape[2]), int(z.shape[3]), reach, z.device)
    tables.plan.check(weight.shape, None, z.shape[:2])
    wide, kinds = torch.promote_types(z.dtype, torch.float32), tables.kinds
    rows = z.permute(0, 2, 3, 1).flatten(1, 2).to(wide)
    sums, skipped = rows.index_select(1, tables.computed), rows.index_select(1, tables.skipped)
    for tap, (index, there) in enumerate(tables.taps):
        sums.index_add_(1, index, skipped[:, there] * weight[:, tap].to(wide)[kinds[there]])
    out = sums.transpose(1, 2).unsqueeze(3).to(z.dtype)
    return out.contiguous(memory_format=CHANNELS_LAST)


def fill_fitted_weight(y: Tensor, z: Tensor, sampling: str, reach: int, shape: Sequence[int]) -> Tensor:
    tables = _fill_tables(sampling, int(z.shape[2]), int(z.shape[3]), reach, y.device)
    tables.plan.check(shape, None, y.shape)
    wide, kinds, count = torch.promote_types(y.dtype, torch.float32), tables.kinds, tables.plan.count
    rows = y.squeeze(3).transpose(1, 2)
    skipped = z.permute(0, 2, 3, 1).flatten(1, 2).index_select(1, tables.skipped).to(wide)
    gradient = rows.new_zeros(tuple(shape), dtype=wide)
    for tap, (index, there) in enumerate(tables.taps):
        products = (rows.index_select(1, index).to(wide) * skipped[:, there]).sum(0)
        gradient[:, tap] = products.new_zeros((count, y.shape[1])).index_add_(0, kinds[there], products)
    return gradient.to(y.dtype)


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
