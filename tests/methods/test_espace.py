"""ESPACE layers: the compact chain against the explicit fills, its gradient, other grids, the method."""

import copy
import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import quincunx as qx
from quincunx.layers.build import build_module
from quincunx.layers.separable import MaskedConv2d, resized
from quincunx.methods.fitting.impact import highest, impacts
from quincunx.ops import filled_conv2d
from quincunx.surgery.calibration import Batch

OPS = torch.ops.quincunx


def drawn(height, width, share=0.3, seed=0):
    mask = torch.rand(height, width, generator=torch.Generator().manual_seed(seed)) < share
    mask[0, 0] = True
    return qx.Positions(mask)


# settings of the layer, and its masks for a 9 x 8 input
LAYERS = {
    "random": ({"kernel_size": 3, "padding": 1}, (qx.Random(0.25, 1), qx.Random(0.2, 2))),
    "uniform": ({"kernel_size": 5, "padding": 2, "groups": 2}, (qx.Uniform(0.25), qx.Uniform(0.25))),
    "cosets": ({"kernel_size": 3, "padding": 1, "bias": False}, (qx.CHESSBOARD, qx.QUARTER)),
    "explicit": ({"kernel_size": 3, "stride": 2, "padding": 1}, (drawn(5, 8), drawn(5, 4, seed=3))),
    "strided": (
        {"kernel_size": (3, 5), "stride": (1, 3), "padding": (0, 2)},
        (qx.Random(0.5), qx.Uniform(0.5)),
    ),
    "dilated": ({"kernel_size": 3, "dilation": (2, 1)}, (qx.Uniform(0.3), qx.Random(0.6, 1))),
    "same": ({"kernel_size": (2, 3), "padding": "same"}, (qx.Random(0.3), drawn(9, 8))),
    "dense": ({"kernel_size": 3, "padding": 1}, (qx.Random(1.0), qx.Random(1.0))),
}
layers = pytest.mark.parametrize(("settings", "masks"), LAYERS.values(), ids=LAYERS.keys())


def layer(settings, masks, dtype=torch.float64):
    return qx.EspaceConv2d(6, 4, **settings, rank=2, masks=masks).to(dtype)


def composed(module, x):
    """Convolution, fill, convolution, fill: each by torch, filled by a loop over the positions."""
    for half in (module.vertical, module.horizontal):
        top, bottom, left, right = half.borders
        x = F.conv2d(
            F.pad(x, (left, right, top, bottom)),
            half.weight,
            half.bias,
            half.stride,
            0,
            half.dilation,
            half.groups,
        )
        places = half.sampling.positions(*x.shape[2:])
        filled = torch.empty_like(x)
        for r in range(x.shape[2]):
            for c in range(x.shape[3]):
                near = ((places - torch.tensor([r, c])) ** 2).sum(1).argmin()
                filled[:, :, r, c] = x[:, :, places[near, 0], places[near, 1]]
        x = filled
    return x


@layers
def test_the_compact_chain_is_the_explicit_one(settings, masks):
    module, x = layer(settings, masks), torch.randn(2, 6, 9, 8, dtype=torch.float64)
    torch.testing.assert_close(module(x), composed(module, x), rtol=0, atol=1e-13)
    single = copy.deepcopy(module).float()
    # float32 sums in another order, by the native kernels where they are built
    torch.testing.assert_close(single(x.float()), composed(single, x.float()), rtol=1e-5, atol=1e-5)


@layers
def test_gradients(settings, masks):
    module, x = layer(settings, masks), torch.randn(1, 6, 9, 8, dtype=torch.float64, requires_grad=True)
    parameters = dict(module.named_parameters())

    def call(x, *values):
        return torch.func.functional_call(module, dict(zip(parameters, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (x, *parameters.values()))


@layers
def test_gradients_are_those_of_the_explicit_chain(settings, masks):
    module, x = layer(settings, masks), torch.randn(2, 6, 9, 8, dtype=torch.float64, requires_grad=True)
    leaves = [x, *module.parameters()]
    weights = torch.randn_like(module(x))
    got = torch.autograd.grad((module(x) * weights).sum(), leaves)
    want = torch.autograd.grad((composed(module, x) * weights).sum(), leaves)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=0, atol=1e-11)


def test_what_a_layer_returns_may_be_changed_in_place():
    module = qx.EspaceConv2d(3, 4, 3, rank=2, masks=(qx.QUARTER, qx.QUARTER), padding=1)
    x = torch.randn(2, 3, 6, 6)
    want = torch.autograd.grad(F.relu(module(x)).sum(), list(module.parameters()))
    got = torch.autograd.grad(F.relu(module(x), inplace=True).sum(), list(module.parameters()))
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)


