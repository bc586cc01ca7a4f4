"""Networks from images to maps: their sizes against the papers', any input, fused, stored."""

import pytest
import torch
from torch import nn

import quincunx as qx

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = ("dncnn5", "sb-dncnn5", "sb-dncnn4", "unet", "sb-unet", "fcn-resnet18", "sb-fcn-resnet18")


def built(name, **settings):
    torch.manual_seed(0)
    if "unet" in name or "dncnn" in name:
        settings = {"width": 8, **settings}
    model = qx.networks.build(name, None if "dncnn" in name else 4, 3, **settings)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.eval()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [(64, 64), (77, 98)])
def test_maps_have_the_size_of_the_image_and_fusing_changes_nothing(name, size):
    model, x = built(name), torch.rand(2, 3, *size)
    with torch.no_grad():
        y = model(x)
    assert y.shape == (2, 3 if "dncnn" in name else 4, *size)
    fused = qx.fuse(model)
    torch.testing.assert_close(fused(x), y, rtol=1e-3, atol=1e-4)
    # another size after the first
    torch.testing.assert_close(fused(x[:1, :, :65, :70]), model(x[:1, :, :65, :70]), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_they_are_rebuilt_from_their_spec(name, tmp_path):
    model, x = built(name), torch.rand(1, 3, 64, 70)
    qx.save(model, tmp_path / "model")
    assert torch.equal(qx.load(tmp_path / "model")(x), model(x))


def test_dncnn_is_the_papers():
    with torch.device("meta"):
        model = qx.networks.build("dncnn17", None, 1)
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == 17
    # 64 x 9 of the first with bias, 15 of 64 x 64 x 9, the last with bias; two numbers for each of 15 norms
    expected = 64 * 9 + 64 + 15 * 64 * 64 * 9 + 64 * 9 + 1 + 15 * 128
    assert sum(p.numel() for p in model.parameters()) == expected


@pytest.mark.parametrize(("sampling", "share"), [("2/4", 1 / 2), ("1/4", 1 / 4)])
def test_the_bottleneck_saves_what_its_density_says(sampling, share):
    one = torch.zeros(1, 3, 32, 32)
    dense = qx.cost(qx.networks.build("dncnn17"), one)
    fast = qx.cost(qx.networks.build("sb-dncnn17", sampling=sampling), one)
    assert fast.params == dense.params
    ends = 2 * 32 * 32 * 3 * 64 * 9
    assert fast.macs - ends == pytest.approx(share * (dense.macs - ends), rel=0.05)


def test_fcn_takes_the_weights_of_a_resnet():
    fcn, backbone = built("fcn-resnet18"), qx.networks.build("resnet18", 4)
    missing, unexpected = fcn.load_state_dict(backbone.state_dict(), strict=False)
    assert sorted(unexpected) == ["fc.bias", "fc.weight"]
    assert {name.partition(".")[0] for name in missing} == {"score8", "score16", "score32"}


def test_what_cannot_be_built_is_refused():
    with pytest.raises(ValueError, match="num_classes=5: the network gives images of as many channels as it"):
        qx.networks.build("dncnn17", 5)
    with pytest.raises(ValueError, match="dncnn2: the depth must be at least 3"):
        qx.networks.build("dncnn2")
    with pytest.raises(ValueError, match="width=0: expected a positive integer"):
        qx.networks.build("unet", width=0)


def test_pairs_are_found_in_the_dense_network():
    model = built("dncnn6")
    found = qx.accelerate(model, qx.SpatialBottleneck(), example_input=torch.rand(1, 3, 32, 32))
    kinds = [record["kind"] for record in found.replaced.values()]
    assert len([name for name in found.replaced if name.startswith("blocks")]) == 4, kinds
    y = found.model(torch.rand(2, 3, 41, 50))
    assert y.shape == (2, 3, 41, 50)
