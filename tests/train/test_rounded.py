"""Training as in eight bits: equal to the fused network, with gradients, and better than rounding alone."""

import copy

import pytest
import torch
from torch import nn

import quincunx as qx
from helpers.acceleration import DATA, METHOD, network
from quincunx.acceleration.judge import sample_batches
from quincunx.acceleration.pipeline import accelerate_trained
from quincunx.data import load_data
from quincunx.layers.eightbits import encode_weight, quantisation_of
from quincunx.networks.spec import note_factory
from quincunx.surgery.norms import join_norms
from quincunx.train.evaluation import evaluate
from quincunx.train.loop import fit
from quincunx.train.recipes import by_name, recipe_with
from quincunx.train.rounded import computing_rounded

pytestmark = pytest.mark.usefixtures("one_thread")
INT8 = torch.int8


@pytest.fixture(autouse=True)
def _kept_layers_in_float32(monkeypatch):
    monkeypatch.setattr("quincunx.fusion.fuse.type_beside_int8", lambda: torch.float32)


def with_statistics(model):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.normal_(module.weight)
    return model.eval()


def espace():
    model = qx.networks.build("cifar-resnet8", 10, 3).eval()
    return qx.accelerate(model, qx.Espace(mask="random"), example_input=torch.randn(1, 3, 16, 16)).model


def perforated():
    model = qx.networks.build("cifar-resnet8", 10, 3).eval()
    images = [torch.randn(8, 3, 16, 16)]
    return qx.accelerate(model, qx.Perforate(), calibration=images, example_input=images[0]).model


NETWORKS = {
    "cifar-resnet8": (lambda: qx.networks.build("cifar-resnet8", 10, 3), 5e-4),
    # a number halfway between two integers may go to either
    "rsbn8": (lambda: qx.networks.build("rsbn8", 10, 3), 5e-3),
    "squeezenet1_1": (lambda: qx.networks.build("squeezenet1_1", 10, 3), 6e-3),
    "espace": (espace, 5e-4),
    # the sampled map before a fitted fill is rounded in the fused network alone
    "perforated": (perforated, 1e-2),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_it_computes_what_the_fused_network_computes(name):
    build, near = NETWORKS[name]
    torch.manual_seed(0)
    model, x = with_statistics(build()), torch.randn(16, 3, 32, 32)
    small = qx.calibrate(model, x, max_drop=100)
    with torch.no_grad():
        off = float((small(x) - model(x)).norm() / model(x).norm())
        with computing_rounded(small):
            trained = small(x)
        fused = qx.fuse(small, INT8, force=True)
        far = float((fused(x) - trained).norm() / trained.norm())
    assert far < min(near, off * (0.9 if name == "perforated" else 0.5))
    assert "forward" not in small.__dict__
    assert torch.equal(small(x), copy.deepcopy(small)(x))


def test_gradients_pass_the_rounding_to_every_weight():
    model = with_statistics(qx.networks.build("cifar-resnet8", 10, 3))
    small = qx.calibrate(model, torch.randn(16, 3, 16, 16), max_drop=100).train()
    names = list(small.state_dict())
    with computing_rounded(small):
        assert join_norms(small).reason
        small(torch.randn(4, 3, 16, 16)).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in small.parameters())
    assert all(float(p.grad.abs().max()) > 0 for n, p in small.named_parameters() if "conv" in n)
    assert list(small.state_dict()) == names


def test_a_network_without_a_record_is_left_alone():
    model = nn.Conv2d(3, 3, 1)
    with computing_rounded(model):
        assert "forward" not in model.__dict__


def small_network():
    torch.manual_seed(0)
    layers = []
    for inputs in (1, 12, 12):
        layers += [nn.Conv2d(inputs, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 10))
    return note_factory(model, "here:small_network")


def spoil(model):
    """Give each channel one weight far from the others, for a map that is 0: float32 does not mind."""
    with torch.no_grad():
        for at in (0, 3):
            norm, conv = model[at + 1], model[at + 3]
            norm.weight[0], norm.bias[0] = 0, -1
            conv.weight[:, 0] = 0
            conv.weight[:, 0, 0, 0] = 120 * conv.weight.abs().amax((1, 2, 3))


