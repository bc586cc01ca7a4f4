"""torch.jit.trace: a trace of our layers follows the size of what it is given, or says that it cannot."""

import warnings

import pytest
import torch
from torch import nn

import quincunx as qx


def convs():
    layers = (nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 3, padding=1))
    return nn.Sequential(*layers).eval()


def made(method):
    return qx.accelerate(convs(), method, calibration=[torch.randn(32, 3, 12, 10)]).model.eval()


def traced(model, x):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(model, x)


MODELS = {
    "low rank": lambda: made(qx.LowRank(3)),
    "espace, uniform": lambda: made(qx.Espace(3, mask="uniform", rate=(0.5, 0.25))),
    "espace, random": lambda: made(qx.Espace(3, mask="random")),
    "pair": lambda: made(qx.SpatialBottleneck()),
    "pair, pooled": lambda: made(qx.SpatialBottleneck(qx.QUARTER, down="avgpool")),
    "singles": lambda: made(qx.SpatialBottleneck(qx.THREE_QUARTERS, pairs=False)),
    "qcnn": lambda: made(qx.QCNN(subspace=3, codewords=8)),
    "binary": lambda: made(qx.BinaryConnect()),
    "packed": lambda: qx.BinaryConnect.pack(made(qx.BinaryConnect())),
    "perforated": lambda: qx.PerforatedConv2d(3, 4, 3, sampling=qx.Uniform(0.3), padding=1),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_trace_follows_the_size_of_its_input(name):
    model = MODELS[name]()
    script = traced(model, torch.randn(2, 3, 12, 10))
    for shape in ((2, 3, 12, 10), (1, 3, 10, 12), (3, 3, 7, 16)):
        x = torch.randn(shape)
        torch.testing.assert_close(script(x), model(x), rtol=1e-4, atol=1e-5)


def test_a_trace_through_masks_of_one_grid_refuses_another():
    model = made(qx.Espace(3))
    script = traced(model, torch.randn(2, 3, 12, 10))
    x = torch.randn(4, 3, 12, 10)
    torch.testing.assert_close(script(x), model(x), rtol=1e-4, atol=1e-5)
    with pytest.raises((RuntimeError, ValueError), match="12 x 10"):
        script(torch.randn(4, 3, 10, 12))


@pytest.mark.parametrize("name", ["pair", "espace, uniform"])
def test_a_trace_is_trained_as_its_network_is(name):
    model = MODELS[name]()
    script = traced(model, torch.randn(2, 3, 12, 10))
    x = torch.randn(2, 3, 6, 9, requires_grad=True)
    (want,) = torch.autograd.grad(model(x).square().sum(), x)
    (got,) = torch.autograd.grad(script(x).square().sum(), x)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
