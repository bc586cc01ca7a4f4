"""Published weights: what is read, what is refused, and that the networks then see what they should."""

from __future__ import annotations

import csv
import io
import os
import tarfile
import zipfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import quincunx as qx
from helpers import ROOT
from quincunx.networks.checkpoints import read_weights
from quincunx.networks.weights import fill_parameters, from_caffe, load, read_npz

DATA = ROOT.parent / "shared" / "data"

# written down from the models' deploy.prototxt: outputs, inputs of a group, kernel
ALEXNET = {
    "conv1": (96, 3, 11, 11),
    "conv2": (256, 48, 5, 5),
    "conv3": (384, 256, 3, 3),
    "conv4": (384, 192, 3, 3),
    "conv5": (256, 192, 3, 3),
    "fc6": (4096, 9216),
    "fc7": (4096, 4096),
    "fc8": (1000, 4096),
}
INCEPTIONS = {
    "3a": (192, 64, 96, 128, 16, 32, 32),
    "3b": (256, 128, 128, 192, 32, 96, 64),
    "4a": (480, 192, 96, 208, 16, 48, 64),
    "4b": (512, 160, 112, 224, 24, 64, 64),
    "4c": (512, 128, 128, 256, 24, 64, 64),
    "4d": (512, 112, 144, 288, 32, 64, 64),
    "4e": (528, 256, 160, 320, 32, 128, 128),
    "5a": (832, 256, 160, 320, 32, 128, 128),
    "5b": (832, 384, 192, 384, 48, 128, 128),
}


def googlenet_shapes(heads):
    shapes = {
        "conv1/7x7_s2": (64, 3, 7, 7),
        "conv2/3x3_reduce": (64, 64, 1, 1),
        "conv2/3x3": (192, 64, 3, 3),
        "loss3/classifier": (1000, 1024),
    }
    for name, (inside, one, reduce3, three, reduce5, five, pool) in INCEPTIONS.items():
        shapes |= {
            f"inception_{name}/1x1": (one, inside, 1, 1),
            f"inception_{name}/3x3_reduce": (reduce3, inside, 1, 1),
            f"inception_{name}/3x3": (three, reduce3, 3, 3),
            f"inception_{name}/5x5_reduce": (reduce5, inside, 1, 1),
            f"inception_{name}/5x5": (five, reduce5, 5, 5),
            f"inception_{name}/pool_proj": (pool, inside, 1, 1),
        }
    for i, inside in ((1, 512), (2, 528)) if heads else ():
        shapes |= {
            f"loss{i}/conv": (128, inside, 1, 1),
            f"loss{i}/fc": (1024, 2048),
            f"loss{i}/classifier": (1000, 1024),
        }
    return shapes


def squeezenet_shapes():
    shapes = {"conv1": (64, 3, 3, 3), "conv10": (1000, 512, 1, 1)}
    inside = 64
    for i, (squeezed, expanded) in enumerate(((16, 64), (32, 128), (48, 192), (64, 256))):
        for fire in (2 * i + 2, 2 * i + 3):
            shapes[f"fire{fire}/squeeze1x1"] = (squeezed, inside, 1, 1)
            shapes[f"fire{fire}/expand1x1"] = (expanded, squeezed, 1, 1)
            shapes[f"fire{fire}/expand3x3"] = (expanded, squeezed, 3, 3)
            inside = 2 * expanded
    return shapes


def arrays_of(shapes, classes=None):
    """Random weights of activations that keep their scale; the last layer with other classes."""
    draw = np.random.default_rng(0)
    found = {}
    for layer, shape in shapes.items():
        if classes and (layer in ("fc8", "conv10") or layer.endswith("/classifier")):
            shape = (classes, *shape[1:])
        weight = draw.standard_normal(shape, dtype=np.float32)
        weight *= np.float32(np.sqrt(2 / np.prod(shape[1:])))
        found[layer] = [weight, draw.standard_normal(shape[0], dtype=np.float32) * np.float32(0.1)]
    return found


def constants_of(shapes):
    """Arrays that take no memory, for what is refused before it is read."""
    return {k: [np.broadcast_to(np.float32(0), s), np.zeros(s[0])] for k, s in shapes.items()}


# ---------------------------------------------------------------- Caffe


def neighbours(x):
    """Caffe's LRN across channels: local_size 5, alpha 1e-4, beta 0.75."""
    total = torch.zeros_like(x)
    for shift in range(-2, 3):
        total += torch.roll(F.pad(x, (0, 0, 0, 0, 2, 2)), shift, 1)[:, 2:-2].square()
    return x / (1 + 1e-4 / 5 * total) ** 0.75


