"""Which positions a sampling computes, how it is written down, and what it refuses."""

import itertools
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.oracle import computed, samplings
from quincunx.sampling import (
    CHESSBOARD,
    QUARTER,
    THREE_QUARTERS,
    Cosets,
    Positions,
    Random,
    Sampling,
    Uniform,
    from_spec,
    parse,
)

EVERY = [
    CHESSBOARD,
    QUARTER,
    THREE_QUARTERS,
    Cosets(3, [(2, 1), (0, 0)]),
    Random(0.3, 5),
    Uniform(0.4),
    Uniform(0.4, rule="eq8"),
    Positions(torch.eye(5, 7, dtype=torch.bool)),
]
every = pytest.mark.parametrize("sampling", EVERY, ids=repr)


@st.composite
def sampling_and_grid(draw):
    grid = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    return draw(samplings(*grid)), grid


@given(sampling_and_grid())
def test_mask_positions_and_count_agree(example):
    sampling, grid = example
    mask = sampling.mask(*grid)
    assert mask.dtype == torch.bool
    assert mask.shape == grid
    assert mask.any()
    positions = sampling.positions(*grid)
    assert positions.dtype == torch.int64
    assert [tuple(p) for p in positions.tolist()] == computed(mask.numpy())
    assert sampling.count(*grid) == len(positions)


@given(sampling_and_grid())
def test_spec_round_trip(example):
    sampling, grid = example
    again = from_spec(sampling.spec)
    assert again == sampling
    assert hash(again) == hash(sampling)
    assert again.spec == sampling.spec
    assert torch.equal(again.mask(*grid), sampling.mask(*grid))
    assert json.loads(sampling.spec)["kind"] == sampling.kind
    assert parse(sampling.spec) == sampling
    assert parse(sampling) is sampling


@every
def test_a_mask_is_a_fresh_tensor(sampling):
    first = sampling.mask(5, 7)
    want = first.clone()
    first.fill_(True)
    assert torch.equal(sampling.mask(5, 7), want)


def test_samplings_differ():
    assert len({s.spec for s in EVERY}) == len(set(EVERY)) == len(EVERY)
    assert Random(0.25) != QUARTER
    assert Positions(torch.ones(2, 3, dtype=torch.bool)) != Positions(torch.ones(3, 2, dtype=torch.bool))


# ---------------------------------------------------------------- cosets


@pytest.mark.parametrize("period", [2, 3, 4, 5])
@pytest.mark.parametrize("size", [(5, 5), (8, 8), (7, 10)])
def test_a_coset_is_its_congruence(period, size):
    for a, b in itertools.product(range(period), repeat=2):
        mask = Cosets(period, [(a, b)]).mask(*size)
        for row, column in itertools.product(*map(range, size)):
            # a goes with the column, b with the row
            assert mask[row, column] == (column % period == a and row % period == b)


def test_a_union_is_the_or_of_its_cosets():
    offsets = [(0, 2), (1, 0), (2, 2)]
    union = torch.stack([Cosets(3, [o]).mask(7, 8) for o in offsets]).any(0)
    assert torch.equal(Cosets(3, offsets).mask(7, 8), union)


@pytest.mark.parametrize("period", [2, 3, 4])
def test_all_cosets_are_everything(period):
    everything = Cosets(period, itertools.product(range(period), repeat=2))
    assert everything.mask(5, 6).all()
    assert everything.density == 1


def test_named_samplings():
    assert QUARTER.mask(2, 2).tolist() == [[True, False], [False, False]]
    assert CHESSBOARD.mask(2, 2).tolist() == [[True, False], [False, True]]
    # (0, 1): column 0, row 1
    assert THREE_QUARTERS.mask(2, 2).tolist() == [[True, False], [True, True]]
    assert [s.density for s in (QUARTER, CHESSBOARD, THREE_QUARTERS)] == [0.25, 0.5, 0.75]


def test_order_and_repetition_of_offsets_do_not_matter():
    shuffled = Cosets(2, [[1, 1], (0, 0), (1, 1)])
    assert shuffled == CHESSBOARD
    assert shuffled.spec == CHESSBOARD.spec
    assert hash(shuffled) == hash(CHESSBOARD)


