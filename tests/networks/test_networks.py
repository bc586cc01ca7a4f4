"""Which networks are built by name, and what is in them."""

from __future__ import annotations

import json
import re

import pytest
import torch
from torch import nn

import quincunx as qx
from quincunx.layers.sampled import SpatialBottleneck2d
from quincunx.networks.preresnet import BottleneckBlock, RegularBlock, RegularSBBlock


def blocks(model):
    return [list(stage) for stage in model.stages]


SHALLOW = [n for n in qx.networks.names() if re.fullmatch(r"[rc]s?b?n(20|29|44|47)", n)]


@pytest.mark.parametrize("name", SHALLOW)
def test_every_named_network_maps_images_to_scores(name):
    model = qx.networks.build(name, num_classes=7, in_channels=1, width=4).eval()
    assert model(torch.randn(2, 1, 16, 16)).shape == (2, 7)


@pytest.mark.parametrize(("depth", "n"), [(8, 1), (14, 2), (20, 3), (110, 18)])
def test_regular_networks_keep_the_two_blocks_that_change_the_resolution(depth, n):
    dense, sampled = (blocks(qx.networks.build(f"{kind}{depth}", width=2)) for kind in ("rrn", "rsbn"))
    assert [[type(b) for b in stage] for stage in dense] == [[RegularBlock] * n] * 3
    kinds = [[type(b) for b in stage] for stage in sampled]
    assert kinds[0] == [RegularSBBlock] * n
    assert kinds[1] == kinds[2] == [RegularBlock] + [RegularSBBlock] * (n - 1)


@pytest.mark.parametrize(("depth", "n"), [(11, 1), (29, 3), (101, 11)])
def test_bottleneck_networks_keep_the_first_block_of_each_stage(depth, n):
    for stage in blocks(qx.networks.build(f"csbn{depth}", width=2)):
        assert [type(b) for b in stage] == [BottleneckBlock] * n
        assert [type(b.conv2) for b in stage] == [nn.Conv2d] + [SpatialBottleneck2d] * (n - 1)


def test_a_channel_bottleneck_block_keeps_its_parameter_count():
    dense, sampled = (qx.networks.build(name) for name in ("crn29", "csbn29"))
    assert sum(p.numel() for p in dense.parameters()) == sum(p.numel() for p in sampled.parameters())


def test_a_regular_network_keeps_its_parameter_count():
    dense, sampled = (qx.networks.build(name) for name in ("rrn20", "rsbn20"))
    assert (
        sum(p.numel() for p in dense.parameters()) == sum(p.numel() for p in sampled.parameters()) == 269_722
    )


