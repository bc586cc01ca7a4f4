"""The families beside the paper's own tables: what all of them must do, and the structure of each."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import quincunx as qx
from quincunx.fusion.program import Program
from quincunx.networks import resnet
from quincunx.networks.googlenet import Head
from quincunx.networks.pieces import local_response_norm, middle


def on_meta(name, *arguments, **settings):
    """A network without storage: its names and shapes."""
    with torch.device("meta"):
        return qx.networks.build(name, *arguments, **settings)


# ---------------------------------------------------------------- what every one of them does

CASES = [
    ("resnext50", 33, {}),
    ("sb-resnext50", 64, {}),
    ("seresnet18", 33, {}),
    ("sb-seresnet18", 64, {}),
    ("sb-seresnet50", 64, {"down": "avgpool", "reduction": 4}),
    ("densenet121", 33, {}),
    ("sb-densenet121", 64, {}),
    ("alexnet", 67, {"dropout": 0.0, "form": "original"}),
    ("googlenet", 48, {"aux": True, "dropout": 0.0, "aux_dropout": 0.0}),
    ("googlenet", 79, {"aux": True, "dropout": 0.0, "aux_dropout": 0.0, "form": "original"}),
    ("squeezenet1_1", 48, {"dropout": 0.0}),
    ("cifar-resnet14", 16, {"width": 4}),
    ("sb-cifar-resnet14", 17, {"width": 4}),
]
IDS = [f"{name}-{settings.get('form', settings.get('down', ''))}".rstrip("-") for name, _, settings in CASES]


@pytest.fixture(scope="module", params=CASES, ids=IDS)
def case(request):
    """A network away from its start, in evaluation mode, and its input."""
    name, side, settings = request.param
    torch.manual_seed(0)
    model = qx.networks.build(name, 5, 2, **settings).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.3, 0.3)
            module.momentum = None
    with torch.no_grad():
        model(torch.randn(2, 2, side, side))
    return model.eval(), torch.randn(2, 2, side, side + 1)


def test_maps_images_to_scores(case):
    model, x = case
    scores = model(x)
    assert scores.shape == (2, 5)
    assert scores.isfinite().all()
    # each image by itself
    torch.testing.assert_close(model(x[1:]), scores[1:], rtol=1e-3, atol=1e-4)


def test_every_parameter_has_a_gradient(case):
    model, x = case
    results = model.train()(x)
    scores = results if isinstance(results, tuple) else (results,)
    sum(s.square().sum() for s in scores).backward()
    model.eval()
    without = [k for k, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    bad = [k for k, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    model.zero_grad()
    assert (without, bad) == ([], [])


def test_comes_back_from_an_artifact(case, tmp_path):
    model, x = case
    again = qx.load(qx.save(model, tmp_path / "saved"))
    assert again.quincunx_spec == model.quincunx_spec
    assert torch.equal(again(x), model(x))


def test_fused_it_is_the_same(case):
    model, x = case
    fused = qx.fuse(model)
    for module in fused.modules():
        if isinstance(module, Program):
            # every step by our kernel, and no time spent on measuring which is faster
            module.native_only = True
    with torch.no_grad():
        expected = model(x)
        close = {"rtol": 1e-3, "atol": 1e-4 * float(expected.abs().max())}
        torch.testing.assert_close(fused(x), expected, **close)


EXPORTED = [
    ("sb-resnext50", 64, {}),
    ("sb-seresnet18", 64, {}),
    ("alexnet", 67, {"form": "original"}),
    ("googlenet", 31, {"form": "original", "aux": True}),
    ("squeezenet1_1", 17, {}),
    ("sb-cifar-resnet14", 16, {"width": 4, "down": "avgpool"}),
]


@pytest.mark.parametrize(("name", "side", "settings"), EXPORTED)
def test_exported_it_is_the_same(name, side, settings):
    model = qx.networks.build(name, 5, **settings).eval()
    x = torch.randn(2, 3, side, side)
    with torch.no_grad():
        assert torch.equal(torch.export.export(model, (x,)).module()(x), model(x))


def test_a_dense_block_can_be_exported():
    block = qx.networks.build("sb-densenet121", 5).eval().features.denseblock1
    x = torch.randn(2, 64, 9, 8)
    with torch.no_grad():
        assert torch.equal(torch.export.export(block, (x,)).module()(x), block(x))


def test_relatives_are_named():
    relatives = {name for name, _, _ in CASES if not name.endswith(("14", "18"))}
    assert relatives <= set(qx.networks.names())
    assert {"sb-seresnet50", "cifar-resnet20", "sb-cifar-resnet56"} <= set(qx.networks.names())


@pytest.mark.parametrize(
    ("name", "side", "settings"),
    [("alexnet", 224, {}), ("alexnet", 227, {"form": "original"}), ("googlenet", 96, {"form": "original"})],
)
def test_activations_keep_their_scale_without_batch_norm(name, side, settings):
    model = qx.networks.build(name, 50, **settings).eval()
    with torch.no_grad():
        assert 0.1 < model(torch.randn(2, 3, side, side)).std() < 10


# ---------------------------------------------------------------- spatial bottlenecks in them


@pytest.mark.parametrize(
    ("name", "side", "settings"),
    [
        ("rsbn14", 16, {"width": 4}),
        ("csbn20", 16, {"width": 4}),
        ("sb-pyramidnet20-a12", 16, {}),
        ("sb-pyramidnet119-a9", 16, {}),
        ("sb-cifar-resnet14", 16, {"width": 4}),
        ("sb-resnet18", 97, {}),
        ("sb-resnet50", 97, {}),
        ("sb-resnext50", 97, {}),
        ("sb-seresnet18", 97, {}),
        ("sb-densenet121", 125, {}),
    ],
)
@pytest.mark.parametrize("period", [3, 4])
def test_any_union_of_cosets_trains(name, side, settings, period):
    draw = random.Random(f"{name} {period}")
    every = [(a, b) for a in range(period) for b in range(period)]
    sampling = qx.Cosets(period, draw.sample(every, draw.randint(1, period**2 - 1)))
    down = draw.choice(["stride", "avgpool"])
    model = qx.networks.build(name, 3, 1, sampling=sampling, down=down, **settings)
    found = {m.sampling for m in model.modules() if hasattr(m, "sampling")}
    assert found == {sampling}
    scores = model(torch.randn(2, 1, side, side))
    scores.square().sum().backward()
    assert scores.shape == (2, 3)
    assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "stages"), [("sb-resnext50", (3, 4, 6, 3)), ("sb-seresnet50", (3, 4, 6, 3))]
)
def test_channel_bottlenecks_are_replaced_but_for_the_first_of_each_stage(name, stages):
    model = on_meta(name)
    for i, count in enumerate(stages, 1):
        kinds = [type(block.conv2) for block in getattr(model, f"layer{i}")]
        assert kinds == [nn.Conv2d] + [qx.SpatialBottleneck2d] * (count - 1)


def test_layers_of_a_densenet_are_replaced_but_for_the_first_of_each_block():
    dense, sampled = (on_meta(name) for name in ("densenet121", "sb-densenet121"))
    for i, count in enumerate((6, 12, 24, 16), 1):
        layers = getattr(sampled.features, f"denseblock{i}")
        assert [type(layer.conv2) for layer in layers] == [nn.Conv2d] + [qx.SpatialBottleneck2d] * (count - 1)
    # 128 to 32 through 26 channels
    more = 9 * 26 * (128 + 32) - 9 * 128 * 32
    extra = sum(p.numel() for p in sampled.parameters()) - sum(p.numel() for p in dense.parameters())
    assert extra == more * (5 + 11 + 23 + 15)


@pytest.mark.parametrize(
    ("name", "dense", "sampled"),
    [
        ("densenet121", 2.834, 2.298),
        ("resnext50", 4.231, 4.144),
        ("seresnet50", 4.092, 3.400),
        ("seresnet34", 3.664, 2.166),
    ],
)
def test_what_bottlenecks_save_in_relatives(name, dense, sampled):
    """As their docstrings say."""
    x = torch.zeros(1, 3, 224, 224)
    found = [qx.cost(qx.networks.build(kind + name, 1000), x).macs / 1e9 for kind in ("", "sb-")]
    assert found == pytest.approx([dense, sampled], abs=6e-4)


def test_groups_of_a_grouped_bottleneck_do_not_mix():
    sampled = middle(12, 1, qx.CHESSBOARD, groups=3)
    x = torch.randn(1, 12, 7, 7)
    other = x.clone()
    other[:, 4:8] += 1
    changed = (sampled(x) - sampled(other)).abs().amax((0, 2, 3)) > 1e-6
    assert changed.tolist() == [False] * 4 + [True] * 4 + [False] * 4


def test_a_bottleneck_of_every_position_is_the_dense_network():
    everywhere = qx.Cosets(2, [(a, b) for a in (0, 1) for b in (0, 1)])
    dense = qx.networks.build("cifar-resnet14", width=4)
    sampled = qx.networks.build("sb-cifar-resnet14", width=4, sampling=everywhere)
    theirs = dense.state_dict()
    state = {}
    for key in sampled.state_dict():
        if key.endswith("up.weight"):
            # a transposed convolution's kernel is mirrored and has its channels the other way round
            state[key] = theirs[key.replace("up.", "conv2.")].transpose(0, 1).flip(2, 3)
        else:
            state[key] = theirs[key.replace("down.", "conv1.")]
    sampled.load_state_dict(state)
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(sampled(x), dense(x), rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- structure of each


def test_a_gate_scales_channels_by_what_the_means_say():
    gate = resnet.SqueezeExcitation(8, 4)
    x = torch.randn(2, 8, 3, 5)
    first, second = gate.fc1.weight[:, :, 0, 0], gate.fc2.weight[:, :, 0, 0]
    inner = (x.flatten(2).mean(2) @ first.T + gate.fc1.bias).relu()
    expected = (inner @ second.T + gate.fc2.bias).sigmoid()
    torch.testing.assert_close(gate(x) / x, expected[:, :, None, None].expand_as(x))


@pytest.mark.parametrize("name", ["seresnet18", "sb-seresnet18", "seresnet50", "sb-seresnet50"])
def test_open_gates_are_a_network_without_gates(name):
    gated, plain = (qx.networks.build(n, 3).eval() for n in (name, name.replace("seresnet", "resnet")))
    plain.load_state_dict({k: v for k, v in gated.state_dict().items() if ".se." not in k})
    for module in gated.modules():
        if isinstance(module, resnet.SqueezeExcitation):
            nn.init.zeros_(module.fc2.weight)
            nn.init.constant_(module.fc2.bias, 40.0)
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(gated(x), plain(x), rtol=1e-4, atol=1e-4)


def test_a_dense_layer_puts_new_channels_behind_the_old():
    for layer in list(qx.networks.build("sb-densenet121", 3).eval().features.denseblock1)[:2]:
        x = torch.randn(1, layer.norm1.num_features, 6, 6)
        out = layer(x)
        assert out.shape[1] == x.shape[1] + 32
        assert torch.equal(out[:, : x.shape[1]], x)


def test_option_a_takes_every_second_position_and_pads_on_both_sides():
    block = qx.networks.build("cifar-resnet8").eval().layer2[0]
    nn.init.zeros_(block.bn2.weight)
    nn.init.zeros_(block.bn2.bias)
    x = torch.rand(1, 16, 8, 8)
    out = block(x)
    assert torch.equal(out[:, 8:24], x[:, :, ::2, ::2])
    assert not out[:, :8].any()
    assert not out[:, 24:].any()


def test_local_response_normalisation_is_the_papers_formula():
    x = torch.randn(1, 7, 2, 3) * 100
    expected = torch.empty_like(x)
    for c in range(7):
        near = x[:, max(0, c - 2) : c + 3].square().sum(1)
        expected[:, c] = x[:, c] / (1 + 1e-4 / 5 * near) ** 0.75
    torch.testing.assert_close(local_response_norm()(x), expected)
    assert not torch.allclose(expected, x, rtol=0.1)


def test_the_original_alexnet_has_two_columns():
    features = on_meta("alexnet", form="original").features
    groups = {name: m.groups for name, m in features.named_children() if isinstance(m, nn.Conv2d)}
    assert groups == {"conv1": 1, "conv2": 2, "conv3": 1, "conv4": 2, "conv5": 2}
    assert features(torch.empty(1, 3, 227, 227, device="meta")).shape == (1, 256, 6, 6)


@pytest.mark.parametrize(("form", "size", "biased"), [("torchvision", 3, False), ("original", 5, True)])
def test_forms_of_googlenet(form, size, biased):
    model = on_meta("googlenet", form=form)
    third = model.inception4c.branch3[1].conv
    assert third.kernel_size == (size, size)
    assert (third.bias is not None) is biased
    assert any(isinstance(m, nn.BatchNorm2d) for m in model.modules()) is not biased


@pytest.mark.parametrize("form", ["torchvision", "original"])
def test_heads_answer_in_training_only(form):
    """The last two results are those of aux2 and of aux1, in torchvision's order."""
    model = qx.networks.build("googlenet", 3, form=form, aux=True)
    for i, head in enumerate((model.aux1, model.aux2), 1):
        nn.init.zeros_(head.fc2.weight)
        nn.init.constant_(head.fc2.bias, float(i))
    x = torch.randn(2, 3, 80, 80)
    scores, second, first = model(x)
    assert scores.shape == (2, 3)
    assert torch.equal(second, torch.full((2, 3), 2.0))
    assert torch.equal(first, torch.full((2, 3), 1.0))
    assert model.eval()(x).shape == (2, 3)
    assert qx.networks.build("googlenet", 3, form=form)(x).shape == (2, 3)