def test_positions_that_share_a_value_add_their_gradients():
    """Eq. 7: one computed position stands for four, so its bias collects all four."""
    module = qx.EspaceConv2d(1, 1, 1, rank=1, masks=(qx.QUARTER, qx.QUARTER)).double()
    x = torch.zeros(1, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    z = module(x)
    upstream = torch.arange(16.0, dtype=torch.float64).view(1, 1, 4, 4)
    z.backward(upstream)
    assert float(module.horizontal.bias.grad) == float(upstream.sum())
    weight = float((module.vertical.weight * module.horizontal.weight).detach())
    shares = torch.zeros(4, 4, dtype=torch.float64)
    places = [(0, 0), (0, 2), (2, 0), (2, 2)]
    for r in range(4):
        for c in range(4):
            row, col = min(places, key=lambda p: ((p[0] - r) ** 2 + (p[1] - c) ** 2, p))
            shares[row, col] += upstream[0, 0, r, c]
    torch.testing.assert_close(x.grad[0, 0], weight * shares)


@layers
def test_the_operator_is_registered_whole(settings, masks):
    module = layer(settings, masks, torch.float32)
    half, between = module.horizontal, module.vertical.grid(9, 8)
    y = torch.randn(2, 2 * half.groups, masks[0].count(*between), 1, requires_grad=True)
    inputs = (y, half.weight, half.bias, masks[0].spec, between, masks[1].spec)
    torch.library.opcheck(
        OPS.conv_filled.default, (*inputs, half.stride, half.borders, half.dilation, half.groups)
    )


def test_second_derivatives():
    y, w = (
        torch.randn(1, 2, 4, 1).double().requires_grad_(),
        torch.randn(2, 2, 1, 3).double().requires_grad_(),
    )

    def call(y, w):
        return filled_conv2d(y, w, source=qx.QUARTER, size=(4, 4), sampling=qx.CHESSBOARD, padding=(0, 1))

    assert torch.autograd.gradgradcheck(call, (y, w))


@pytest.mark.parametrize(
    ("error", "match", "change"),
    [
        (TypeError, "sampling=0.5", {"source": 0.5}),
        (TypeError, "sampling=None", {"sampling": None}),
        (ValueError, r"y: expected \[N, C, m, 1\] with m=16", {"size": (8, 8)}),
        (ValueError, r"size=\(4,\)", {"size": (4,)}),
        (ValueError, "groups=3", {"groups": 3}),
        (ValueError, "does not fit", {"padding": 0, "size": (8, 2), "source": qx.Random(0.25)}),
    ],
)
def test_the_function_refuses(error, match, change):
    arguments = {"source": qx.QUARTER, "size": (4, 4), "sampling": qx.CHESSBOARD, "padding": (0, 1)}
    with pytest.raises(error, match=match):
        filled_conv2d(torch.zeros(1, 2, 4, 1), torch.zeros(4, 2, 1, 3), **{**arguments, **change})


@layers
def test_macs_are_those_of_the_computed_positions(settings, masks):
    module = layer(settings, masks)
    between = module.vertical.grid(9, 8)
    m1, m2 = masks[0].count(*between), masks[1].count(*module.horizontal.grid(*between))
    dh, dw = module.vertical.kernel_size[0], module.horizontal.kernel_size[1]
    cost = qx.cost(module, torch.zeros(1, 6, 9, 8, dtype=torch.float64))
    assert cost.macs == 2 * (dh * 6 * m1 + dw * 4 * m2)
    assert [row.name for row in cost.rows] == ["vertical", "horizontal"]


@layers
def test_fused_compiled_and_exported(settings, masks):
    module, x = layer(settings, masks, torch.float32).eval(), torch.randn(2, 6, 9, 8)
    want = module(x)
    torch.testing.assert_close(qx.fuse(module)(x), want, rtol=1e-5, atol=1e-5)
    if not any(isinstance(mask, qx.Uniform) for mask in masks):  # whose counts a compiler warns about
        torch.testing.assert_close(torch.compile(module, fullgraph=True, backend="eager")(x), want)
        torch.testing.assert_close(torch.export.export(module, (x,)).module()(x), want)


def test_a_fused_chain_has_one_program_and_folds_what_stands_between():
    masks = (qx.Random(0.3, 1), qx.Random(0.3, 2))
    net = nn.Sequential(
        qx.EspaceConv2d(6, 8, 3, rank=4, masks=masks, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 1),
        nn.ReLU(),
        qx.EspaceConv2d(8, 4, 3, rank=4, masks=masks, padding=1),
    ).eval()
    net[1].running_mean.normal_()
    net[1].running_var.uniform_(0.5, 2)
    fused, x = qx.fuse(net), torch.randn(3, 6, 9, 8)
    assert [n.op for n in fused.graph.nodes].count("call_module") == 1
    torch.testing.assert_close(fused(x), net(x), rtol=1e-4, atol=1e-5)


@layers
def test_a_state_dict_holds_weights_only_and_a_spec_the_rest(settings, masks):
    module, x = layer(settings, masks), torch.randn(2, 6, 9, 8, dtype=torch.float64)
    assert set(module.state_dict()) == {name for name, _ in module.named_parameters()}
    other = build_module(json.loads(json.dumps(module.spec))).double()
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(x), module(x))
    assert other.masks == masks


