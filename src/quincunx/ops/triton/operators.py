"""The contract's operators on CUDA, with the kernels of this package."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from quincunx.ops.geometry import Geometry
from quincunx.ops.plan import collect_plan, nearest_index
from quincunx.ops.triton import launch
from quincunx.ops.triton.layouts import adjoint_layout, forward_layout, weight_table

__all__ = ["collect", "conv", "conv_filled", "conv_transpose", "conv_weight", "fill"]


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
    geometry = Geometry.make(weight.shape[2:], stride, padding, dilation)
    layout = forward_layout(sampling, geometry, x.shape[2], x.shape[3], None, x.device)
    return _wanted(launch.convolve(x, weight.to(x.dtype), bias, layout, groups))


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
    geometry = Geometry.make(weight.shape[2:], stride, padding, dilation)
    layout = forward_layout(sampling, geometry, size[0], size[1], source, y.device)
    return _wanted(launch.convolve(y, weight.to(y.dtype), bias, layout, groups))


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
    geometry = Geometry.make(weight.shape[2:], stride, padding, dilation)
    layout = adjoint_layout(sampling, geometry, size[0], size[1], y.device)
    z = _wanted(launch.convolve(y, weight.to(y.dtype), bias, layout, groups, transposed=True))
    return z if shortcut is None else z.add_(shortcut)


def conv_weight(
    x: Tensor,
    y: Tensor,
    kernel: Sequence[int],
    sampling: str,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    channels_last: bool = True,
    wide: bool = False,
) -> Tensor:
    """In channels_last whatever is asked for: convolutions on GPUs read weights so."""
    geometry = Geometry.make(kernel, stride, padding, dilation)
    table, points = weight_table(sampling, geometry, x.shape[2], x.shape[3], x.device)
    gradient = launch.derive_weight(x, y, kernel, table, points, groups)
    return gradient.float() if wide else gradient


def fill(y: Tensor, sampling: str, size: Sequence[int]) -> Tensor:
    return launch.fill_rows(y, _nearest(sampling, size[0], size[1], y.device), size)


def collect(z: Tensor, sampling: str) -> Tensor:
    """Sum in float32 in the table's order, so that the result is deterministic."""
    index, starts, size = _shared(sampling, z.shape[2], z.shape[3], z.device)
    return launch.reduce_windows(z, index, starts, size)


def _wanted(found: tuple[Tensor | None, Tensor | None]) -> Tensor:
    out = found[0]
    if out is None:
        raise RuntimeError("a convolution without an output")
    return out


@lru_cache(maxsize=1024)
@torch.inference_mode(False)
def _nearest(spec: str, height: int, width: int, device: torch.device) -> Tensor:
    return nearest_index(spec, height, width).int().to(device)


@lru_cache(maxsize=1024)
@torch.inference_mode(False)
def _shared(
    spec: str, height: int, width: int, device: torch.device
) -> tuple[Tensor, Tensor, tuple[int, int]]:
    plan = collect_plan(spec, height, width)
    return plan.index.to(device), plan.starts.to(device), plan.out_size