def test_heads_of_the_original_pool_as_caffe_did():
    """Five by five windows three apart, which make 4 x 4 of the 14 x 14 map."""
    head = Head(2, 3, True, 0.0)
    seen = []
    head.conv.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    x = torch.randn(1, 2, 14, 14)
    head(x)
    windows = [
        [x[:, :, 3 * i : 3 * i + 5, 3 * j : 3 * j + 5].mean((2, 3)) for j in range(4)] for i in range(4)
    ]
    torch.testing.assert_close(seen[0], torch.stack([torch.stack(row, 2) for row in windows], 2))


def test_squeezenet_pools_beyond_the_border():
    """227 to 113 by the unpadded convolution; 56, 28, 14 by windows of three, the last ones cut."""
    shapes = []
    model = on_meta("squeezenet1_1")
    for module in model.features:
        if isinstance(module, (nn.Conv2d, nn.MaxPool2d)):
            module.register_forward_hook(lambda _, __, out: shapes.append(out.shape[-1]))
    model(torch.empty(1, 3, 227, 227, device="meta"))
    assert shapes == [113, 56, 28, 14]


def test_fire_puts_the_one_by_one_first():
    fire = qx.networks.build("squeezenet1_1", 3).features[3]
    x = torch.randn(1, 64, 5, 5)
    inner = F.relu(fire.squeeze(x))
    assert torch.equal(fire(x)[:, :64], F.relu(fire.expand1x1(inner)))


