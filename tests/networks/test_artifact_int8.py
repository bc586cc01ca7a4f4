"""Artifacts in eight bits: a quarter of the bytes, the same bits, and what of a file is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import quincunx as qx
from quincunx.fusion.int8 import Int8Program
from quincunx.layers.eightbits import (
    decode_weight,
    encode_weight,
    quantisation_of,
    round_weights,
    sole_weights,
)
from quincunx.layers.sampled import SampledConvTranspose2d
from quincunx.networks.spec import format_of, read_spec
from quincunx.reading import sha256_of

pytestmark = pytest.mark.usefixtures("one_thread")
INT8 = torch.int8


def trained_like(model):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.normal_(module.weight)  # some are negative
    return model.eval()


def own():
    """Two convolutions with one weight, one used twice, one that is kept in real numbers elsewhere."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.twice = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
            self.left, self.right = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
            self.right.weight = self.left.weight
            self.norm, self.last = nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)

        def forward(self, x):
            x = self.twice(torch.relu(self.twice(torch.relu(self.stem(x)))))
            return self.last(torch.relu(self.norm(self.left(x)) + self.right(x)))

    return Tied()


def lowrank():
    model = qx.networks.build("cifar-resnet8", 10, 3).eval()
    return qx.accelerate(model, qx.LowRank(), example_input=torch.randn(1, 3, 16, 16)).model


def espace():
    model = qx.networks.build("cifar-resnet8", 10, 3).eval()
    return qx.accelerate(model, qx.Espace(mask="random"), example_input=torch.randn(1, 3, 16, 16)).model


NETWORKS = {
    "cifar-resnet8": lambda: qx.networks.build("cifar-resnet8", 10, 3),
    "rsbn14": lambda: qx.networks.build("rsbn14", 10, 3),
    "csbn29": lambda: qx.networks.build("csbn29", 10, 3),
    "lowrank": lowrank,
    "espace": espace,
    "own": own,
}


def saved(name, folder):
    """A network, the same in eight bits, and its artifact."""
    model, x = trained_like(NETWORKS[name]()), torch.randn(16, 3, 16, 16)
    small = qx.calibrate(model, x, max_drop=100)
    qx.save(small, folder / "small", factory="here:own" if name == "own" else None)
    return model, small, x


def loaded(name, folder):
    return qx.load(folder / "small", **({"factory": own} if name == "own" else {}))


@pytest.mark.parametrize("name", NETWORKS)
def test_a_loaded_network_gives_the_same_bits_without_images(name, tmp_path):
    model, small, x = saved(name, tmp_path)
    expected = qx.fuse(model, INT8, calibration=x, force=True, max_drop=100)
    fused, again = (qx.fuse(m, INT8, force=True) for m in (small, loaded(name, tmp_path)))
    assert any(isinstance(module, Int8Program) for module in again.modules())
    assert again.meta == fused.meta == expected.meta
    assert torch.equal(fused(x), expected(x))
    assert torch.equal(again(x), expected(x))
    state, before = loaded(name, tmp_path).state_dict(), small.state_dict()
    assert all(torch.equal(state[key], before[key]) for key in before)


def test_it_takes_about_a_quarter_of_the_bytes_and_says_so(tmp_path):
    model, small, _ = saved("rsbn14", tmp_path)
    qx.save(model, tmp_path / "plain")
    sizes = [(tmp_path / name / "weights.safetensors").stat().st_size for name in ("small", "plain")]
    assert sizes[0] < 0.29 * sizes[1]
    stored = load_file(tmp_path / "small" / "weights.safetensors")
    parts = [stored[f"{path}.weight"] for path in quantisation_of(small).layers]
    assert parts
    assert all(t.dtype == torch.int8 for t in parts)
    assert [format_of(read_spec(tmp_path / name)) for name in ("small", "plain")] == ["int8", "float32"]
    assert read_spec(tmp_path / "plain")["version"] == 1  # older programs read it


def test_weights_that_were_trained_since_are_stored_as_they_are(tmp_path):
    _, small, x = saved("cifar-resnet8", tmp_path)
    path = quantisation_of(small).layers[0]
    with torch.no_grad():
        small.get_submodule(path).weight.mul_(1 + 0.01 * torch.randn(3, 3))
    qx.save(small, tmp_path / "small")
    assert load_file(tmp_path / "small" / "weights.safetensors")[f"{path}.weight"].dtype == torch.float32
    fused, again = (qx.fuse(m, INT8, force=True) for m in (small, qx.load(tmp_path / "small")))
    assert torch.equal(fused(x), again(x))


def test_weights_that_somebody_else_reads_in_real_numbers_stay():
    model = own()
    assert sole_weights(model, ["left", "twice"]) == ("twice",)
    assert sole_weights(model, ["left", "right"]) == ("left", "right")


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("groups", [1, 3])
def test_rounded_weights_are_exact_and_stay(transposed, groups):
    conv = (
        SampledConvTranspose2d(6, 9, 3, sampling=qx.CHESSBOARD, padding=1, groups=groups)
        if transposed
        else nn.Conv2d(6, 9, 3, groups=groups)
    )
    with torch.no_grad():
        conv.weight.mul_(torch.logspace(-20, 20, conv.weight.numel()).view_as(conv.weight))
        conv.weight[0] = 0
    integers, scales = encode_weight(conv, conv.weight)
    assert scales.shape == (9,)
    before = conv.weight.detach().clone()
    round_weights(conv, [""])
    assert torch.equal(conv.weight, decode_weight(conv, integers, scales))
    assert float((conv.weight.detach() - before).abs().max()) <= float(before.abs().max()) / 253
    again = encode_weight(conv, conv.weight)
    assert torch.equal(again[0], integers)
    assert torch.equal(again[1], scales)