# ---------------------------------------------------------------- rules with a rate


@pytest.mark.parametrize("rate", [0.01, 0.2, 0.5, 0.83, 1])
def test_random_draws_its_share(rate):
    for height, width in ((1, 1), (6, 7), (13, 5)):
        assert Random(rate, 3).count(height, width) == max(1, round(rate * height * width))
    assert Random(rate).density == rate


def test_random_depends_on_seed_and_grid_only():
    torch.manual_seed(1)
    first = Random(0.4, 7).mask(9, 8)
    state = torch.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(Random(0.4, 7).mask(9, 8), first)
    assert not torch.equal(Random(0.4, 8).mask(9, 8), first)
    torch.manual_seed(1)
    Random(0.4, 7).mask(9, 8)
    assert torch.equal(torch.get_rng_state(), state)  # torch's own generator was not touched


def test_random_favours_no_position():
    hits = torch.stack([Random(0.25, seed).mask(4, 4) for seed in range(400)]).sum(0)
    # binomial(400, 1/4): mean 100, deviation 8.7; five deviations
    assert (hits - 100).abs().max() < 44


@pytest.mark.parametrize("size", [(8, 8), (7, 10), (27, 27), (1, 6)])
@pytest.mark.parametrize("rate", [0.05, 0.25, 0.5, 0.9, 1.0])
def test_uniform_is_even_rows_times_even_columns(size, rate):
    mask = Uniform(rate).mask(*size)
    rows, columns = (mask.any(axis).nonzero().flatten().tolist() for axis in (1, 0))
    assert Uniform(rate).count(*size) == len(rows) * len(columns)
    for kept, length in ((rows, size[0]), (columns, size[1])):
        assert kept == [int((i + 0.5) * length / len(kept)) for i in range(len(kept))]
        gaps = [b - a for a, b in itertools.pairwise(kept)]
        assert not gaps or max(gaps) - min(gaps) <= 1
    # the share reached is within a row or a column of the one asked for
    assert abs(len(rows) * len(columns) - rate * size[0] * size[1]) <= max(len(rows), len(columns), 1)


def test_uniform_of_everything_is_everything():
    assert Uniform(1.0).mask(5, 9).all()
    assert torch.equal(Uniform(0.25).mask(8, 8), Cosets(2, [(1, 1)]).mask(8, 8))


@pytest.mark.parametrize("size", [(8, 8), (7, 10), (27, 27), (13, 5), (28, 29)])
@pytest.mark.parametrize("rate", [0.05, 0.2, 0.25, 0.5, 2 / 3, 0.9, 1.0])
def test_eq_8_is_the_papers_formula(size, rate):
    """Written out in floating point, positions counted from 1."""
    height, width = size
    m = max(1, round(rate * height * width))
    s, a, b = (math.floor(x) for x in (math.sqrt(m), height / math.sqrt(m), width / math.sqrt(m)))
    sampling = Uniform(rate, rule="eq8")
    if min(a, b) < 1:
        with pytest.raises(ValueError, match=rf"grid {height} x {width}: eq\. 8 has no positions.*m={m}"):
            sampling.mask(*size)
        with pytest.raises(ValueError, match="rule='even' has"):
            sampling.count(*size)
        assert Uniform(rate).mask(*size).any()
        return
    wanted = [[i * a - 1, j * b - 1] for i in range(1, s + 1) for j in range(1, s + 1)]
    assert sampling.positions(*size).tolist() == wanted
    assert sampling.count(*size) == s * s <= m


