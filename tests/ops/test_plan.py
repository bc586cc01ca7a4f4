"""The gather tables: read by a small interpreter they are the operators, and read no row in vain."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.oracle import AWKWARD, cases, magnitude, run_plan, samplings
from helpers.oracle import fill_nearest as fill_oracle
from helpers.oracle import nearest as nearest_oracle
from helpers.oracle import sampled_conv as conv_oracle
from helpers.oracle import sampled_conv_transpose as transpose_oracle
from quincunx.ops.geometry import Geometry
from quincunx.ops.plan import (
    adjoint_plan,
    forward_plan,
    nearest_index,
    position_index,
)
from quincunx.sampling import CHESSBOARD, QUARTER, THREE_QUARTERS, Cosets, Positions, Random

awkward = pytest.mark.parametrize("case", AWKWARD.values(), ids=AWKWARD.keys())
TOLERANCE = {"rtol": 0, "atol": 1e-12}  # float64 sums of at most a few hundred terms of size 1


def geometry_of(case):
    return Geometry.make(case.kernel, case.stride, case.padding, case.dilation)


def values(case):
    """One picture and one group, as rows: x [H W, C], y [m, O], w [O, C, kh, kw]."""
    generator = np.random.default_rng(case.seed)
    inner, outer = case.depth
    x = generator.standard_normal((1, inner, *case.size))
    y = generator.standard_normal((1, outer, int(case.mask.sum()), 1))
    return x, y, generator.standard_normal((outer, inner, *case.kernel))


def rows_of(dense):
    return dense.reshape(dense.shape[1], -1).T


def where(case):
    return {"stride": case.stride, "padding": case.padding, "dilation": case.dilation}


def by_tap(w):
    """Matrices [C, O], one a tap, tap = i kw + j."""
    return [w[:, :, i, j].T for i, j in itertools.product(range(w.shape[2]), range(w.shape[3]))]


def check_forward(case):
    x, _, w = values(case)
    got = run_plan(forward_plan(case.sampling.spec, geometry_of(case), *case.size), rows_of(x), by_tap(w))
    np.testing.assert_allclose(got, rows_of(conv_oracle(x, w, None, case.mask, **where(case))), **TOLERANCE)


def check_adjoint(case):
    _, y, w = values(case)
    plan = adjoint_plan(case.sampling.spec, geometry_of(case), *case.size)
    assert plan.out_size == case.size
    got = run_plan(plan, rows_of(y), [m.T for m in by_tap(w)])
    want = transpose_oracle(y, w, None, case.mask, case.size, **where(case))
    np.testing.assert_allclose(got, rows_of(want), **TOLERANCE)


@settings(max_examples=60)
@given(case=cases())
def test_forward_tables_are_the_convolution(case):
    check_forward(case)


@settings(max_examples=60)
@given(case=cases())
def test_adjoint_tables_are_the_transposed_convolution(case):
    check_adjoint(case)


@awkward
def test_awkward_cases(case):
    check_forward(case)
    check_adjoint(case)


@awkward
def test_no_sampling_named_means_every_position(case):
    x, _, w = values(case)
    everywhere = np.ones(case.grid, dtype=bool)
    geometry = geometry_of(case)
    forward = forward_plan("", geometry, *case.size)
    assert forward.out_size == case.grid
    dense = conv_oracle(x, w, None, everywhere, **where(case))
    np.testing.assert_allclose(run_plan(forward, rows_of(x), by_tap(w)), rows_of(dense), **TOLERANCE)
    back = transpose_oracle(dense, w, None, everywhere, case.size, **where(case))
    got = run_plan(adjoint_plan("", geometry, *case.size), rows_of(dense), [m.T for m in by_tap(w)])
    bound = transpose_oracle(*magnitude(dense, w), None, everywhere, case.size, **where(case)).max()
    np.testing.assert_allclose(got, rows_of(back), rtol=0, atol=1e-13 * (1 + bound))


@given(data=st.data(), case=cases())
def test_a_source_is_read_as_if_it_were_filled(data, case):
    source = data.draw(samplings(*case.size))
    mask = source.mask(*case.size).numpy()
    _, _, w = values(case)
    compact = np.random.default_rng(case.seed).standard_normal((1, w.shape[1], int(mask.sum()), 1))
    plan = forward_plan(case.sampling.spec, geometry_of(case), *case.size, source.spec)
    want = conv_oracle(fill_oracle(compact, mask), w, None, case.mask, **where(case))
    np.testing.assert_allclose(run_plan(plan, rows_of(compact), by_tap(w)), rows_of(want), **TOLERANCE)


# ---------------------------------------------------------------- the nearest position


@st.composite
def masks(draw):
    grid = draw(st.integers(1, 10)), draw(st.integers(1, 10))
    return draw(samplings(*grid)), grid


@settings(max_examples=100)
@given(masks())
def test_nearest_is_brute_force(example):
    sampling, grid = example
    mask = sampling.mask(*grid).numpy()
    assert nearest_index(sampling.spec, *grid).tolist() == nearest_oracle(mask)
    assert position_index(sampling.spec, *grid).tolist() == np.flatnonzero(mask).tolist()


def test_ties_go_to_the_lowest_index():
    ring = torch.zeros(11, 11, dtype=torch.bool)
    for r, c in itertools.product(range(11), repeat=2):
        ring[r, c] = (r - 5) ** 2 + (c - 5) ** 2 == 25  # twelve positions at distance 5 from the centre
    assert ring.sum() == 12
    numbers = nearest_index(Positions(ring).spec, 11, 11)
    assert numbers[5 * 11 + 5] == 0  # (0, 5), above (1, 2) ... (10, 5)
    pair = Positions([[False, False], [True, False], [False, False], [True, True]])
    assert nearest_index(pair.spec, 4, 2).view(4, 2).tolist() == [[0, 0], [0, 0], [0, 2], [1, 2]]


# ---------------------------------------------------------------- tap groups


@pytest.mark.parametrize(
    ("sampling", "kernel", "groups"),
    [
        # taps of each residue class, and its share of an 8 x 8 map
        (QUARTER, (3, 3), [(16, 1), (16, 2), (16, 2), (16, 4)]),
        (CHESSBOARD, (3, 3), [(32, 4), (32, 5)]),
        (CHESSBOARD, (5, 5), [(32, 12), (32, 13)]),
        (QUARTER, (1, 1), [(16, 1), (48, 0)]),
        (Cosets(4, [(1, 2)]), (3, 3), [(28, 0), (36, 1)]),
    ],
)
def test_positions_with_equal_taps_share_a_group(sampling, kernel, groups):
    half = kernel[0] // 2
    plan = adjoint_plan(sampling.spec, Geometry(kernel, padding=(half,) * 4), 8, 8)
    got = sorted(tuple(g) for g in plan.groups.tolist())
    merged = {}
    for count, taps in got:
        merged[taps] = merged.get(taps, 0) + count
    wanted = {}
    for count, taps in groups:
        wanted[taps] = wanted.get(taps, 0) + count
    assert merged == wanted
    tap_sets = [tuple(t.tolist()) for t in plan.taps.split([taps for _, taps in plan.groups.tolist()])]
    assert len(set(tap_sets)) == len(tap_sets)
    assert [len(t) for t in tap_sets] == [taps for _, taps in plan.groups.tolist()]


@pytest.mark.parametrize(("size", "left_out"), [((13, 14), 0.3), ((28, 28), 0.55), ((56, 40), 0.7)])
@pytest.mark.parametrize("rate", [0.1, 0.25, 0.5, 0.75])
def test_positions_of_a_mask_are_grouped_by_what_they_read(rate, size, left_out):
    """In groups of at least a tile; the more positions there are, the fewer missing ones are read."""
    plan = adjoint_plan(Random(rate, 3).spec, Geometry((3, 3), padding=(1,) * 4), *size)
    positions, taps = plan.groups.T
    assert positions.min() >= 16
    assert sorted(plan.rows.tolist()) == list(range(size[0] * size[1]))
    at = 0
    for count, width in plan.groups.tolist():
        block = plan.index[at : at + count * width].view(count, width)
        assert (block >= 0).any(0).all()  # no tap that nobody has
        at += count * width
    assert at == plan.reads == int(positions @ taps)
    together = 9 * size[0] * size[1]
    existing = int((plan.index >= 0).sum())
    assert existing <= plan.reads < together - left_out * (together - existing)


@pytest.mark.parametrize(
    "sampling", [QUARTER, CHESSBOARD, THREE_QUARTERS, Cosets(4, [(0, 0), (2, 1)]), Cosets(4, [(3, 3)])]
)
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (5, 3)])
def test_no_multiplication_by_a_structural_zero(sampling, kernel):
    padding = (kernel[0] // 2, kernel[0] // 2, kernel[1] // 2, kernel[1] // 2)
    geometry = Geometry(kernel, padding=padding)
    macs = sampling.count(16, 16) * kernel[0] * kernel[1]
    assert forward_plan(sampling.spec, geometry, 16, 16).reads == macs
    assert adjoint_plan(sampling.spec, geometry, 16, 16).reads == macs


def test_a_random_sampling_reads_at_most_every_tap():
    plan = adjoint_plan(Random(0.3, 1).spec, Geometry((3, 3), padding=(1, 1, 1, 1)), 12, 12)
    assert plan.reads <= 12 * 12 * 9
    assert (plan.index >= 0).sum() == (
        forward_plan(Random(0.3, 1).spec, Geometry((3, 3), padding=(1, 1, 1, 1)), 12, 12).index >= 0
    ).sum()


def test_plans_are_cached_by_value():
    def make():
        spec = Cosets(2, [(1, 1), (0, 0)]).spec
        return [
            forward_plan(spec, Geometry.make([3, 3], [1, 1], [1, 1, 1, 1], [1, 1]), 8, 8),
            adjoint_plan(spec, Geometry((3, 3), padding=(1, 1, 1, 1)), 8, 8),
            nearest_index(spec, 8, 8),
        ]

    assert all(a is b for a, b in zip(make(), make(), strict=True))
