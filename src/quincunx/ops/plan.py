"""Geometry as tables, computed once per (sampling, grid, kernel) and cached.

A *plan* holds, for every computed position, the input rows that it reads, one per kernel tap, and -1
where a tap falls outside. A "row" is a position of a channels_last map: its C values are adjacent.
Positions that read through the same taps form a *tap group*, so that a transposed convolution from
a sampled map never multiplies by a structural zero.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from quincunx.ops.geometry import Geometry
from quincunx.sampling import Cosets, from_spec

__all__ = [
    "Plan",
    "ShiftPlan",
    "WindowPlan",
    "adjoint_plan",
    "collect_plan",
    "forward_plan",
    "nearest_index",
    "nearest_shares",
    "position_index",
    "shift_plan",
    "window_plan",
]


F_ = TypeVar("F_", bound=Callable[..., object])


def _kept(make: F_) -> F_:
    """Cache each result as an ordinary tensor: one made in inference mode could not be used in training."""
    return lru_cache(maxsize=1024)(torch.inference_mode(False)(make))  # type: ignore[return-value]


@dataclass(frozen=True)
class Plan:
    """The gather tables of one convolution, all int32.

    Attributes:
        index: flat; group after group, a block [positions, taps] of input rows, -1 for "outside".
        rows: flat; the output row of each position, group after group.
        taps: flat; the kernel taps of each group, tap = i * kw + j.
        groups: [G, 2]; (positions, taps) of each group.
        out_size: the output map's (height, width).
        in_rows: number of rows of the input map.
    """

    index: Tensor
    rows: Tensor
    taps: Tensor
    groups: Tensor
    out_size: tuple[int, int]
    in_rows: int

    @property
    def reads(self) -> int:
        """The number of rows read, including border taps: MACs = reads * C * O / channel groups."""
        return int(self.index.numel())


@_kept
def position_index(spec: str, height: int, width: int) -> Tensor:
    """Return row-major indices of the computed positions, LongTensor [m]. Do not write to it."""
    return from_spec(spec).mask(height, width).flatten().nonzero().flatten()


@_kept
def nearest_index(spec: str, height: int, width: int) -> Tensor:
    """Return for each grid position the number (0..m-1) of the nearest computed one, LongTensor [H W].

    The distance is Euclidean; ties go to the lowest row-major index.
    """
    mask = from_spec(spec).mask(height, width)
    return _nearest(mask)


@_kept
def nearest_shares(spec: str, height: int, width: int) -> Tensor:
    """Return the share of the grid that takes each computed position's value, float32 [m]; they sum to 1."""
    index, m = nearest_index(spec, height, width), position_index(spec, height, width).shape[0]
    return index.bincount(minlength=m).double().div(height * width).float()


def _nearest(mask: Tensor) -> Tensor:
    """Return the exact nearest computed position, separably: along each row first, then over rows.

    The key distance^2 * (H W) + index orders by distance and then by index; the result is its minimum over
    the nearest candidates of every row, since within a row only those can win.
    """
    height, width = mask.shape
    columns = torch.arange(width)
    far = 2 * (height + width)
    left = torch.where(mask, columns, -far).cummax(dim=1).values
    right = torch.where(mask, columns, far).flip(1).cummin(dim=1).values.flip(1)
    # on a tie the left one has the lower index
    best = torch.where(columns - left <= right - columns, left, right)
    exists = (best >= 0) & (best < width)
    number = (mask.flatten().cumsum(0) - 1).view(height, width)
    row_base = torch.arange(height)[:, None] * width
    column_part = (columns - best) ** 2
    flat = (row_base + best.clamp(0, width - 1)).long()
    result = torch.empty(height, width, dtype=torch.long)
    never = torch.iinfo(torch.long).max
    for r in range(height):
        distance = column_part + (torch.arange(height)[:, None] - r) ** 2
        key = torch.where(exists, distance * (height * width) + flat, never)
        winner = key.argmin(dim=0)
        result[r] = number.flatten()[flat[winner, columns]]
    return result.flatten()


def _input_rows(geometry: Geometry, positions: Tensor, grid_width: int, height: int, width: int) -> Tensor:
    """Return the input row behind each tap of each output position, [len(positions), taps], -1 outside."""
    kh, kw = geometry.kernel
    row = torch.div(positions, grid_width, rounding_mode="floor")
    col = positions - row * grid_width
    tap_r = (torch.arange(kh) * geometry.dilation[0]).repeat_interleave(kw)
    tap_c = (torch.arange(kw) * geometry.dilation[1]).repeat(kh)
    r = row[:, None] * geometry.stride[0] - geometry.padding[0] + tap_r
    c = col[:, None] * geometry.stride[1] - geometry.padding[2] + tap_c
    inside = (r >= 0) & (r < height) & (c >= 0) & (c < width)
    return torch.where(inside, r * width + c, -1)


