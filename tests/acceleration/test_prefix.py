"""Networks changed from a layer on answer from kept values as they do from their inputs."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import quincunx as qx
from quincunx import networks
from quincunx.acceleration import prefix as tail
from quincunx.acceleration.prefix import Tails
from quincunx.modules import inference_mode_of, set_module
from quincunx.surgery.calibration import Calibration


class Inplace(nn.Module):
    """Values that are changed in place after others have read them, and one layer that is called twice."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.twice, self.c = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(16, 4, 1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        size = x.shape[0]
        y = self.a(x)
        z = self.b(y)
        F.relu_(y)
        z += y
        z = self.twice(self.relu(z))
        z = self.twice(self.relu(z))
        return self.c(torch.cat([y, z], 1)).mean((2, 3)).view(size, -1)


class Heads(nn.Module):
    """In training mode it has another answer."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 5, 3)

    def forward(self, x):
        x = self.a(x)
        return (x, self.b(x)) if self.training else self.b(F.dropout(x, 0.5, self.training)).mean((2, 3))


MADE = {
    "in place": Inplace,
    "heads": Heads,
    "resnet": lambda: networks.build("rrn8", width=4),
    "pre-activation": lambda: networks.build("pyramidnet8-a8"),
    "bottlenecks": lambda: networks.build("crn11", width=4),
    "sampled": lambda: networks.build("rsbn8", width=4),
}


def made(kind, seed=0):
    torch.manual_seed(seed)
    return MADE[kind]()


def images(model, count=2):
    generator = torch.Generator().manual_seed(1)
    return Calibration([torch.randn(3, 3, 12, 12, generator=generator) for _ in range(count)], model)


def changed(model, name):
    """A copy of a network with other weights in one layer."""
    network = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in network.get_submodule(name).parameters():
            parameter.copy_(torch.randn_like(parameter) / 4)
    return network


def convolutions(model):
    return [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d)]


def compared(tails, network, data):
    with inference_mode_of(network):
        answers = list(tails.answers(network))
        for answer, batch in zip(answers, data, strict=True):
            torch.testing.assert_close(answer, network(batch.input), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", MADE)
@settings(max_examples=5)
@given(order=st.lists(st.integers(0, 100), min_size=3, max_size=6))
def test_from_any_layer_to_any_other(kind, order):
    model = made(kind)
    names, data = convolutions(model), images(model)
    tails = Tails(model, data)
    for i in order:
        name = names[i % len(names)]
        with inference_mode_of(model):
            tails.go_to((name,))
        # as often as one likes: what is kept stays as it is
        for _ in range(2):
            compared(tails, changed(model, name), data)


@pytest.mark.parametrize("kind", MADE)
@settings(max_examples=5)
@given(order=st.lists(st.tuples(st.integers(0, 100), st.integers(0, 100)), min_size=2, max_size=4))
def test_what_a_layer_reads(kind, order):
    model = made(kind)
    names, data = convolutions(model), images(model)
    tails = Tails(model, data)
    for at, to in order:
        start, name = names[at % len(names)], names[to % len(names)]
        with inference_mode_of(model):
            tails.go_to((start,))
            for network in (model, changed(model, start)):
                found = tails.inputs(network, (name,))
                seen = []
                hook = network.get_submodule(name).register_forward_pre_hook(
                    lambda _, given, seen=seen: seen.append(given[0].clone())
                )
                for batch in data:
                    seen.clear()
                    network(batch.input)
                    if found is not None:
                        torch.testing.assert_close(next(found), seen[0], rtol=1e-4, atol=1e-5)
                hook.remove()
                assert found is not None or name != start


def test_there_is_no_shortcut_to_a_layer_that_was_passed():
    model = made("resnet")
    tails = Tails(model, images(model))
    with inference_mode_of(model):
        tails.go_to(("stages.1.0.conv2",))
        assert tails.inputs(model, ("stages.0.0.conv1",)) is None
        assert tails.inputs(model, ("stages.1.0.conv2",)) is not None
        assert tails.inputs(model, ("nothing",)) is None
        assert Tails(Choosing(), images(model)).inputs(model, ("a",)) is None


class Once:
    """Batches that must not be read again."""

    def __init__(self, batches):
        self.batches, self.left = list(batches), 1

    def __iter__(self):
        self.left -= 1
        assert self.left >= 0
        return iter(self.batches)


def test_what_lies_before_runs_once():
    model = made("resnet")
    names, data = convolutions(model), images(model)
    tails = Tails(model, Once(data))
    with inference_mode_of(model):
        for name in names[2:]:
            tails.go_to((name,))
            tails.go_to((name,))
            compared(tails, changed(model, name), data)


@pytest.mark.parametrize(
    "method",
    [qx.SpatialBottleneck(pairs=False, singles=True), qx.Espace(mask="uniform"), qx.LowRank(rank=0.4)],
)
def test_a_method_in_place_of_a_layer(method):
    model = made("resnet")
    data = images(model, 24)  # enough for the method that needs the most
    tails = Tails(model, data)
    name = "stages.1.0.conv2"
    with inference_mode_of(model):
        tails.go_to((name,))
    fast = qx.accelerate(model, method, where=[name], calibration=[b.input for b in data]).model
    assert fast.get_submodule(name) is not model.get_submodule(name)
    compared(tails, fast, data)


class Choosing(Heads):
    """torch.fx cannot trace it."""

    def forward(self, x):
        x = self.a(x)
        return self.b(x if x.sum() > 0 else -x).mean((2, 3))


def test_networks_that_have_to_run_whole(monkeypatch):
    hooked = made("resnet")
    hooked.stages[0].register_forward_hook(lambda *given: 2 * given[-1])
    for model in (Choosing(), hooked):
        data, name = images(model), convolutions(model)[-1]
        tails = Tails(model, data)
        with inference_mode_of(model):
            tails.go_to((name,))
        assert tails.kept == []
        compared(tails, changed(model, name), data)
    monkeypatch.setattr(tail, "MOST_KEPT", 1)
    model = made("resnet")
    data, name = images(model), convolutions(model)[-1]
    tails = Tails(model, data)
    with inference_mode_of(model):
        tails.go_to((name,))
    assert tails.kept == []
    compared(tails, changed(model, name), data)


def test_a_network_that_differs_before_the_layer_runs_whole():
    model = made("resnet")
    data, names = images(model), convolutions(model)
    tails = Tails(model, data)
    with inference_mode_of(model):
        tails.go_to((names[-1],))
    other = changed(
        set_module(copy.deepcopy(model), "stages.0.0.bn1", nn.Sequential(nn.Identity(), nn.Identity())),
        names[0],
    )
    compared(tails, other, data)


def test_nothing_is_measured_to_answer(monkeypatch):
    # in another process, or after an interruption, a close call may end the other way
    def measured(*args, **kwargs):
        raise AssertionError("measured which kernel is faster")

    monkeypatch.setattr("quincunx.fusion.program.speed_ratio", measured)
    monkeypatch.setattr("quincunx.fusion.program.decision", measured)
    model = made("resnet")
    tails = Tails(model, images(model))
    with inference_mode_of(model):
        tails.go_to((convolutions(model)[1],))
        assert len([*tails.answers(model), *tails.inputs(model, (convolutions(model)[2],))]) == 4
