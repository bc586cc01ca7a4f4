"""Tables of shifts say what the gather tables say, and kernels that read them answer as the reference."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quincunx.ops import native
from quincunx.ops.geometry import Geometry
from quincunx.ops.plan import adjoint_plan, forward_plan
from quincunx.sampling import CHESSBOARD, QUARTER, THREE_QUARTERS, Cosets, EvenGrid, Random

THIRD = Cosets(3, [(0, 0), (1, 2), (2, 1)])
SAMPLINGS = {
    "dense": "",
    "chessboard": CHESSBOARD.spec,
    "quarter": QUARTER.spec,
    "three quarters": THREE_QUARTERS.spec,
    "third": THIRD.spec,
    "rows of four": Cosets(4, [(a, 1) for a in range(4)]).spec,
    "two of nine": Cosets(3, [(0, 0), (1, 0)]).spec,
    "random": Random(0.5, 0).spec,
}


def gathered(plan):
    """What each output reads through each tap, of its gather tables."""
    found, index, taps, rows = {}, plan.index.tolist(), plan.taps.tolist(), plan.rows.tolist()
    for positions, used in plan.groups.tolist():
        own, taps = taps[:used], taps[used:]
        for row in rows[:positions]:
            read, index = index[:used], index[used:]
            found[row] = {tap: one for tap, one in zip(own, read, strict=True) if one >= 0}
        rows = rows[positions:]
    return found


def in_lines(table):
    """The same of its table of shifts, and the tiles of 16 outputs times taps that it takes."""
    values = table.tolist()
    classes, slots = values[:2]
    heads = [values[2 + 2 * i : 4 + 2 * i] for i in range(classes)]
    body, found, tiles = values[2 + 2 * classes :], {}, 0
    lines = body[len(body) - slots :]
    for taps, positions in heads:
        own, offsets, rows = body[:taps], body[taps : 2 * taps], body[2 * taps : 2 * taps + positions]
        body = body[2 * taps + positions :]
        tiles += -(-positions // 16) * taps
        assert own == sorted(own)
        for q, row in enumerate(rows):
            if row < 0:
                continue
            assert row not in found
            read = {tap: lines[offset + q] for tap, offset in zip(own, offsets, strict=True)}
            found[row] = {tap: one for tap, one in read.items() if one >= 0}
    assert len(body) == slots
    return found, tiles


geometries = st.builds(
    Geometry,
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(*(st.integers(0, 3) for _ in range(4))),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
)


@given(geometries, st.integers(10, 24), st.integers(10, 24), st.sampled_from(sorted(SAMPLINGS)))
def test_lines_say_what_gather_tables_say(geometry, height, width, name):
    if min(geometry.grid(height, width)) < 4:
        return
    for plan in (
        forward_plan(SAMPLINGS[name], geometry, height, width),
        adjoint_plan(SAMPLINGS[name], geometry, height, width),
        forward_plan("", geometry, height, width, source=CHESSBOARD.spec),
    ):
        if len(plan.shifts):
            assert in_lines(plan.shifts)[0] == gathered(plan)


@pytest.mark.parametrize("side", [56, 28, 14])
@pytest.mark.parametrize("name", [name for name in SAMPLINGS if name != "random"])
def test_lattices_have_lines_with_few_gaps(name, side):
    geometry = Geometry((3, 3), padding=(1, 1, 1, 1))
    for make in (forward_plan, adjoint_plan):
        plan = make(SAMPLINGS[name], geometry, side, side)
        found, tiles = in_lines(plan.shifts)
        assert found == gathered(plan)
        least = sum(map(len, found.values())) / 16
        assert tiles <= least * {14: 1.8, 28: 1.4, 56: 1.2}[side]


def test_masks_have_lines_where_every_position_is_written():
    """Only there: an output that is computed or not follows no rule."""
    geometry = Geometry((3, 3), padding=(1, 1, 1, 1))
    assert not len(forward_plan(Random(0.5, 0).spec, geometry, 28, 28).shifts)
    plan = adjoint_plan(Random(0.5, 0).spec, geometry, 28, 28)
    assert in_lines(plan.shifts)[0] == gathered(plan)
    assert not len(forward_plan(EvenGrid(0.3).spec, geometry, 28, 28).shifts)


def test_maps_without_positions_have_no_lines():
    geometry = Geometry((3, 3))
    plan = forward_plan("", geometry, 3, 3)
    assert in_lines(plan.shifts)[0] == gathered(plan) if len(plan.shifts) else True


@pytest.mark.skipif(native.load() is not None, reason="the native back end is not there")
@pytest.mark.parametrize("spoil", ["short", "classes", "slots", "offset", "row", "twice", "input", "tap"])
def test_spoilt_tables_are_refused(spoil):
    geometry = Geometry((3, 3), padding=(1, 1, 1, 1))
    plan = forward_plan(CHESSBOARD.spec, geometry, 8, 8)
    table = plan.shifts.clone()
    classes, slots = table[:2].tolist()
    taps, positions = table[2:4].tolist()
    body = 2 + 2 * classes
    rows = body + 2 * taps
    changes = {
        "short": lambda: table[:-1],
        "classes": lambda: table.index_fill(0, torch.tensor(0), 40),
        "slots": lambda: table.index_fill(0, torch.tensor(1), slots + 1),
        "offset": lambda: table.index_fill(0, torch.tensor(body + taps), slots - positions + 1),
        "row": lambda: table.index_fill(0, torch.tensor(rows), 10**6),
        "twice": lambda: table.index_fill(0, torch.arange(rows, rows + positions), 1),
        "input": lambda: table.index_fill(0, torch.tensor(len(table) - 1), 64),
        "tap": lambda: table.index_fill(0, torch.tensor(body), 9),
    }
    x, weight = torch.randn(1, 32, 8, 8), torch.randn(32, 32, 3, 3)
    packed = native.pack(weight, 1, False)
    given = (x, packed, None, None, None, None, plan.index, plan.rows, plan.taps, plan.groups)
    rest = (plan.out_size, 32, 9, 1, 0)
    torch.ops.quincunx_native.gather_gemm(*given, *rest, plan.shifts)
    with pytest.raises(RuntimeError, match=r"shifts|slots"):
        torch.ops.quincunx_native.gather_gemm(*given, *rest, changes[spoil]())
