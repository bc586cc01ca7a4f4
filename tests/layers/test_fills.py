"""Layers whose skipped positions are filled: settings, starts, specs, training, artifacts."""

import subprocess
import sys

import pytest
import torch
from torch import nn

import quincunx as qx
from quincunx.layers.build import build_module
from quincunx.layers.fills import FittedFill2d
from quincunx.layers.separable import MaskedConv2d
from quincunx.sampling import CHESSBOARD, QUARTER, THREE_QUARTERS, Cosets, Positions, Random, Uniform

MASK = Positions(torch.tensor([[(3 * r + 5 * c) % 7 < 3 for c in range(8)] for r in range(8)]))
EVERY = Cosets(2, [(0, 0), (0, 1), (1, 0), (1, 1)])
SAMPLINGS = [CHESSBOARD, QUARTER, THREE_QUARTERS, Cosets(3, [(0, 0), (1, 2)]), MASK, Random(0.3, seed=1)]
samplings = pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)


def layer_of(sampling, fill="fitted", kind=qx.PerforatedConv2d, **settings):
    size = (8, 8) if fill == "fitted" and isinstance(sampling, (Random, Uniform)) else None
    settings = {"padding": 1} | settings
    return kind(4, 6, 3, sampling=sampling, fill=fill, fill_size=size, **settings)


@samplings
def test_the_start_fills_a_constant_map_exactly(sampling):
    fill = layer_of(sampling).filling
    y = torch.full((2, 6, sampling.count(8, 8), 1), 2.5)
    torch.testing.assert_close(fill(y, (8, 8)), torch.full((2, 6, 8, 8), 2.5))


@samplings
@pytest.mark.parametrize("fill", ["zero", "nearest", "fitted"])
def test_computed_positions_are_the_convolution(sampling, fill):
    layer, x = layer_of(sampling, fill, stride=1, groups=2), torch.randn(2, 4, 8, 8)
    dense = nn.functional.conv2d(x, layer.weight, layer.bias, padding=1, groups=2)
    mask = sampling.mask(8, 8)
    torch.testing.assert_close(layer(x)[:, :, mask], dense[:, :, mask], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fill", ["zero", "nearest", "fitted"])
def test_every_position_computed_is_the_convolution(fill):
    layer, x = layer_of(EVERY, fill), torch.randn(2, 4, 7, 9)
    dense = nn.functional.conv2d(x, layer.weight, layer.bias, padding=1)
    torch.testing.assert_close(layer(x), dense, rtol=1e-5, atol=1e-5)


def test_the_nearest_fill_is_what_it_was():
    x, layer = torch.randn(2, 4, 8, 8), layer_of(CHESSBOARD, "nearest")
    default = qx.PerforatedConv2d(4, 6, 3, sampling=CHESSBOARD, padding=1)
    default.load_state_dict(layer.state_dict())
    assert torch.equal(default(x), layer(x))
    assert "fill" not in default.spec
    sampled = qx.sampled_conv2d(x, layer.weight, layer.bias, sampling=CHESSBOARD, padding=1)
    assert torch.equal(layer(x), qx.fill_nearest(sampled, sampling=CHESSBOARD, size=(8, 8)))


@samplings
@pytest.mark.parametrize("fill", ["zero", "fitted"])
@pytest.mark.parametrize("kind", [qx.PerforatedConv2d, MaskedConv2d])
def test_a_spec_builds_the_layer_again(sampling, fill, kind):
    layer, x = layer_of(sampling, fill, kind, groups=2, bias=False), torch.randn(2, 4, 8, 8)
    again = build_module(layer.spec)
    again.load_state_dict(layer.state_dict())
    assert type(again) is kind
    assert torch.equal(again(x), layer(x))
    assert again.spec == layer.spec


@pytest.mark.parametrize("fill", ["zero", "nearest", "fitted"])
@pytest.mark.parametrize("masks", [(CHESSBOARD, QUARTER), (MASK, MASK)], ids=str)
def test_espace_is_two_perforated_convolutions(fill, masks):
    layer = qx.EspaceConv2d(4, 6, 3, rank=3, masks=masks, padding=1, fill=fill)
    x = torch.randn(2, 4, 8, 8)
    torch.testing.assert_close(layer(x), layer.horizontal(layer.vertical(x)), rtol=1e-5, atol=1e-5)
    again = build_module(layer.spec)
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(x), layer(x))


