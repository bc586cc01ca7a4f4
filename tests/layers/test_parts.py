"""Where a module's first call is in a graph, and what it reads."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from quincunx.layers.graph import trace
from quincunx.layers.parts import call_of, read_by


class Halves(nn.Module):
    """Of several layers, with a function first, a parameter of its own, and a size that it asks for."""

    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 1)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        x = F.pad(x, (1, 1, 1, 1))
        return self.scale * self.other(self.one(x)).reshape(x.shape[0], 4, -1).mean(2)


class Reading(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.first, self.layer = nn.Conv2d(3, 4, 1), layer

    def forward(self, x):
        y = torch.relu(self.first(x))
        return self.layer(y), y.sum()


class Again(Reading):
    def forward(self, x):
        return self.layer(self.layer(self.first(x)))


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 1), nn.Bilinear(3, 3, 2)

    def forward(self, x):
        return self.b(self.a(x).mean((2, 3)), x.mean((2, 3)))


@pytest.mark.parametrize(
    "layer", [nn.Conv2d(4, 4, 3), nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU()), Halves()]
)
def test_a_module_begins_with_its_first_part_and_reads_one_value(layer):
    graph = trace(Reading(layer).eval())
    at, nodes = call_of(graph, ("layer",)), list(graph.nodes)
    assert [node.name for node in nodes[:at] if node.op != "get_attr"] == ["x", "first", "relu"]
    assert read_by(graph, ("layer",)).name == "relu"


@pytest.mark.parametrize("layer", [nn.Conv2d(4, 4, 1), nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU())])
def test_of_several_calls_the_first_counts(layer):
    graph = trace(Again(layer).eval())
    assert read_by(graph, ("layer",)).name == "first"
    assert list(graph.nodes)[call_of(graph, ("layer",))].prev.name == "first"


def test_by_any_of_its_names():
    shared = nn.Conv2d(3, 3, 1)
    graph = trace(nn.Sequential(nn.ReLU(), shared, nn.ReLU(), shared).eval())
    assert call_of(graph, ("1", "3")) == 2
    assert read_by(graph, ("1", "3")).name == "_0"


def test_what_is_not_called_or_reads_more_than_one_value():
    graph = trace(Two().eval())
    assert call_of(graph, ("c",)) is read_by(graph, ("c",)) is read_by(graph, ("b",)) is None
    assert call_of(graph, ("b",)) is not None
