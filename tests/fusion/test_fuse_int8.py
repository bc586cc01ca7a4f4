"""A fused copy in eight bits: the same bits on every back end, near the network, what it refuses or keeps."""

import copy
import dataclasses
import pickle

import pytest
import torch
from torch import nn

import quincunx as qx
from quincunx.deployment.lowering import lower
from quincunx.fusion import calibrated
from quincunx.fusion import fuse as fuse_module
from quincunx.fusion.calibrate import fuse_to_time
from quincunx.fusion.formats import type_beside_int8
from quincunx.fusion.fuse import _fuse
from quincunx.fusion.int8 import Int8Program, Int8Step, sampled_map
from quincunx.layers.eightbits import note_quantisation, quantisation_of

pytestmark = pytest.mark.usefixtures("one_thread")
INT8 = torch.int8
needs_native = pytest.mark.skipif(qx.backend().name != "native", reason="the extension is not built")


class Joined(nn.Module):
    """Branches that are joined, pooled and added, a strided shortcut, and two outputs."""

    def __init__(self):
        super().__init__()
        self.stem, self.left = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 9, 1)
        self.right, self.deep = nn.Conv2d(12, 7, 3, padding=1), nn.Conv2d(16, 16, 3, 2, padding=1)
        self.wide, self.head = nn.Conv2d(16, 20, 3, padding=1, groups=2), nn.Linear(20, 6)
        self.pool = nn.MaxPool2d(3, 2, 1)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = torch.cat([torch.relu(self.left(x)), self.right(x)], 1)
        y = self.deep(x) + x[:, :, ::2, ::2]
        y = self.pool(torch.relu(y))
        z = nn.functional.leaky_relu(self.wide(y), 0.2)
        return self.head(z.mean((2, 3))), z


def perforated():
    return nn.Sequential(
        qx.PerforatedConv2d(3, 8, 3, padding=1, sampling=qx.CHESSBOARD),
        nn.ReLU(),
        nn.Conv2d(8, 8, 1),
        nn.Hardswish(),
        nn.MaxPool2d(2),
        qx.PerforatedConv2d(8, 8, 3, padding=1, sampling=qx.QUARTER),
        nn.ReLU6(),
        nn.Conv2d(8, 4, 3, padding=1),
    )


class Filled(nn.Module):
    """Every fill and its epilogues: cosets and a mask, shortcuts, a long activation, a second output."""

    def __init__(self):
        super().__init__()

        def layer(inner, outer, sampling, fill="fitted", **settings):
            made = qx.PerforatedConv2d(inner, outer, 3, padding=1, sampling=sampling, fill=fill, **settings)
            if fill == "fitted":
                # not a mean of neighbours
                nn.init.normal_(made.filling.bias, std=0.2)
                made.filling.weight.data += 0.1 * torch.randn_like(made.filling.weight)
            return made

        self.one, self.two = layer(3, 21, qx.CHESSBOARD), layer(21, 21, qx.QUARTER, fill_reach=2)
        self.zero, self.near = layer(21, 21, qx.CHESSBOARD, "zero"), layer(21, 18, qx.QUARTER, "nearest")
        self.wide = layer(18, 24, qx.Random(0.4, 3), fill_size=(13, 10))
        self.norm, self.last = nn.BatchNorm2d(24), layer(24, 24, qx.CHESSBOARD)
        self.end = nn.Conv2d(24, 5, 3, 2, padding=1)

    def forward(self, x):
        x = torch.relu(self.one(x))
        x = torch.relu(self.two(x) + x)
        x = self.near(nn.functional.hardswish(self.zero(x)))
        y = self.wide(x) + nn.functional.pad(x, (0, 0, 0, 0, 0, 6))
        y = self.last(torch.relu(self.norm(y))) + y
        return self.end(y)


def pooled_bottleneck():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        qx.SpatialBottleneck2d(8, 8, 3, sampling=qx.QUARTER, down="avgpool"),
        nn.ReLU(),
        nn.Conv2d(8, 5, 3, padding=1),
    )


def accelerated(method):
    model = qx.networks.build("cifar-resnet8", 10, 3).eval()
    return qx.accelerate(model, method, example_input=torch.randn(1, 3, 16, 16)).model