# ---------------------------------------------------------------- bad settings


@pytest.mark.parametrize(
    ("name", "settings", "match"),
    [
        ("resnext18", {}, "resnext18: the depth must be one of 50, 101"),
        ("seresnet19", {}, "seresnet19: the depth must be one of 18, 34, 50, 101"),
        ("seresnet18", {"reduction": 0}, "reduction=0: expected a positive integer"),
        ("sb-seresnet18", {"reduction": 2.5}, "reduction=2.5: expected a positive integer"),
        ("densenet120", {}, "densenet120: the depth must be one of 121, 161, 169, 201"),
        ("sb-densenet121", {"down": "max"}, "down='max'"),
        ("cifar-resnet21", {}, r"cifar-resnet21: the depth must be 6n \+ 2 with n >= 1, such as 20"),
        ("sb-cifar-resnet20", {"width": True}, "width=True: expected a positive integer"),
        ("cifar-resnet20", {"sampling": "2/4"}, "cifar-resnet20 has no such setting; it has width"),
        ("alexnet", {"form": "caffe"}, "form='caffe': expected 'torchvision' or 'original'"),
        ("alexnet", {"dropout": 1}, "dropout=1: expected a number from 0 to less than 1"),
        ("googlenet", {"form": None}, "form=None: expected 'torchvision' or 'original'"),
        ("googlenet", {"aux": 1}, "aux=1: expected True or False"),
        ("googlenet", {"aux_dropout": -0.1}, "aux_dropout=-0.1"),
        ("squeezenet1_1", {"dropout": "half"}, "dropout='half'"),
        ("squeezenet1_0", {}, "unknown network; nearest first: squeezenet1_1"),
    ],
)
def test_refuses(name, settings, match):
    with pytest.raises(ValueError, match=match):
        qx.networks.build(name, **settings)


def test_a_map_smaller_than_the_period_is_named():
    model = qx.networks.build("sb-resnet18", 3, sampling=qx.Cosets(4, [(0, 0)]))
    model.eval()
    with pytest.raises(ValueError, match="grid 2 x 2: smaller than the sampling's period K=4"):
        model(torch.zeros(1, 3, 64, 64))
