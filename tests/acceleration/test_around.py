"""The part of a network around some layers: what the whole computes there, with any layers in it."""

import copy

import pytest
import torch
from torch import fx, nn

import quincunx as qx
from quincunx import networks
from quincunx.acceleration.around import Around, NoPart
from quincunx.layers.graph import trace
from quincunx.modules import inference_mode_of, set_module
from quincunx.surgery.replace import replace_layers


class Values(fx.Interpreter):
    """What each node of a network's graph gives, by name."""

    def __init__(self, model, x):
        super().__init__(model, graph=trace(model))
        self.found = {}
        with inference_mode_of(model):
            self.run(x)

    def run_node(self, node):
        self.found[node.name] = value = super().run_node(node)
        return value


MADE = {
    "resnet": (lambda: networks.build("rrn14", width=4), ["stages.1.0.conv2", "stages.1.1.conv1"]),
    "pre-activation": (lambda: networks.build("pyramidnet14-a8"), ["blocks.2.conv2"]),
    "branches": (lambda: networks.build("squeezenet1_1"), ["features.4.expand3x3"]),
}


def made(kind):
    torch.manual_seed(0)
    make, names = MADE[kind]
    return make().eval(), names


METHODS = {
    "perforated": qx.Perforate(fill="nearest"),
    "of low rank": qx.LowRank(rank=0.25, data=False),
    "sampled": qx.SpatialBottleneck(),
}


@pytest.mark.parametrize("kind", MADE)
@pytest.mark.parametrize("other", ["as it is", *METHODS])
def test_it_gives_what_the_whole_network_has_there(kind, other):
    model, names = made(kind)
    x = torch.randn(8, 3, 64, 64)
    around = Around(model, trace(model), names, x)
    network = model
    if other in METHODS:
        result = replace_layers(model, METHODS[other], where=names, calibration=[x])
        assert set(result.replaced) == set(names)
        network = result.model
    part = around.of(network)
    (output,) = (node for node in part.graph.nodes if node.op == "output")
    wanted = [node.name for node in output.args[0]]
    values = Values(network, x).found
    with inference_mode_of(network):
        answers = part(*around.given)
    assert len(wanted) == len(answers) > 0
    for name, answer in zip(wanted, answers, strict=True):
        torch.testing.assert_close(answer, values[name])
    # and no more than it needs
    assert len(part.graph.nodes) < 0.7 * len(trace(network).nodes)


def test_it_begins_a_layer_before_and_ends_two_after():
    layers = [nn.Conv2d(3 if i == 0 else 4, 4, 3, padding=1) for i in range(9)]
    model = nn.Sequential(*(part for layer in layers for part in (layer, nn.ReLU()))).eval()
    x = torch.randn(2, 3, 8, 8)
    around = Around(model, trace(model), ["8"], x)
    part = around.of(model)
    assert [n.target for n in part.graph.nodes if n.op == "call_module"] == [str(i) for i in range(6, 14)]
    with torch.no_grad():
        assert torch.equal(around.given[0], model[:6](x))
        (answer,) = part(*around.given)
        assert torch.equal(answer, model[:14](x))


def test_at_the_end_it_gives_the_answer_of_the_network():
    model, _ = made("resnet")
    x = torch.randn(2, 3, 16, 16)
    part = (around := Around(model, trace(model), ["stages.2.1.conv2"], x)).of(model)
    with torch.no_grad():
        torch.testing.assert_close(part(*around.given), model(x))


def test_all_calls_of_a_layer_and_all_layers_are_within():
    shared = nn.Conv2d(4, 4, 1)
    rest = [nn.Conv2d(4, 4, 1) for _ in range(8)]
    model = nn.Sequential(nn.Conv2d(3, 4, 1), rest[0], shared, rest[1], shared, *rest[2:]).eval()
    x = torch.randn(1, 3, 4, 4)
    part = Around(model, trace(model), ["2", "4"], x).of(model)
    assert [n.target for n in part.graph.nodes if n.op == "call_module"] == ["1", "2", "3", "2", "5", "6"]


@pytest.mark.parametrize("names", [["0"], ["0", "4"], ["elsewhere"]])
def test_a_part_that_is_the_whole_is_none(names):
    model = nn.Sequential(*(nn.Conv2d(3, 3, 1) for _ in range(5 if "4" in names else 3))).eval()
    with pytest.raises(NoPart):
        Around(model, trace(model), names, torch.randn(1, 3, 4, 4))


def test_a_network_that_differs_elsewhere_has_no_such_part():
    model = nn.Sequential(*(nn.Conv2d(3, 3, 1) for _ in range(8))).eval()
    around = Around(model, trace(model), ["3"], torch.randn(1, 3, 4, 4))
    before = set_module(copy.deepcopy(model), "1", nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()))
    after = model[:5]
    for other in (before, after):
        with pytest.raises(NoPart):
            around.of(other)