NETWORKS = {
    "resnet": (lambda: qx.networks.build("cifar-resnet8", 10, 3), (16, 3, 16, 16)),
    "rsbn14": (lambda: qx.networks.build("rsbn14", 10, 3), (16, 3, 16, 16)),
    "csbn29": (lambda: qx.networks.build("csbn29", 10, 3), (16, 3, 16, 16)),
    "squeezenet1_1": (lambda: qx.networks.build("squeezenet1_1", 10, 3), (16, 3, 64, 64)),
    "joined": (Joined, (16, 3, 13, 10)),
    "perforated": (perforated, (16, 3, 12, 10)),
    "depthwise": (
        lambda: nn.Sequential(
            *(nn.Conv2d(3, 70, 1), nn.ReLU6(), nn.Conv2d(70, 70, 3, 2, padding=1, groups=70), nn.ReLU6()),
            nn.Conv2d(70, 9, 1),
        ),
        (16, 3, 12, 11),
    ),
    "pooled": (pooled_bottleneck, (16, 3, 12, 12)),
    "filled": (Filled, (16, 3, 13, 10)),
    "lowrank": (lambda: accelerated(qx.LowRank()), (16, 3, 16, 16)),
    "espace": (lambda: accelerated(qx.Espace(mask="random")), (16, 3, 16, 16)),
}


def built(name):
    build, shape = NETWORKS[name]
    model = build().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.running_mean, std=0.2)
    return model, torch.randn(shape)


def programs(fused):
    return [module for module in fused.modules() if isinstance(module, Int8Program)]


def leaves(found):
    return found if isinstance(found, tuple) else (found,)


def away(found, expected):
    pairs = zip(leaves(found), leaves(expected), strict=True)
    return max(float((a - b).detach().norm() / b.detach().norm()) for a, b in pairs)


@pytest.mark.parametrize("name", NETWORKS)
def test_answers_are_near_those_of_the_network(name):
    model, x = built(name)
    fused = qx.fuse(model, INT8, calibration=x, check=x, force=True, max_drop=100)
    assert programs(fused)
    rest = str(type_beside_int8()).removeprefix("torch.")
    assert fused.meta["dtype"] == {"asked": "int8", "used": "int8", "rest": rest, "ratio": None}
    said = fused.meta["int8"]
    assert said["images"] == 16
    assert said["layers"] >= 1
    for batch in (x, x[:1], x.contiguous(memory_format=torch.channels_last)):
        found, expected = fused(batch), model(batch)
        assert all(t.dtype == torch.float32 for t in leaves(found))
        assert away(found, expected) < 0.08
    again = pickle.loads(pickle.dumps(fused))
    for other in (copy.deepcopy(fused), again):
        assert all(torch.equal(a, b) for a, b in zip(leaves(other(x)), leaves(fused(x)), strict=True))


@needs_native
@pytest.mark.parametrize("real", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NETWORKS)
def test_kernels_and_reference_give_the_same_bits(name, real, monkeypatch):
    """With every layer in eight bits; what is in float32 may be summed in another order."""
    model, x = built(name)
    plain = _fuse(model, None, None, joins=True)
    with torch.no_grad():
        fused = calibrated._assembled(plain, calibrated._observe(plain, [x], "minmax"), {}, real)
        for path, program in list(fused.named_modules()):
            if isinstance(program, Int8Program):
                # nothing but eight bits inside: nothing else is worth a pass over arguments and results
                assert program.dtype == torch.float32
                names = program.inputs, program.outputs
                fused.set_submodule(path, Int8Program(program.steps, *names, program.grids, real))
        steps = [s for program in programs(fused) for s in program.steps if hasattr(s, "geometry")]
        assert all(isinstance(step, Int8Step) for step in steps)
        found = leaves(fused(x))
        monkeypatch.setenv("QUINCUNX_BACKEND", "reference")
        expected = leaves(copy.deepcopy(fused)(x))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@needs_native