# ---------------------------------------------------------------- other grids


def test_random_and_uniform_masks_are_drawn_for_any_grid():
    module = qx.EspaceConv2d(2, 3, 3, rank=2, masks=(qx.Random(0.3), qx.Uniform(0.3)), padding=1).double()
    for size in ((9, 8), (5, 12)):
        x = torch.randn(1, 2, *size, dtype=torch.float64)
        torch.testing.assert_close(module(x), composed(module, x), rtol=0, atol=1e-13)


@pytest.mark.parametrize("which", [0, 1])
def test_estimated_masks_are_refused_on_another_grid_unless_resized(which):
    masks = [qx.Random(0.3), qx.Random(0.3)]
    masks[which] = drawn(9, 8)
    x = torch.randn(1, 2, 12, 10)
    strict = qx.EspaceConv2d(2, 3, 3, rank=2, masks=tuple(masks), padding=1)
    message = r"grid 12 x 10: this mask was estimated on 9 x 8; estimate it again .* resize_masks=True"
    with pytest.raises(ValueError, match=message):
        strict(x)
    loose = qx.EspaceConv2d(2, 3, 3, rank=2, masks=tuple(masks), padding=1, resize_masks=True)
    loose.load_state_dict(strict.state_dict())
    masks[which] = resized(masks[which].spec, 12, 10)
    exact = qx.EspaceConv2d(2, 3, 3, rank=2, masks=tuple(masks), padding=1)
    exact.load_state_dict(strict.state_dict())
    assert torch.equal(loose(x), exact(x))
    assert build_module(loose.spec).vertical.resize_masks


def test_resizing_takes_the_nearest_position():
    mask = drawn(4, 6)
    assert resized(mask.spec, 4, 6) == mask
    doubled = resized(mask.spec, 8, 12).mask(8, 12)
    assert torch.equal(doubled, mask.mask(4, 6).repeat_interleave(2, 0).repeat_interleave(2, 1))
    lonely = torch.zeros(9, 9, dtype=torch.bool)
    lonely[0, 8] = True
    assert resized(qx.Positions(lonely).spec, 3, 3).positions(3, 3).tolist() == [[0, 2]]
    with pytest.raises(TypeError, match="explicit"):
        resized(qx.QUARTER.spec, 3, 3)


@pytest.mark.parametrize(
    ("error", "match", "change"),
    [
        (ValueError, "rank=0", {"rank": 0}),
        (ValueError, "rank=True", {"rank": True}),
        (TypeError, "masks=", {"masks": (qx.QUARTER, "all")}),
        (TypeError, "masks=", {"masks": (qx.QUARTER,)}),
        (ValueError, "in_channels=6", {"groups": 4}),
        (ValueError, "kernel_size=0", {"kernel_size": 0}),
    ],
)
def test_a_layer_refuses(error, match, change):
    arguments = {"kernel_size": 3, "rank": 2, "masks": (qx.QUARTER, qx.QUARTER)}
    with pytest.raises(error, match=match):
        qx.EspaceConv2d(6, 8, **{**arguments, **change})


def test_a_map_without_a_batch_is_refused_by_a_sentence():
    for fill in ("nearest", "zero"):
        layer = qx.EspaceConv2d(6, 8, 3, rank=2, masks=(qx.QUARTER, qx.QUARTER), fill=fill)
        with pytest.raises(ValueError, match=r"expected 4 dimensions, got shape \(6, 9, 8\)"):
            layer(torch.randn(6, 9, 8))


def test_a_separable_layer_refuses_padding_that_torch_has_no_word_for():
    with pytest.raises(ValueError, match=r"padding=\(0, 1, 0, 1\)"):
        qx.SeparableConv2d(2, 2, 3, rank=1, padding=(0, 1, 0, 1))


# ---------------------------------------------------------------- the method


def network():
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 12, 3, stride=2, padding=1),
        nn.BatchNorm2d(12),
        nn.ReLU(inplace=True),
        nn.Conv2d(12, 8, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    ).double()


def data(targets=True):
    batches = [torch.randn(6, 3, 10, 9, dtype=torch.float64) for _ in range(2)]
    return [(x, torch.randint(5, (6,))) for x in batches] if targets else batches