@pytest.mark.parametrize(
    ("block", "shape"),
    [
        (RegularBlock(4, 8, 2), (1, 4, 6, 6)),
        (RegularSBBlock(4, qx.CHESSBOARD, "stride"), (1, 4, 6, 6)),
        (BottleneckBlock(4, 3, 2), (1, 4, 6, 6)),
        (BottleneckBlock(12, 3, 1), (1, 12, 6, 6)),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else None,
)
def test_the_shortcut_has_no_parameters(block, shape):
    """With the residual's last convolution at zero a block is its shortcut: every second position of
    the input, behind it zero channels."""
    last = [m for m in block.modules() if hasattr(m, "weight") and m.weight.dim() == 4][-1]
    nn.init.zeros_(last.weight)
    x = torch.randn(shape)
    out = block.eval()(x)
    assert torch.equal(out[:, : shape[1]], x[:, :, :: block.stride, :: block.stride])
    assert not out[:, shape[1] :].any()


def test_full_sampling_of_a_network_is_the_dense_network():
    torch.manual_seed(0)
    everywhere = qx.Cosets(2, [(a, b) for a in (0, 1) for b in (0, 1)])
    dense = qx.networks.build("rrn14", width=4).eval()
    sampled = qx.networks.build("rsbn14", width=4, sampling=everywhere).eval()
    state = {}
    for key, value in dense.state_dict().items():
        key = key.replace("conv1.", "down.").replace("conv2.", "up.")
        # a transposed convolution's kernel is mirrored and has its channels the other way round
        state[key] = value.transpose(0, 1).flip(2, 3).contiguous() if "up." in key else value
    kept = {k: v for k, v in dense.state_dict().items() if k in sampled.state_dict()}
    sampled.load_state_dict({**{k: v for k, v in state.items() if k in sampled.state_dict()}, **kept})
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(sampled(x), dense(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("text", ["1/4", "2/4", "3/4", "cosets:3:0,0;1,2", "random:0.5:1"])
def test_samplings_by_name_reach_every_replaced_block(text):
    model = qx.networks.build("rsbn14", width=2, sampling=text)
    found = {m.sampling for m in model.modules() if hasattr(m, "sampling")}
    assert len(found) == 1
    assert model(torch.randn(1, 3, 16, 16)).shape == (1, 10)
    assert json.loads(json.dumps(model.quincunx_spec)) == model.quincunx_spec


def test_average_pooling_form_has_the_same_parameters():
    strided, pooled = (qx.networks.build("rsbn14", width=2, down=d) for d in ("stride", "avgpool"))
    assert {k: v.shape for k, v in strided.state_dict().items()} == {
        k: v.shape for k, v in pooled.state_dict().items()
    }
    x = torch.randn(1, 3, 16, 16)
    pooled.load_state_dict(strided.state_dict())
    assert not torch.allclose(strided.eval()(x), pooled.eval()(x))


def test_activations_keep_their_scale_at_the_start():
    """Neither form of a network explodes or fades through a hundred layers."""
    torch.manual_seed(0)
    x = torch.randn(4, 3, 16, 16)
    for name in ("rrn110", "rsbn110", "csbn101"):
        scores = qx.networks.build(name, width=4)(x)
        assert 1e-3 < scores.std() < 1e3


@pytest.mark.parametrize(
    ("arguments", "settings", "error", "match"),
    [
        (("rsbn21",), {}, ValueError, r"rsbn21: the depth must be 6n \+ 2 .*such as 20"),
        (("csbn30",), {}, ValueError, "csbn30.*such as 29"),
        (("rrn2",), {}, ValueError, "rrn2.*such as 8"),
        (("rsbn2O",), {}, ValueError, r"unknown network; nearest first: rsbn20, "),
        (("vgg",), {}, ValueError, "unknown network"),
        ((20,), {}, TypeError, "name=20"),
        (("rrn20", 0), {}, ValueError, "num_classes=0"),
        (("rrn20", 10, True), {}, ValueError, "in_channels=True"),
        (("rrn20",), {"sampling": "2/4"}, ValueError, "rrn20 has no such setting; it has width"),
        (("rsbn20",), {"down": "max"}, ValueError, "down='max'"),
        (("rsbn20",), {"sampling": "5/4"}, ValueError, "5/4"),
        (("rsbn20",), {"down": "avgpool", "sampling": "random:0.5"}, ValueError, "once per coset"),
        (("rsbn20",), {"width": 0}, ValueError, "width=0"),
    ],
)
def test_refuses(arguments, settings, error, match):
    with pytest.raises(error, match=match):
        qx.networks.build(*arguments, **settings)


# ---------------------------------------------------------------- ImageNet ResNets and PyramidNets


def published_keys(depth):
    """The state-dict keys of the published ImageNet ResNets, written down from their description."""
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    keys = ["conv1.weight", *(f"bn1.{k}" for k in norm)]
    counts = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}[depth]
    convolutions = 2 if depth < 50 else 3
    for stage, count in enumerate(counts, 1):
        for block in range(count):
            at = f"layer{stage}.{block}"
            for i in range(1, convolutions + 1):
                keys += [f"{at}.conv{i}.weight", *(f"{at}.bn{i}.{k}" for k in norm)]
            if block == 0 and (stage > 1 or depth >= 50):
                keys += [f"{at}.downsample.0.weight", *(f"{at}.downsample.1.{k}" for k in norm)]
    return [*keys, "fc.weight", "fc.bias"]


@pytest.mark.parametrize(
    ("depth", "params", "macs"),
    [(18, 11_689_512, 1.814), (34, 21_797_672, 3.664), (50, 25_557_032, 4.089), (101, 44_549_160, 7.801)],
)
def test_resnets_are_the_published_ones(depth, params, macs):
    model = qx.networks.build(f"resnet{depth}", 1000)
    assert list(model.state_dict()) == published_keys(depth)
    found = qx.cost(model, torch.zeros(1, 3, 224, 224))
    assert found.params == params
    assert found.macs / 1e9 == pytest.approx(macs, abs=6e-4)


@pytest.mark.parametrize(("depth", "kept", "replaced"), [(18, 3, 5), (34, 3, 13), (50, 4, 12), (101, 4, 29)])
def test_which_blocks_of_a_resnet_are_replaced(depth, kept, replaced):
    model = qx.networks.build(f"sb-resnet{depth}", 10)
    blocks = [block for i in range(1, 5) for block in getattr(model, f"layer{i}")]
    sampled = [any(hasattr(m, "sampling") for m in block.modules()) for block in blocks]
    assert (sampled.count(False), sampled.count(True)) == (kept, replaced)
    firsts = {0, *torch.tensor([len(getattr(model, f"layer{i}")) for i in range(1, 4)]).cumsum(0).tolist()}
    assert {i for i, s in enumerate(sampled) if not s} == (firsts if depth >= 50 else firsts - {0})


@pytest.mark.parametrize(("name", "depth"), [("resnet", 18), ("sb-resnet", 18), ("resnet", 50)])
def test_the_width_of_a_resnet_scales_all_its_channels(name, depth, tmp_path):
    whole, half = (qx.networks.build(f"{name}{depth}", 7, width=width).eval() for width in (64, 32))
    for (_, one), (_, other) in zip(whole.named_parameters(), half.named_parameters(), strict=True):
        assert one.shape[0] in (2 * other.shape[0], 7)
    # but for the images' channels, a quarter of the products
    costs = [qx.cost(model, torch.zeros(1, 3, 64, 64)).macs for model in (whole, half)]
    assert 3.5 < costs[0] / costs[1] < 4
    assert qx.networks.build(f"{name}{depth}", 7, width=64).quincunx_spec["settings"] == {"width": 64}
    again = qx.load(qx.save(half, tmp_path / "half"))
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(again(x), half(x))
    with pytest.raises(ValueError, match="width=0: expected a positive integer"):
        qx.networks.build(f"{name}{depth}", width=0)


@pytest.mark.parametrize("name", ["resnet18", "sb-resnet18", "resnet50", "sb-resnet50"])
def test_resnets_map_images_to_scores(name):
    model = qx.networks.build(name, 7, 1).eval()
    assert model(torch.randn(2, 1, 65, 64)).shape == (2, 7)


def test_spatial_bottlenecks_save_what_the_design_says():
    """PyramidNet-164, alpha 84: 0.745 to 0.553 G."""
    x = torch.zeros(1, 3, 32, 32)
    dense, sampled = (qx.networks.build(f"{kind}164-a84") for kind in ("pyramidnet", "sb-pyramidnet"))
    assert qx.cost(dense, x).macs / 1e9 == pytest.approx(0.745, abs=1e-3)
    # an odd number of channels has no half
    assert qx.cost(sampled, x).macs / 1e9 == pytest.approx(0.553, abs=2e-3)


@pytest.mark.parametrize("name", ["pyramidnet20-a12", "sb-pyramidnet20-a12", "sb-pyramidnet119-a9"])
def test_pyramids_map_images_to_scores_and_grow_evenly(name):
    model = qx.networks.build(name, 7).eval()
    assert model(torch.randn(2, 3, 17, 16)).shape == (2, 7)
    outside = [block.bn3.num_features for block in model.blocks]
    alpha = int(name.rpartition("a")[2])
    assert outside[-1] == 16 + alpha
    assert max(b - a for a, b in zip([16, *outside], outside, strict=False)) <= -(-alpha // len(outside))


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("resnet19", "resnet19: the depth must be one of 18, 34, 50, 101"),
        ("pyramidnet111-a84", r"pyramidnet111: the depth must be 6n \+ 2 up to 110"),
        ("pyramidnet110-a0", "alpha must be at least 1"),
    ],
)
def test_refuses_other_depths(name, match):
    with pytest.raises(ValueError, match=match):
        qx.networks.build(name)
