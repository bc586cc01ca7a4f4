"""A strided convolution and the next, on the smaller grid behind it, as a spatial bottleneck."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import quincunx as qx
from quincunx.layers.sampled import SampledDown2d
from quincunx.surgery.pairs import find_pairs

ALL = qx.Cosets(2, [(0, 0), (0, 1), (1, 0), (1, 1)])
PAIR = qx.SpatialBottleneck(singles=False, strided=True)


def network(kernel=3, padding=1, mode="zeros", stride=2):
    torch.manual_seed(0)
    settings = {"stride": stride, "padding": padding, "padding_mode": mode}
    return nn.Sequential(
        nn.Conv2d(3, 8, kernel, **settings),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, padding_mode=mode),
    ).eval()


FIRST = {
    "3 x 3": network(),
    "even kernel": network(4),
    "no padding": network(5, 0),
    "one way": network((3, 5), (0, 2), stride=(1, 2)),
    "by three": network(7, 3, stride=3),
    "reflect": network(mode="reflect"),
    "circular": network(5, 2, mode="circular"),
}


@pytest.mark.parametrize("first", FIRST)
def test_with_every_position_a_pair_is_torchs_network(first):
    model, x = FIRST[first], torch.randn(2, 3, 17, 20)
    method = qx.SpatialBottleneck(ALL, singles=False, strided=True)
    result = qx.accelerate(model, method, example_input=x)
    assert set(result.replaced) == {"0", "3"}
    with torch.no_grad():
        torch.testing.assert_close(result.model(x), model(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(qx.fuse(result.model, check=x)(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sampling", [qx.CHESSBOARD, qx.QUARTER, qx.Cosets(3, [(1, 2), (0, 0)])], ids=str)
@pytest.mark.parametrize("first", FIRST)
def test_positions_are_the_smaller_grids_and_counted(first, sampling):
    """The first half computes the strided convolution's values at sampled positions of its grid."""
    model, x = FIRST[first], torch.randn(8, 3, 17, 20)
    method = qx.SpatialBottleneck(sampling, singles=False, strided=True)
    result = qx.accelerate(model, method, calibration=[x, torch.randn(8, 3, 17, 20)])
    with torch.no_grad():
        whole = model[0](x)
        mask = sampling.mask(*whole.shape[2:]).flatten()
        wanted = whole.flatten(2)[:, :, mask]
        torch.testing.assert_close(
            result.model[0](x).flatten(2).as_subclass(torch.Tensor), wanted, rtol=1e-4, atol=1e-5
        )
        found = qx.fuse(result.model, check=x)(x[:3])
        torch.testing.assert_close(found, result.model(x[:3]), rtol=1e-4, atol=1e-5)
    assert result.replaced["0"]["macs_after"] == int(mask.sum()) * model[0].weight.numel()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        result.model(x[:1])
    counted = sum(record["macs_after"] for record in result.replaced.values())
    assert counted == counter.get_total_flops() // 2


def test_the_fit_beats_the_weights_scaled():
    model, images = network(), [torch.randn(16, 3, 12, 12) + 1 for _ in range(6)]
    x, errors = torch.randn(16, 3, 12, 12) + 1, {}
    for data in (True, False):
        method = qx.SpatialBottleneck(singles=False, strided=True, data=data)
        made = qx.accelerate(model, method, calibration=images).model
        with torch.no_grad():
            errors[data] = float((made(x) - model(x)).square().mean())
    assert errors[True] < 0.6 * errors[False]


def test_pairs_that_keep_the_resolution_come_first():
    """Between a strided convolution and another one, the one that both could have stays with the latter."""

    def conv(**settings):
        return nn.Conv2d(4, 4, 3, padding=1, **settings)

    strided = conv(stride=2)
    assert find_pairs(nn.Sequential(strided, conv(), conv())).found == (("1", "2"),)
    assert find_pairs(nn.Sequential(conv(), strided, conv())).found == (("1", "2"),)
    assert find_pairs(nn.Sequential(conv(), conv(stride=2))).found == ()
    expand = nn.Conv2d(4, 8, 1, stride=2)
    depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
    assert find_pairs(nn.Sequential(expand, nn.ReLU(), depthwise)).found == (("0", "2"),)
    assert find_pairs(nn.Sequential(expand, nn.Conv2d(8, 4, 3, padding=1))).found == ()


def test_only_who_asks_gets_them():
    model, x = network(), torch.randn(1, 3, 16, 16)
    plain = qx.accelerate(model, qx.SpatialBottleneck(), example_input=x)
    assert plain.skipped == {"0": "strided: it changes the resolution, where the paper keeps the convolution"}
    assert "pair" not in plain.replaced["3"]  # a bottleneck of its own, as before
    with pytest.warns(UserWarning, match="replaced nothing"):
        alone = qx.accelerate(nn.Sequential(model[0], model[2]), qx.SpatialBottleneck(strided=True)).skipped
    assert alone == {"0": "strided: no other convolution on the grid behind it makes a pair with it"}
    assert all(method.strided for method in qx.SpatialBottleneck.candidates())
    with pytest.raises(ValueError, match="strided='yes': expected True or False"):
        qx.SpatialBottleneck(strided="yes")
    with pytest.raises(ValueError, match="strided=True: window means"):
        qx.SpatialBottleneck(strided=True, down="avgpool")
    with pytest.raises(ValueError, match="down='avgpool': has no stride or padding, got 2 and None"):
        SampledDown2d(3, 3, sampling=qx.QUARTER, down="avgpool", stride=2)


def test_artifacts_and_export(tmp_path):
    images = [torch.randn(8, 3, 17, 20)]
    made = qx.accelerate(network(), PAIR, calibration=images).model
    loaded = qx.load(qx.save(made, tmp_path / "model", factory="mine:network"), factory=network)
    with torch.no_grad():
        assert torch.equal(loaded(images[0]), made(images[0]))
    pytest.importorskip("onnxruntime")
    for plugin in (False, True):
        written = qx.export(made, tmp_path / "net.onnx", images[0][:1], plugin=plugin, rounds=0)
        assert max(written.difference.values()) < 1e-4


def test_several_sizes_and_gradients():
    made = qx.accelerate(network(), PAIR, example_input=torch.randn(1, 3, 16, 16)).model
    fused = qx.fuse(made)
    for size in ((16, 16), (13, 22)):
        x = torch.randn(2, 3, *size, requires_grad=True)
        y = made(x)
        assert y.shape[2:] == ((size[0] + 1) // 2, (size[1] + 1) // 2)
        y.square().mean().backward()
        assert x.grad.abs().sum() > 0
        torch.testing.assert_close(fused(x.detach()), y.detach(), rtol=1e-4, atol=1e-5)