@pytest.mark.parametrize("targets", [False, True])
def test_impact_masks_are_estimated_on_the_network_of_low_rank(targets):
    model, batches = network(), data(targets)
    method = qx.Espace(rank=4, rate=(0.5, 0.25), pointwise=True)
    result = qx.accelerate(model, method, calibration=batches)
    low = qx.accelerate(model, qx.LowRank(rank=4), calibration=batches).model
    places = {"a": low[0].vertical, "b": low[0].horizontal, "c": low[2].vertical, "d": low[2].horizontal}
    places["e"] = low[5]
    numbered = [Batch(i, *(b if targets else (b,))) for i, b in enumerate(batches)]
    wanted = impacts(low, places, numbered)
    new = result.model
    masks = [*new[0].masks, *new[2].masks, new[5].sampling]
    for place, mask, rate in zip("abcde", masks, (0.5, 0.25, 0.5, 0.25, 0.5), strict=True):
        assert mask == highest(wanted[place], rate)
    assert isinstance(new[5], MaskedConv2d)
    assert torch.equal(new[2].vertical.weight, low[2].vertical.weight)
    assert torch.equal(new[5].weight, model[5].weight)
    torch.testing.assert_close(result.maps["2"]["impact2"], wanted["d"], rtol=1e-9, atol=0)
    assert result.replaced["2"]["rates"] == [mask.density for mask in new[2].masks]
    assert result.replaced["5"]["rates"] == [12 / 25]  # round(12.5)
    json.dumps(result.replaced)


@pytest.mark.parametrize("mask", ["impact", "uniform", "random"])
def test_everything_computed_at_full_rank_is_the_network_itself(mask):
    model, batches = network().eval(), data()
    method = qx.Espace(rank="full", rate=1, mask=mask, pointwise=True)
    result = qx.accelerate(model, method, calibration=batches)
    assert sorted(result.replaced) == ["0", "2", "5"]
    x = batches[0][0]
    torch.testing.assert_close(result.model(x), model(x), rtol=0, atol=1e-12)


def test_without_data_uniform_and_random_masks_go_on_the_weights():
    model = network()
    for mask in ("uniform", "random"):
        result = qx.accelerate(model, qx.Espace(rank=4, mask=mask))
        assert result.replaced["0"]["response_error"] is None
        assert result.replaced["0"]["macs_before"] is None
    first = [m for i in (0, 2) for m in result.model[i].masks]
    assert len(set(first)) == 4  # every place has a draw of its own
    other = qx.accelerate(model, qx.Espace(rank=4, mask="random", seed=1)).model
    assert not set(first) & {m for i in (0, 2) for m in other[i].masks}
    same = qx.accelerate(model, qx.Espace(rank=4, mask="random", mask_seed=1)).model
    assert [m for i in (0, 2) for m in same[i].masks] == [m for i in (0, 2) for m in other[i].masks]
    with pytest.raises(ValueError, match="mask_seed=-1: expected an integer of at least 0"):
        qx.Espace(mask_seed=-1)
    with pytest.raises(ValueError, match=r"calibration=None: impact masks .* mask='uniform'"):
        qx.accelerate(model, qx.Espace())


def test_it_trains():
    model, batches = network(), data()
    fast = qx.accelerate(model, qx.Espace(rank=4, rate=0.5), calibration=batches).model
    assert fast.training
    optimizer = torch.optim.SGD(fast.parameters(), lr=0.3)
    losses = []
    for _ in range(40):
        loss = sum(F.cross_entropy(fast(x), t) for x, t in batches)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize(
    ("error", "match", "settings"),
    [
        (ValueError, "rate=0", {"rate": 0}),
        (ValueError, r"rate=1\.1", {"rate": (0.5, 1.1)}),
        (ValueError, r"rate=\(0\.5,\)", {"rate": (0.5,)}),
        (TypeError, "rate='half'", {"rate": "half"}),
        (ValueError, "mask='best'", {"mask": "best"}),
    ],
)
def test_bad_settings(error, match, settings):
    with pytest.raises(error, match=match):
        qx.Espace(**settings)


def test_settings_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        qx.Espace().rate = 0.5


class Residual(nn.Module):
    """A layer whose output is added to: the sum is not constant where the layer's values are."""

    def __init__(self):
        super().__init__()
        self.sparse = qx.EspaceConv2d(
            6, 6, 3, rank=3, masks=(qx.Random(0.3, 1), qx.Random(0.3, 2)), padding=1
        )
        self.norm, self.dense = nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3, padding=1)

    def forward(self, x):
        return self.dense(F.relu(self.norm(self.sparse(x)) + x))


def test_a_fused_shortcut_is_added_at_every_position():
    net, x = Residual().eval(), torch.randn(2, 6, 9, 8)
    torch.testing.assert_close(qx.fuse(net)(x), net(x), rtol=1e-4, atol=1e-5)
