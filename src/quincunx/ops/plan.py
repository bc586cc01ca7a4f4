"""Geometry as tables, computed once per (sampling, grid, kernel) and cached.

A *plan* holds, for every computed position, the input rows that it reads, one per kernel tap, and -1
where a tap falls outside. A "row" is a position of a channels_last map: its C values are adjacent.
Positions that read through the same taps form a *tap group*, so that a transposed convolution from
a sampled map never multiplies by a structural zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import count as counter
from operator import itemgetter
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from quincunx.ops.geometry import Geometry
from quincunx.ops.shifts import Reads, shift_table
from quincunx.sampling import Cosets, Sampling, from_spec

__all__ = [
    "FillAdjoint",
    "FillPlan",
    "Plan",
    "ShiftPlan",
    "WindowPlan",
    "adjoint_plan",
    "collect_plan",
    "coset_taps",
    "fill_adjoint_plan",
    "fill_plan",
    "fill_sizes",
    "forward_plan",
    "nearest_index",
    "nearest_shares",
    "position_index",
    "shift_plan",
    "tap_distances",
    "window_plan",
]


# as csrc/tile_gemm.h: a step has the channels of at least four taps of so few
_FEW_CHANNELS = 8

# positions of a mask that are computed together, in tiles of as many rows
_LEAST_ALIKE = 16

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
        reads_of: makes the same by rows and columns.
    """

    index: Tensor
    rows: Tensor
    taps: Tensor
    groups: Tensor
    out_size: tuple[int, int]
    in_rows: int
    reads_of: Callable[[], Reads] | None = None

    @cached_property
    def shifts(self) -> Tensor:
        """The table of :func:`quincunx.ops.shifts.shift_table`; made when it is first asked for."""
        return self._shifts(apart=False)

    @cached_property
    def shifts_apart(self) -> Tensor:
        """The same with inputs side by side as they lie in the map, where a stride sets outputs apart."""
        return self._shifts(apart=True)

    def _shifts(self, apart: bool) -> Tensor:
        if self.reads_of is None:
            return torch.zeros(0, dtype=torch.int32)
        with torch.inference_mode(False):
            return shift_table(self.reads_of(), apart)

    def lines(self, taps: int, groups: int, channels: int) -> Tensor | None:
        """The table of shifts that a kernel reads: of several taps in one channel group, if there are lines.

        Several taps of few channels are one step where their inputs lie side by side.
        """
        if groups != 1 or taps == 1:
            return None
        if channels <= _FEW_CHANNELS and len(self.shifts_apart):
            return self.shifts_apart
        return self.shifts if len(self.shifts) else None

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


def _taps(geometry: Geometry) -> tuple[Tensor, Tensor]:
    """The rows and the columns of the taps, as distances from the first."""
    kh, kw = geometry.kernel
    rows = (torch.arange(kh) * geometry.dilation[0]).repeat_interleave(kw)
    return rows, (torch.arange(kw) * geometry.dilation[1]).repeat(kh)


def _two(positions: Tensor, width: int) -> tuple[Tensor, Tensor]:
    row = torch.div(positions, width, rounding_mode="floor")
    return row, positions - row * width


def _read_positions(geometry: Geometry, positions: Tensor, grid_width: int) -> tuple[Tensor, Tensor]:
    """Return row and column behind each tap of each output position, [len(positions), taps], also outside."""
    (row, col), (tap_r, tap_c) = _two(positions, grid_width), _taps(geometry)
    r = row[:, None] * geometry.stride[0] - geometry.padding[0] + tap_r
    c = col[:, None] * geometry.stride[1] - geometry.padding[2] + tap_c
    return r, c


def _input_rows(geometry: Geometry, positions: Tensor, grid_width: int, height: int, width: int) -> Tensor:
    """Return the input row behind each tap of each output position, [len(positions), taps], -1 outside."""
    r, c = _read_positions(geometry, positions, grid_width)
    inside = (r >= 0) & (r < height) & (c >= 0) & (c < width)
    return torch.where(inside, r * width + c, -1)


