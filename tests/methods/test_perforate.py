"""Perforation: fitted errors, stages, which layers, specs; and ESPACE with fitted fills."""

from itertools import pairwise

import pytest
import torch
from torch import nn

import quincunx as qx
from quincunx.layers.build import build_module
from quincunx.layers.separable import EspaceConv2d, SeparableConv2d
from quincunx.methods.fitting.fills import FillMoments, Held, conditioner, fit_perforated, refit_kernel
from quincunx.methods.fitting.halves import fit_halves
from quincunx.methods.fitting.lattices import LATTICES, lattice_of
from quincunx.methods.perforate import Perforate
from quincunx.methods.registry import candidates_named, method_named
from quincunx.sampling import CHESSBOARD, QUARTER, THREE_QUARTERS, Cosets, Positions, Random, Uniform

MASK = Positions(torch.tensor([[(3 * r + 5 * c) % 7 < 3 for c in range(8)] for r in range(8)]))


def smooth(*shape, seed=0):
    """Maps with neighbours that say something about each other."""
    noise = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return nn.functional.avg_pool2d(noise, 3, 1, 1) * 3


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 12, 1),
        nn.ReLU(),
        nn.Conv2d(12, 6, 5, stride=2, padding=2, groups=2),
    ).eval()


@pytest.mark.parametrize(
    "sampling", [CHESSBOARD, QUARTER, THREE_QUARTERS, MASK, Random(0.5, seed=2)], ids=str
)
def test_the_fitted_error_is_never_above_the_nearest_fills(sampling):
    conv, x = nn.Conv2d(4, 6, 3, padding=1), smooth(6, 4, 8, 8)
    # few images, and inputs that are not those of the responses
    pairs = [(x + 0.3 * smooth(6, 4, 8, 8, seed=1), conv(x).detach())]
    size = (8, 8) if isinstance(sampling, Random) else None
    made = qx.PerforatedConv2d(4, 6, 3, sampling=sampling, padding=1, fill="fitted", fill_size=size)
    made.load_state_dict(conv.state_dict(), strict=False)
    nearest = qx.PerforatedConv2d(4, 6, 3, sampling=sampling, padding=1)
    nearest.load_state_dict(conv.state_dict())

    @torch.no_grad()
    def error(layer):
        squares = (layer(pairs[0][0]).double() - pairs[0][1]).square().sum()
        power = (pairs[0][1] - pairs[0][1].mean((0, 2, 3), keepdim=True)).square().sum()
        return float(squares / power)

    record = fit_perforated(made, conv, pairs)
    assert record["response_error"] == pytest.approx(error(made), rel=1e-3)
    assert record["nearest_error"] == pytest.approx(error(nearest), rel=1e-3)
    assert record["response_error"] < record["nearest_error"]
    assert all(after <= before for (_, before), (_, after) in pairwise(record["stages"]))
    assert record["stages"][0][0] == "fill"


def test_stages_lower_the_error_where_the_input_is_approximated():
    conv, x = nn.Conv2d(4, 6, 3, padding=1), smooth(32, 4, 8, 8)
    pairs = [(0.8 * x + 0.1, conv(x).detach())]
    made = qx.PerforatedConv2d(4, 6, 3, sampling=CHESSBOARD, padding=1, fill="fitted")
    made.load_state_dict(conv.state_dict(), strict=False)
    record = fit_perforated(made, conv, pairs, refits=2)
    names = [name for name, _ in record["stages"]]
    assert names[:3] == ["fill", "kernel", "together"]
    assert record["response_error"] < 0.8 * record["stages"][0][1]


