r"""How the GPU kernels find rows: a few integers for cosets, a table for everything else.

Positions whose taps are the same shifts form a *class*. With cosets a class is a lattice of points
(a, b), a = 0 .. A - 1 and b = 0 .. B - 1, and its indices are affine:

.. math:: \text{output row} &= a\,o_A + b\,o_B + o_0, \\
          \text{input row of tap } t &= a\,t_A + b\,t_B + s_t.

This holds for compact maps too: the number of computed positions in a grid row depends only on its residue
modulo the period, so ranks are affine. One bit per tap says whether a point's tap falls inside the map.
Explicit positions, and maps read as if filled, use the tables of :mod:`quincunx.ops.plan`, shared by all
images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from quincunx.ops.geometry import Geometry
from quincunx.ops.plan import Plan, adjoint_plan, forward_plan
from quincunx.sampling import Cosets, from_spec

__all__ = ["CLASS_FIELDS", "TAP_BITS", "Layout", "adjoint_layout", "forward_layout", "weight_table"]

# a class: points, columns B, o_A, o_B, o_0, t_A, t_B, its start in the bits, first tap, taps; with tables
# the columns are the class's start in the rows, and o_A its start in the index
CLASS_FIELDS = 10
# a tap: s_t 2^TAP_BITS + the kernel's tap
TAP_BITS = 12
# the most taps that have a bit
_MOST_TAPS = 63
# searching more tap groups than this costs a kernel more than their missing taps save
_MOST_GROUPS = 16


@dataclass(frozen=True, eq=False)
class Layout:
    """The rows that a convolution reads and writes, on one device.

    Attributes:
        affine: whether classes are lattices; otherwise ``index`` and ``rows`` are tables.
        classes: int32 [G, CLASS_FIELDS], those with most taps first.
        taps: int64 [T], each tap with its shift.
        index: for tables int32: class after class, a block [taps, positions] of input rows, -1 outside; for
            lattices int32 or int64: class after class the bits of the taps that fall inside.
        rows: int32, for tables: the output row of each position.
        in_rows: rows of an image's input map.
        out_rows: rows of an image's output map.
        out_size: the output map's (height, width).
        shape: (points, taps) of each class.
    """

    affine: bool
    classes: Tensor
    taps: Tensor
    index: Tensor
    rows: Tensor | None
    in_rows: int
    out_rows: int
    out_size: tuple[int, int]
    shape: tuple[tuple[int, int], ...]

    @property
    def reads(self) -> int:
        """The number of rows read, including border taps."""
        return sum(points * taps for points, taps in self.shape)


class _Ranks:
    """Numbers a grid's computed positions, in row-major order, by an affine function."""

    def __init__(self, spec: str, grid: tuple[int, int]) -> None:
        sampling = from_spec(spec) if spec else None
        self.grid, self.period = grid, 1
        offsets: tuple[tuple[int, int], ...] = ((0, 0),)
        if sampling is not None:
            assert isinstance(sampling, Cosets)  # noqa: S101
            self.period, offsets = sampling.period, sampling.offsets
        # computed columns of the rows with each residue
        self.columns = [sorted(a for a, b in offsets if b == row) for row in range(self.period)]
        counts = [sum(_count(grid[1], a, self.period) for a in columns) for columns in self.columns]
        self.per_period = sum(counts)
        self.before = [sum(counts[:row]) for row in range(self.period)]
        self.total = sum(n * _count(grid[0], row, self.period) for row, n in enumerate(counts))
        self.offsets = [(row, a) for row, columns in enumerate(self.columns) for a in columns]

    def at(self, row: int, column: int) -> tuple[int, int, int] | None:
        """Return (o_A, o_B, o_0) of positions (row + K a, column + K b), also off the grid, or None."""
        down, r = divmod(row, self.period)
        right, c = divmod(column, self.period)
        columns = self.columns[r]
        if c not in columns:
            return None
        start = down * self.per_period + self.before[r] + right * len(columns) + columns.index(c)
        return self.per_period, len(columns), start


def _count(length: int, start: int, step: int) -> int:
    return len(range(start, length, step))


def _is_affine(spec: str, geometry: Geometry) -> bool:
    few = geometry.kernel[0] * geometry.kernel[1] <= _MOST_TAPS
    return few and (not spec or isinstance(from_spec(spec), Cosets))