def test_a_network_that_was_changed_since_is_refused():
    model, x = trained_like(qx.networks.build("cifar-resnet8", 10, 3)), torch.randn(16, 3, 16, 16)
    small = qx.calibrate(model, x, max_drop=100)
    changed = qx.accelerate(small, qx.SpatialBottleneck(), example_input=x).model
    with pytest.raises(ValueError, match="its record of eight bits is of other convolutions"):
        qx.fuse(changed, INT8)
    assert qx.fuse(changed, INT8, calibration=x, force=True, max_drop=100).meta["int8"]["layers"] > 0


def test_a_fused_network_says_what_to_save(tmp_path):
    model, x = trained_like(qx.networks.build("cifar-resnet8", 10, 3)), torch.randn(16, 3, 16, 16)
    fused = qx.fuse(model, INT8, calibration=x, force=True)
    with pytest.raises(ValueError, match=r"qx\.calibrate"):
        qx.save(fused, tmp_path / "fused")


def test_a_network_on_no_cpu_and_no_network_are_refused():
    with pytest.raises(TypeError, match="model: expected"):
        qx.calibrate("resnet", torch.randn(16, 3, 8, 8))
    with pytest.raises(ValueError, match="expected one on the CPU, got one on meta"):
        qx.calibrate(nn.Conv2d(3, 3, 1).to("meta"), torch.randn(16, 3, 8, 8))
    with pytest.raises(ValueError, match="calibration: 3 images"):
        qx.calibrate(nn.Conv2d(3, 3, 1), torch.randn(3, 3, 8, 8))


# ---------------------------------------------------------------- damaged files


def rewritten(folder, change):
    """Changes the spec and the tensors of an artifact, and keeps its checksum right."""
    spec = json.loads((folder / "spec.json").read_text())
    state = load_file(folder / "weights.safetensors")
    change(spec, state)
    save_file(state, folder / "weights.safetensors")
    if "weights" in spec:
        spec["weights"]["sha256"] = sha256_of(folder / "weights.safetensors")
    (folder / "spec.json").write_text(json.dumps(spec))


def scale_of(state):
    return next(key for key in state if key.startswith("int8/scale/"))


def shift_of(state):
    return next(key for key in state if key.startswith("int8/shift/"))


def negative(state):
    state[scale_of(state)].neg_()


def grid(value):
    def change(spec, state):
        name = next(iter(spec["int8"]["grids"]))
        spec["int8"]["grids"][name] = value

    return change


DAMAGE = {
    "a version of tomorrow": (
        lambda spec, state: spec.update(version=3),
        "version 3, but this program reads",
    ),
    "no record": (lambda spec, state: spec.pop("int8"), "version 2 with or without 'int8'"),
    "an old version": (lambda spec, state: spec.update(version=1), "version 1 with or without 'int8'"),
    "no grids": (lambda spec, state: spec["int8"].pop("grids"), "'grids' is missing"),
    "a scale of zero": (grid([0.0, 3]), "a scale and a zero point"),
    "a zero point beyond": (grid([0.5, 256]), "expected 0 to 255"),
    "no pair": (grid([0.5]), "a list of 2"),
    "layers of numbers": (lambda spec, state: spec["int8"].update(layers=[3]), "expected text"),
    "no facts": (lambda spec, state: spec["int8"].pop("facts"), "'facts' is missing"),
    "facts of another form": (lambda spec, state: spec["int8"]["facts"].pop("input"), "'input' is missing"),
    "no shift": (lambda spec, state: state.pop(shift_of(state)), "the shift of convolution"),
    "no scale": (lambda spec, state: state.pop(scale_of(state)), "is in int8 and has no scale"),
    "a negative scale": (lambda spec, state: negative(state), "no scale of a weight"),
    "few scales": (
        lambda spec, state: state.update({scale_of(state): torch.ones(1)}),
        "1 scales for 16 outputs",
    ),
    "a layer of one number": (lambda spec, state: spec["int8"]["facts"].update(input=[3]), "a list of 3"),
    "a scale of nothing": (
        lambda spec, state: state.update({"int8/scale/x": torch.ones(1)}),
        "no scale of a",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_artifacts_are_refused_in_a_sentence(name, tmp_path):
    saved("cifar-resnet8", tmp_path)
    change, expected = DAMAGE[name]
    rewritten(tmp_path / "small", change)
    with pytest.raises(ValueError, match=expected) as caught:
        qx.load(tmp_path / "small")
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_grids_of_another_network_are_refused_when_fused(tmp_path):
    saved("cifar-resnet8", tmp_path)

    def change(spec, state):
        spec["int8"]["grids"] = {}

    rewritten(tmp_path / "small", change)
    with pytest.raises(ValueError, match="does not fit convolution"):
        qx.fuse(qx.load(tmp_path / "small"), INT8)