def test_a_fill_is_trained():
    torch.manual_seed(0)
    x = torch.randn(64, 4, 8, 8)
    smooth = nn.functional.avg_pool2d(x, 3, 1, 1)
    layer = layer_of(CHESSBOARD)
    dense = nn.Conv2d(4, 6, 3, padding=1)
    layer.load_state_dict(dense.state_dict(), strict=False)
    want = dense(smooth).detach()
    with torch.no_grad():
        layer.filling.weight[:, :2] = 0  # far from the mean that it starts with
    optimizer = torch.optim.Adam(layer.filling.parameters(), lr=0.02)
    losses = []
    for _ in range(30):
        loss = (layer(smooth) - want).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_an_artifact_keeps_it(tmp_path):
    model = qx.networks.build("cifar-resnet8", width=4).eval()
    images = [torch.randn(16, 3, 16, 16)]
    result = qx.accelerate(model, qx.Perforate(CHESSBOARD), calibration=images)
    qx.save(result.model, tmp_path / "net")
    with torch.no_grad():
        assert torch.equal(qx.load(tmp_path / "net").eval()(images[0]), result.model.eval()(images[0]))


def test_an_artifact_is_read_in_another_process(tmp_path):
    network = qx.networks.build("cifar-resnet8", width=4).eval()
    images = [torch.randn(4, 3, 8, 8)]
    first = qx.accelerate(network, qx.Perforate(CHESSBOARD), where=["conv1"], calibration=images)
    fits = [name for name, layer in network.named_modules() if getattr(layer, "stride", 0) == (1, 1)][1:3]
    made = qx.accelerate(first.model, qx.Perforate(MASK), where=fits, calibration=images)
    assert made.replaced
    qx.save(made.model, tmp_path / "net")
    program = "import sys, quincunx as qx; print(type(qx.load(sys.argv[1])).__name__)"
    done = subprocess.run([sys.executable, "-c", program, tmp_path / "net"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"fill_size": [1 << 20, 1 << 20]}, "too large"),
        ({"fill_reach": 10**9}, "reach=1000000000"),
        ({"sampling": Cosets(10**6, [(0, 0)]).spec, "fill_size": None}, "period=1000000"),
    ],
)
def test_sizes_that_a_file_claims_are_refused_before_tables_are_made(changed, message):
    spec = layer_of(Random(0.3, seed=1)).spec | changed
    with pytest.raises(ValueError, match=message):
        build_module(spec)


def test_its_multiply_adds_are_counted():
    layer = qx.PerforatedConv2d(4, 6, 3, sampling=CHESSBOARD, padding=1, fill="fitted", fill_reach=1)
    assert qx.cost(layer, torch.zeros(1, 4, 8, 8)).macs == 32 * 4 * 6 * 9 + 32 * 6 * 4


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"fill": "mean"}, ValueError, "fill='mean'"),
        ({"fill": "zero", "fill_reach": 1}, ValueError, "settings of fill='fitted'"),
        ({"fill": "fitted", "fill_reach": 0}, ValueError, "reach=0"),
        ({"fill": "fitted", "sampling": Uniform(0.5)}, ValueError, "size=None"),
    ],
)
def test_wrong_settings(settings, error, message):
    with pytest.raises(error, match=message):
        qx.PerforatedConv2d(**({"in_channels": 4, "out_channels": 6, "kernel_size": 3} | {"sampling": CHESSBOARD} | settings))  # fmt: skip # noqa: E501


def test_coefficients_of_positions_serve_one_grid():
    with pytest.raises(ValueError, match="resize_masks=True"):
        MaskedConv2d(4, 6, 3, sampling=MASK, fill="fitted", resize_masks=True)
    with pytest.raises(TypeError, match="sampling='2/4'"):
        FittedFill2d(3, "2/4")
    layer = layer_of(Random(0.3, seed=1))
    with pytest.raises(ValueError, match="weight: expected"):
        layer(torch.zeros(1, 4, 9, 9))
