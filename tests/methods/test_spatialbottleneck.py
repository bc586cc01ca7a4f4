"""Spatial bottlenecks from trained weights: the fit against numpy, what is recorded, and what is refused."""

import dataclasses
import itertools
import re
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import quincunx as qx
from quincunx.acceleration.assigned import Assigned
from quincunx.methods import spatialbottleneck
from quincunx.methods.spatialbottleneck import _around_noise, _leading

ALL = qx.Cosets(2, [(0, 0), (0, 1), (1, 0), (1, 1)])


def two(values):
    return values if isinstance(values, tuple) else (values, values)


def images(count, channels=3, size=(8, 8), seed=0):
    """Maps whose positions and channels belong together, as those of real pictures do."""
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(channels, channels, 3, 3, generator=generator, dtype=torch.float64)
    generator.manual_seed(seed)
    height, width = size
    source = torch.randn(count, channels, height + 2, width + 2, generator=generator, dtype=torch.float64)
    return torch.nn.functional.conv2d(source, mix) + 0.3


def conv(inputs=4, outputs=4, size=3, **settings):
    return nn.Conv2d(inputs, outputs, size, **{"padding": "same", "dtype": torch.float64, **settings})


def paired(**settings):
    return nn.Sequential(conv(3, 4), nn.ReLU(), conv(4, 5, **settings))


# ---------------------------------------------------------------- numpy's own


def neighbours(maps, kernel, dilation, padding):
    """What a kernel reads at each position, [N, H, W, C, kh, kw], placed one by one on zeros."""
    (vertical, horizontal), (kh, kw) = padding, kernel
    n, c, height, width = maps.shape
    padded = np.pad(maps, ((0, 0), (0, 0), (vertical, vertical), (horizontal, horizontal)))
    found = np.empty((n, height, width, c, kh, kw))
    for i, j in itertools.product(range(kh), range(kw)):
        r, s = i * dilation[0], j * dilation[1]
        found[..., i, j] = padded[:, :, r : r + height, s : s + width].transpose(0, 2, 3, 1)
    return found