def _period(spec: str) -> int:
    """Of the lattice of a sampling; 1 for one without."""
    sampling = from_spec(spec) if spec else None
    return sampling.period if isinstance(sampling, Cosets) else 1


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

    def reads() -> Reads:
        outputs = torch.stack(_two(positions, grid[1]), -1)
        inputs = torch.stack(_read_positions(geometry, positions, grid[1]), -1)
        rows, entries = torch.arange(count), table.numel()
        return Reads(outputs, inputs, table, rows, entries, geometry.stride, _period(spec), False)

    return Plan(
        index=table.flatten().int(),
        rows=torch.arange(count, dtype=torch.int32),
        taps=torch.arange(taps, dtype=torch.int32),
        groups=torch.tensor([[count, taps]], dtype=torch.int32),
        out_size=out_size,
        in_rows=in_rows,
        reads_of=reads,
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

    def reads() -> Reads:
        own, (tap_r, tap_c) = torch.stack(_two(torch.arange(height * width), width), -1), _taps(geometry)
        top, _, left, _ = geometry.padding
        # where a tap lies between two rows or columns, no output of its class reads it
        r = (own[:, :1] + top - tap_r).div(geometry.stride[0], rounding_mode="floor")
        c = (own[:, 1:] + left - tap_c).div(geometry.stride[1], rounding_mode="floor")
        rows, entries = torch.arange(height * width), sum(map(torch.numel, blocks))
        return Reads(own, torch.stack((r, c), -1), table, rows, entries, geometry.stride, _period(spec), True)

    return Plan(
        index=torch.cat(blocks).int(),
        rows=order.int(),
        taps=torch.cat(tap_lists).int(),
        groups=torch.tensor(meta, dtype=torch.int32),
        out_size=(height, width),
        in_rows=m,
        reads_of=reads,
    )


def _residue_signature(spec: str, geometry: Geometry, height: int, width: int, used: Tensor) -> Tensor:
    """Return the taps of each position's group, BoolTensor [H W, taps]; a superset of the taps it uses.

    For cosets the taps are the union over the positions with equal residues modulo the period
    (in input coordinates, period times stride), which joins border and interior positions. Other
    samplings have no period: positions that use similar taps form a group.
    """
    sampling = from_spec(spec) if spec else None
    if sampling is not None and not isinstance(sampling, Cosets):
        return _alike(used)
    period = 1 if sampling is None else sampling.period
    step_r, step_c = period * geometry.stride[0], period * geometry.stride[1]
    residue = (torch.arange(height) % step_r)[:, None] * step_c + torch.arange(width) % step_c
    flat = residue.flatten()
    union = torch.zeros(step_r * step_c, used.shape[1], dtype=torch.int32)
    union.index_add_(0, flat, used.int())
    return union[flat] > 0


def _alike(used: Tensor) -> Tensor:
    """Return the taps of each position's group: at least a tile of positions that use similar taps.

    A group is divided by the tap that most of its positions do without.
    """
    found = torch.empty_like(used)
    todo = [torch.arange(len(used))]
    while todo:
        members = todo.pop()
        own = used[members]
        having = own.sum(0)
        without = len(members) - having
        allowed = (having >= _LEAST_ALIKE) & (without >= _LEAST_ALIKE)
        if not bool(allowed.any()):
            found[members] = having > 0
            continue
        has = own[:, int(torch.where(allowed, without, -1).argmax())]
        todo += [members[has], members[~has]]
    return found


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


@dataclass(frozen=True)
class FillPlan:
    """The computed positions that each skipped position is filled from, int32.

    Attributes:
        index: [H W, T] (at least one column); the numbers (0..m-1) of the computed positions that a skipped
            position reads, the nearest one first, -1 for none; a computed position's own number comes first.
        kinds: [H W]; the row of coefficients that a skipped position uses, -1 for a computed one.
        count: how many rows of coefficients there are.
        taps: T, the columns that count; 0 where skipped positions read nothing.
        computed, skipped: LongTensors; the row-major indices of both.
        distance: [count, T] float64; distances of the taps, infinite for none.
        size: (H, W).
    """

    index: Tensor
    kinds: Tensor
    count: int
    taps: int
    computed: Tensor
    skipped: Tensor
    distance: Tensor
    size: tuple[int, int]

    @property
    def reads(self) -> int:
        """Values that the skipped positions read of one channel: its multiply-adds."""
        return int((self.index[self.skipped, : self.taps] >= 0).sum())

    def check(self, weight: Sequence[int], bias: Sequence[int] | None, y: Sequence[int]) -> None:
        """Refuse coefficients, a bias or a sampled map of other sizes.

        Raises:
            ValueError: what was expected and what there is.
        """
        channels = y[1]
        # without taps there is nothing that rows could differ in
        rows = self.count if self.taps else weight[0]
        if tuple(weight) != (rows, self.taps, channels):
            raise ValueError(
                f"weight: expected [{self.count}, {self.taps}, {channels}] for this sampling on a grid of "
                f"{self.size[0]} x {self.size[1]}, got {tuple(weight)}"
            )
        if bias is not None and tuple(bias) != (self.count, channels):
            raise ValueError(f"bias: expected [{self.count}, {channels}], got {tuple(bias)}")
        if bias is not None and not self.taps and len(self.skipped):
            raise ValueError("bias: expected None where skipped positions read nothing")
        if len(y) > 2 and tuple(y[2:]) != (len(self.computed), 1):
            raise ValueError(f"y: expected [N, C, {len(self.computed)}, 1], got {tuple(y)}")


@_kept
def fill_plan(spec: str, height: int, width: int, reach: int) -> FillPlan:
    """Tables of a fill that combines computed positions.

    For cosets the skipped positions of one residue class share coefficients. Their taps are the computed
    positions at most ``reach`` rows and columns away, farther where a class has none so near; a tap outside
    the grid, or on the grid's border where it hits none, is the computed position nearest to it. For other
    samplings each skipped position has its own coefficients and the ``reach`` nearest computed positions.
    The first tap is always the one that the nearest fill copies. A ``reach`` of 0 gives no taps.
    """
    sampling = from_spec(spec)
    computed = position_index(spec, height, width)
    mask = torch.zeros(height * width, dtype=torch.bool)
    mask[computed] = True
    skipped = (~mask).nonzero().flatten()
    if isinstance(sampling, Cosets):
        offsets, row, col = coset_taps(spec, reach), skipped // width, skipped % width
        numbers = torch.tensor(_class_numbers(sampling), dtype=torch.long)
        kind, classes = numbers[row % sampling.period, col % sampling.period], len(offsets)
        table = _tap_table(spec, offsets, kind, row, col, (height, width))
        distance = tap_distances(offsets)
    else:
        kind, classes = torch.arange(len(skipped)), len(skipped)
        table, distance = _neighbour_table(skipped, computed, width, min(reach, len(computed)))
    taps = table.shape[1]
    if taps:
        table[:, 0] = nearest_index(spec, height, width)[skipped]
    index = torch.full((height * width, max(1, taps)), -1, dtype=torch.int32)
    index[computed, 0] = torch.arange(len(computed), dtype=torch.int32)
    if taps:
        index[skipped] = table.int()
    kinds = torch.full((height * width,), -1, dtype=torch.int32)
    kinds[skipped] = kind.int()
    return FillPlan(index, kinds, classes, taps, computed, skipped, distance, (height, width))


@_kept
def fill_kinds_plan(spec: str, height: int, width: int, reach: int) -> tuple[Tensor, Tensor]:
    """Skipped positions of :func:`fill_plan`, kind by kind; where each kind begins: int32 [s], [R + 1]."""
    plan = fill_plan(spec, height, width, reach)
    kinds = plan.kinds[plan.skipped]
    order = plan.skipped[kinds.argsort(stable=True)]
    starts = F.pad(torch.bincount(kinds, minlength=plan.count).cumsum(0), (1, 0))
    return order.int(), starts.int()


@dataclass(frozen=True)
class FillAdjoint:
    """The fill read backwards, int32: which positions of the grid each computed position's value went to.

    Attributes:
        index: [m, T']; positions of the grid, its own first, -1 for none.
        kinds: [m]; the row of ``rows`` that a computed position uses.
        rows: LongTensor [K, T']; for each list of coefficients that computed positions have, rows of the
            coefficients [R T, C] followed by one row of ones, which is the own position's.
    """

    index: Tensor
    kinds: Tensor
    rows: Tensor


@_kept
def fill_adjoint_plan(spec: str, height: int, width: int, reach: int) -> FillAdjoint:
    """Tables of the adjoint of :func:`fill_plan`'s fill, which is a fill itself.

    Computed positions of one residue class are read by the same taps, but for those near the border, so there
    are few different lists of coefficients.
    """
    plan = fill_plan(spec, height, width, reach)
    own = plan.count * plan.taps
    readers: list[list[tuple[int, int]]] = [[(int(p), own)] for p in plan.computed]
    kinds, index = plan.kinds.tolist(), plan.index.tolist()
    for p in plan.skipped.tolist() if plan.taps else []:
        for tap, number in enumerate(index[p]):
            if number >= 0:
                readers[number].append((p, kinds[p] * plan.taps + tap))
    # in the order of coefficients, so that positions with the same ones share a list
    readers = [[first, *sorted(rest, key=itemgetter(1))] for first, *rest in readers]
    longest = max(map(len, readers))
    numbers: dict[tuple[int, ...], int] = {}
    which = [numbers.setdefault(tuple(row for _, row in found), len(numbers)) for found in readers]
    rows = [[*found, *[own] * (longest - len(found))] for found in numbers]
    places = [[p for p, _ in found] + [-1] * (longest - len(found)) for found in readers]
    return FillAdjoint(
        index=torch.tensor(places, dtype=torch.int32),
        kinds=torch.tensor(which, dtype=torch.int32),
        rows=torch.tensor(rows),
    )


Taps = tuple[tuple[tuple[int, int], ...], ...]
# beyond these a window is no small one; what a file claims ends here too
_LARGEST = {"period": 64, "window": 16, "neighbours": 256, "grid": 1 << 24}


def fill_sizes(sampling: Sampling, reach: int, height: int, width: int) -> tuple[int, int]:
    """How many rows of coefficients a fill has, and how many taps; no table is made for that.

    Args:
        sampling, reach: as :func:`fill_plan` has them.
        height, width: of the grid; what is returned for cosets does not depend on it.

    Raises:
        ValueError: a reach, a period or a grid that is too large for coefficients.
    """
    cosets = isinstance(sampling, Cosets)
    if reach > (most := _LARGEST["window" if cosets else "neighbours"]):
        raise ValueError(f"reach={reach}: expected at most {most}")
    if isinstance(sampling, Cosets):
        if sampling.period > _LARGEST["period"]:
            raise ValueError(f"period={sampling.period}: a fitted fill takes at most {_LARGEST['period']}")
        taps = coset_taps(sampling.spec, reach)
        return len(taps), max((len(found) for found in taps), default=0)
    if height * width > _LARGEST["grid"]:
        raise ValueError(f"grid {height} x {width}: too large for coefficients of each position")
    m = sampling.count(height, width)
    return height * width - m, min(reach, m) if height * width > m else 0


def _class_numbers(sampling: Cosets) -> list[list[int]]:
    """The number of each skipped residue class (row, column), row-major; -1 for computed ones."""
    kept, fresh = set(sampling.offsets), counter()
    span = range(sampling.period)
    return [[-1 if (a, b) in kept else next(fresh) for a in span] for b in span]


@lru_cache(maxsize=1024)
def coset_taps(spec: str, reach: int) -> Taps:
    """For each skipped residue class of cosets its taps (rows down, columns across), nearest first."""
    sampling = from_spec(spec)
    if not isinstance(sampling, Cosets):
        raise TypeError(f"spec={spec!r}: expected cosets")
    period, kept = sampling.period, set(sampling.offsets)
    offsets = []
    for b, row in enumerate(_class_numbers(sampling)):
        for a, number in enumerate(row):
            found: list[tuple[int, int]] = []
            radius = reach
            while number >= 0 and reach and not found:
                span = range(-radius, radius + 1)
                around = [(r, c) for r in span for c in span]
                found = [(r, c) for r, c in around if ((a + c) % period, (b + r) % period) in kept]
                radius += 1
            if number >= 0:
                offsets.append(tuple(sorted(found, key=lambda at: (at[0] ** 2 + at[1] ** 2, at))))
    return tuple(offsets)


def tap_distances(offsets: Taps) -> Tensor:
    """Distances of the taps of classes, float64 [R, T], infinite where a class has fewer than another."""
    taps = max((len(found) for found in offsets), default=0)
    rows = [[math.hypot(*at) for at in found] + [math.inf] * (taps - len(found)) for found in offsets]
    return torch.tensor(rows, dtype=torch.float64).view(len(offsets), taps)


def _tap_table(
    spec: str, offsets: Taps, kind: Tensor, row: Tensor, col: Tensor, size: tuple[int, int]
) -> Tensor:
    """For each skipped position of cosets the computed ones that its taps hit."""
    height, width = size
    taps = max((len(found) for found in offsets), default=0)
    nearest = nearest_index(spec, height, width)
    table = torch.full((len(kind), taps), -1, dtype=torch.long)
    for number, found in enumerate(offsets):
        members = (kind == number).nonzero().flatten()
        for tap, (down, across) in enumerate(found):
            r = (row[members] + down).clamp(0, height - 1)
            c = (col[members] + across).clamp(0, width - 1)
            table[members, tap] = nearest[r * width + c]
    return table


# of distances between skipped and computed positions that are held at a time
_DISTANCES = 1 << 24


def _neighbour_table(skipped: Tensor, computed: Tensor, width: int, count: int) -> tuple[Tensor, Tensor]:
    """The numbers of the nearest computed positions, and their distances; ties by row-major index."""
    m = len(computed)
    table = torch.empty(len(skipped), count, dtype=torch.long)
    distance = torch.empty(len(skipped), count, dtype=torch.float64)
    if not count:
        return table, distance
    step = max(1, _DISTANCES // m)
    for first in range(0, len(skipped), step):
        some = skipped[first : first + step]
        squares = (some[:, None] // width - computed // width) ** 2
        squares = squares + (some[:, None] % width - computed % width) ** 2
        key = (squares * m + torch.arange(m)).topk(count, largest=False, sorted=True).values
        table[first : first + step] = key % m
        distance[first : first + step] = (key // m).double().sqrt()
    return table, distance


def _phase(geometry: Geometry, axis: int, tap: int) -> tuple[int, int]:
    """Return the plane that a tap reads along an axis, and its shift from the output's own place there."""
    start = tap * geometry.dilation[axis] - geometry.padding[2 * axis]
    return start % geometry.stride[axis], start // geometry.stride[axis]