def test_kept_layers_in_bfloat16_are_near_those_in_float32_and_on_every_back_end(monkeypatch):
    model, x = built("joined")
    plain = _fuse(model, None, None, joins=True)
    with torch.no_grad():
        seen = calibrated._observe(plain, [x], "minmax")
        kept = dict.fromkeys(calibrated._layers(plain)[::2], "")
        low, wide = (calibrated._assembled(plain, seen, kept, t) for t in (torch.bfloat16, torch.float32))
        (program,) = programs(low)
        assert program.dtype == torch.bfloat16
        real = [s for s in program.steps if hasattr(s, "geometry") and not isinstance(s, Int8Step)]
        assert real
        assert all(step.weight.dtype == torch.bfloat16 for step in real)
        found = low(x)
        assert all(t.dtype == torch.float32 for t in found)
        assert away(found, wide(x)) < 0.02
        assert not torch.equal(found[1], wide(x)[1])
        monkeypatch.setenv("QUINCUNX_BACKEND", "reference")
        assert away(copy.deepcopy(low)(x), found) < 0.01
        assert type_beside_int8() == torch.float32


@needs_native
def test_results_do_not_depend_on_batch_or_threads():
    model, x = built("joined")
    fused = qx.fuse(model, INT8, calibration=x, force=True, max_drop=100, keep_ends=False)
    whole = fused(x)[1]
    assert torch.equal(torch.cat([fused(part)[1] for part in x.split(5)]), whole)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(fused(x)[1], whole)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("observer", calibrated.OBSERVERS)
def test_joined_and_pooled_maps_share_a_grid(observer):
    model, x = built("joined")
    fused = qx.fuse(model, INT8, calibration=x, force=True, max_drop=100, observer=observer)
    [program] = programs(fused)
    joined = [step for step in program.steps if not hasattr(step, "geometry")]
    assert {step.kind for step in joined} >= {"concat", "maxpool"}
    for step in joined:
        if step.kind in ("concat", "maxpool"):
            assert len({program.grids[name] for name in (*step.sources, step.out)}) == 1
    assert away(fused(x), model(x)) < 0.08


def test_the_first_and_the_last_layer_stay_in_float32_if_asked():
    asked = {"force": True, "max_drop": 100, "keep_ends": True}
    model, x = built("squeezenet1_1")
    kept = qx.fuse(model, INT8, calibration=x, **asked).meta["int8"]["kept"]
    assert kept == {"features.0": "reads the network's input", "classifier.1": "is the last layer"}
    model, x = built("resnet")  # its last layer is linear
    kept = qx.fuse(model, INT8, calibration=x, **asked).meta["int8"]["kept"]
    assert kept == {"conv1": "reads the network's input"}
    part = qx.fuse(model, INT8, calibration=x, force=True, max_drop=100, keep_ends=False)
    assert (part.meta["int8"]["kept"], part.meta["int8"]["layers"]) == ({}, 7)
    assert away(part(x), model(x)) < 0.08


@pytest.mark.parametrize(("factor", "kept"), [(1, []), (1000, ["reads the network's input"])])
def test_the_first_layer_stays_where_its_input_does_not_suit_eight_bits(factor, kept):
    """One channel of the images as large as `factor` times the others: on one grid these are 0."""
    model, x = built("resnet")
    share = torch.tensor([1.0, 1.0, factor]).view(1, 3, 1, 1)
    with torch.no_grad():
        model.conv1.weight /= share
    found = qx.calibrate(model, x * share, max_drop=100)
    assert list(quantisation_of(found).facts["kept"].values()) == kept


def test_layers_that_change_answers_too_much_are_kept():
    """One channel thousands of times as large as the others: on one grid these are 0."""
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(8, 8, 3, padding=1), nn.Flatten(), nn.Linear(8 * 36, 7, bias=False)),
    ).eval()
    with torch.no_grad():
        model[2].weight[0] *= 3000
        model[4].weight[:, 0] /= 3000
    x = torch.randn(64, 3, 6, 6)
    with torch.no_grad():
        free = qx.fuse(model, INT8, calibration=x, force=True, max_drop=100, observer="minmax")
        bound = qx.fuse(model, INT8, calibration=x, force=True, max_drop=2, observer="minmax")
        answers = model(x).argmax(1)
        shares = [100 * float((fused(x).argmax(1) != answers).float().mean()) for fused in (free, bound)]
    assert shares[0] > 2 >= shares[1]
    assert [free.meta["int8"]["drop"], bound.meta["int8"]["drop"]] == pytest.approx(shares)
    assert bound.meta["int8"]["kept"]["4"] == "changes the answers too much"
    assert "2" not in bound.meta["int8"]["kept"]


