"""Walks from layer to layer: the pairs of a network's own forward, with fewer forwards."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import quincunx as qx
from quincunx.surgery import calibration
from quincunx.surgery.calibration import Calibration, Context, Layer
from quincunx.surgery.replace import replace_layers
from quincunx.surgery.walks import Walk


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 6, 3, padding=1)
        self.b = nn.Conv2d(6, 6, 3, padding=1)
        self.c = nn.Conv2d(6, 8, 1)
        self.d = nn.Conv2d(8, 6, 3, padding=1)

    def forward(self, x):
        return self.d(F.relu(self.c(F.relu(self.b(F.relu(self.a(x)))))))


class Residual(Plain):
    def forward(self, x):
        a = self.a(x)
        b = self.b(F.relu(a)) + a
        return self.d(self.c(b)) * F.avg_pool2d(b, 3, 1, 1)


class InPlace(Plain):
    """What a layer has read is changed afterwards, also through a view, and read again."""

    def forward(self, x):
        a = self.a(x)
        b = self.b(a)
        a.add_(1)
        b.flatten(2).mul_(0.5)
        c = self.c(a.relu_())
        a.sub_(b)
        return self.d(c) + F.relu(a, inplace=True)


class Twice(Plain):
    """A value from the start is read at the end, sizes are asked for, and one layer is called twice."""

    def forward(self, x):
        a = self.b(self.b(self.a(x)))
        size = a.shape[-2:]
        c = self.c(F.max_pool2d(a, 2))
        parts = F.interpolate(c, size=size).chunk(2, 1)
        return self.d(torch.cat([parts[1], parts[0]], 1)) + x.mean(1, keepdim=True)


class Deciding(Plain):
    """What it computes depends on values: it has no graph."""

    def forward(self, x):
        if x.sum() > 0:
            x = x + 1
        return super().forward(x)


pytestmark = [
    pytest.mark.filterwarnings("ignore:calibration. 12 images are few"),
    pytest.mark.filterwarnings("ignore:accelerate. the network. Deciding cannot be traced"),
]
NETWORKS = [Plain, Residual, InPlace, Twice, Deciding]


def images(count=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(4, 3, 8, 8, generator=generator) for _ in range(count)]


def without_walks(monkeypatch):
    monkeypatch.setattr(Walk, "leg", lambda *_: None)


@pytest.mark.parametrize("network", NETWORKS, ids=lambda n: n.__name__)
@pytest.mark.parametrize("most", [0, 5000, 1 << 30])
@pytest.mark.parametrize(
    "method",
    [
        qx.LowRank(rank=2, data=True),
        qx.Perforate(fill="fitted", pointwise=True),
        qx.SpatialBottleneck(),
        # fitted again once all layers are replaced, each by a module of two convolutions
        qx.Espace(rank=2, rate=0.5, mask="lattice", fill="fitted"),
    ],
    ids=lambda m: type(m).__name__,
)
def test_fits_are_those_of_whole_forwards(network, most, method, monkeypatch):
    torch.manual_seed(1)
    model, data = network().eval(), images()
    monkeypatch.setattr("quincunx.surgery.walks.MOST_KEPT", most)
    walked = replace_layers(model, method, calibration=data)
    without_walks(monkeypatch)
    whole = replace_layers(model, method, calibration=data)
    assert walked.replaced == whole.replaced
    assert len(walked.replaced) >= (1 if isinstance(method, qx.SpatialBottleneck) else 2)
    one, other = walked.model.state_dict(), whole.model.state_dict()
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def forwards(network, monkeypatch, method=None):
    """How often a fit ran a network from its own input to a layer."""
    method = method or qx.LowRank(rank=2, data=True)
    model, calls, real = network().eval(), [], calibration._run_to
    monkeypatch.setattr(calibration, "_run_to", lambda *a: calls.append(a[1]) or real(*a))
    replace_layers(model, method, calibration=images())
    return calls


def test_networks_with_a_graph_do_not_start_again(monkeypatch):
    assert forwards(Plain, monkeypatch) == []
    assert forwards(Plain, monkeypatch, qx.Espace(rank=2, rate=0.5, mask="lattice", fill="fitted")) == []


def test_networks_without_a_graph_and_with_hooks_run_as_they_are(monkeypatch):
    assert "b" in forwards(Deciding, monkeypatch)

    class Hooked(Plain):
        def __init__(self):
            super().__init__()
            self.c.register_forward_hook(lambda *_: None)

    assert "d" in forwards(Hooked, monkeypatch)


def context_of(model, data):
    original = copy.deepcopy(model).eval()
    return Context(original, copy.deepcopy(original), Calibration(data, original))


def pairs_of(context, name):
    module = context.original.get_submodule(name)
    return list(context.responses(Layer(name, (name,), module)))


@pytest.mark.parametrize("network", NETWORKS, ids=lambda n: n.__name__)
def test_pairs_in_any_order_and_left_half_way(network, monkeypatch):
    torch.manual_seed(2)
    context = context_of(network(), images())
    with torch.no_grad():
        context.network.a.weight.mul_(1.5)
    context.changed = True
    found = {}
    for name in ("b", "d", "a", "c", "b", "c", "d"):
        found.setdefault(name, []).append(pairs_of(context, name))
        # a pass that ends after its first batch
        next(iter(context.responses(Layer("d", ("d",), context.original.d))))
    without_walks(monkeypatch)
    for name, lists in found.items():
        for pairs in lists:
            for one, other in zip(pairs, pairs_of(context, name), strict=True):
                assert torch.equal(one[0], other[0])
                assert torch.equal(one[1], other[1])


@pytest.mark.parametrize("change", ["in place", "another layer", "a norm's statistics"])
def test_a_network_that_changes_before_the_layer(change):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 5, 1), nn.Conv2d(5, 6, 1))
    context = context_of(model, images())
    context.changed = True
    for name in ("2", "3"):
        pairs_of(context, name)
    with torch.no_grad():
        if change == "in place":
            context.network[0].weight.mul_(2)
        elif change == "another layer":
            context.network[0] = nn.Conv2d(3, 4, 1).eval()
        else:
            context.network[1].running_mean.add_(1)
    for name in ("3", "2", "3"):
        for batch, (seen, response) in zip(images(), pairs_of(context, name), strict=True):
            with torch.no_grad():
                assert torch.equal(seen, context.network[: int(name)](batch))
                assert torch.equal(response, context.original[: int(name) + 1](batch))


class Shuffled:
    """Batches in another order, and of other images, at each pass."""

    def __init__(self):
        self.passes = 0

    def __iter__(self):
        self.passes += 1
        return iter(images(3, seed=self.passes % 2) if self.passes % 3 else images(3)[::-1])


def test_pairs_are_of_one_image_also_where_passes_differ():
    torch.manual_seed(4)
    model = nn.Sequential(*(nn.Conv2d(3, 3, 1) for _ in range(4)))
    context = context_of(model, Shuffled())
    with torch.no_grad():
        # the input of what follows is twice that of the original
        context.network[0].weight.mul_(2)
        context.network[0].bias.mul_(2)
    context.changed = True
    for name in ("1", "1", "2", "3", "2", "1"):
        module = context.original[int(name)]
        for seen, response in pairs_of(context, name):
            half = seen
            if name == "1":
                half = seen / 2
                with torch.no_grad():
                    torch.testing.assert_close(module(half), response)
            assert response.shape == half.shape
    # the same for layers behind, where both networks are one
    context = context_of(model, Shuffled())
    context.changed = True
    for name in ("1", "3", "2", "3"):
        for seen, response in pairs_of(context, name):
            with torch.no_grad():
                assert torch.equal(context.original[int(name)](seen), response)


def test_what_is_kept_stays_within_its_bound():
    context = context_of(Plain(), images(6))
    # room for about two batches of 6 x 8 x 8 float32 values of 4 images
    context.walks = Walk(14000), Walk(14000)
    context.changed = True
    for name in ("a", "b", "c", "d"):
        pairs_of(context, name)
        for walk in context.walks:
            assert 0 <= walk.held <= 14000
            assert walk.held == sum(kept.bytes for kept in walk.kept.values())
    assert 0 < len(context.walks[0].kept) < 6


def test_networks_with_several_inputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x, y):
            return self.b(self.a(x) + self.a(y))

    data = [((x, x.flip(0)),) for x in images()]
    result = replace_layers(Two(), qx.LowRank(rank=2, data=True), calibration=data)
    assert "b" in result.replaced
