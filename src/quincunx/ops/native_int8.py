"""The CPU kernels in eight bits: packed weights, and one convolution as a program of one step.

``csrc/int8_gemm.h`` has the kernels, ``csrc/int8_program.h`` says what a program is made of. A map of int8 is
one of uint8 whose numbers and zero point are 128 higher.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from quincunx.ops import native
from quincunx.ops.contract import CHANNELS_LAST
from quincunx.ops.geometry import Geometry
from quincunx.ops.int8 import Grid, check_products
from quincunx.ops.plan import Plan, adjoint_plan, forward_plan

__all__ = ["TYPES", "convolve", "keep", "pack", "run"]

# MapType in csrc/kernel_api.h
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.uint8: 2}


def pack(weight: Tensor, groups: int, transposed: bool) -> Tensor:
    """Return an int8 weight in the kernel's layout, uint8; cached like :func:`quincunx.ops.native.pack`.

    Args:
        weight: [O, C / groups, kh, kw]; with ``transposed`` [C, O / groups, kh, kw].
        groups: channel groups.
        transposed: pack for the adjoint.
    """
    return native._kept(weight, transposed, (groups, transposed), _pack)


def _pack(weight: Tensor, groups: int, transposed: bool) -> Tensor:
    flat = weight.detach().flatten(2)
    grouped = flat.view(groups, -1, *flat.shape[1:])
    packed: Tensor = torch.ops.quincunx_native.pack_int8(grouped.transpose(1, 2) if transposed else grouped)
    return packed


def run(
    inputs: Sequence[Tensor],
    tensors: Sequence[Tensor],
    buffers: Sequence[int],
    code: Sequence[int],
    grids: Sequence[Grid | torch.dtype],
    multipliers: Sequence[int],
) -> list[Tensor]:
    """Run a program in eight bits.

    Args:
        inputs, tensors, buffers, code: as of ``run_program``.
        grids: of each buffer: what its uint8 numbers mean, or the type of its real numbers.
        multipliers: for each step the number of the tensor with its multipliers, or -1.
    """
    found: list[Tensor] = torch.ops.quincunx_native.run_int8_program(
        list(inputs), list(tensors), list(buffers), list(code), *_given(grids), list(multipliers)
    )
    return found


def keep(
    tensors: Sequence[Tensor],
    buffers: Sequence[int],
    code: Sequence[int],
    grids: Sequence[Grid | torch.dtype],
    multipliers: Sequence[int],
) -> native.Kept:
    """Return a program in eight bits that was checked; arguments as of :func:`run`.

    Raises:
        RuntimeError: something does not fit.
    """
    number = torch.ops.quincunx_native.keep_int8_program(
        list(tensors), list(buffers), list(code), *_given(grids), list(multipliers)
    )
    return native.Kept(number)


def _given(grids: Sequence[Grid | torch.dtype]) -> tuple[list[int], list[int], Tensor]:
    """Types, zero points and scales of buffers."""
    types = [TYPES[g.dtype if isinstance(g, Grid) else g] for g in grids]
    zeros = [g.zero if isinstance(g, Grid) else 0 for g in grids]
    scales = torch.tensor([g.scale if isinstance(g, Grid) else 1.0 for g in grids], dtype=torch.float32)
    return types, zeros, scales


def _unsigned(q: Tensor, grid: Grid) -> tuple[Tensor, Grid]:
    if grid.dtype == torch.uint8:
        return q, grid
    return q.view(torch.uint8) ^ 128, replace(grid, zero=grid.zero + 128, dtype=torch.uint8)


def convolve(
    kind: str,
    x: Tensor,
    grid: Grid,
    weight: Tensor,
    multiplier: Tensor,
    bias: Tensor | None,
    sampling: str,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    size: Sequence[int],
    source: str,
    residual: Tensor | None,
    residual_grid: Grid | None,
    activation: int,
    slope: Tensor | None,
    out: Grid | torch.dtype,
) -> Tensor:
    """See :func:`quincunx.ops.int8.convolve`."""
    x, grid = _unsigned(x, grid)
    geometry = Geometry.make(weight.shape[2:], stride, padding, dilation)
    plan: Plan
    if kind == "transposed":
        plan = adjoint_plan(sampling, geometry, size[0], size[1])
        outputs = weight.shape[1] * groups
    else:
        height, width = size if source else x.shape[2:]
        plan = forward_plan(sampling, geometry, height, width, source=source or None)
        outputs = weight.shape[0]
    taps = weight.shape[2] * weight.shape[3]
    check_products(x.shape[1] // groups * taps)
    tensors = [pack(weight, groups, kind == "transposed"), multiplier.float().contiguous()]
    tensors += [plan.index, plan.rows, plan.taps, plan.groups]
    numbers = []
    for optional in (bias, slope):
        numbers.append(len(tensors) if optional is not None else -1)
        if optional is not None:
            tensors.append(optional.float().contiguous())
    inputs = [x]
    given: list[Grid | torch.dtype] = [grid]
    buffers = [0, x.shape[1], *x.shape[2:], 0]
    channels = 0
    if residual is not None:
        if residual_grid is not None:
            residual, residual_grid = _unsigned(residual, residual_grid)
        inputs.append(residual)
        given.append(residual_grid or residual.dtype)
        channels = residual.shape[1]
        buffers += [0, channels, *residual.shape[2:], 0]
    stored = out
    if isinstance(out, Grid) and out.dtype == torch.int8:
        stored = replace(out, zero=out.zero + 128, dtype=torch.uint8)
    given.append(stored)
    buffers += [2, outputs, *plan.out_size, 0]
    code = [0, 0, numbers[0], 1 if residual is not None else -1, -1, channels, -1, -1, 2, 3, 4, 5]
    shifts = plan.lines(taps, groups, x.shape[1]) if native.reads_shifts(torch.uint8) else None
    code += [
        len(inputs),
        -1,
        taps,
        groups,
        activation,
        numbers[1],
        0,
        -1 if shifts is None else len(tensors),
        0,
    ]
    if shifts is not None:
        tensors.append(shifts)
    maps = [t.contiguous(memory_format=CHANNELS_LAST) for t in inputs]
    (found,) = run(maps, tensors, buffers, code, given, [1])
    return (found ^ 128).view(torch.int8) if stored is not out else found