def test_eq_8_leaves_a_margin_below_and_on_the_right():
    # m = 20: s = 4, a = floor(10 / 4.47) = 2, b = 2
    mask = Uniform(0.2, rule="eq8").mask(10, 10)
    assert (
        mask.any(1).nonzero().flatten().tolist() == mask.any(0).nonzero().flatten().tolist() == [1, 3, 5, 7]
    )
    # m = 33, s = 5, a = b = 1: five rows and columns of seven, all at the upper left
    mask = Uniform(2 / 3, rule="eq8").mask(7, 7)
    assert mask[:5, :5].all()
    assert int(mask.sum()) == 25
    # not square: m = 18, s = 4, a = floor(6 / 4.24) = 1, b = floor(12 / 4.24) = 2
    assert Uniform(0.25, rule="eq8").positions(6, 12).tolist() == [
        [row, column] for row in range(4) for column in (1, 3, 5, 7)
    ]
    # one position is the last one
    assert Uniform(0.01, rule="eq8").positions(4, 6).tolist() == [[3, 5]]
    assert Uniform(1.0, rule="eq8").mask(6, 6).all()


def test_eq_8_is_exact_where_floating_point_is_not():
    """sqrt(m) and H / sqrt(m) are whole: a last digit less would take a row away."""
    for step in (3, 7, 11, 49):
        sampling = Uniform(1 / step**2, rule="eq8")
        for side in (1, 5, 23):
            size = side * step, side * step
            assert sampling.count(*size) == side**2
            assert sampling.positions(*size)[0].tolist() == [step - 1, step - 1]


def test_which_rule_is_part_of_a_uniform_sampling():
    even, paper = Uniform(0.3), Uniform(0.3, rule="eq8")
    assert even == Uniform(0.3, "even")
    assert even != paper
    assert (even.density, paper.density) == (0.3, 0.3)
    assert [json.loads(s.spec)["rule"] for s in (even, paper)] == ["even", "eq8"]
    assert "rule='eq8'" in repr(paper)
    # from before there were two
    assert from_spec('{"kind": "uniform", "rate": 0.3}') == even


def test_positions_keep_their_own_copy():
    mask = torch.zeros(3, 4, dtype=torch.bool)
    mask[1, 2] = mask[2, 3] = True
    sampling = Positions(mask)
    mask.fill_(True)
    assert sampling.positions(3, 4).tolist() == [[1, 2], [2, 3]]
    assert sampling.density == 2 / 12
    assert sampling.size == (3, 4)
    assert Positions([[True, False]]) == Positions(torch.tensor([[True, False]]))


# ---------------------------------------------------------------- what a person types


@pytest.mark.parametrize(
    ("text", "sampling"),
    [
        ("1/4", QUARTER),
        (" Chessboard ", CHESSBOARD),
        ("2/4", CHESSBOARD),
        ("3/4", THREE_QUARTERS),
        ("cosets:3:0,0;1,2", Cosets(3, [(0, 0), (1, 2)])),
        ("random:0.25", Random(0.25, 0)),
        ("random:0.25:9", Random(0.25, 9)),
        ("uniform:0.5", Uniform(0.5)),
        ("uniform:0.5:eq8", Uniform(0.5, rule="eq8")),
        ("uniform:0.5:even", Uniform(0.5)),
    ],
)
def test_parse(text, sampling):
    assert parse(text) == sampling


@pytest.mark.parametrize(
    "text",
    [
        "",
        "4/4",
        "cosets:1:0,0",
        "cosets:2:",
        "cosets:2:0",
        "random:x",
        "uniform:2",
        "random:0.5:-1",
        "random:0.5:eq8",
        "uniform:0.5:",
        "uniform:0.5:best",
        "{}",
    ],
)
def test_parse_refuses(text):
    with pytest.raises(ValueError, match=r"sampling=|spec="):
        parse(text)