def around(maps, layer):
    """What ``layer``'s kernel reads, its size being odd."""
    half = [d * (k - 1) // 2 for k, d in zip(layer.kernel_size, layer.dilation, strict=True)]
    return neighbours(maps, layer.kernel_size, layer.dilation, half)


def means(maps, window):
    """The mean of each window that begins at a position, over what lies inside."""
    height, width = maps.shape[2:]
    found = np.empty_like(maps)
    for r, s in itertools.product(range(height), range(width)):
        found[:, :, r, s] = maps[:, :, r : r + window, s : s + window].mean((2, 3))
    return found


def answered(layer, filled, wanted):
    """Least squares with an intercept: numpy's answers to the zero-filled maps, and the relative error.

    ``filled`` and ``wanted`` are lists of maps, since batches may differ in size.
    """
    g, outputs = layer.groups, layer.out_channels // layer.groups
    squares = power = 0.0
    answers = [np.empty_like(maps) for maps in wanted]
    for group in range(g):
        read = [
            around(maps, layer)[:, :, :, group * maps.shape[1] // g : (group + 1) * maps.shape[1] // g]
            for maps in filled
        ]
        p = np.concatenate([r.reshape(-1, np.prod(r.shape[3:])) for r in read])
        own = slice(group * outputs, (group + 1) * outputs)
        y = np.concatenate([maps[:, own].transpose(0, 2, 3, 1).reshape(-1, outputs) for maps in wanted])
        p = np.concatenate([p, np.ones((len(p), 1))], 1)
        solution = np.linalg.lstsq(p, y, rcond=None)[0]
        got = p @ solution
        squares += ((y - got) ** 2).sum()
        power += ((y - y.mean(0)) ** 2).sum()
        at = 0
        for answer in answers:
            n, _, height, width = answer.shape
            part = got[at : at + n * height * width].reshape(n, height, width, outputs)
            answer[:, own], at = part.transpose(0, 3, 1, 2), at + n * height * width
    return answers, squares / power


def filled(sampled, sampling, size):
    """A sampled map [N, C, m, 1] on a grid of zeros."""
    mask = sampling.mask(*size).numpy()
    found = np.zeros((*sampled.shape[:2], *size))
    found[:, :, mask] = sampled[..., 0]
    return found


# ---------------------------------------------------------------- the second half


CASES = {
    "chessboard": (qx.CHESSBOARD, {}),
    "quarter": (qx.QUARTER, {}),
    "uniform": (qx.Uniform(0.4), {}),
    "tall": (qx.CHESSBOARD, {"size": (3, 1)}),
    "dilated": (qx.THREE_QUARTERS, {"dilation": (1, 2)}),
    "bias-free": (qx.CHESSBOARD, {"bias": False}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_second_half_of_a_pair_is_the_least_squares_solution(case):
    sampling, settings = CASES[case]
    # batches of two sizes
    model, data = paired(**settings), [images(12), images(9, size=(5, 7), seed=1)]
    result = qx.accelerate(model, qx.SpatialBottleneck(sampling), calibration=data)
    with torch.no_grad():
        sampled = [filled(result.model[:2](x).numpy(), sampling, x.shape[2:]) for x in data]
        want, got = [model(x).numpy() for x in data], [result.model(x).numpy() for x in data]
    # the first half has the original's weights
    np.testing.assert_allclose(
        sampled[0], torch.relu(model[0](data[0])).detach().numpy() * sampling.mask(8, 8).numpy(), atol=1e-12
    )
    best, error = answered(model[2], sampled, want)
    for one, other in zip(got, best, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-4 * np.abs(other).max())
    assert result.replaced["2"]["response_error"] == pytest.approx(error, rel=1e-5)
    assert 1e-3 < error < 1


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("down", ["stride", "avgpool"])
def test_the_second_half_of_a_single_is_the_least_squares_solution(down, groups):
    model, data = nn.Sequential(conv(4, 6, groups=groups)), [images(30, 4)]
    result = qx.accelerate(model, qx.SpatialBottleneck(down=down), calibration=data)
    new = result.model[0]
    with torch.no_grad():
        codes = filled(new.down(data[0]).numpy(), qx.CHESSBOARD, (8, 8))
        want, got = model(data[0]).numpy(), new(data[0]).numpy()
    (best,), error = answered(model[0], [codes], [want])
    np.testing.assert_allclose(got, best, atol=2e-4 * np.abs(best).max())
    assert result.replaced["0"]["response_error"] == pytest.approx(error, rel=1e-5)
    assert new.down.out_channels == result.replaced["0"]["mid_channels"] == 2


# ---------------------------------------------------------------- the first half of a pooled pair


POOLED = {
    "quarter": (qx.QUARTER, 2, {}),
    "chessboard": (qx.CHESSBOARD, 2, {}),
    "thirds": (qx.Cosets(3, [(0, 0), (1, 1)]), 3, {}),
    "dilated": (qx.QUARTER, 2, {"dilation": (1, 2)}),
    "grouped, bias-free": (qx.QUARTER, 2, {"groups": 3, "bias": False}),
}


@pytest.mark.parametrize("case", POOLED)
def test_the_first_half_of_a_pooled_pair_is_the_least_squares_solution(case):
    sampling, window, settings = POOLED[case]
    layer = conv(3, 6, **settings)
    model, x = nn.Sequential(layer, nn.ReLU(), conv(6, 5)), images(60, size=(6, 8))
    batches = [x[:25], x[25:]]
    result = qx.accelerate(model, qx.SpatialBottleneck(sampling, down="avgpool"), calibration=batches)
    spread = [window * d for d in layer.dilation]
    half = [d * (k - 1) // 2 for k, d in zip(layer.kernel_size, spread, strict=True)]
    at = sampling.mask(6, 8).numpy()
    read = neighbours(means(x.numpy(), window), layer.kernel_size, spread, half)[:, at]
    with torch.no_grad():
        wanted, got = layer(x).numpy()[:, :, at], result.model[0](x)[..., 0].numpy()
    squares, power, g = 0.0, 0.0, layer.groups
    for group in range(g):
        own = slice(group * 6 // g, (group + 1) * 6 // g)
        p = read[:, :, group * 3 // g : (group + 1) * 3 // g].reshape(read.shape[0] * read.shape[1], -1)
        p = np.concatenate([p, np.ones((len(p), 1))], 1)
        y = wanted[:, own].transpose(0, 2, 1).reshape(len(p), -1)
        best = p @ np.linalg.lstsq(p, y, rcond=None)[0]
        made = got[:, own].transpose(0, 2, 1).reshape(len(p), -1)
        np.testing.assert_allclose(made, best, atol=2e-4 * np.abs(best).max())
        squares += ((y - best) ** 2).sum()
        power += ((y - y.mean(0)) ** 2).sum()
    assert result.replaced["0"]["response_error"] == pytest.approx(squares / power, rel=1e-5)
    assert 1e-3 < squares / power < 1


# ---------------------------------------------------------------- the first half of a single


FIRST = {
    "every position": (ALL, "stride", {}),
    "chessboard": (qx.CHESSBOARD, "stride", {}),
    "grouped": (qx.CHESSBOARD, "stride", {"groups": 2}),
    "dilated": (qx.CHESSBOARD, "stride", {"dilation": 2}),
    "tall": (ALL, "stride", {"size": (3, 1)}),
    "avgpool": (qx.QUARTER, "avgpool", {}),
    "avgpool, every position": (ALL, "avgpool", {"size": (1, 3)}),
}


@pytest.mark.parametrize("case", FIRST)
def test_the_codes_are_those_of_a_reduced_rank_regression(case):
    sampling, down, settings = FIRST[case]
    layer, x = conv(4, 6, **settings), images(60, 4, (6, 8))
    model = nn.Sequential(layer)
    result = qx.accelerate(
        model, qx.SpatialBottleneck(sampling, down=down, mid_share=1.7), calibration=[x[:25], x[25:]]
    )
    kept = result.model[0].down
    with torch.no_grad():
        y = layer(x).numpy()
    window = 2 if down == "avgpool" else 1
    spread = [window * d for d in layer.dilation]
    half = [d * (k - 1) // 2 for k, d in zip(layer.kernel_size, spread, strict=True)]
    at = sampling.mask(6, 8).numpy()
    read = neighbours(means(x.numpy(), window), layer.kernel_size, spread, half)[:, at]
    told = around(y, layer)[:, at]
    g = layer.groups
    for group in range(g):
        p = read[:, :, group * 4 // g : (group + 1) * 4 // g].reshape(read.shape[0] * read.shape[1], -1)
        t = told[:, :, group * 6 // g : (group + 1) * 6 // g].reshape(len(p), -1)
        p, t = p - p.mean(0), t - t.mean(0)
        slope = np.linalg.lstsq(p, t, rcond=None)[0]
        rank = kept.out_channels // g
        best = np.linalg.svd(p @ slope, full_matrices=False)[2][:rank]
        want = p @ slope @ best.T
        got = p @ kept.weight[group * rank : (group + 1) * rank].detach().numpy().reshape(rank, -1).T
        # the same codes up to a change of basis: each is a combination of the others
        rest = want - got @ np.linalg.lstsq(got, want, rcond=None)[0]
        assert np.abs(rest).max() < 1e-3 * np.abs(want).max()


# ---------------------------------------------------------------- laws of the fit


def test_a_single_with_room_for_all_of_a_patch_is_exact():
    model, data = nn.Sequential(conv(4, 6)), [images(40, 4)]
    result = qx.accelerate(model, qx.SpatialBottleneck(ALL, mid_share=1e6), calibration=data)
    assert result.replaced["0"]["mid_channels"] == 36
    assert result.replaced["0"]["response_error"] < 1e-9
    x = images(3, 4, (9, 5), seed=7)
    want = model(x).detach()
    torch.testing.assert_close(result.model(x).detach(), want, rtol=0, atol=1e-3 * float(want.abs().max()))


@pytest.mark.parametrize("data", [True, False])
def test_both_halves_of_a_single_have_weights_of_one_size(data):
    """Whatever the scale of the map: a first step of training on halves of unlike size would end it."""
    conv, x = nn.Conv2d(6, 8, 3, padding=1, groups=2), 1000 * torch.randn(40, 6, 9, 9)
    made = qx.accelerate(nn.Sequential(conv), qx.SpatialBottleneck(), calibration=[x] if data else None)
    halves = made.model[0].down.weight, made.model[0].up.weight
    first, second = (w.detach().flatten(1).norm(dim=1) for w in halves)
    torch.testing.assert_close(first, second)
    assert float(first.min()) > 0


def test_a_layer_of_low_rank_needs_as_many_codes_as_its_patches_have_to_tell():
    layer, data = conv(4, 4), [images(40, 4)]
    with torch.no_grad():  # one number a position, read nine times
        layer.weight.zero_()[:, :, 1, 1] = torch.randn(4, 1).double() @ torch.randn(1, 4).double()

    def error(mid):
        method = qx.SpatialBottleneck(ALL, mid_share=mid / 2)
        made = qx.accelerate(nn.Sequential(layer), method, calibration=data).replaced["0"]
        assert made["mid_channels"] == mid
        return made["response_error"]

    assert error(9) < 1e-9
    assert error(3) > 1e-3


def test_a_pair_at_every_position_is_exact():
    model, data = paired(), [images(12)]
    result = qx.accelerate(model, qx.SpatialBottleneck(ALL), calibration=data)
    assert result.replaced["2"]["response_error"] < 1e-12
    x = images(3, size=(5, 7), seed=5)
    torch.testing.assert_close(result.model(x), model(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("down", ["stride", "avgpool"])
@pytest.mark.parametrize("kind", ["pair", "single"])
def test_a_fit_to_data_is_better_on_other_data(kind, down):
    model, other = (paired() if kind == "pair" else nn.Sequential(conv(3, 5))), images(20, seed=3)

    def error(data):
        method = qx.SpatialBottleneck(data=data, down=down)
        new = qx.accelerate(model, method, calibration=[images(40)]).model
        with torch.no_grad():
            want = model(other)
            spread = want - want.mean((0, 2, 3), keepdim=True)
            return float((new(other) - want).square().sum() / spread.square().sum())

    assert error(True) < 0.95 * error(False)


def test_what_the_data_does_not_show_stays_at_the_start():
    model, x = paired(), images(30)
    with torch.no_grad():
        model[0].weight[1], model[0].bias[1] = 0, -1  # relu makes it a channel of zeros
    start = qx.accelerate(model, qx.SpatialBottleneck(data=False)).model
    fitted = qx.accelerate(model, qx.SpatialBottleneck(), calibration=[x]).model
    torch.testing.assert_close(fitted[2].weight[1], start[2].weight[1], rtol=1e-9, atol=1e-9)
    assert (fitted[2].weight[0] - start[2].weight[0]).abs().max() > 1e-2


@pytest.mark.parametrize("value", [0.0, 0.3, 1000.123])
def test_maps_that_never_change(value):
    model = nn.Sequential(conv(3, 4))
    # at these positions no patch reaches over the border
    method = qx.SpatialBottleneck(qx.Cosets(2, [(1, 1)]))
    x = (value * torch.tensor([1, 0.37, -2.1]).double().view(3, 1, 1)).expand(30, 3, 9, 9)
    result = qx.accelerate(model, method, calibration=[x])
    assert all(bool(p.isfinite().all()) for p in result.model.parameters())
    with torch.no_grad():
        want, got = model(x[:1]), result.model(x[:1])
    if value == 0:
        assert result.replaced["0"]["response_error"] == 0
        torch.testing.assert_close(got, want)
        # a code that was never seen at work adds nothing
        with torch.no_grad():
            other = result.model(images(2))
        torch.testing.assert_close(
            other, model.get_parameter("0.bias").detach().view(-1, 1, 1).expand_as(other)
        )
    assert float((got - want).abs().max()) <= 2 * float((want - want.mean((2, 3), keepdim=True)).abs().max())


@pytest.mark.parametrize("data", [True, False])
def test_the_seed_alone_decides(data):
    def weights(seed, noise):
        torch.manual_seed(noise)
        method = qx.SpatialBottleneck(data=data, positions=40, seed=seed)
        new = qx.accelerate(model, method, calibration=[images(40, 4, (9, 9))]).model
        return torch.cat([p.detach().flatten() for p in new.parameters()])

    model = nn.Sequential(conv(4, 4), nn.MaxPool2d(2), conv(4, 4))
    assert torch.equal(weights(0, 1), weights(0, 2))
    assert not torch.allclose(weights(0, 1), weights(5, 1))


@pytest.mark.parametrize(
    "sampling", [qx.QUARTER, qx.Cosets(17, [(i, i) for i in range(17)]), qx.Positions(torch.eye(18) > 0)]
)
def test_a_single_fitted_to_noise(sampling):
    model, x = nn.Sequential(conv(3, 4)), torch.randn(2, 3, 18, 18).double()
    new = qx.accelerate(model, qx.SpatialBottleneck(sampling, data=False), example_input=x).model
    assert torch.equal(new[0].up.bias, model[0].bias)
    assert (new(x) - model(x)).square().mean() < model(x).square().mean()


def test_many_codes_fitted_to_noise():
    model, x = nn.Sequential(conv(3, 12)), torch.randn(2, 3, 8, 8).double()
    new = qx.accelerate(model, qx.SpatialBottleneck(ALL, data=False, mid_share=100)).model
    torch.testing.assert_close(new(x), model(x), rtol=0, atol=1e-2)


@pytest.mark.parametrize(("size", "dilation", "groups"), [(3, 1, 1), ((3, 5), (2, 1), 1), (3, 2, 2)])
def test_what_noise_would_tell_a_first_half_is_known(size, dilation, groups):
    torch.manual_seed(0)
    padding = [d * (k - 1) // 2 for d, k in zip(two(dilation), two(size), strict=True)]
    layer = nn.Conv2d(4, 6, size, padding=padding, dilation=dilation, groups=groups, bias=False).double()
    # of what is linear in white noise the moments are those of one value at a time
    grid, borders = (17, 17), {"dilation": dilation, "padding": padding}
    x = torch.eye(4 * 17 * 17, dtype=torch.double).view(-1, 4, *grid)
    with torch.no_grad():
        y = layer(x)
    p, t = (F.unfold(z, size, **borders)[:, :, 8 * 17 + 8].view(len(z), groups, -1) for z in (x, y))
    found = _around_noise(layer)
    torch.testing.assert_close(found.gram.contiguous(), torch.einsum("ngp,ngq->gpq", p, p))
    torch.testing.assert_close(found.cross, torch.einsum("ngp,ngt->gpt", p, t))
    torch.testing.assert_close(found.power, t.square().sum((0, 2)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes(dtype):
    model, data = paired().to(dtype), [images(20).to(dtype)]
    result = qx.accelerate(model, qx.SpatialBottleneck(), calibration=data)
    assert {p.dtype for p in result.model.parameters()} == {dtype}
    assert result.replaced["2"]["response_error"] < 1
    wide = qx.accelerate(model.double(), qx.SpatialBottleneck(), calibration=[data[0].double()])
    want = wide.replaced["2"]["response_error"]
    assert result.replaced["2"]["response_error"] == pytest.approx(want, rel=0.05)


# ---------------------------------------------------------------- data that will not do


@pytest.mark.parametrize("kind", ["pair", "pooled pair", "single"])
def test_few_images_give_less_error_on_others_than_no_data_and_than_no_regularisation(kind, monkeypatch):
    method = qx.SpatialBottleneck(down="avgpool" if kind == "pooled pair" else "stride")
    unseen = images(200, size=(4, 4), seed=77)
    errors = dict.fromkeys(("kept", "plain", "free"), 0.0)
    # a mean over four layers: of one a draw may favour either
    for seed in range(4):
        torch.manual_seed(seed)
        model = nn.Sequential(conv(3, 6)) if kind == "single" else paired()
        few = images(3, size=(4, 4), seed=seed)

        def error(method, full, model=model, few=few):
            monkeypatch.setattr(spatialbottleneck, "_FULL", full)
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore", UserWarning)
                made, wanted = qx.accelerate(model, method, calibration=[few]).model, model(unseen)
                return float((made(unseen) - wanted).square().sum() / wanted.square().sum())

        errors["kept"] += error(method, 6)
        errors["free"] += error(method, 0)
        errors["plain"] += error(dataclasses.replace(method, data=False), 6)
    assert errors["kept"] < 0.95 * errors["plain"]
    assert errors["kept"] < 0.95 * errors["free"]


def test_too_few_images_are_one_line_that_says_how_many_would_do():
    few, enough = [images(2, size=(4, 4))], [images(14, size=(4, 4))]
    line = (
        "calibration: 2 images are few for 1 of 2 layers, which were held near their own weights; a full fit "
        "of all needs 14 images of this size (layer '2' most)"
    )
    with pytest.warns(UserWarning, match=re.escape(line)):
        result = qx.accelerate(paired(), qx.SpatialBottleneck(qx.QUARTER), calibration=few)
    # 32 of 6 (36 + 1) samples
    assert result.replaced["2"]["images_needed"] == 14
    again = qx.accelerate(paired(), qx.SpatialBottleneck(qx.QUARTER), calibration=enough)
    assert "images_needed" not in again.replaced["2"]
    # of a single the first half has a quarter of the positions: 6 (36 + 1) / 4 images
    with pytest.warns(UserWarning, match="56 images"):
        qx.accelerate(
            nn.Sequential(conv(4, 4)), qx.SpatialBottleneck(qx.QUARTER), calibration=[images(9, 4, (4, 4))]
        )


def test_a_value_that_is_not_finite():
    data = [images(12), images(12)]
    data[1][3, 0, 2, 2] = torch.nan
    for model, layer in ((paired(), "2"), (nn.Sequential(conv(3, 3)), "0")):
        match = f"calibration: layer '{layer}': batch 1 gives a value that is not finite"
        with pytest.raises(ValueError, match=match):
            qx.accelerate(model, qx.SpatialBottleneck(), calibration=data)


def test_data_is_asked_for_and_there_is_none():
    with pytest.raises(ValueError, match="calibration=None: this method is fitted on data"):
        qx.accelerate(paired(), qx.SpatialBottleneck(data=True))


# ---------------------------------------------------------------- the record


@pytest.mark.parametrize("down", ["stride", "avgpool"])
@pytest.mark.parametrize("sampling", [qx.CHESSBOARD, qx.QUARTER, qx.Cosets(3, [(0, 1), (2, 2)])])
def test_recorded_macs_are_those_of_the_network(sampling, down):
    model = nn.Sequential(conv(3, 8, groups=1), nn.ReLU(), conv(8, 8, groups=2), nn.Sigmoid(), conv(8, 6, 5))
    x = torch.randn(2, 3, 7, 8).double()
    result = qx.accelerate(model, qx.SpatialBottleneck(sampling, down=down, data=False), example_input=x)
    before, after = (
        {row.name: row.macs for row in qx.cost(net, x[:1]).rows} for net in (model, result.model)
    )
    count = sampling.count(7, 8)
    assert result.replaced["0"]["macs_after"] == after["0"] == count * 9 * 3 * 8
    assert result.replaced["2"]["macs_after"] == after["2"] == count * 9 * 4 * 8
    assert result.replaced["4"]["macs_after"] == after["4.down"] + after["4.up"]
    for name in ("0", "2", "4"):
        assert result.replaced[name]["macs_before"] == before[name]
        assert result.replaced[name]["sampling"] == sampling.spec
    assert result.replaced["4"]["mid_channels"] == round(8 * 6 / 14)


# ---------------------------------------------------------------- refusals


REFUSED = {
    "1 x 1": (conv(size=1), {}, "1 x 1: it would leave the positions between the computed ones empty"),
    "strided": (conv(stride=2, padding=1), {}, "strided: it changes the resolution, where"),
    "size": (conv(padding=0), {}, "its result has another size than its input"),
    "even": (conv(size=4, padding=1), {}, "its result has another size than its input"),
    "same": (conv(size=4, padding="same"), {}, "an even kernel with padding='same': it has no middle"),
    "padding": (conv(padding=1, padding_mode="reflect"), {"down": "avgpool"}, "padding_mode='reflect'"),
    "depthwise": (conv(groups=4), {}, "depthwise: a bottleneck of one channel saves nothing"),
    "period": (
        conv(),
        {"sampling": qx.Cosets(9, [(0, 0)])},
        "grid 8 x 8: smaller than the sampling's period",
    ),
    "grid": (
        conv(),
        {"sampling": qx.Positions([[True]])},
        "grid 8 x 8: these positions belong to a grid of 1 x 1",
    ),
    "singles": (conv(), {"singles": False}, "no other convolution on its grid makes a pair with it"),
}


# torch says once how it pads unequal sides
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case):
    layer, settings, reason = REFUSED[case]
    with pytest.warns(UserWarning, match="spatialbottleneck replaced nothing"):
        result = qx.accelerate(
            nn.Sequential(layer), qx.SpatialBottleneck(**settings), calibration=[images(20, 4)]
        )
    assert result.skipped["0"].startswith(reason)
    assert type(result.model[0]) is nn.Conv2d


def test_a_layer_that_is_called_twice_has_no_one_input():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = conv()

        def forward(self, x):
            return self.layer(self.layer(x))

    data = [images(20, 4)]
    with pytest.warns(UserWarning, match="spatialbottleneck replaced nothing"):
        result = qx.accelerate(Twice(), qx.SpatialBottleneck(), calibration=data)
    assert result.skipped["layer"].startswith("called 2 times in a forward")
    assert qx.accelerate(Twice(), qx.SpatialBottleneck(data=False), calibration=data).replaced


def test_a_half_whose_partner_has_another_method_is_a_single_or_stays():
    model, data = nn.Sequential(conv(3, 4), nn.ReLU(), conv(4, 4)), [images(40)]
    methods = {"0": qx.SpatialBottleneck(qx.QUARTER), "2": qx.SpatialBottleneck(singles=False)}
    result = qx.accelerate(model, Assigned(methods), calibration=data)
    assert result.replaced["0"]["kind"] == "SpatialBottleneck2d"
    assert result.skipped == {"2": "no other convolution on its grid makes a pair with it"}
    assert result.model(data[0]).shape == (40, 4, 8, 8)


@pytest.mark.parametrize(("rows", "columns", "count"), [(60, 80, 5), (60, 80, 60), (12, 4, 8)])
def test_directions_are_those_of_the_whole_decomposition(rows, columns, count):
    torch.manual_seed(0)
    scale = 0.8 ** torch.arange(columns, dtype=torch.float64)
    matrix = torch.randn(2, rows, columns, dtype=torch.float64) * scale
    found = _leading(matrix, count)
    assert found.shape == (2, rows, count)
    torch.testing.assert_close(found.mT @ found, torch.eye(count, dtype=torch.float64).expand(2, -1, -1))
    kept = min(count, columns)
    expected = np.linalg.svd(matrix.numpy())[0][:, :, :kept]
    inside = torch.from_numpy(expected).mT @ found
    torch.testing.assert_close(inside.square().sum(), torch.tensor(2.0 * kept, dtype=torch.float64))


def test_a_fit_does_not_depend_on_the_random_state():
    model, data, method = paired(), images(40), qx.SpatialBottleneck(pairs=False)
    first, second = (qx.accelerate(model, method, calibration=[data]).model for _ in range(2))
    assert all(map(torch.equal, first.parameters(), second.parameters()))


def test_pairs_may_be_left_as_singles():
    result = qx.accelerate(paired(), qx.SpatialBottleneck(pairs=False), calibration=[images(40)])
    assert [made["kind"] for made in result.replaced.values()] == ["SpatialBottleneck2d"] * 2


@pytest.mark.parametrize(
    ("error", "match", "settings"),
    [
        (TypeError, "sampling='half': expected a sampling", {"sampling": "half"}),
        (ValueError, "down='max': expected 'stride' or 'avgpool'", {"down": "max"}),
        (ValueError, "has no cosets", {"sampling": qx.Uniform(0.5), "down": "avgpool"}),
        (ValueError, "mid_share=0: expected a positive share", {"mid_share": 0}),
        (ValueError, "mid_share=nan: expected a positive share", {"mid_share": float("nan")}),
        (ValueError, "mid_share=inf: expected a positive share", {"mid_share": float("inf")}),
        (ValueError, "nothing is left to replace", {"pairs": False, "singles": False}),
        (ValueError, "positions=0: expected an integer of at least 1", {"positions": 0}),
        (ValueError, "positions=2.5: expected an integer", {"positions": 2.5}),
        (ValueError, "seed=-1: expected an integer of at least 0", {"seed": -1}),
        (ValueError, "data='yes': expected True, False or None", {"data": "yes"}),
    ],
)
def test_bad_settings(error, match, settings):
    with pytest.raises(error, match=match):
        qx.SpatialBottleneck(**settings)
