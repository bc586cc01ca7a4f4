"""What must hold whatever the code does: limits, adjoints, linearity, receptive fields, shared gradients."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings

from helpers.oracle import AWKWARD, cases
from quincunx.layers.sampled import PerforatedConv2d, SampledDown2d, SpatialBottleneck2d
from quincunx.ops import fill_nearest, sampled_conv2d, sampled_conv_transpose2d
from quincunx.sampling import CHESSBOARD, QUARTER, THREE_QUARTERS, Cosets, Positions, Random, Uniform

OPS = torch.ops.quincunx
EXACT = {"rtol": 0, "atol": 1e-12}  # float64 sums of at most a few hundred terms of size about 1
awkward = pytest.mark.parametrize("case", AWKWARD.values(), ids=AWKWARD.keys())


def randn(*shape):
    return torch.randn(shape, dtype=torch.float64)


def everything(period):
    return Cosets(period, itertools.product(range(period), repeat=2))


# ---------------------------------------------------------------- dense convolution is a limit

SETTINGS = [
    {},
    {"padding": 1},
    {"padding": (2, 0), "dilation": (2, 1)},
    {"padding": 1, "groups": 2},
    {"padding": 2, "groups": 4, "dilation": 2},
]


@pytest.mark.parametrize("full", [everything(2), everything(3), Random(1.0), Uniform(1.0)], ids=repr)
@pytest.mark.parametrize("geometry", SETTINGS, ids=str)
@pytest.mark.parametrize("size", [(8, 8), (7, 9)])
def test_full_sampling_is_dense_convolution(full, geometry, size):
    groups = geometry.get("groups", 1)
    x, w, b, c = randn(2, 4, *size), randn(8, 4 // groups, 3, 3), randn(8), randn(4)
    dense = F.conv2d(x, w, b, **geometry)
    y = sampled_conv2d(x, w, b, sampling=full, **geometry)
    torch.testing.assert_close(y.view(dense.shape), dense, **EXACT)
    back = sampled_conv_transpose2d(y, w, c, sampling=full, size=size, **geometry)
    torch.testing.assert_close(back, F.conv_transpose2d(dense, w, c, **geometry), rtol=0, atol=1e-11)


def test_full_sampling_of_a_bottleneck_is_a_pair_of_convolutions():
    module = SpatialBottleneck2d(6, 4, sampling=everything(2), mid_channels=5).double()
    x = randn(2, 6, 7, 8)
    inner = F.conv2d(x, module.down.weight, padding=1)
    want = F.conv_transpose2d(inner, module.up.weight, module.up.bias, padding=1)
    torch.testing.assert_close(module(x), want, **EXACT)
    # a transposed convolution with stride 1 is a convolution with the flipped kernel
    flipped = module.up.weight.flip(2, 3).transpose(0, 1)
    torch.testing.assert_close(module(x), F.conv2d(inner, flipped, module.up.bias, padding=1), **EXACT)


@pytest.mark.parametrize("geometry", [{"padding": 1}, {"padding": 1, "stride": 2}, {"groups": 2}], ids=str)
def test_perforated_convolution_at_full_sampling_is_conv2d(geometry):
    dense = torch.nn.Conv2d(4, 6, 3, **geometry).double()
    perforated = PerforatedConv2d(4, 6, 3, sampling=everything(2), **geometry).double()
    perforated.load_state_dict(dense.state_dict())
    x = randn(2, 4, 9, 8)
    torch.testing.assert_close(perforated(x), dense(x), **EXACT)


@pytest.mark.parametrize("size", [(8, 8), (6, 10)])
def test_quarter_is_the_strided_pair(size):
    x, w, w2 = randn(2, 3, *size), randn(5, 3, 3, 3), randn(5, 4, 3, 3)
    y = sampled_conv2d(x, w, sampling=QUARTER, padding=1)
    strided = F.conv2d(x, w, stride=2, padding=1)
    torch.testing.assert_close(y.view(strided.shape), strided, **EXACT)
    z = sampled_conv_transpose2d(y, w2, sampling=QUARTER, size=size, padding=1)
    want = F.conv_transpose2d(strided, w2, stride=2, padding=1, output_padding=1)
    torch.testing.assert_close(z, want, **EXACT)


@pytest.mark.parametrize("size", [(7, 9), (7, 8)])
def test_quarter_on_odd_sizes_is_the_strided_pair(size):
    """An odd size needs no output padding: the last position is computed."""
    x, w, w2 = randn(2, 3, *size), randn(5, 3, 3, 3), randn(5, 4, 3, 3)
    y = sampled_conv2d(x, w, sampling=QUARTER, padding=1)
    strided = F.conv2d(x, w, stride=2, padding=1)
    torch.testing.assert_close(y.view(strided.shape), strided, **EXACT)
    z = sampled_conv_transpose2d(y, w2, sampling=QUARTER, size=size, padding=1)
    extra = [1 - n % 2 for n in size]
    want = F.conv_transpose2d(strided, w2, stride=2, padding=1, output_padding=extra)
    torch.testing.assert_close(z, want, **EXACT)


@pytest.mark.parametrize("period", [2, 3, 4])
def test_cosets_partition_the_dense_convolution(period):
    x, w, w2 = randn(1, 3, 9, 10), randn(4, 3, 3, 3), randn(4, 2, 3, 3)
    dense = F.conv2d(x, w, padding=1)
    together = torch.zeros_like(dense)
    back = torch.zeros(1, 2, 9, 10, dtype=torch.float64)
    for offset in itertools.product(range(period), repeat=2):
        coset = Cosets(period, [offset])
        y = sampled_conv2d(x, w, sampling=coset, padding=1)
        together[:, :, coset.mask(9, 10)] += y.squeeze(3)
        back += sampled_conv_transpose2d(y, w2, sampling=coset, size=(9, 10), padding=1)
    torch.testing.assert_close(together, dense, **EXACT)
    torch.testing.assert_close(back, F.conv_transpose2d(dense, w2, padding=1), rtol=0, atol=1e-11)


# ---------------------------------------------------------------- adjoints


def check_adjoint(case):
    x, y, w, *_ = case.values()
    arguments = case.operator_arguments
    image = OPS.conv(x, w, None, *arguments)
    preimage = OPS.conv_transpose(y, w, None, case.size, *arguments)
    gradient = OPS.conv_weight(x, y, case.kernel, *arguments)
    # one trilinear form T(x, w, y), summed in three orders; the bound is that of the sums
    products = [(image * y).sum(), (preimage * x).sum(), (gradient * w).sum()]
    bound = 1e-13 * (1 + OPS.conv(x.abs(), w.abs(), None, *arguments).mul(y.abs()).sum())
    assert max(products) - min(products) <= bound


@settings(max_examples=80)
@given(case=cases())
def test_transposed_is_adjoint(case):
    check_adjoint(case)


@awkward
def test_transposed_is_adjoint_in_awkward_cases(case):
    check_adjoint(case)


@pytest.mark.parametrize(
    "sampling", [CHESSBOARD, Cosets(3, [(1, 2)]), Random(0.3, 1), Uniform(0.2)], ids=repr
)
def test_public_pair_is_adjoint(sampling):
    x, w = randn(2, 4, 9, 7), randn(6, 2, 3, 5)
    geometry = {"sampling": sampling, "padding": "same", "groups": 2}
    y = torch.randn_like(sampled_conv2d(x, w, **geometry))
    left = (sampled_conv2d(x, w, **geometry) * y).sum()
    right = (x * sampled_conv_transpose2d(y, w, size=(9, 7), **geometry)).sum()
    torch.testing.assert_close(left, right, rtol=0, atol=1e-10)  # 10^4 terms


@pytest.mark.parametrize("sampling", [QUARTER, CHESSBOARD, Random(0.3, 1)], ids=repr)
def test_collect_is_the_adjoint_of_fill(sampling):
    z = randn(2, 3, 7, 8)
    y = randn(2, 3, sampling.count(7, 8), 1)
    left = (OPS.fill(y, sampling.spec, (7, 8)) * z).sum()
    right = (y * OPS.collect(z, sampling.spec)).sum()
    torch.testing.assert_close(left, right, **EXACT)


# ---------------------------------------------------------------- linearity


@pytest.mark.parametrize("down", ["stride", "avgpool"])
@pytest.mark.parametrize("sampling", [QUARTER, CHESSBOARD, Cosets(3, [(0, 0), (1, 2)])], ids=repr)
def test_a_spatial_bottleneck_is_linear(down, sampling):
    module = SpatialBottleneck2d(4, 6, sampling=sampling, down=down, bias=False).double()
    x, y = randn(2, 4, 7, 8), randn(2, 4, 7, 8)
    torch.testing.assert_close(module(2 * x - 3 * y), 2 * module(x) - 3 * module(y), **EXACT)
    assert not module(torch.zeros_like(x)).any()


def test_with_a_bias_it_is_affine_and_the_bias_is_everywhere():
    module = SpatialBottleneck2d(4, 6, sampling=QUARTER).double()
    at_zero = module(torch.zeros(1, 4, 6, 6, dtype=torch.float64))
    assert torch.equal(at_zero, module.up.bias.view(1, -1, 1, 1).expand(1, 6, 6, 6))


@pytest.mark.parametrize("sampling", [QUARTER, CHESSBOARD, Cosets(3, [(0, 0), (1, 2)])], ids=repr)
def test_cosets_commute_with_shifts_of_their_period(sampling):
    module = SpatialBottleneck2d(2, 2, sampling=sampling, bias=False).double()
    x = torch.zeros(1, 2, 18, 18, dtype=torch.float64)
    x[:, :, 6:9, 6:9] = randn(1, 2, 3, 3)  # far from the border
    period = sampling.period
    shifted = module(x.roll((period, period), (2, 3)))
    torch.testing.assert_close(shifted, module(x).roll((period, period), (2, 3)), **EXACT)
    assert not torch.allclose(module(x.roll(1, 2)), module(x).roll(1, 2))


# ---------------------------------------------------------------- receptive fields


def receptive_field(module, row, column, size=13):
    """Input positions that one output position depends on, by gradient; weights are positive."""
    for weight in module.parameters():
        torch.nn.init.uniform_(weight, 0.5, 1.0)
    x = torch.zeros(1, 2, size, size, requires_grad=True)
    module(x)[0, :, row, column].sum().backward()
    return x.grad[0].ne(0).any(0)


def extent(field):
    rows, columns = field.any(1).nonzero(), field.any(0).nonzero()
    return int(rows.max() - rows.min()) + 1, int(columns.max() - columns.min()) + 1


def test_quarter_mixes_receptive_fields():
    module = SpatialBottleneck2d(2, 2, sampling=QUARTER)
    for row, column in itertools.product(range(4, 9), repeat=2):
        field = receptive_field(module, row, column)
        # a neuron between computed rows (columns) sees two of them
        wanted = (3 + 2 * (row % 2), 3 + 2 * (column % 2))
        assert extent(field) == wanted
        assert field.sum() == wanted[0] * wanted[1]
        assert field[row - wanted[0] // 2, column - wanted[1] // 2]


def test_chessboard_gives_every_neuron_five_by_five():
    module = SpatialBottleneck2d(2, 2, sampling=CHESSBOARD)
    for row, column in itertools.product(range(4, 9), repeat=2):
        field = receptive_field(module, row, column)
        assert extent(field) == (5, 5)
        assert field[row - 2 : row + 3].sum() == field.sum()
        # four neighbours' 3 x 3 windows leave the corners out, the centre and four diagonals do not
        assert field.sum() == (25 if (row + column) % 2 == 0 else 21)


def test_a_pair_of_dense_convolutions_sees_five_by_five():
    module = SpatialBottleneck2d(2, 2, sampling=everything(2))
    assert receptive_field(module, 6, 5).sum() == 25


# ---------------------------------------------------------------- average pooling (paper 4.4)


def pooled_by_hand(x, w1, w2, sampling, kernel):
    """Per coset: pool at its offset, convolve the small map, scatter; then one transposed convolution."""
    k, half = sampling.period, kernel // 2
    grid = torch.zeros(x.shape[0], w1.shape[0], *x.shape[2:], dtype=x.dtype)
    for a, b in sampling.offsets:
        pooled = F.avg_pool2d(x[:, :, b:, a:], k, k, ceil_mode=True, count_include_pad=False)
        grid[:, :, b::k, a::k] = F.conv2d(pooled, w1, padding=half)
    return grid, F.conv_transpose2d(grid, w2, padding=half)


@pytest.mark.parametrize(
    "sampling",
    [QUARTER, CHESSBOARD, THREE_QUARTERS, Cosets(3, [(0, 0), (2, 1)]), Cosets(4, [(1, 3)])],
    ids=repr,
)
@pytest.mark.parametrize("size", [(8, 8), (7, 9), (12, 5)])
@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_avgpool_is_pooling_then_convolution(sampling, size, kernel):
    module = SpatialBottleneck2d(3, 4, kernel, sampling=sampling, down="avgpool", bias=False).double()
    x = randn(2, 3, *size)
    grid, want = pooled_by_hand(x, module.down.weight, module.up.weight, sampling, kernel)
    inner = grid[:, :, sampling.mask(*size)].unsqueeze(3)
    torch.testing.assert_close(module.down(x), inner, **EXACT)
    torch.testing.assert_close(module(x), want, **EXACT)


def test_avgpool_leaves_constants_as_they_are():
    """Border windows take the mean of what is inside, so a constant map stays one."""
    down = SampledDown2d(1, 1, 1, sampling=everything(2), down="avgpool", bias=False).double()
    x = torch.full((1, 1, 5, 7), 3.0, dtype=torch.float64)
    torch.testing.assert_close(down(x), (3 * down.weight).expand(1, 1, 35, 1), **EXACT)


# ---------------------------------------------------------------- nearest fill (ESPACE, eqs. 6 and 7)


@pytest.mark.parametrize("sampling", [QUARTER, CHESSBOARD, Random(0.3, 4), Uniform(0.2)], ids=repr)
def test_fill_keeps_what_was_computed(sampling):
    y = randn(2, 3, sampling.count(7, 8), 1)
    dense = fill_nearest(y, sampling=sampling, size=(7, 8))
    assert torch.equal(dense[:, :, sampling.mask(7, 8)], y.squeeze(3))


def test_positions_that_share_a_value_add_their_gradients():
    mask = torch.tensor([[True, False, False], [False, False, True]])
    y = randn(1, 2, 2, 1).requires_grad_()
    z = randn(1, 2, 2, 3)
    fill_nearest(y, sampling=Positions(mask), size=(2, 3)).backward(z)
    # (0, 1) and (1, 0) are nearest to (0, 0); (1, 1) and (0, 2) to (1, 2); (0, 1) alone is no tie
    first = z[..., 0, 0] + z[..., 0, 1] + z[..., 1, 0]
    second = z[..., 1, 2] + z[..., 0, 2] + z[..., 1, 1]
    torch.testing.assert_close(y.grad.squeeze(3), torch.stack([first, second], 2), **EXACT)


@pytest.mark.parametrize("sampling", [CHESSBOARD, Random(0.3, 4)], ids=repr)
def test_a_perforated_layers_weight_gradient_sums_over_shared_positions(sampling):
    x, w = randn(2, 3, 7, 8), randn(4, 3, 3, 3)
    layer = PerforatedConv2d(3, 4, 3, sampling=sampling, padding=1, bias=False).double()
    layer.load_state_dict({"weight": w})
    upstream = randn(2, 4, 7, 8)
    layer(x).backward(upstream)
    # the same by autograd through indexing: row i of the dense result stands for its nearest one
    w = w.requires_grad_()
    mask = sampling.mask(7, 8)
    places = mask.nonzero()
    every = torch.cartesian_prod(torch.arange(7), torch.arange(8))
    distance = (every[:, None] - places).pow(2).sum(2)
    nearest = distance.argmin(1)  # the first minimum: the lowest row-major index
    dense = F.conv2d(x, w, padding=1).flatten(2)[:, :, mask.flatten()]
    dense[:, :, nearest].unflatten(2, (7, 8)).backward(upstream)
    torch.testing.assert_close(layer.weight.grad, w.grad, rtol=0, atol=1e-11)
