"""Modules that a forward makes itself, ``nn.ReLU()(x)``, are looked into."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import quincunx as qx
from quincunx.fusion.program import Program

SIDES = [(16, 16), (9, 20), (31, 12)]


class Net(nn.Module):
    def __init__(self, run):
        super().__init__()
        self.run = run
        self.one, self.norm, self.two = nn.Conv2d(3, 6, 3, 1, 1), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3, 1, 1)

    def forward(self, x):
        return self.run(self, x)


class Scaled(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return nn.Hardswish()(x) * self.factor


def after(*modules):
    modules = list(modules)
    return lambda m, x: m.two(nn.Sequential(*modules)(m.norm(m.one(x))))


MADE = {
    "activation": lambda m, x: nn.ReLU()(m.two(nn.ReLU(inplace=True)(m.norm(m.one(x))))),
    "pooling": lambda m, x: m.two(nn.MaxPool2d(3, stride=2, padding=1)(m.one(x))),
    "to a size": lambda m, x: m.two(nn.Upsample(size=x.shape[2:])(nn.AvgPool2d(2)(m.one(x)))),
    "by a factor": lambda m, x: m.two(nn.UpsamplingBilinear2d(scale_factor=2)(m.one(x))),
    "padding": lambda m, x: m.two(nn.ReflectionPad2d((1, 2, 0, 1))(m.one(x))),
    "a mean": lambda m, x: nn.Flatten()(nn.AdaptiveAvgPool2d(1)(m.two(F.relu(m.one(x))))),
    "a user's": lambda m, x: Scaled(3)(m.two(Scaled(0.5)(m.one(x)))),
    "several": after(nn.ReLU6(), nn.MaxPool2d(2), nn.Identity()),
    "in a branch": lambda m, x: m.two(nn.MaxPool2d(2)(m.one(x)) if x.shape[2] > 10 else m.one(x)),
}


@pytest.mark.parametrize("case", MADE)
def test_they_do_what_they_do(case):
    model = Net(MADE[case]).eval()
    fused = qx.fuse(model)
    assert fused.meta["whole"] == {}
    assert any(isinstance(module, Program) for module in fused.modules())
    for sides in SIDES:
        x = torch.randn(2, 3, *sides)
        torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-5)


def test_activations_ride_on_their_convolutions():
    fused = qx.fuse(Net(MADE["activation"]).eval())
    [program] = [module for module in fused.modules() if isinstance(module, Program)]
    assert len(program.steps) == 2


@pytest.mark.parametrize("make", [lambda: nn.Conv2d(6, 6, 1), lambda: nn.BatchNorm2d(6), lambda: Net(None)])
def test_layers_with_parameters_of_their_own_are_refused(make):
    layer = make().eval()
    with pytest.raises(TypeError, match=r"with parameters that is not one of its modules"):
        qx.fuse(Net(lambda m, x: layer(m.one(x))).eval())