def test_fine_tuning_wins_back_what_eight_bits_alone_lose(tmp_path):
    data, recipe = load_data("digits", size=8), recipe_with(by_name("digits"), epochs=3, lr=0.1)
    model = small_network()
    spoil(model)
    fit(model, data, recipe, tmp_path / "float")
    spoil(model)
    ((images, _),) = sample_batches(data, 50)
    small = qx.calibrate(model.eval(), images, max_drop=100)

    def loss(network):
        return evaluate(network, data.test, data).loss

    before, alone = loss(model), loss(qx.fuse(small, INT8, force=True))
    assert alone > before + 0.05
    more = recipe_with(recipe, epochs=2, lr=0.02)
    result = fit(small, data, more, tmp_path / "int8", seed=1)
    after = loss(qx.fuse(small, INT8, force=True))
    fit(model, data, more, tmp_path / "more", seed=1)
    in_float = loss(model)
    rounded = loss(qx.fuse(qx.calibrate(model.eval(), images, max_drop=100), INT8, force=True))
    # as much training in float32, rounded afterwards, keeps most of what eight bits lose
    assert after - in_float < 0.5 * (rounded - in_float)
    assert result["test_loss"] == pytest.approx(after, rel=1e-2), "tested as it computes"
    loaded = qx.load(tmp_path / "int8" / "model", factory=small_network)
    assert torch.equal(qx.fuse(loaded, INT8, force=True)(images), qx.fuse(small, INT8, force=True)(images))


def test_compiled_steps_round_as_ordinary_ones(tmp_path):
    """Generated code may join a product and a sum, so that a number between two integers goes to either."""
    data = load_data("digits", size=8)
    recipe = recipe_with(by_name("digits"), epochs=2, lr=0.05)
    small = qx.calibrate(small_network().eval(), next(iter(sample_batches(data, 50)))[0], max_drop=100)
    runs = {}
    for name, chosen in (("plain", recipe), ("compiled", recipe_with(recipe, compile=True))):
        torch.compiler.reset()
        found = copy.deepcopy(small)
        runs[name] = fit(found, data, chosen, tmp_path / name, seed=1)["history"], found
    float32 = fit(small_network(), data, recipe, tmp_path / "float32", seed=1)["history"]
    for key in ("train_loss", "test_loss"):
        ours, theirs = ([epoch[key] for epoch in runs[name][0]] for name in ("compiled", "plain"))
        assert ours == pytest.approx(theirs, rel=1e-2)
        assert ours != pytest.approx([epoch[key] for epoch in float32], rel=1e-4)
    trained, x = runs["compiled"][1].eval(), next(iter(sample_batches(data, 50)))[0]
    fused = qx.fuse(trained, INT8, force=True)
    with torch.no_grad(), computing_rounded(trained):
        assert torch.allclose(fused(x), trained(x), atol=0.05)


def test_the_accelerated_network_is_the_one_that_was_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "quincunx.acceleration.pipeline.format_served", lambda model, example, dtype: (dtype, None)
    )
    recipe = recipe_with(by_name("digits"), epochs=1, lr=0.01)
    options = {"layers": ["layer1.*"], "calibration": 40, "batch": 2, "rounds": 3, "keep_best": False}
    result = accelerate_trained(network(), METHOD, DATA, tmp_path, recipe=recipe, dtype=INT8, **options)
    names = [stage["name"] for stage in result["stages"]]
    assert names[-3:] == ["in int8, before fine-tuning", "after fine-tuning", "in int8"]
    tuned, last = result["stages"][-2:]
    assert last["loss"] == pytest.approx(tuned["loss"], rel=1e-2)
    assert set(result["int8"]["kept"].values()) <= {"reads the network's input"}
    loaded = qx.load(tmp_path / "model")
    path = quantisation_of(loaded).layers[0]
    layer = loaded.get_submodule(path)
    integers, scales = encode_weight(layer, layer.weight)
    assert float((integers.float() * scales.view(-1, 1, 1, 1) - layer.weight).detach().abs().max()) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"distill_features": 0.5}, r"distill_features=0\.5: maps within a network"),
    ],
)
def test_what_does_not_go_together_is_refused(change, message, tmp_path):
    small = qx.calibrate(network(), torch.rand(16, 3, 8, 8), max_drop=100)
    with pytest.raises(ValueError, match=message):
        fit(small, DATA, recipe_with(by_name("digits"), epochs=1, **change), tmp_path, teacher=network())


def test_a_run_in_float32_is_not_gone_on_with(tmp_path):
    recipe = recipe_with(by_name("digits"), epochs=1)
    fit(network(), DATA, recipe, tmp_path)
    small = qx.calibrate(network(), torch.rand(16, 3, 8, 8), max_drop=100)
    with pytest.raises(ValueError, match="a checkpoint of another int8"):
        fit(small, DATA, recipe, tmp_path, resume=True)
