"""Tables of shifts say what the gather tables say, and kernels that read them answer as the reference."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from quincunx.fusion.program import Program
from quincunx.fusion.steps import Step
from quincunx.ops import native, reference
from quincunx.ops.geometry import Geometry
from quincunx.ops.plan import adjoint_plan, forward_plan, position_index
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
    classes, slots, step = values[:3]
    heads = [values[3 + 2 * i : 5 + 2 * i] for i in range(classes)]
    body, found, tiles = values[3 + 2 * classes :], {}, 0
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
            read = {tap: lines[offset + step * q] for tap, offset in zip(own, offsets, strict=True)}
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
        for table in (plan.shifts, plan.shifts_apart):
            if len(table):
                assert in_lines(table)[0] == gathered(plan)


@pytest.mark.parametrize("name", ["dense", "chessboard", "third"])
@pytest.mark.parametrize("stride", [(2, 2), (1, 2), (2, 3), (4, 4)])
def test_taps_of_a_row_follow_each_other_where_outputs_are_set_apart(name, stride):
    geometry = Geometry((5, 7), stride, padding=(2, 2, 3, 3))
    plan = forward_plan(SAMPLINGS[name], geometry, 30, 41)
    assert in_lines(plan.shifts_apart)[0] == gathered(plan)
    table = plan.shifts_apart.tolist()
    assert table[2] == stride[1]
    period = {"dense": 1, "chessboard": 2, "third": 3}[name]
    body = table[3 + 2 * table[0] :]
    for taps, positions in zip(table[3::2][: table[0]], table[4::2], strict=False):
        own, offsets, body = body[:taps], body[taps : 2 * taps], body[2 * taps + positions :]
        offset_of = dict(zip(own, offsets, strict=True))
        for tap, offset in offset_of.items():
            # neighbours in a kernel's row that lie on the same of the lattice's lines
            if tap % 7 + period < 7 and tap + period in offset_of:
                assert offset_of[tap + period] == offset + 1
    assert plan.lines(35, 1, 3) is plan.shifts_apart
    assert plan.lines(35, 1, 24) is plan.shifts
    assert plan.lines(35, 3, 3) is None


def test_without_a_stride_nothing_is_set_apart():
    assert not len(forward_plan("", Geometry((3, 3)), 9, 9).shifts_apart)
    assert not len(adjoint_plan("", Geometry((3, 3), (2, 2)), 9, 9).shifts_apart)


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


@pytest.mark.parametrize("make", [forward_plan, adjoint_plan])
@pytest.mark.parametrize("sampling", [Random(0.5, 0), EvenGrid(0.3)])
def test_masks_have_lines_with_gaps(make, sampling):
    """Those of the dense map: narrow maps take longer to copy, tile by tile, than to multiply for nothing."""
    plan = make(sampling.spec, Geometry((3, 3), padding=(1, 1, 1, 1)), 28, 28)
    assert in_lines(plan.shifts)[0] == gathered(plan)


@pytest.mark.parametrize("make", [forward_plan, adjoint_plan])
def test_masks_of_few_positions_have_none(make):
    assert not len(make(Random(0.02, 0).spec, Geometry((3, 3), padding=(1, 1, 1, 1)), 56, 56).shifts)


def test_maps_without_positions_have_no_lines():
    geometry = Geometry((3, 3))
    plan = forward_plan("", geometry, 3, 3)
    assert in_lines(plan.shifts)[0] == gathered(plan) if len(plan.shifts) else True


@pytest.mark.skipif(native.load() is not None, reason="the native back end is not there")
@pytest.mark.parametrize(
    "spoil", ["short", "classes", "slots", "offset", "row", "twice", "input", "tap", "step", "far"]
)
def test_spoilt_tables_are_refused(spoil):
    geometry = Geometry((3, 3), padding=(1, 1, 1, 1))
    plan = forward_plan(CHESSBOARD.spec, geometry, 8, 8)
    table = plan.shifts.clone()
    classes, slots = table[:2].tolist()
    taps, positions = table[3:5].tolist()
    body = 3 + 2 * classes
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
        "step": lambda: table.index_fill(0, torch.tensor(2), 0),
        "far": lambda: table.index_fill(0, torch.tensor(2), 2),
    }
    x, weight = torch.randn(1, 32, 8, 8), torch.randn(32, 32, 3, 3)
    packed = native.pack(weight, 1, False)
    given = (x, packed, None, None, None, None, plan.index, plan.rows, plan.taps, plan.groups)
    rest = (plan.out_size, 32, 9, 1, 0)
    torch.ops.quincunx_native.gather_gemm(*given, *rest, plan.shifts)
    with pytest.raises(RuntimeError, match=r"shifts|slots"):
        torch.ops.quincunx_native.gather_gemm(*given, *rest, changes[spoil]())


@pytest.mark.parametrize("channels", [3, 16, 24, 40])
@pytest.mark.parametrize("name", ["chessboard", "quarter", "third", "random"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_reaches_its_readers_alone(channels, name, value):
    """Also where a step multiplies a neighbour by weights of 0."""
    torch.manual_seed(0)
    x = torch.randn(3, channels, 12, 12).bfloat16().contiguous(memory_format=torch.channels_last)
    x[1, channels - 1, 5, 6] = value
    weight = torch.rand(16, channels, 3, 3).bfloat16() + 0.5
    where = ((1, 1), (1, 1, 1, 1), (1, 1), 1)
    spec = SAMPLINGS[name]
    for run in ("conv", "conv_transpose"):
        if run == "conv":
            found, expected = (
                of(x, weight, None, spec, *where) for of in (torch.ops.quincunx.conv, reference.conv)
            )
        else:
            count = forward_plan(spec, Geometry((3, 3), padding=(1, 1, 1, 1)), 12, 12).out_size
            y = x.flatten(2)[:, :, : count[0] * count[1]].reshape(3, channels, *count)
            y = y.contiguous(memory_format=torch.channels_last)
            turned = weight.transpose(0, 1).contiguous()
            found, expected = (
                of(y, turned, None, (12, 12), spec, *where)
                for of in (torch.ops.quincunx.conv_transpose, reference.conv_transpose)
            )
        assert torch.equal(found.isfinite(), expected.isfinite())


@pytest.mark.parametrize("value", [0.0, float("nan"), -float("inf")])
@pytest.mark.parametrize("kernel", [(7, 7), (3, 3), (2, 9)])
@pytest.mark.parametrize("stride", [(2, 2), (1, 2), (4, 4), (2, 3)])
@pytest.mark.parametrize("channels", [1, 3, 8])
def test_a_network_s_first_convolution(channels, stride, kernel, value):
    """Few channels and a stride: a step multiplies the taps of a kernel's row as they lie in the map."""
    torch.manual_seed(1)
    x = torch.randn(2, channels, 31, 44).bfloat16().contiguous(memory_format=torch.channels_last)
    if value:
        x[1, channels - 1, 12, 13] = value
    weight = torch.randn(35, channels, *kernel).bfloat16()
    geometry = Geometry(kernel, stride, (3, 2, 0, 4))
    whole = F.conv2d(F.pad(x.float(), (0, 4, 3, 2)), weight.float(), stride=stride)
    step = Step("dense", "x", weight, None, geometry, 1, out="y")
    with torch.no_grad():
        answers = [(Program([step], ["x"], ["y"], native_only=True)(x)[0], whole)]
    for sampling in (CHESSBOARD, QUARTER, THREE_QUARTERS):
        found = torch.ops.quincunx.conv(
            x, weight, None, sampling.spec, stride, geometry.padding, geometry.dilation, 1
        )
        computed = position_index(sampling.spec, *whole.shape[2:])
        answers.append((found, whole.flatten(2)[:, :, computed, None]))
    for found, expected in answers:
        assert torch.equal(found.isfinite(), expected.isfinite())
        near = 2e-2 * float(weight[0].float().norm())
        torch.testing.assert_close(found.float(), expected, rtol=2e-2, atol=near, equal_nan=True)