@pytest.mark.parametrize(
    "spec",
    [
        "",
        "[]",
        '{"kind": "stars"}',
        '{"kind": "cosets"}',
        '{"kind": "positions", "size": [2, 2], "bits": "0"}',
        '{"kind": "positions", "size": [2, 2], "bits": "0f"}',
        '{"kind": "positions", "size": [2, 4], "bits": "-1"}',
        '{"kind": "positions", "size": [1, 3], "bits": "f"}',
        '{"kind": "positions", "size": [0, 3], "bits": ""}',
        '{"kind": "positions", "size": [2], "bits": "f"}',
        '{"kind": "positions", "size": [2, 2], "bits": 15}',
        '{"kind": "uniform", "rate": 0.5, "rule": "eq9"}',
        '{"kind": "uniform", "rate": 0.5, "rule": ["eq8"]}',
    ],
)
def test_from_spec_refuses(spec):
    with pytest.raises(ValueError, match="spec="):
        from_spec(spec)


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: Cosets(1, [(0, 0)]), ValueError, "period=1"),
        (lambda: Cosets(-2, [(0, 0)]), ValueError, "period=-2"),
        (lambda: Cosets(2.0, [(0, 0)]), TypeError, r"period=2\.0"),
        (lambda: Cosets(True, [(0, 0)]), TypeError, "period=True"),
        (lambda: Cosets(2, [(0, 2)]), ValueError, r"\(0, 2\) is outside \[0, 2\)"),
        (lambda: Cosets(3, [(0, 0), (-1, 1)]), ValueError, r"\(-1, 1\) is outside \[0, 3\)"),
        (lambda: Cosets(2, []), ValueError, r"offsets=\(\).*empty sampling"),
        (lambda: Cosets(2, [(0, 0, 0)]), TypeError, r"offsets.*\(0, 0, 0\)"),
        (lambda: Cosets(2, [(0.0, 1)]), TypeError, r"offsets.*\(0\.0, 1\)"),
        (lambda: Cosets(2, (0, 1)), TypeError, "offsets.*got 0"),
        (lambda: Cosets(2, 5), TypeError, "offsets.*5"),
        (lambda: Random(0), ValueError, "rate=0"),
        (lambda: Random(1.01), ValueError, r"rate=1\.01"),
        (lambda: Random(float("nan")), ValueError, "rate=nan"),
        (lambda: Random("0.5"), TypeError, "rate='0.5'"),
        (lambda: Random(0.5, -1), ValueError, "seed=-1"),
        (lambda: Random(0.5, 2**63), ValueError, "seed=9223372036854775808"),
        (lambda: Random(0.5, 1.0), TypeError, r"seed=1\.0"),
        (lambda: Uniform(-0.5), ValueError, r"rate=-0\.5"),
        (lambda: Uniform(None), TypeError, "rate=None"),
        (lambda: Uniform(0.5, rule="eq. 8"), ValueError, r"rule='eq\. 8'.*even, eq8"),
        (lambda: Uniform(0.5, rule=8), ValueError, "rule=8.*even, eq8"),
        (lambda: Uniform(1.5, rule="eq8"), ValueError, r"rate=1\.5"),
        (lambda: Uniform(0.5, rule="eq8").mask(2, 9), ValueError, r"grid 2 x 9: eq\. 8 .* rate=0\.5.*m=9"),
        (lambda: Uniform(0.5, rule="eq8").mask(4, 0), ValueError, "width=0"),
        (lambda: Positions(torch.zeros(3, 3, dtype=torch.bool)), ValueError, "mask.*empty sampling"),
        (lambda: Positions(torch.ones(3, 3)), TypeError, "mask.*float32"),
        (lambda: Positions(torch.ones(9, dtype=torch.bool)), ValueError, r"mask.*\(9,\)"),
        (lambda: CHESSBOARD.mask(1, 4), ValueError, "grid 1 x 4.*K=2"),
        (lambda: Cosets(4, [(0, 0)]).count(4, 3), ValueError, "grid 4 x 3.*K=4"),
        (lambda: CHESSBOARD.positions(0, 4), ValueError, "height=0"),
        (lambda: Random(0.5).mask(4, 0), ValueError, "width=0"),
        (lambda: Uniform(0.5).count(-1, 4), ValueError, "height=-1"),
        (lambda: Positions(torch.ones(2, 3, dtype=torch.bool)).mask(3, 2), ValueError, "grid 3 x 2.*2 x 3"),
        (lambda: parse(0.25), TypeError, r"sampling=0\.25"),
    ],
)
def test_refuses(make, error, match):
    with pytest.raises(error, match=match):
        make()


def test_the_base_class_is_abstract():
    with pytest.raises(TypeError, match="abstract"):
        Sampling()


@every
def test_samplings_do_not_change(sampling):
    if isinstance(sampling, Positions):
        pytest.skip("a plain class")
    with pytest.raises(AttributeError):
        sampling.period = 3
