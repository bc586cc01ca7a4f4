"""Whether two maps are as large as each other is told from the layers only where it is so for every image."""

import operator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import quincunx as qx
from quincunx.layers.alike import decided
from quincunx.layers.graph import trace
from quincunx.layers.sizes import about_sizes

SIDES = [(8, 8), (9, 12), (5, 17), (1, 1), (32, 7)]


class Net(nn.Module):
    def __init__(self, run):
        super().__init__()
        self.run = run
        self.one, self.wide, self.tall = (
            nn.Conv2d(3, 6, 3, 1, 1),
            nn.Conv2d(6, 6, 5, 1, 2),
            nn.Conv2d(6, 6, (3, 1)),
        )
        self.more, self.strided, self.thin = nn.Conv2d(6, 9, 1), nn.Conv2d(6, 6, 3, 2, 1), nn.Conv2d(6, 6, 3)
        self.spread, self.same = nn.Conv2d(6, 6, 3, 1, 2, 2), nn.Conv2d(6, 6, 5, padding="same")
        self.norm, self.pool, self.drop = nn.BatchNorm2d(6), nn.MaxPool2d(3, 1, 1), nn.Dropout()

    def forward(self, x):
        return self.run(self, self.one(x))


# of a map y, another one and whether it surely has the shape of y
MAPS = {
    "itself": (lambda m, y: y, True),
    "a convolution that pads": (lambda m, y: m.wide(y), True),
    "dilated": (lambda m, y: m.spread(y), True),
    "the same": (lambda m, y: m.same(y), True),
    "a block": (lambda m, y: F.relu(y + m.wide(m.drop(F.relu(m.norm(m.wide(y)))))), True),
    "a chain": (lambda m, y: (m.wide(y).sigmoid() * y).contiguous().clamp(0, 1), True),
    "other channels": (lambda m, y: m.more(y), False),
    "strided": (lambda m, y: m.strided(y), None),
    "unpadded": (lambda m, y: m.thin(y), None),
    "one side": (lambda m, y: m.tall(y), None),
    "pooled": (lambda m, y: m.pool(y), None),
    "resized": (lambda m, y: F.interpolate(y, scale_factor=1.0), None),
    "broadcast": (lambda m, y: y.mean((2, 3), keepdim=True) * y, None),
    "a mean": (lambda m, y: y.mean((2, 3), keepdim=True), None),
    "turned": (lambda m, y: y.transpose(2, 3), None),
    "strided and back": (lambda m, y: F.interpolate(m.strided(y), size=y.shape[2:]), None),
}


@pytest.mark.parametrize("case", MAPS)
def test_what_is_decided_is_so_for_every_image(case):
    make, expected = MAPS[case]
    questions = {
        "whole": lambda y, z: y.shape == z.shape,
        "unequal": lambda y, z: y.size() != z.size(),
        "sides": lambda y, z: y.shape[2:] == z.shape[2:],
        "height": lambda y, z: y.size(2) == z.shape[2],
        "width": lambda y, z: y.shape[-1] != z.size(-1),
    }

    def run(m, y):
        z = make(m, y)
        return [question(y, z) for question in questions.values()]

    model = Net(run).eval()
    graph = trace(model)
    asked = [node for node in graph.nodes if node.target in (operator.eq, operator.ne)]
    told = [decided(about_sizes(node), graph, model) for node in asked]
    assert len(told) == len(questions)
    assert told[0] is expected
    sides, not_sides = (None, None) if expected is None else (True, False)
    assert told[1:] == [None if expected is None else not expected, sides, sides, not_sides]
    for images in (1, 2):
        for size in SIDES:
            x = torch.randn(images, 3, *size)
            try:
                answers = model(x)
            except RuntimeError:
                # too small for a kernel
                continue
            assert all(answer in (None, found) for answer, found in zip(told, answers, strict=True))
    if expected is not None:
        # an image alone, which batch norm does not take
        model.norm = nn.Identity()
        answers = model(torch.randn(3, 8, 8))
        assert all(answer in (None, found) for answer, found in zip(told, answers, strict=True))


def test_a_map_that_is_given_another_shape_in_place_decides_nothing():
    def run(m, y):
        z = m.wide(y) + 0
        z.transpose_(2, 3)
        return y if y.shape == z.shape else y * 2

    model = Net(run).eval()
    fused = qx.fuse(model)
    for size in SIDES:
        x = torch.randn(1, 3, *size)
        torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-5)