def caffe_convolution(x, blobs, stride=1, padding=0, groups=1):
    weight, bias = map(torch.from_numpy, blobs)
    parts = zip(x.chunk(groups, 1), weight.chunk(groups), bias.chunk(groups), strict=True)
    return torch.cat([F.conv2d(p, w, b, stride, padding) for p, w, b in parts], 1).relu()


def test_a_converted_alexnet_answers_as_in_caffe():
    """bvlc_alexnet as its prototxt says, on blue, green, red; ours on red, green, blue."""
    arrays = arrays_of(ALEXNET, classes=7)
    model = qx.networks.build("alexnet", 7, form="original").eval()
    model.load_state_dict(from_caffe("alexnet", arrays))
    x = torch.randn(1, 3, 227, 227) * 60
    y = neighbours(caffe_convolution(x, arrays["conv1"], stride=4))
    y = F.max_pool2d(y, 3, 2, ceil_mode=True)
    y = neighbours(caffe_convolution(y, arrays["conv2"], padding=2, groups=2))
    y = F.max_pool2d(y, 3, 2, ceil_mode=True)
    y = caffe_convolution(y, arrays["conv3"], padding=1)
    y = caffe_convolution(y, arrays["conv4"], padding=1, groups=2)
    y = F.max_pool2d(caffe_convolution(y, arrays["conv5"], padding=1, groups=2), 3, 2, ceil_mode=True)
    values = y.numpy().reshape(-1)
    for layer in ("fc6", "fc7"):
        values = np.maximum(arrays[layer][0] @ values + arrays[layer][1], 0)
    expected = torch.from_numpy(arrays["fc8"][0] @ values + arrays["fc8"][1])
    with torch.no_grad():
        torch.testing.assert_close(model(x.flip(1))[0], expected, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(model(x)[0], expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("heads", [False, True])
def test_a_converted_googlenet_has_each_layer_in_its_place(heads):
    arrays = arrays_of(googlenet_shapes(heads), classes=5)
    model = qx.networks.build("googlenet", 5, form="original", aux=heads).eval()
    model.load_state_dict(from_caffe("googlenet", arrays))
    assert torch.equal(model.conv1.conv.weight.flip(1), torch.from_numpy(arrays["conv1/7x7_s2"][0]))
    for name, channels in INCEPTIONS.items():
        x = torch.randn(1, channels[0], 4, 4)

        def layer(x, kind, padding=0, name=name):
            return caffe_convolution(x, arrays[f"inception_{name}/{kind}"], padding=padding)

        expected = torch.cat(
            [
                layer(x, "1x1"),
                layer(layer(x, "3x3_reduce"), "3x3", 1),
                layer(layer(x, "5x5_reduce"), "5x5", 2),
                layer(F.max_pool2d(x, 3, 1, 1), "pool_proj"),
            ],
            1,
        )
        found = model.get_submodule(f"inception{name}")(x)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    if heads:
        for i, head in enumerate((model.aux1, model.aux2), 1):
            for kind, module in (("conv", head.conv.conv), ("fc", head.fc1), ("classifier", head.fc2)):
                assert torch.equal(module.weight, torch.from_numpy(arrays[f"loss{i}/{kind}"][0]))
                assert torch.equal(module.bias, torch.from_numpy(arrays[f"loss{i}/{kind}"][1]))


def test_blobs_of_older_files_have_leading_ones():
    arrays = arrays_of(squeezenet_shapes(), classes=3)
    older = {k: [w, b.reshape(1, 1, 1, -1)] for k, (w, b) in arrays.items()}
    expected, found = (from_caffe("squeezenet1_1", a) for a in (arrays, older))
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_numbers_of_any_kind_become_float32():
    arrays = arrays_of(squeezenet_shapes(), classes=3)
    doubled = {k: [w.astype(np.float64), b.astype(np.float16)] for k, (w, b) in arrays.items()}
    assert {v.dtype for v in from_caffe("squeezenet1_1", doubled).values()} == {torch.float32}


@pytest.mark.parametrize(
    ("name", "change", "error", "match"),
    [
        ("alexnet", lambda a: a.pop("conv3"), ValueError, "^alexnet: missing conv3$"),
        ("alexnet", lambda a: a.update(norm1=[]), ValueError, "^alexnet: unexpected norm1$"),
        ("alexnet", lambda a: a.update(fc6=[1]), TypeError, r"arrays\['fc6'\]: expected \[weight, bias\]"),
        (
            "alexnet",
            lambda a: a.update(conv1=[np.array(["x"]), np.zeros(96)]),
            TypeError,
            r"arrays\['conv1'\]: weight: expected numbers, got <U1",
        ),
        ("googlenet", lambda a: a.pop("loss2/fc"), ValueError, "^googlenet: missing loss2/fc$"),
        ("vgg16", lambda a: None, ValueError, "name='vgg16': expected 'alexnet', 'googlenet' or"),
    ],
)
def test_arrays_that_do_not_fit(name, change, error, match):
    arrays = constants_of(googlenet_shapes(True) if name == "googlenet" else ALEXNET)
    change(arrays)
    with pytest.raises(error, match=match):
        from_caffe(name, arrays)


def test_at_most_ten_of_each_kind_are_named():
    with pytest.raises(ValueError, match="missing") as caught:
        from_caffe("googlenet", {f"layer{i}": [] for i in range(12)})
    missing, unexpected = str(caught.value).removeprefix("googlenet: ").split("; ")
    assert missing.startswith("missing conv1/7x7_s2, conv2/3x3_reduce, ")
    assert missing.endswith(" and 48 more")
    assert missing.count(", ") == 9
    assert unexpected == f"unexpected {', '.join(f'layer{i}' for i in range(10))} and 2 more"


def test_wrong_shapes_are_named():
    arrays = arrays_of(squeezenet_shapes(), classes=3)
    arrays["conv1"][0] = arrays["conv1"][0][:, :2]
    arrays["fire4/expand3x3"][1] = arrays["fire4/expand3x3"][1][:5]
    with pytest.raises(ValueError, match="wrong shape of") as caught:
        from_caffe("squeezenet1_1", arrays)
    assert "features.0.weight (64, 2, 3, 3), expected (64, 3, 3, 3)" in str(caught.value)
    assert "features.6.expand3x3.bias (5,), expected (128,)" in str(caught.value)
    with pytest.raises(TypeError, match="arrays: expected a mapping of layer names, got list"):
        from_caffe("alexnet", [])


# ---------------------------------------------------------------- .npz


def test_a_network_from_an_npz_file(tmp_path):
    """Kernels may lie there as height, width, in, out."""
    arrays = arrays_of(squeezenet_shapes(), classes=4)
    flat = {}
    for i, (layer, (weight, bias)) in enumerate(arrays.items()):
        if i % 2:
            flat[f"{layer}/kernel_hwio"] = weight.transpose(2, 3, 1, 0)
        else:
            flat[f"{layer}/weight"] = weight
        flat[f"{layer}/bias"] = bias
    np.savez(tmp_path / "weights.npz", **flat)
    model = load("squeezenet1_1", tmp_path / "weights.npz")
    assert not model.training
    expected = from_caffe("squeezenet1_1", arrays)
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())
    again = qx.load(qx.save(model, tmp_path / "saved"))
    x = torch.randn(1, 3, 40, 40)
    assert torch.equal(again(x), model(x))


def test_caffe_weights_bring_their_settings(tmp_path):
    flat = {}
    for layer, (weight, bias) in arrays_of(googlenet_shapes(True), classes=3).items():
        flat |= {f"{layer}/weight": weight, f"{layer}/bias": bias}
    np.savez(tmp_path / "weights.npz", **flat)
    spec = load("googlenet", tmp_path / "weights.npz", dropout=0.1).quincunx_spec
    assert spec["num_classes"] == 3
    assert spec["settings"] == {"form": "original", "aux": True, "dropout": 0.1}
    with pytest.raises(ValueError, match=r"aux=False: the weights in .*weights.npz have aux=True"):
        load("googlenet", tmp_path / "weights.npz", aux=False)


def test_npz_files_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_npz(tmp_path / "none.npz")
    good = tmp_path / "good.npz"
    np.savez(good, **{"conv1/weight": np.zeros((2, 3, 1, 1)), "conv1/bias": np.zeros(2)})
    assert list(read_npz(good)) == ["conv1"]
    for name, content in (
        ("text.npz", b"no archive"),
        ("empty.npz", b""),
        ("cut.npz", good.read_bytes()[:-90]),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}: no readable .npz file of layers"):
            read_npz(tmp_path / name)
    np.save(tmp_path / "single.npy", np.zeros(3))
    with pytest.raises(ValueError, match="one array, no archive of arrays"):
        read_npz(tmp_path / "single.npy")


@pytest.mark.parametrize(
    ("arrays", "match"),
    [
        ({"conv1/gamma": np.zeros(2)}, "key 'conv1/gamma', expected LAYER/weight"),
        ({"weight": np.zeros(2)}, "key 'weight'"),
        ({"conv1/kernel_hwio": np.zeros(2)}, "'conv1/kernel_hwio' has 1 axes, expected 4"),
        ({"conv1/weight": np.zeros(2)}, "weight or bias is missing of conv1"),
        ({"conv1/weight": np.array([print], dtype=object)}, "no readable .npz file"),
    ],
)
def test_npz_files_of_something_else(arrays, match, tmp_path):
    np.savez(tmp_path / "other.npz", **arrays)
    with pytest.raises(ValueError, match=match):
        read_npz(tmp_path / "other.npz")


def test_a_damaged_member_is_no_weight(tmp_path):
    path = tmp_path / "damaged.npz"
    np.savez_compressed(path, **{"conv1/weight": np.arange(999.0), "conv1/bias": np.zeros(2)})
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as file:
        at = file.getinfo("conv1/weight.npy").header_offset
    content[at + 200] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"damaged.npz: no readable"):
        read_npz(path)