@_kept
def forward_plan(spec: str, geometry: Geometry, height: int, width: int, source: str | None = None) -> Plan:
    """Return the tables of a sampled convolution of an H x W map: one tap group that has every tap.

    Args:
        spec: sampling of the output grid; empty for every position.
        geometry: of the convolution.
        height: H.
        width: W.
        source: sampling of the input map if it is a sampled map, to be read as if filled from
            the nearest computed position; the filled map is never stored.
    """
    grid = geometry.grid(height, width)
    if spec:
        positions = position_index(spec, *grid)
        out_size = (int(positions.shape[0]), 1)
    else:
        positions = torch.arange(grid[0] * grid[1])
        out_size = grid
    table = _input_rows(geometry, positions, grid[1], height, width)
    in_rows = height * width
    if source is not None:
        nearest = nearest_index(source, height, width)
        table = torch.where(table >= 0, nearest[table.clamp_min(0)], -1)
        in_rows = int(position_index(source, height, width).shape[0])
    taps = geometry.kernel[0] * geometry.kernel[1]
    count = int(positions.shape[0])
    return Plan(
        index=table.flatten().int(),
        rows=torch.arange(count, dtype=torch.int32),
        taps=torch.arange(taps, dtype=torch.int32),
        groups=torch.tensor([[count, taps]], dtype=torch.int32),
        out_size=out_size,
        in_rows=in_rows,
    )


@_kept
def adjoint_plan(spec: str, geometry: Geometry, height: int, width: int) -> Plan:
    """Return the tables of the transposed convolution: every position of H x W gathers from the sampled map.

    An output position (r, c) reads, through tap (i, j), the grid position (p, q) with
    p stride + i dilation - top = r (likewise columns), if that one is computed. Which taps can
    ever match depends only on the position's residues, so interior positions with the same taps form
    a group; border positions join the group of their residues and read -1 for missing positions.
    """
    grid = geometry.grid(height, width)
    positions = position_index(spec, *grid) if spec else torch.arange(grid[0] * grid[1])
    m = int(positions.shape[0])
    kh, kw = geometry.kernel
    taps = kh * kw
    # scatter the forward table: forward row (position k, tap t) -> input row x means x reads (k, t)
    forward = _input_rows(geometry, positions, grid[1], height, width)
    table = torch.full((height * width, taps), -1, dtype=torch.long)
    which, tap = (forward >= 0).nonzero(as_tuple=True)
    table[forward[which, tap], tap] = which
    used = table >= 0
    signature = _residue_signature(spec, geometry, height, width, used)
    patterns, member = signature.unique(dim=0, return_inverse=True)  # type: ignore[no-untyped-call]
    order = member.argsort(stable=True)
    counts = member.bincount(minlength=patterns.shape[0])
    blocks: list[Tensor] = []
    tap_lists: list[Tensor] = []
    meta: list[tuple[int, int]] = []
    start = 0
    for pattern, count in zip(patterns, counts.tolist(), strict=True):
        members = order[start : start + count]
        start += count
        active = pattern.nonzero().flatten()
        blocks.append(table[members][:, active].flatten())
        tap_lists.append(active)
        meta.append((count, int(active.shape[0])))
    return Plan(
        index=torch.cat(blocks).int(),
        rows=order.int(),
        taps=torch.cat(tap_lists).int(),
        groups=torch.tensor(meta, dtype=torch.int32),
        out_size=(height, width),
        in_rows=m,
    )


def _residue_signature(spec: str, geometry: Geometry, height: int, width: int, used: Tensor) -> Tensor:
    """Return the taps of each position's group, BoolTensor [H W, taps]; a superset of the taps it uses.

    For cosets the taps are the union over the positions with equal residues modulo the period
    (in input coordinates, period times stride), which joins border and interior positions. Other
    samplings have no period: a position's own taps are its signature, unless the groups would have too few
    positions to pay off; then all positions share one group with every tap.
    """
    sampling = from_spec(spec) if spec else None
    if sampling is None or isinstance(sampling, Cosets):
        period = sampling.period if isinstance(sampling, Cosets) else 1
        step_r, step_c = period * geometry.stride[0], period * geometry.stride[1]
        residue = (torch.arange(height) % step_r)[:, None] * step_c + torch.arange(width) % step_c
        flat = residue.flatten()
        union = torch.zeros(step_r * step_c, used.shape[1], dtype=torch.int32)
        union.index_add_(0, flat, used.int())
        return union[flat] > 0
    if len(used.unique(dim=0)) * 8 <= len(used):  # type: ignore[no-untyped-call]
        return used
    return torch.ones_like(used)