def test_channels_and_maps_of_one_value():
    model = nn.Sequential(
        *(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 1)),
        *(nn.ReLU(), nn.Conv2d(4, 4, 3)),
    ).eval()
    x = torch.randn(16, 3, 9, 9)
    with torch.no_grad():
        model[2].weight[1] = 0  # a channel of one value
        model[2].bias[1] = 0.7
        found = qx.fuse(model, INT8, calibration=x, force=True, max_drop=100)(x)
        assert away(found, model(x)) < 0.05
        model[2].weight.zero_()  # a map of one value for each channel
        assert away(qx.fuse(model, INT8, calibration=x, force=True, max_drop=100)(x), model(x)) < 0.01
        model[2].bias.fill_(-1.0)  # and one of zeros
        found = qx.fuse(model, INT8, calibration=x, force=True, max_drop=100)(x)
        assert away(found, model(x)) < 0.01
        dark = torch.zeros(16, 3, 9, 9)
        found = qx.fuse(model, INT8, calibration=dark, force=True, max_drop=100)(dark)
        assert away(found, model(dark)) < 0.01


def test_bias_is_corrected_by_what_rounding_weights_changes():
    """The mean of each channel is nearer with it, on the images that it comes from."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 8, 3, padding=1), nn.Sigmoid()),
        nn.Conv2d(8, 8, 1),
    ).eval()
    x = torch.rand(32, 3, 12, 12)
    with torch.no_grad():
        # weights of one large number and many that are rounded alike
        model[2].weight.abs_().clamp_max_(0.01).add_(0.02)
        model[2].weight[:, 0, 0, 0] = 6
        plain = _fuse(model, None, None, joins=True)
        seen = calibrated._observe(plain, [x], "minmax")
        with_it = calibrated._assembled(plain, seen, {("program0", 2): ""})
        seen["program0"].shifts[1].zero_()
        without = calibrated._assembled(plain, seen, {("program0", 2): ""})
        far = [(fused(x) - model(x)).mean((0, 2, 3)).abs().mean() for fused in (with_it, without)]
    assert far[0] < far[1] / 2


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({}, ValueError, r"calibration=None: dtype=torch.int8 needs at least 16 images"),
        (
            {"calibration": torch.randn(3, 3, 8, 8)},
            ValueError,
            r"calibration: 3 images, expected at least 16",
        ),
        ({"calibration": []}, ValueError, r"calibration: 0 images, expected at least 16"),
        ({"calibration": 5}, TypeError, r"calibration: expected images or batches of images, got int"),
        (
            {"calibration": [torch.randn(4)]},
            TypeError,
            r"calibration: expected images \[N, C, H, W\] in batch 0",
        ),
        (
            {"calibration": ["a"]},
            TypeError,
            r"calibration: expected images \[N, C, H, W\] in batch 0, got str",
        ),
        (
            {"calibration": [torch.randn(16, 3, 8, 8), torch.full((1, 3, 8, 8), float("nan"))]},
            ValueError,
            r"calibration: batch 1 has numbers that are not finite",
        ),
        ({"observer": "best"}, ValueError, r"observer='best': expected one of histogram, minmax, percentile"),
        ({"max_drop": 101}, ValueError, r"max_drop=101: expected 0 to 100"),
        ({"max_drop": float("nan")}, ValueError, r"max_drop=nan: expected 0 to 100"),
    ],
)
def test_bad_arguments_are_named(settings, error, message):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
    if {"observer", "max_drop"} & set(settings):
        settings = {"calibration": torch.randn(16, 3, 8, 8), **settings}
    with pytest.raises(error, match=message):
        qx.fuse(model, INT8, **settings)


class TwoMaps(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x, other):
        return self.conv(x) + other


def test_a_network_of_two_maps_is_refused():
    with pytest.raises(ValueError, match=r"expected a network of one argument.*got x, other"):
        qx.fuse(TwoMaps(), INT8, calibration=torch.randn(16, 3, 8, 8))


def test_a_network_that_overflows_is_named():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1))
    with torch.no_grad():
        model[0].weight.fill_(3e38)
        model[2].weight.fill_(3e38)
    with pytest.raises(ValueError, match=r"calibration: map '\w+' of the network is not finite"):
        qx.fuse(model, INT8, calibration=torch.rand(16, 3, 8, 8))


def test_a_network_without_layers_for_it_is_said_and_stays_in_float32():
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 3)), torch.randn(16, 3, 8, 8)
    with pytest.warns(
        UserWarning, match="no layer of this network runs in eight bits.*0: reads the network's"
    ):
        fused = qx.fuse(model, INT8, calibration=x)
    assert fused.meta["dtype"]["used"] == "float32"
    assert torch.allclose(fused(x), model.eval()(x), atol=1e-5)


@needs_native
def test_a_network_of_fills_is_one_call(monkeypatch):
    """With a grid for each sampled map, of which no value of the network is."""
    model, x = built("filled")
    fused = qx.fuse(model, INT8, calibration=x, force=True, max_drop=100, keep_ends=False)
    assert (fused.meta["int8"]["kept"], fused.meta["int8"]["layers"]) == ({}, 7)
    [program] = programs(fused)
    fitted = [step for step in program.steps if getattr(step, "filling", None) is not None]
    assert len(fitted) == 5
    assert {sampled_map(step) for step in fitted} <= program.grids.keys()
    assert fused(x).dtype == torch.float32
    [stages] = program._compiled.values()
    assert len(stages) == 1
    # what is only timed has grids too
    assert fuse_to_time(model, INT8)(x).shape == model(x).shape


def test_a_record_without_the_grid_of_a_sampled_map_is_of_another_network():
    model, x = built("filled")
    known = qx.calibrate(model, x, max_drop=100, keep_ends=False)
    assert torch.equal(
        qx.fuse(known, INT8, force=True)(x),
        qx.fuse(model, INT8, calibration=x, force=True, max_drop=100, keep_ends=False)(x),
    )
    record = quantisation_of(known)
    grids = {name: grid for name, grid in record.grids.items() if not name.endswith(".sampled")}
    note_quantisation(known, dataclasses.replace(record, grids=grids))
    with pytest.raises(ValueError, match="does not fit convolution"):
        qx.fuse(known, INT8, force=True)


def test_eight_bits_are_used_only_where_they_are_faster(monkeypatch):
    model, x = built("resnet")
    monkeypatch.setattr(fuse_module, "speed_ratio", lambda *_: 0.5)
    with pytest.warns(UserWarning, match=r"eight bits are 0\.50 times as fast"):
        slow = qx.fuse(model, INT8, calibration=x)
    assert slow.meta["dtype"] == {"asked": "int8", "used": "float32", "rest": "float32", "ratio": 0.5}
    assert not programs(slow)
    monkeypatch.setattr(fuse_module, "speed_ratio", lambda *_: 2.0)
    assert qx.fuse(model, INT8, calibration=x).meta["dtype"] == {
        "asked": "int8",
        "used": "int8",
        "rest": str(type_beside_int8()).removeprefix("torch."),
        "ratio": 2.0,
    }


def test_calls_that_it_was_not_made_for_are_refused():
    model, x = built("perforated")
    fused = qx.fuse(model, INT8, calibration=x, force=True, max_drop=100)
    with pytest.raises(ValueError, match="takes float32 maps"):
        fused(x.double())
    with pytest.raises(TypeError, match="in eight bits, which plain operators have not"):
        lower(fused, (x,))
    with pytest.raises(ValueError, match="channels"):
        fused(torch.randn(1, 4, 12, 10))


def test_batches_with_labels_are_read():
    x = torch.randn(40, 3, 4, 4)
    found = calibrated.read_images([(x[:33], torch.zeros(33)), [x[33:]]])
    assert [len(batch) for batch in found] == [32, 1, 7]
    assert torch.equal(torch.cat(list(found)), x)
