"""Published sizes and names: parameters, MACs and state-dict keys that others' weights rely on."""

from __future__ import annotations

import pytest
import torch

import quincunx as qx

NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
BOTH = ("weight", "bias")


def on_meta(name, *arguments, **settings):
    """A network without storage: its names and shapes."""
    with torch.device("meta"):
        return qx.networks.build(name, *arguments, **settings)


def under(prefix, names):
    return [f"{prefix}.{name}" for name in names]


# ---------------------------------------------------------------- published sizes


@pytest.mark.parametrize(
    ("name", "settings", "params", "macs"),
    [
        ("resnext50", {}, 25_028_904, 4.230),
        ("seresnet50", {}, 28_088_024, 4.092),
        ("densenet121", {}, 7_978_856, 2.834),
        ("alexnet", {}, 61_100_840, 0.714),
        ("alexnet", {"form": "original"}, 60_965_224, 0.724),
        ("googlenet", {}, 6_624_904, 1.498),
        ("googlenet", {"aux": True}, 13_004_888, 1.498),
        ("googlenet", {"form": "original"}, 6_998_552, 1.583),
        ("googlenet", {"form": "original", "aux": True}, 13_378_280, 1.583),
        ("squeezenet1_1", {}, 1_235_496, 0.349),
    ],
)
def test_parameters_and_macs_are_the_published_ones(name, settings, params, macs):
    side = 227 if name == "alexnet" and settings else 224
    found = qx.cost(qx.networks.build(name, 1000, **settings), torch.zeros(1, 3, side, side))
    assert found.params == params
    assert found.macs / 1e9 == pytest.approx(macs, abs=6e-4)


@pytest.mark.parametrize(
    ("name", "classes", "params"),
    [
        ("resnext101", 1000, 88_791_336),
        ("densenet161", 1000, 28_681_000),
        ("densenet169", 1000, 14_149_480),
        ("densenet201", 1000, 20_013_928),
        ("cifar-resnet20", 10, 269_722),
        ("cifar-resnet56", 10, 853_018),
        ("cifar-resnet110", 10, 1_727_962),
    ],
)
def test_parameters_of_other_depths(name, classes, params):
    assert sum(p.numel() for p in on_meta(name, classes).parameters()) == params


# ---------------------------------------------------------------- published names


def alexnet_keys():
    features = [f"features.{i}.{k}" for i in (0, 3, 6, 8, 10) for k in BOTH]
    return features + [f"classifier.{i}.{k}" for i in (1, 4, 6) for k in BOTH]


def conv_norm(prefix):
    return [f"{prefix}.conv.weight", *under(f"{prefix}.bn", NORM)]


def googlenet_keys():
    keys = [key for i in (1, 2, 3) for key in conv_norm(f"conv{i}")]
    for block in ("3a", "3b", "4a", "4b", "4c", "4d", "4e", "5a", "5b"):
        for branch in ("branch1", "branch2.0", "branch2.1", "branch3.0", "branch3.1", "branch4.1"):
            keys += conv_norm(f"inception{block}.{branch}")
    for head in ("aux1", "aux2"):
        keys += [*conv_norm(f"{head}.conv"), *under(f"{head}.fc1", BOTH), *under(f"{head}.fc2", BOTH)]
    return keys + under("fc", BOTH)


def squeezenet_keys():
    keys = under("features.0", BOTH)
    for i in (3, 4, 6, 7, 9, 10, 11, 12):
        keys += [f"features.{i}.{part}.{k}" for part in ("squeeze", "expand1x1", "expand3x3") for k in BOTH]
    return keys + under("classifier.1", BOTH)


def densenet_keys():
    keys = ["features.conv0.weight", *under("features.norm0", NORM)]
    for block, count in enumerate((6, 12, 24, 16), 1):
        for layer in range(1, count + 1):
            at = f"features.denseblock{block}.denselayer{layer}"
            keys += [*under(f"{at}.norm1", NORM), f"{at}.conv1.weight"]
            keys += [*under(f"{at}.norm2", NORM), f"{at}.conv2.weight"]
        if block < 4:
            at = f"features.transition{block}"
            keys += [*under(f"{at}.norm", NORM), f"{at}.conv.weight"]
    return [*keys, *under("features.norm5", NORM), *under("classifier", BOTH)]


def cifar_keys(n):
    keys = ["conv1.weight", *under("bn1", NORM)]
    for stage in (1, 2, 3):
        for block in range(n):
            for i in (1, 2):
                at = f"layer{stage}.{block}"
                keys += [f"{at}.conv{i}.weight", *under(f"{at}.bn{i}", NORM)]
    return keys + under("linear", BOTH)


@pytest.mark.parametrize(
    ("name", "settings", "keys"),
    [
        ("alexnet", {}, alexnet_keys()),
        ("googlenet", {"aux": True}, googlenet_keys()),
        ("googlenet", {}, [k for k in googlenet_keys() if not k.startswith("aux")]),
        ("squeezenet1_1", {}, squeezenet_keys()),
        ("densenet121", {}, densenet_keys()),
        ("cifar-resnet20", {}, cifar_keys(3)),
    ],
)
def test_keys_are_the_published_ones(name, settings, keys):
    assert list(on_meta(name, **settings).state_dict()) == keys


def test_relatives_of_resnet_have_its_keys():
    """ResNeXt all of them; SE-ResNet those and a gate of two 1 x 1 convolutions in each block."""
    plain = list(on_meta("resnet50").state_dict())
    assert list(on_meta("resnext50").state_dict()) == plain
    gated = list(on_meta("seresnet50").state_dict())
    gates = [key for key in gated if ".se." in key]
    assert [key for key in gated if key not in gates] == plain
    assert len(gates) == 16 * 4
    assert {key.partition(".se.")[2] for key in gates} == {f"fc{i}.{k}" for i in (1, 2) for k in BOTH}