def test_the_fit_is_least_squares():
    fill = qx.PerforatedConv2d(1, 3, 1, sampling=CHESSBOARD, fill="fitted", fill_reach=1).filling
    y, response = torch.randn(50, 3, 18, 1), torch.randn(50, 3, 6, 6)
    moments = FillMoments(fill, (6, 6))
    moments.add(y[:20], response[:20])
    moments.add(y[20:], response[20:])
    weight, bias = moments.solve(fill.start)
    plan = moments.plan
    members = plan.skipped[plan.kinds[plan.skipped] == 1]
    for channel in range(3):
        taps = y[:, channel, plan.index[members].long(), 0].flatten(0, 1).double()
        design = torch.cat([taps, torch.ones(len(taps), 1)], 1)
        want = torch.linalg.lstsq(
            design, response[:, channel].flatten(1)[:, members].flatten()[:, None].double()
        )
        got = torch.cat([weight[1, channel], bias[1, channel, None]])
        torch.testing.assert_close(got, want.solution.flatten(), rtol=1e-2, atol=1e-3)


def test_pairs_are_kept_up_to_a_size():
    read = []

    class Source:
        def __iter__(self):
            for i in range(3):
                read.append(i)
                yield torch.ones(100), torch.ones(100)

    for most, times in ((1 << 20, 3), (100, 6)):
        read.clear()
        held = Held(Source(), most)
        assert len(list(held)) == len(list(held)) == 3
        assert len(read) == times


@pytest.mark.parametrize("fill", ["zero", "nearest", "fitted"])
def test_convolutions_of_every_kind(fill):
    images = [smooth(8, 4, 12, 12, seed=s) for s in range(2)]
    result = qx.accelerate(net(), Perforate(CHESSBOARD, fill=fill), calibration=images)
    assert set(result.replaced) == {"0", "2", "4", "6"}
    for name, record in result.replaced.items():
        assert record["macs_after"] < record["macs_before"], name
        if fill == "fitted" and "read_by" not in record:
            assert record["response_error"] <= record["nearest_error"]
    with torch.no_grad():
        want = result.model(images[0])
        torch.testing.assert_close(qx.fuse(result.model)(images[0]), want, rtol=1e-4, atol=1e-4)


def test_a_depthwise_layer():
    images = [smooth(8, 4, 12, 12)]
    result = qx.accelerate(net(), Perforate(THREE_QUARTERS), where=["2"], calibration=images)
    # 8 taps of a fill save the 9 of a depthwise kernel little, but some
    assert result.replaced["2"]["macs_after"] < result.replaced["2"]["macs_before"]


def test_reasons_to_stay():
    x = torch.zeros(1, 4, 12, 12)
    skipped = qx.accelerate(net(), Perforate(CHESSBOARD, reach=2), example_input=x).skipped
    assert "times as many multiply-adds" in skipped["2"]
    with pytest.warns(UserWarning, match="replaced nothing"):
        alone = qx.accelerate(net(), Perforate(Uniform(0.5)))
    assert "give an example input" in alone.skipped["0"]
    with pytest.warns(UserWarning, match="replaced nothing"):
        skipped = qx.accelerate(net(), Perforate(Cosets(14, [(0, 0)])), example_input=x).skipped
    assert "period K=14" in skipped["0"]
    skipped = qx.accelerate(net(), Perforate(pointwise=False), example_input=x).skipped
    assert "pointwise=True" in skipped["4"]