@dataclass(frozen=True)
class _Lattice:
    """A class of an affine layout."""

    count: tuple[int, int]  # A, B
    out: tuple[int, int, int]  # o_A, o_B, o_0
    step: tuple[int, int]  # t_A, t_B
    taps: tuple[tuple[int, int], ...]  # the kernel's tap, s_t
    # bit t of a point is set if tap t is on the grid in both directions
    rows: tuple[tuple[int, int, int], ...]  # of each tap: first row, step, rows of the grid
    columns: tuple[tuple[int, int, int], ...]

    def bits(self) -> Tensor:
        """Return the bits of each point, int64 [A B]."""
        a, b = torch.arange(self.count[0])[:, None], torch.arange(self.count[1])
        found = torch.zeros(self.count, dtype=torch.int64)
        for t, ((r, down, height), (c, right, width)) in enumerate(zip(self.rows, self.columns, strict=True)):
            row, column = r + a * down, c + b * right
            inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            found |= inside.long() << t
        return found.flatten()


@lru_cache(maxsize=1024)
@torch.inference_mode(False)
def forward_layout(
    spec: str, geometry: Geometry, height: int, width: int, source: str | None, device: torch.device
) -> Layout:
    """Return the layout of a sampled convolution; arguments as for :func:`quincunx.ops.plan.forward_plan`."""
    if source is not None or not _is_affine(spec, geometry):
        return _tabled(forward_plan(spec, geometry, height, width, source=source), device)
    grid = geometry.grid(height, width)
    ranks = _Ranks(spec, grid)
    step_r, step_c = ranks.period * geometry.stride[0], ranks.period * geometry.stride[1]
    found = []
    for row, column in ranks.offsets:
        place = ranks.at(row, column)
        corner_r = row * geometry.stride[0] - geometry.padding[0]
        corner_c = column * geometry.stride[1] - geometry.padding[2]
        reached = [(corner_r + down, corner_c + right) for down, right in _reach(geometry)]
        count = _count(grid[0], row, ranks.period), _count(grid[1], column, ranks.period)
        if place is not None and count[0] * count[1]:
            found.append(
                _Lattice(
                    count,
                    place,
                    (step_r * width, step_c),
                    tuple((tap, r * width + c) for tap, (r, c) in enumerate(reached)),
                    tuple((r, step_r, height) for r, _ in reached),
                    tuple((c, step_c, width) for _, c in reached),
                )
            )
    out_size = (ranks.total, 1) if spec else grid
    return _affine(found, height * width, ranks.total, out_size, device)


@lru_cache(maxsize=1024)
@torch.inference_mode(False)
def adjoint_layout(spec: str, geometry: Geometry, height: int, width: int, device: torch.device) -> Layout:
    """Return the layout of the transposed convolution; arguments: :func:`quincunx.ops.plan.adjoint_plan`."""
    lattices = None
    grid = geometry.grid(height, width)
    if _is_affine(spec, geometry):
        ranks = _Ranks(spec, grid)
        lattices = _adjoint_lattices(ranks, geometry, height, width)
    if lattices is None:
        return _tabled(_merged(adjoint_plan(spec, geometry, height, width), geometry), device)
    return _affine(lattices, ranks.total, height * width, (height, width), device)


def _adjoint_lattices(ranks: _Ranks, geometry: Geometry, height: int, width: int) -> list[_Lattice] | None:
    """Return one lattice per residue; None if a class reads rows with different numbers of positions."""
    step_r, step_c = ranks.period * geometry.stride[0], ranks.period * geometry.stride[1]
    found = []
    for row in range(min(step_r, height)):
        for column in range(min(step_c, width)):
            read = []
            for tap, (down, right) in enumerate(_reach(geometry)):
                p, not_r = divmod(row + geometry.padding[0] - down, geometry.stride[0])
                q, not_c = divmod(column + geometry.padding[2] - right, geometry.stride[1])
                place = None if not_r or not_c else ranks.at(p, q)
                if place is not None:
                    read.append((tap, place, p, q))
            steps = {place[:2] for _, place, _, _ in read} or {(0, 0)}
            if len(steps) > 1:
                return None
            found.append(
                _Lattice(
                    (_count(height, row, step_r), _count(width, column, step_c)),
                    (step_r * width, step_c, row * width + column),
                    steps.pop(),
                    tuple((tap, place[2]) for tap, place, _, _ in read),
                    tuple((p, ranks.period, ranks.grid[0]) for _, _, p, _ in read),
                    tuple((q, ranks.period, ranks.grid[1]) for _, _, _, q in read),
                )
            )
    return found


def _reach(geometry: Geometry) -> list[tuple[int, int]]:
    """Return how far below and right of the window's corner each tap reads."""
    return [
        (i * geometry.dilation[0], j * geometry.dilation[1])
        for i in range(geometry.kernel[0])
        for j in range(geometry.kernel[1])
    ]