@dataclass(frozen=True)
class ShiftPlan:
    """A dense convolution in which a tap is a shift: position q reads slot offsets[tap] + q.

    Attributes:
        slots: int32, the input row of each slot, -1 for "outside".
        offsets: int32 [taps].
        rows: int32, the output row of each position, -1 for one that only pads the order.
        out_size: the output map's (height, width).
    """

    slots: Tensor
    offsets: Tensor
    rows: Tensor
    out_size: tuple[int, int]


@_kept
def shift_plan(geometry: Geometry, height: int, width: int) -> ShiftPlan:
    """Return slots in which every tap reads neighbours for neighbouring positions, whatever the stride.

    Input positions with equal residues modulo the stride form a plane, in which neighbouring outputs
    read neighbours. A plane's rows are stored one after the other, separated by a gap of zeros as wide as
    taps reach beyond a row's end or start, so that one gap serves both.
    """
    grid = geometry.grid(height, width)
    rows = [_phase(geometry, 0, i) for i in range(geometry.kernel[0])]
    cols = [_phase(geometry, 1, j) for j in range(geometry.kernel[1])]
    top, low = min(shift for _, shift in rows), max(shift for _, shift in rows)
    before = max(0, -min(shift for _, shift in cols))
    pitch = grid[1]
    for phase, shift in cols:
        length = len(range(phase, width, geometry.stride[1]))
        pitch = max(pitch, length + max(before, grid[1] + shift - length))
    lines, planes = grid[0] + low - top, sorted({(a, b) for a, _ in rows for b, _ in cols})
    size = lines * pitch + before
    slots = torch.full((len(planes), size), -1)
    for number, (a, b) in enumerate(planes):
        r = torch.arange(top, top + lines)[:, None] * geometry.stride[0] + a
        c = torch.arange(pitch)[None] * geometry.stride[1] + b
        inside = (r >= 0) & (r < height) & (c < width)
        slots[number, before:] = torch.where(inside, r * width + c, -1).flatten()
    offsets = [
        planes.index((a, b)) * size + (down - top) * pitch + right + before
        for a, down in rows
        for b, right in cols
    ]
    count = (grid[0] - 1) * pitch + grid[1]
    q = torch.arange(count)
    row, col = torch.div(q, pitch, rounding_mode="floor"), q % pitch
    return ShiftPlan(
        slots=slots.flatten().int(),
        offsets=torch.tensor(offsets, dtype=torch.int32),
        rows=torch.where(col < grid[1], row * grid[1] + col, -1).int(),
        out_size=grid,
    )


@dataclass(frozen=True)
class WindowPlan:
    """The input rows of each window of a pooling or a sum, without duplicates, int32.

    Attributes:
        index: window after window, the input rows.
        starts: [windows + 1]; the start of each window's rows in ``index``, and the end of the last.
        out_size: the output map's (height, width).
    """

    index: Tensor
    starts: Tensor
    out_size: tuple[int, int]


@_kept
def window_plan(source: str, geometry: Geometry, height: int, width: int) -> WindowPlan:
    """Return rows of a sampled map in the windows of a pooling of the H x W map filled from it.

    Args:
        source: sampling of the map; empty for every position.
        geometry: of the pooling.
        height: H.
        width: W.

    Raises:
        ValueError: no window fits.
    """
    grid = geometry.grid(height, width)
    if grid[0] < 1 or grid[1] < 1:
        raise ValueError(f"a pooling by {geometry.kernel} does not fit a padded map of {(height, width)}")
    table = _input_rows(geometry, torch.arange(grid[0] * grid[1]), grid[1], height, width)
    if source:
        table = torch.where(table >= 0, nearest_index(source, height, width)[table.clamp_min(0)], -1)
    table = table.sort(dim=1).values
    fresh = table >= 0
    fresh[:, 1:] &= table[:, 1:] != table[:, :-1]
    return WindowPlan(
        index=table[fresh].int(),
        starts=F.pad(fresh.sum(1).cumsum(0), (1, 0)).int(),
        out_size=grid,
    )


@_kept
def collect_plan(spec: str, height: int, width: int) -> WindowPlan:
    """Return for each computed position the grid positions that take its value: the transposed table."""
    nearest, m = nearest_index(spec, height, width), position_index(spec, height, width).shape[0]
    return WindowPlan(
        index=nearest.argsort(stable=True).int(),
        starts=F.pad(nearest.bincount(minlength=m).cumsum(0), (1, 0)).int(),
        out_size=(m, 1),
    )


def _phase(geometry: Geometry, axis: int, tap: int) -> tuple[int, int]:
    """Return the plane that a tap reads along an axis, and its shift from the output's own place there."""
    start = tap * geometry.dilation[axis] - geometry.padding[2 * axis]
    return start % geometry.stride[axis], start // geometry.stride[axis]