def test_without_data_the_start_serves():
    result = qx.accelerate(net(), Perforate(CHESSBOARD), where=["0"], example_input=torch.zeros(1, 4, 12, 12))
    assert "response_error" not in result.replaced["0"]
    constant = result.model[0].filling(torch.ones(1, 8, 72, 1), (12, 12))
    torch.testing.assert_close(constant, torch.ones(1, 8, 12, 12))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fill": "mean"}, "fill='mean'"),
        ({"fill": "nearest", "reach": 1}, "reach=1"),
        ({"reach": 0}, "reach=0"),
        ({"refits": -1}, "refits=-1"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        Perforate(**settings)
    if "refits" in settings or "fill" in settings or settings["reach"] == 0:
        with pytest.raises(ValueError, match=message):
            qx.Espace(**({"fill": "fitted"} | settings))


def test_it_is_published():
    assert method_named("perforate") is Perforate
    assert [method.sampling for method in candidates_named("perforate")] == [
        THREE_QUARTERS,
        CHESSBOARD,
        Cosets(3, ((0, 0), (1, 1), (2, 2))),
        QUARTER,
    ]
    assert Perforate().label() == "perforate, 2/4, fitted"
    assert len(Perforate.sweep("nearest")) == 4


@pytest.mark.parametrize("mask", ["impact", "uniform"])
def test_espace_with_fitted_fills(mask):
    torch.manual_seed(3)
    layers = [nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()]
    layers += [nn.Conv2d(8, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    network = nn.Sequential(*layers).eval()
    images = [smooth(16, 4, 8, 8, seed=s) for s in range(2)]
    errors = {}
    for fill in ("nearest", "fitted"):
        method = qx.Espace(rank=6, rate=0.5, mask=mask, pointwise=True, fill=fill)
        result = qx.accelerate(network, method, calibration=images)
        with torch.no_grad():
            parts = [(network[:5](x), result.model[:5](x)) for x in images]
        errors[fill] = sum(float((a - b).square().sum()) for a, b in parts)
        record = result.replaced["2"]
        if fill == "fitted":
            assert record["fill"] == "fitted"
            assert record["response_error"] <= record["nearest_error"]
            assert record["first_half"]["response_error"] <= record["first_half"]["nearest_error"]
            with torch.no_grad():
                fused = qx.fuse(result.model)(images[0])
                torch.testing.assert_close(fused, result.model(images[0]), rtol=1e-4, atol=1e-5)
    assert errors["fitted"] < errors["nearest"]


def test_what_only_a_pointwise_convolution_reads_stays_exact():
    """The depthwise and the projecting convolution of an inverted residual; the second's fill is fitted."""
    net = nn.Sequential(
        nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.BatchNorm2d(16), nn.ReLU6(), nn.Conv2d(16, 8, 1)
    ).eval()
    x = torch.randn(4, 16, 12, 12)
    found = qx.accelerate(net, qx.Perforate(refits=0), calibration=[torch.randn(16, 16, 12, 12)])
    assert found.replaced["0"]["fill"] == "nearest"
    assert found.replaced["0"]["read_by"] == "3"
    assert found.replaced["3"]["fill"] == "fitted"
    computed = qx.CHESSBOARD.mask(12, 12)
    with torch.no_grad():
        got, want = found.model(x), net(x)
        torch.testing.assert_close(got[..., computed], want[..., computed])
        assert not torch.allclose(got, want)  # between them
        torch.testing.assert_close(qx.fuse(found.model, check=x)(x), got, rtol=1e-4, atol=1e-5)
    alone = qx.accelerate(net, qx.Perforate(refits=0), calibration=[x], where=["0"])
    assert alone.replaced["0"]["fill"] == "fitted"


def separable_layer(masks, fill="fitted"):
    """A layer of low rank, the same masked, and pairs whose inputs are not those of the responses."""
    torch.manual_seed(5)
    conv, x = nn.Conv2d(4, 6, 3, padding=1), smooth(8, 4, 8, 8)
    dense = SeparableConv2d(4, 6, 3, rank=5, padding=1)
    with torch.no_grad():
        for half in (dense.vertical, dense.horizontal):
            half.weight.copy_(torch.randn(half.weight.shape) * 0.3)
    made = EspaceConv2d(4, 6, 3, rank=5, padding=1, masks=masks, fill=fill)
    made.load_state_dict(dense.state_dict(), strict=False)
    return dense, made, [(x + 0.3 * smooth(8, 4, 8, 8, seed=1), conv(x).detach())]


EVERY = lattice_of(1)


@pytest.mark.parametrize(
    ("masks", "fill"),
    [
        ((CHESSBOARD, CHESSBOARD), "fitted"),
        ((MASK, MASK), "fitted"),
        ((EVERY, CHESSBOARD), ("nearest", "fitted")),
        ((THREE_QUARTERS, EVERY), ("fitted", "nearest")),
    ],
    ids=["lattices", "masks", "second", "first"],
)
def test_the_stages_of_both_halves_never_raise_the_error(masks, fill):
    dense, made, pairs = separable_layer(masks, fill)
    record = fit_halves(made, dense, pairs, refits=2)
    with torch.no_grad():
        (x, r) = pairs[0]
        power = (r - r.mean((0, 2, 3), keepdim=True)).square().sum()
        errors = [float((layer(x) - r).square().sum() / power) for layer in (dense, made)]
    assert record["stages"][0] == ["low rank", pytest.approx(errors[0], rel=1e-3)]
    assert record["response_error"] == pytest.approx(errors[1], rel=1e-3)
    masked = [error for _, error in record["stages"][1:]]
    assert all(after <= before for before, after in pairwise(masked))
    # the turns of the first half are what the second half's own fit cannot do
    assert "first half" in [name for name, _ in record["stages"]]
    assert masked[-1] < 0.9 * masked[0]
    assert ("first_half" in record) == (made.vertical.filling is not None)


def test_a_step_on_the_first_half_is_least_squares():
    """Conjugate gradients on as many directions as there are unknowns reach the minimum over that kernel."""
    dense, made, pairs = separable_layer((CHESSBOARD, CHESSBOARD))
    made.double()
    pairs = [(x.double(), r.double()) for x, r in pairs]
    first, second = made.vertical, made.horizontal
    vertical = dense.vertical.double()
    factor = conditioner(first, vertical, [(x, vertical(x)) for x, _ in pairs], 256, 0)
    refit_kernel(first, pairs, factor, 2 * first.weight.numel(), second)
    (x, r) = pairs[0]
    first.weight.grad = None
    ((second(first(x)) - r).square().sum() / r.square().sum()).backward()
    assert float(first.weight.grad.abs().max()) < 1e-6


def test_lattices_have_their_rates():
    for text, sampling in LATTICES.items():
        top, bottom = map(int, text.split("/"))
        assert sampling.density == top / bottom
        assert lattice_of(round(top / bottom, 3)) == sampling
        assert int(sampling.mask(60, 60).sum()) == 3600 * top // bottom
    assert int(lattice_of(1).mask(5, 5).sum()) == 25
    with pytest.raises(ValueError, match=r"rate=0.4: mask='lattice' has the rates 1, 3/4, 2/3"):
        qx.Espace(rate=0.4, mask="lattice")


def test_espace_on_lattices():
    """Each half has the lattice of its rate; one of which nothing is skipped has no fill."""
    torch.manual_seed(3)
    network = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)).eval()
    images = [smooth(16, 4, 8, 8, seed=s) for s in range(2)]
    method = qx.Espace(rank=6, rate=(1.0, 0.5), mask="lattice", fill="fitted", reach=2)
    result = qx.accelerate(network, method, calibration=images)
    layer = result.model[2]
    assert layer.masks == (EVERY, CHESSBOARD)
    assert layer.vertical.filling is None
    assert layer.horizontal.filling.reach == 2
    assert layer.spec["fill"] == ["nearest", "fitted"]
    again = build_module(layer.spec)
    again.load_state_dict(layer.state_dict())
    with torch.no_grad():
        want = result.model(images[0])
        torch.testing.assert_close(again(result.model[:2](images[0])), want)
        torch.testing.assert_close(qx.fuse(result.model)(images[0]), want, rtol=1e-4, atol=1e-5)
    whole = qx.Espace(rank=6, rate=1, mask="lattice", fill="fitted")
    with torch.no_grad():
        got = qx.accelerate(network, whole, calibration=images).model(images[0])
        low = qx.accelerate(network, qx.LowRank(rank=6), calibration=images).model(images[0])
        torch.testing.assert_close(got, low, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "given",
    [{"fill": ("nearest",)}, {"fill_reach": 1}, {"fill": ("zero", "nearest"), "fill_sizes": ((8, 8), None)}],
)
def test_fills_of_halves_that_do_not_go_together(given):
    with pytest.raises(ValueError, match="fill="):
        EspaceConv2d(4, 6, 3, rank=5, padding=1, masks=(CHESSBOARD, CHESSBOARD), **given)


def test_the_curves_of_a_comparison_have_fitted_fills():
    points = qx.Espace.sweep()
    assert {point.series for point in points} == {
        "espace, impact",
        "espace, residual, fitted",
        "espace, lattice, fitted",
    }
    assert len({point.folder for point in points}) == len(points)
    assert all((point.method.fill == "fitted") == ("fitted" in point.series) for point in points)
    assert {point.series for point in qx.Espace.sweep("uniform")} == {"espace, uniform"}
    # a search's own must serve any size of input
    assert {method.mask for method in candidates_named("espace")} == {"lattice"}
    assert candidates_named("espace")[0].label() == "espace, rank 0.333, rate 1 and 0.5, lattice, fitted fill"


@torch.no_grad()
def test_weights_of_inputs_that_are_constant_do_not_grow():
    """Between them only rounding decides, and large ones that cancel do not survive bfloat16."""
    body = [nn.Conv2d(3, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(), nn.Conv2d(24, 24, 1, groups=24)]
    model = nn.Sequential(*body, nn.BatchNorm2d(24), nn.ReLU(), nn.Conv2d(24, 32, 1)).eval()
    model[1].weight[::3], model[1].bias[::3], model[4].weight[::4], model[4].bias[::4] = 1e-8, 1, 0, 1
    x = torch.randn(64, 3, 16, 16)
    made = qx.accelerate(model, qx.Perforate(sampling=qx.Random(0.5, 1)), calibration=[x])
    assert "6" in made.replaced
    assert made.model[6].weight.abs().max() < 10 * model[6].weight.abs().max()


@pytest.mark.parametrize("sampling", [CHESSBOARD, QUARTER], ids=str)
def test_moments_of_maps_of_several_sizes_are_the_sum_of_each_ones(sampling):
    torch.manual_seed(0)
    fill = qx.PerforatedConv2d(3, 4, 3, sampling=sampling, padding=1, fill="fitted").filling
    maps = [torch.randn(2, 4, *size) for size in ((10, 6), (6, 10), (7, 7))]

    def of(some):
        found = FillMoments(fill, tuple(some[0].shape[2:]))
        for response in some:
            at = sampling.mask(*response.shape[2:]).flatten().nonzero().flatten()
            found.add(response.flatten(2)[:, :, at, None], response)
        return found

    together, apart = of(maps), [of([one]) for one in maps]
    for name in ("gram", "cross", "sum_tap", "sum_response", "power", "count", "sums"):
        torch.testing.assert_close(getattr(together, name), sum(getattr(one, name) for one in apart))
    assert together.computed == 0


@pytest.mark.parametrize(
    "method", [Perforate(), qx.Espace(rank=0.5, rate=0.5, mask="lattice", fill="fitted")], ids=str
)
@pytest.mark.filterwarnings("ignore:calibration:UserWarning")
def test_images_of_several_sizes_fit_what_they_fit_apart(method):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 24, 3, padding=1)).eval()

    def smooth(*size):
        small = torch.randn(24, 3, *(length // 4 + 2 for length in size))
        return nn.functional.interpolate(small, size, mode="bicubic")

    one, other = smooth(20, 12), smooth(12, 20)
    errors = [
        {
            name: row["response_error"]
            for name, row in qx.accelerate(net, method, calibration=data).replaced.items()
        }
        for data in ([one, other.transpose(2, 3)], [one, other], [one, smooth(12, 12)])
    ]
    for several in errors[1:]:
        for name, error in several.items():
            # the kernels see turned images, so that it is not the same
            assert error < 1.5 * errors[0][name]


def test_fills_of_masks_are_of_one_size():
    net = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1)).eval()
    data = [torch.randn(8, 3, 12, 8), torch.randn(8, 3, 8, 12)]
    with pytest.raises(ValueError, match=r"maps of 8 x 12, earlier ones of 12 x 8; .* positions of one size"):
        qx.accelerate(net, Perforate(Random(0.5)), calibration=data)