# ---------------------------------------------------------------- torch checkpoints


class Executed:
    """A pickle that would make a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_checkpoint_is_never_executed(tmp_path):
    torch.save({"state_dict": Executed(tmp_path / "harm")}, tmp_path / "bad.pth")
    with pytest.raises(ValueError, match=r"bad.pth: no checkpoint of tensors"):
        read_weights(tmp_path / "bad.pth")
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s, "best_prec1": 91.0}])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_checkpoints_of_usual_kinds(tmp_path, wrap, prefix):
    model = qx.networks.build("cifar-resnet8", 4, 1, width=3).eval()
    # older checkpoints have no such counters
    kept = {k: v for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}
    torch.save(wrap({prefix + k: v for k, v in kept.items()}), tmp_path / "old.th")
    again = load("cifar-resnet8", tmp_path / "old.th", width=3)
    assert (again.quincunx_spec["num_classes"], again.quincunx_spec["in_channels"]) == (4, 1)
    x = torch.randn(2, 1, 16, 16)
    assert torch.equal(again(x), model(x))


def test_a_safetensors_file_and_old_names(tmp_path):
    """The first published DenseNets had a dot in ``denselayer1.norm.1``."""
    state = qx.networks.build("densenet121", 3).state_dict()
    for part in ("norm", "conv"):
        for i in (1, 2):
            state = {k.replace(f".{part}{i}.", f".{part}.{i}."): v for k, v in state.items()}
    assert "features.denseblock2.denselayer3.norm.2.weight" in state
    save_file(state, tmp_path / "old.safetensors")
    model = load("densenet121", tmp_path / "old.safetensors")
    assert torch.equal(
        model.features.denseblock4.denselayer16.conv2.weight,
        state["features.denseblock4.denselayer16.conv.2.weight"],
    )


def test_checkpoints_that_do_not_fit(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none.th: no such file"):
        load("cifar-resnet8", tmp_path / "none.th")
    state = qx.networks.build("cifar-resnet8", width=4).state_dict()

    def saved(content, name="weights.th"):
        torch.save(content, tmp_path / name)
        return tmp_path / name

    path = saved(state)
    with pytest.raises(ValueError, match=r"cifar-resnet8: wrong shape of conv1.weight \(4, 3, 3, 3\), exp"):
        load("cifar-resnet8", path)
    with pytest.raises(ValueError, match=r"cifar-resnet14: missing layer1.1.conv1.weight, .* and 20 more"):
        load("cifar-resnet14", path, width=4)
    with pytest.raises(ValueError, match="no such setting"):
        load("cifar-resnet8", path, depth=4)
    for content in ([1, 2], {"epoch": 3}, {"state_dict": {"conv1.weight": 3}}):
        with pytest.raises(ValueError, match="holds no state dict"):
            read_weights(saved(content))
    for content in (b"", b"no checkpoint", path.read_bytes()[:200]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"weights.th: no checkpoint of tensors"):
            read_weights(path)
    (tmp_path / "cut.safetensors").write_bytes(b"\x08")
    with pytest.raises(ValueError, match=r"cut.safetensors: no checkpoint of tensors"):
        read_weights(tmp_path / "cut.safetensors")


# ---------------------------------------------------------------- real weights on real images


def real(name):
    path = DATA / name
    if not path.exists():
        pytest.skip(f"needs {name} in ../shared/data, which a checkout alone does not have")
    return path


def scores_of(model, images):
    with torch.no_grad():
        return torch.cat([model(part) for part in images.split(50)])


@pytest.mark.parametrize(
    ("name", "file", "count", "right"),
    [
        ("cifar-resnet20", "resnet20-12fca82f.th", 1000, 915),
        ("cifar-resnet56", "resnet56-4bfd9763.th", 250, 234),
    ],
)
def test_published_cifar_resnets_score_what_they_should(name, file, count, right):
    """915 and 926 of 1,000 test images; one more or less is rounding."""
    classes = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    model = load(name, real(f"pretrained/{file}"))
    images, labels = [], []
    with tarfile.open(real("cifar10-png-small.tar.gz")) as archive:
        for member in archive:
            part, _, label = member.name.rpartition("/")[0].partition("/")[2].partition("/")
            if part == "test" and member.isfile() and len(images) < count:
                image = Image.open(io.BytesIO(archive.extractfile(member).read())).convert("RGB")
                images.append(torch.from_numpy(np.array(image)))
                labels.append(classes.index(label))
    x = torch.stack(images).permute(0, 3, 1, 2) / 255
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)
    found = scores_of(model, (x - mean) / std).argmax(1) == torch.tensor(labels)
    assert len(found) == count
    assert int(found.sum()) == pytest.approx(right, abs=1)


def test_published_squeezenet_scores_what_it_should():
    """The first 50 of 500 images; all of them give 57.6% and 82.4%."""
    model = load("squeezenet1_1", real("pretrained/squeezenet_v1.1_imagenet.npz"))
    assert model.quincunx_spec["num_classes"] == 1000
    images, folder = {}, "imagenet-nips17-500/"
    with tarfile.open(real("imagenet-nips17-500.tar.gz")) as archive:
        table = archive.extractfile(f"{folder}labels.csv").read().decode()
        rows = list(csv.DictReader(io.StringIO(table)))[:50]
        for row in rows:
            content = archive.extractfile(folder + row["file"]).read()
            image = (
                Image.open(io.BytesIO(content)).convert("RGB").resize((227, 227), Image.Resampling.BILINEAR)
            )
            images[row["file"]] = torch.from_numpy(np.array(image)).permute(2, 0, 1).float()
    x = torch.stack([images[row["file"]] for row in rows])
    labels = torch.tensor([int(row["ilsvrc_index"]) for row in rows])
    scores = scores_of(model, x - torch.tensor([123.68, 116.779, 103.939]).view(3, 1, 1))
    best = scores.topk(5).indices == labels[:, None]
    assert int(best[:, 0].sum()) == pytest.approx(29, abs=1)
    assert int(best.any(1).sum()) == pytest.approx(43, abs=1)


def test_names_that_the_network_has_stay_as_they_are(tmp_path):
    names = ["module.denselayer1.norm.1.weight", "module.denselayer1.norm.1.bias"]
    torch.save({name: torch.ones(2) for name in names}, tmp_path / "own.pt")
    assert list(read_weights(tmp_path / "own.pt", known=names)) == names
    assert list(read_weights(tmp_path / "own.pt")) == [
        "denselayer1.norm1.weight",
        "denselayer1.norm1.bias",
    ]


def test_a_network_is_filled_whatever_its_older_names_and_tied_weights():
    class Renamed(nn.Linear):
        def _load_from_state_dict(self, state, prefix, *rest):
            state[prefix + "weight"] = state.pop(prefix + "kernel")
            super()._load_from_state_dict(state, prefix, *rest)

    net = Renamed(2, 2)
    fill_parameters(net, {"kernel": torch.eye(2), "bias": torch.zeros(2)}, "w")
    assert torch.equal(net.weight, torch.eye(2))
    # counters that older checkpoints do not have
    norm = nn.BatchNorm2d(2)
    state = {k: v + 1 for k, v in norm.state_dict().items() if k != "num_batches_tracked"}
    fill_parameters(norm, state, "w")
    assert torch.equal(norm.running_mean, torch.ones(2))
    tied = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    tied[1].weight = tied[0].weight
    fill_parameters(tied, {"1.weight": torch.eye(2), "0.bias": torch.ones(2), "1.bias": torch.zeros(2)}, "w")
    assert torch.equal(tied[0].weight, torch.eye(2))
    # equal values are not tied weights
    alike = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).requires_grad_(False)
    alike[1].bias.copy_(alike[0].bias)
    state = {key: value for key, value in alike.state_dict().items() if key != "0.bias"}
    with pytest.raises(ValueError, match=r"w: missing 0\.bias$"):
        fill_parameters(alike, state, "w")
