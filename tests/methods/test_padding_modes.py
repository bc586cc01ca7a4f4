"""Convolutions that pad by reflection, replication or periodically: replaced, saved, fused and exported."""

import warnings

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import quincunx as qx
from quincunx.layers.padded import PaddedConv2d

MODES = ("reflect", "replicate", "circular")
ALL = qx.Cosets(2, [(0, 0), (0, 1), (1, 0), (1, 1)])


def network(mode="reflect"):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, padding_mode=mode),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, padding_mode=mode),
        nn.ReLU(),
        nn.Conv2d(8, 12, 5, padding=(2, 1), stride=2, padding_mode=mode),
        nn.ReLU(),
        nn.Conv2d(12, 12, 3, padding=1, padding_mode=mode),
    ).eval()


METHODS = {
    "pairs": qx.SpatialBottleneck(),
    "quarter": qx.SpatialBottleneck(qx.QUARTER),
    "odd period": qx.SpatialBottleneck(qx.Cosets(3, [(0, 0), (1, 2)])),
    "singles": qx.SpatialBottleneck(pairs=False),
    "perforate": qx.Perforate(),
    "nearest": qx.Perforate(qx.Random(0.5), fill="nearest"),
    "espace": qx.Espace(4, mask="uniform"),
    "impact": qx.Espace(4, fill="fitted"),
    "lowrank": qx.LowRank(6),
    "budget": qx.LowRank(budget=0.9, multiple=2),
    "cp": qx.CP(4, iterations=2),
    "qcnn": qx.QCNN(2, 16),
}


def build():
    return network()


def accelerated(model, method, images):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="calibration")
        return qx.accelerate(model, method, calibration=images)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", METHODS)
def test_each_method_replaces_counts_saves_and_fuses(mode, name, tmp_path):
    model, images = network(mode), [torch.randn(8, 3, 12, 13) for _ in range(3)]
    result = accelerated(model, METHODS[name], images)
    strided = {"5"} if isinstance(METHODS[name], qx.SpatialBottleneck) else set()
    assert set(result.replaced) >= {"0", "3", "7"} - strided
    x = images[0]
    with torch.no_grad():
        wanted, found = model(x), result.model(x)
    assert ((found - wanted).square().mean() / wanted.var()) < 0.75
    qx.fuse(result.model, check=x)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        result.model(x[:1])
    counted = sum(r["macs_after"] for r in result.replaced.values())
    if "5" in result.skipped:
        counted += 12 * 8 * 25 * 6 * 6
    assert counted == counter.get_total_flops() // 2


@pytest.mark.parametrize("name", METHODS)
def test_artifacts_hold_the_padding(name, tmp_path):
    images = [torch.randn(8, 3, 12, 13) for _ in range(2)]
    made = accelerated(build(), METHODS[name], images).model
    loaded = qx.load(qx.save(made, tmp_path / "model", factory="mine:build"), factory=build)
    with torch.no_grad():
        assert torch.equal(loaded(images[0]), made(images[0]))


@pytest.mark.parametrize("plugin", [False, True], ids=["plain", "plugin"])
@pytest.mark.parametrize("mode", MODES)
def test_pairs_export(mode, plugin, tmp_path):
    pytest.importorskip("onnxruntime")
    images = [torch.randn(8, 3, 12, 13) for _ in range(2)]
    made = accelerated(network(mode), qx.SpatialBottleneck(), images).model
    written = qx.export(made, tmp_path / "net.onnx", images[0][:1], plugin=plugin, rounds=0)
    assert max(written.difference.values()) < 1e-4


@pytest.mark.parametrize("mode", MODES)
def test_full_rank_and_every_position_are_torchs_network(mode):
    """A replacement that approximates nothing answers as the network does, also at the borders."""
    model, x = network(mode), torch.randn(2, 3, 12, 13)
    low = qx.accelerate(model, qx.LowRank("full"), example_input=x)
    both = qx.accelerate(model, qx.SpatialBottleneck(ALL, singles=False), example_input=x)
    assert set(low.replaced) == {"0", "3", "5", "7"}
    assert set(both.replaced) == {"0", "3"}
    for result in (low, both):
        with torch.no_grad():
            torch.testing.assert_close(result.model(x), model(x), rtol=1e-4, atol=1e-5)
        fused = qx.fuse(result.model, check=x)
        torch.testing.assert_close(fused(x), model(x).detach(), rtol=1e-4, atol=1e-5)


def test_a_pair_is_fitted_to_the_responses_at_the_borders():
    """A map that the network continues by reflection: the fit on data beats the weights scaled."""
    torch.manual_seed(1)
    model, images = network(), [torch.randn(16, 3, 8, 9) + 2 for _ in range(8)]
    x = torch.randn(16, 3, 8, 9) + 2
    errors = {}
    for data in (True, False):
        made = qx.accelerate(
            model, qx.SpatialBottleneck(singles=False, data=data), calibration=images, where=[("0", "3")]
        ).model
        with torch.no_grad():
            errors[data] = float((made[:4](x) - model[:4](x)).square().mean())
    assert errors[True] < 0.7 * errors[False]


def test_what_stands_in_a_place_knows_its_padding():
    model = network()
    made = qx.accelerate(model, qx.LowRank(3), example_input=torch.randn(1, 3, 12, 13)).model[5]
    assert isinstance(made, PaddedConv2d)
    for name in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"):
        assert getattr(made, name) == getattr(model[5], name), name
    assert made.padding_mode == "reflect"
    assert made.weight.shape == model[5].weight.shape


def test_window_means_stay_zero_padded():
    with pytest.warns(UserWarning, match="replaced nothing"):
        result = qx.accelerate(network(), qx.SpatialBottleneck(down="avgpool"))
    assert result.skipped["0"] == (
        "padding_mode='reflect': window means (down='avgpool') have zeros around them"
    )
    with pytest.raises(ValueError, match="padding_mode='reflect': window means"):
        qx.SpatialBottleneck2d(4, 4, down="avgpool", padding_mode="reflect")
    with pytest.raises(ValueError, match="padding_mode='mirror': expected one of zeros, reflect"):
        qx.SpatialBottleneck2d(4, 4, padding_mode="mirror")
    with pytest.raises(ValueError, match="mode='zeros': expected one of reflect"):
        PaddedConv2d(nn.Conv2d(3, 3, 3), (1, 1, 1, 1), "zeros")
    with pytest.raises(ValueError, match=r"sides=\(1, -1, 1, 1\)"):
        PaddedConv2d(nn.Conv2d(3, 3, 3), (1, -1, 1, 1), "reflect")


@pytest.mark.parametrize("mode", MODES)
def test_a_dense_convolution_is_a_step_behind_its_padding(mode):
    model, x = network(mode), torch.randn(2, 3, 9, 11)
    fused = qx.fuse(model, check=x)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-5)
