"""Launch the GPU kernels: checks, memory, configurations and grids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from quincunx.ops.contract import CHANNELS_LAST
from quincunx.ops.geometry import Geometry
from quincunx.ops.triton import kernels
from quincunx.ops.triton.configs import Config, for_gemm, for_weight, power
from quincunx.ops.triton.layouts import Layout

__all__ = ["convolve", "derive_weight", "fill_rows", "max_pool", "precision", "reduce_windows"]

_LARGEST = 2**31 - 1


def precision(dtype: torch.dtype) -> str:
    """Return the precision of float32 products, as for cuDNN: ``torch.backends.cudnn.allow_tf32``."""
    if dtype == torch.float32 and not torch.backends.cudnn.allow_tf32:
        return "ieee"
    return "tf32"


def _rows(x: Tensor) -> Tensor:
    """Return a map whose rows of channels are contiguous."""
    return x.contiguous(memory_format=CHANNELS_LAST)


def _wide(*sizes: int) -> bool:
    return max(sizes) > _LARGEST


def _channels_last(weight: Tensor) -> Tensor:
    """Return a weight in the kernels' order: for each first channel tap after tap, channels adjacent."""
    arranged = weight.contiguous(memory_format=CHANNELS_LAST)
    if arranged.shape[1] == 1 or arranged.shape[2] * arranged.shape[3] == 1:
        # torch accepts any strides for dimensions of size one here; contiguous is the same order
        arranged = arranged.contiguous()
    return arranged


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    layout: Layout,
    groups: int,
    *,
    transposed: bool = False,
    residual: Tensor | None = None,
    residual_rows: Tensor | None = None,
    activation: int = 0,
    scale2: Tensor | None = None,
    shift2: Tensor | None = None,
    activation2: int = 1,
    keep: bool = True,
    config: Config | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Compute out = act(conv(x) + bias + residual) and, with ``scale2``, out2 = act2(out scale2 + shift2).

    Args:
        x: map [N, C, ...] whose rows the layout reads.
        weight: [O, C / groups, kh, kw], or for ``transposed`` [C, O / groups, kh, kw].
        bias: [O] or None.
        layout: of the convolution.
        groups: channel groups.
        transposed: whether to compute a transposed convolution.
        residual: map to add; channels beyond its last one are zero.
        residual_rows: int32, the row of ``residual`` for each output row; None if it is the same.
        activation: 0 for none, 1 for ReLU, 2 for ReLU6.
        scale2: [O] or None.
        shift2: [O] or None.
        activation2: of ``out2``, as ``activation``.
        keep: whether to return ``out``.
        config: tiles; by default from the table or the rule.

    Raises:
        ValueError: an activation that these kernels do not have.
    """
    if activation not in (0, 1, 2):
        raise ValueError(f"activation={activation}: expected 0 (none), 1 (ReLU) or 2 (ReLU6)")
    x = _rows(x)
    weight = _channels_last(weight)
    taps = weight.shape[2] * weight.shape[3]
    batch, channels = x.shape[0], x.shape[1]
    outputs = weight.shape[1] * groups if transposed else weight.shape[0]
    shape = (batch, outputs, *layout.out_size)
    out = _empty(x, shape) if keep else None
    out2 = _empty(x, shape) if scale2 is not None else None
    if not batch * outputs * layout.out_rows:
        return out, out2
    inner, outer = channels // groups, outputs // groups
    wide = _wide(x.numel(), batch * outputs * layout.out_rows, 0 if residual is None else residual.numel())
    res_rows = res_channels = 0
    if residual is not None:
        residual = _rows(residual)
        res_rows, res_channels = residual.shape[2] * residual.shape[3], residual.shape[1]
    ends = (bias, residual, residual_rows, scale2, shift2, out, out2)
    with _on(x):
        if inner == outer == 1:
            config = config or Config(64, min(64, power(outputs)), 1, 4, 2)
            kernels.depthwise[_tiles(layout, batch, config.rows), -(-outputs // config.columns)](
                x, weight, *ends, layout.classes, layout.taps, layout.index, layout.rows,
                batch, len(layout.shape), layout.in_rows, layout.out_rows,
                outputs, res_rows, res_channels, TAPS=taps,
                AFFINE=layout.affine, ACT=activation, ACT2=activation2, WIDE=wide,
                BM=config.rows, BN=config.columns, num_warps=config.warps, num_stages=config.stages,
            )  # fmt: skip
            return out, out2
        config = config or for_gemm(x.dtype, batch, inner, outer, groups, layout)
        workspace = None
        if config.split > 1:
            workspace = torch.empty(
                (config.split, batch * layout.out_rows * outputs), dtype=torch.float32, device=x.device
            )
        tiles_n = -(-outer // config.columns)
        kernels.gather_gemm[_tiles(layout, batch, config.rows) * tiles_n, groups, config.split](
            x, weight, *ends, workspace, layout.classes, layout.taps, layout.index, layout.rows,
            batch, len(layout.shape), tiles_n, layout.in_rows, layout.out_rows,
            channels, outputs, res_rows, res_channels,
            C=inner, O=outer, TAPS=taps, TRANSPOSED=transposed, AFFINE=layout.affine, ACT=activation,
            ACT2=activation2, WIDE=wide, PRECISION=precision(x.dtype), SPLIT=config.split, BM=config.rows,
            BN=config.columns, BK=config.depth, num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
        if workspace is not None:
            columns = min(64, power(outputs))
            kernels.finish[-(-batch * layout.out_rows // 32), -(-outputs // columns)](
                workspace, *ends, batch, layout.out_rows, outputs, res_rows, res_channels,
                ACT=activation, ACT2=activation2, WIDE=wide or _wide(workspace.numel()),
                SPLIT=config.split, BM=32, BN=columns, num_warps=4,
            )  # fmt: skip
    return out, out2


def derive_weight(
    x: Tensor,
    y: Tensor,
    kernel: Sequence[int],
    table: Tensor,
    points: int,
    groups: int,
    config: Config | None = None,
) -> Tensor:
    """Return dT/dw [O, C / groups, kh, kw] in channels_last, of a dense and a sampled map; deterministic."""
    taps, inner, outer = kernel[0] * kernel[1], x.shape[1] // groups, y.shape[1] // groups
    out = _empty(x, (y.shape[1], inner, kernel[0], kernel[1]))
    batch = y.shape[0]
    if not batch * points * out.numel():
        return out.zero_()
    x, y = _rows(x), _rows(y)
    config = config or for_weight(x.dtype, batch, points, taps, inner, outer, groups)
    blocks = -(-points // config.depth)
    block_parts = min(config.split, blocks)
    image_parts = min(config.split // block_parts, batch)
    count = block_parts * image_parts
    parts = out
    if count > 1:
        parts = torch.empty((count, out.numel()), dtype=torch.float32, device=x.device)
    tiles_o, tiles_c = -(-outer // config.rows), -(-inner // config.columns)
    with _on(x):
        kernels.weight_grad[tiles_o * tiles_c * taps, groups, count](
            x, y, parts, table, batch, points, x.shape[2] * x.shape[3], x.shape[1], y.shape[1], tiles_c,
            blocks, block_parts, image_parts, C=inner, O=outer, TAPS=taps, GROUPS=groups,
            PRECISION=precision(x.dtype), BP=config.depth, BO=config.rows, BC=config.columns,
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
        if count > 1:
            kernels.reduce_weight[(-(-out.numel() // 1024),)](
                parts, out, out.numel(), count, BLOCK=1024, num_warps=4
            )
    return out


def fill_rows(y: Tensor, index: Tensor, size: Sequence[int]) -> Tensor:
    """Return out[n, :, p] = y[n, :, index[p]]."""
    y = _rows(y)
    channels, rows = y.shape[1], size[0] * size[1]
    out = _empty(y, (y.shape[0], channels, size[0], size[1]))
    total = y.shape[0] * rows
    if total and channels:
        columns = min(256, power(channels))
        many = max(1, 4096 // columns)
        with _on(y):
            kernels.gather_rows[-(-total // many), -(-channels // columns)](
                y, out, index, total, y.shape[2] * y.shape[3], rows, channels,
                WIDE=_wide(out.numel(), y.numel()), BM=many, BN=columns, num_warps=4,
            )  # fmt: skip
    return out


def reduce_windows(x: Tensor, index: Tensor, starts: Tensor, size: Sequence[int], how: str = "sum") -> Tensor:
    """Return the "sum", "mean" or "max" of each window's rows; 0 or -infinity for an empty window."""
    x = _rows(x)
    channels, windows = x.shape[1], size[0] * size[1]
    out = _empty(x, (x.shape[0], channels, size[0], size[1]))
    if out.numel():
        columns = min(256, power(channels))
        with _on(x):
            kernels.collect_rows[x.shape[0] * windows, -(-channels // columns)](
                x, out, index, starts, x.shape[2] * x.shape[3], windows, channels,
                MAX=how == "max", MEAN=how == "mean", WIDE=_wide(out.numel(), x.numel()), BN=columns,
                num_warps=1 if columns <= 64 else 2,
            )  # fmt: skip
    return out


def max_pool(x: Tensor, window: Geometry, size: tuple[int, int]) -> Tensor:
    """Return the maximum of each window of a dense map; ``size`` is the output's (height, width)."""
    x = _rows(x)
    channels = x.shape[1]
    out = _empty(x, (x.shape[0], channels, *size))
    total = x.shape[0] * size[0] * size[1]
    if total and channels:
        columns = min(128, power(channels))
        many = max(1, 2048 // columns)
        with _on(x):
            kernels.max_rows[-(-total // many), -(-channels // columns)](
                x, out, total, x.shape[2], x.shape[3], *size, channels,
                KH=window.kernel[0], KW=window.kernel[1], SH=window.stride[0], SW=window.stride[1],
                TOP=window.padding[0], LEFT=window.padding[2], DH=window.dilation[0],
                DW=window.dilation[1], BM=many, BN=columns, num_warps=4,
            )  # fmt: skip
    return out


def _empty(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=CHANNELS_LAST)


def _tiles(layout: Layout, batch: int, rows: int) -> int:
    return sum(-(-batch * points // rows) for points, _ in layout.shape)


def _on(x: Tensor) -> Any:
    """Make the tensor's device current, since Triton launches on the current device."""
    return torch.cuda.device(x.device) if x.is_cuda else _Here()


class _Here:
    """No device to switch to: the interpreter's tensors are on the CPU."""

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...