def _affine(
    lattices: Sequence[_Lattice],
    in_rows: int,
    out_rows: int,
    out_size: tuple[int, int],
    device: torch.device,
) -> Layout:
    # the longest first, so that no tile starts late and ends last
    ordered = sorted(lattices, key=lambda lattice: -len(lattice.taps))
    classes: list[tuple[int, ...]] = []
    taps: list[tuple[int, int]] = []
    bits = [torch.zeros(0, dtype=torch.int64)]
    at = 0
    for lattice in ordered:
        points = lattice.count[0] * lattice.count[1]
        numbers = (*lattice.out, *lattice.step, at, len(taps), len(lattice.taps))
        classes.append((points, lattice.count[1], *numbers))
        taps += lattice.taps
        bits.append(lattice.bits())
        at += points
    table = torch.cat(bits)
    most = max((len(lattice.taps) for lattice in ordered), default=0)
    return Layout(
        affine=True,
        classes=_integers(classes, CLASS_FIELDS, device),
        taps=_taps(taps, device),
        index=_table(table.int() if most < 32 else table, device),
        rows=None,
        in_rows=in_rows,
        out_rows=out_rows,
        out_size=out_size,
        shape=tuple((c[0], c[-1]) for c in classes),
    )


def _integers(values: Sequence[tuple[int, ...]], fields: int, device: torch.device) -> Tensor:
    # a kernel needs a pointer even if there is nothing to read
    return torch.tensor(list(values) or [(0,) * fields], dtype=torch.int32).to(device)


def _taps(values: Sequence[tuple[int, int]], device: torch.device) -> Tensor:
    return torch.tensor([shift * 2**TAP_BITS + tap for tap, shift in values] or [0]).to(device)


def _merged(plan: Plan, geometry: Geometry) -> Plan:
    """Merge a plan with too many groups into one group with every tap."""
    if len(plan.groups) <= _MOST_GROUPS:
        return plan
    taps = geometry.kernel[0] * geometry.kernel[1]
    count = int(plan.rows.numel())
    table = torch.full((count, taps), -1, dtype=torch.int32)
    at = first = tap_at = 0
    for points, width in plan.groups.tolist():
        block = plan.index[at : at + points * width].view(points, width)
        table[first : first + points, plan.taps[tap_at : tap_at + width].long()] = block
        at, first, tap_at = at + points * width, first + points, tap_at + width
    return Plan(
        index=table.flatten(),
        rows=plan.rows,
        taps=torch.arange(taps, dtype=torch.int32),
        groups=torch.tensor([[count, taps]], dtype=torch.int32),
        out_size=plan.out_size,
        in_rows=plan.in_rows,
    )


def _tabled(plan: Plan, device: torch.device) -> Layout:
    """Return a plan's tables with each tap's rows adjacent, as a GPU's threads read them."""
    classes, blocks = [], []
    at = first = tap_at = 0
    for points, width in plan.groups.tolist():
        blocks.append(plan.index[at : at + points * width].view(points, width).t().reshape(-1))
        classes.append((points, first, at, 0, 0, 0, 0, 0, tap_at, width))
        at, first, tap_at = at + points * width, first + points, tap_at + width
    ordered = sorted((c for c in classes if c[0]), key=lambda c: -c[-1])
    out_rows = plan.out_size[0] * plan.out_size[1]
    return Layout(
        affine=False,
        classes=_integers(ordered, CLASS_FIELDS, device),
        taps=_taps([(tap, 0) for tap in plan.taps.tolist()], device),
        index=_table(torch.cat(blocks) if blocks else plan.index, device),
        rows=_table(plan.rows, device),
        in_rows=plan.in_rows,
        out_rows=out_rows,
        out_size=plan.out_size,
        shape=tuple((c[0], c[-1]) for c in ordered),
    )


def _table(values: Tensor, device: torch.device) -> Tensor:
    return (values if values.numel() else values.new_zeros(1)).to(device)


@lru_cache(maxsize=1024)
@torch.inference_mode(False)
def weight_table(
    spec: str, geometry: Geometry, height: int, width: int, device: torch.device
) -> tuple[Tensor, int]:
    """Return the input row behind each tap of each computed position, int32 [taps, m], and m."""
    plan = forward_plan(spec, geometry, height, width)
    taps = geometry.kernel[0] * geometry.kernel[1]
    table = plan.index.view(-1, taps).t().contiguous()
    return _table(table, device), int(table.shape[1])
