"""Forwards that go through the pieces of a map or through its sizes are looked into, and do the same."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import quincunx as qx
from helpers.fused import same_answers
from quincunx.layers.graph import trace
from quincunx.surgery.pairs import find_pairs


class Net(nn.Module):
    def __init__(self, run):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm, self.pool = nn.BatchNorm2d(8), nn.MaxPool2d(2, return_indices=True)
        self.scale = nn.Parameter(torch.rand(8, 1, 1))
        self.run = [run]

    def forward(self, x):
        return self.run[0](self, self.a(x))


def wider(y):
    return torch.cat([y, y], 1)


PIECES = {
    "list of chunks": lambda net, y: torch.cat(list(y.chunk(2, 1)), 1),
    "tuple of chunks": lambda net, y: torch.cat(tuple(torch.chunk(y, chunks=4, dim=1))[1:], 1),
    "star": lambda net, y: torch.cat([*y.chunk(2, 1), y], 1),
    "star and a name": lambda net, y: (lambda first, *rest: first + rest[0])(*y.chunk(4, 1)),
    "backwards": lambda net, y: torch.cat(list(reversed(y.chunk(4, 1))), 1),
    "a slice of chunks": lambda net, y: torch.cat([2 * p for p in y.chunk(4, 1)[1:3]], 1),
    "every other chunk": lambda net, y: sum(y.chunk(4, 1)[::2]),
    "their number": lambda net, y: sum(y.chunk(4, 1)) / len(y.chunk(4, 1)),
    "list of sizes": lambda net, y: torch.cat(list(y.split([1, 5, 2], 1))[::-1], 1),
    "split_with_sizes": lambda net, y: torch.cat([*y.split_with_sizes((4, 4), 1)], 1),
    "tensor_split by number": lambda net, y: torch.cat([*y.tensor_split(3, 1)], 1),
    "tensor_split by indices": lambda net, y: torch.cat([*torch.tensor_split(y, (1, 4), dim=1)], 1),
    "unpooled": lambda net, y: F.max_unpool2d(*F.max_pool2d(y, 2, return_indices=True), 2),
    "unpooled behind a module": lambda net, y: F.max_unpool2d(*net.pool(y), 2),
    "greatest": lambda net, y: (lambda v, i: v + i)(*y.max(1, keepdim=True)),
    "least": lambda net, y: (lambda v, i: v + i)(*torch.min(y, dim=1)),
    "the first few": lambda net, y: list(y.topk(3, 1))[-2],
    "moments": lambda net, y: (lambda s, m: (y - m) / s)(*torch.std_mean(y, (2, 3), keepdim=True)),
}
SIZES = {
    "first sizes": lambda net, y: y.reshape(*y.shape[:2], -1),
    "all but the last": lambda net, y: y.reshape(*y.shape[:-2], -1),
    "size()": lambda net, y: y.reshape(*y.size()[:2], -1),
    "all": lambda net, y: y.flatten(2).view(*y.shape),
    "tuple": lambda net, y: F.interpolate(y, size=tuple(y.shape[2:])),
    "twice each": lambda net, y: F.interpolate(y, size=[2 * side for side in y.shape[-2:]]),
    "their number": lambda net, y: y if len(y.shape) == 4 else y.unsqueeze(0),
    "dim": lambda net, y: y.flatten(2) if y.dim() > 3 else y,
    "ndim": lambda net, y: y if y.ndim not in (3,) else y[None],
    "behind a norm and more": lambda net, y: F.relu(net.norm(y) * 2 + y).flatten(2).view(*y.shape),
    "behind a shortcut": lambda net, y: (lambda z: z.flatten(1).view(*z.shape))(net.b(F.relu(y)) + y),
    "behind a parameter": lambda net, y: (lambda z: z.flatten(1).view(*z.shape))(y * net.scale),
    "behind pieces": lambda net, y: (lambda z: z.flatten(1).view(*z.shape))(y.chunk(2, 1)[1]),
    "behind a join": lambda net, y: (lambda z: z.flatten(1).view(*z.shape))(wider(y)),
}


@pytest.mark.parametrize("case", [*PIECES, *(f"sizes: {name}" for name in SIZES)])
def test_the_graph_does_what_the_forward_does(case):
    torch.manual_seed(0)
    net = Net({**PIECES, **{f"sizes: {name}": run for name, run in SIZES.items()}}[case]).eval()
    assert not trace(net).whole
    same_answers(qx.fuse(net), net, ((2, 3, 8, 8), (1, 3, 8, 12), (5, 3, 6, 4)))


@pytest.mark.parametrize("case", SIZES)
def test_other_dimensions_are_refused_by_a_sentence_or_served(case):
    net = Net(SIZES[case]).eval()
    x = torch.randn(3, 8, 8)
    try:
        want = net(x)
    except (ValueError, RuntimeError) as error:
        with pytest.raises((type(error), IndexError)):
            qx.fuse(net)(x)
        return
    try:
        found = qx.fuse(net)(x)
    except IndexError as error:
        assert "other dimensions than the network was traced for" in str(error)  # noqa: PT017
    else:
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)


def test_the_number_of_chunks_is_never_made_up():
    net = Net(lambda net, y: y[:, :1] * len(y[:, :, :, :5].chunk(4, 3))).eval()
    fused = qx.fuse(net)
    with torch.no_grad():
        x = torch.randn(1, 3, 8, 4)
        torch.testing.assert_close(fused(x), net(x))
        # five columns are three chunks
        with pytest.raises(IndexError, match="chunk gives other pieces"):
            fused(torch.randn(1, 3, 8, 8))


def test_questions_that_a_network_answers_with_an_error_of_its_own_keep_it():
    def run(net, y):
        if y.dim() != 4:
            raise ValueError(f"images in batches, not {y.dim()} dimensions")
        return net.b(y)

    fused = qx.fuse(Net(run).eval())
    with pytest.raises(ValueError, match="images in batches, not 3 dimensions"):
        fused(torch.randn(3, 8, 8))


UNKNOWN = {
    "the images of a batch": lambda net, y: torch.stack([image for image in y]),  # noqa: C416
    "unbind": lambda net, y: torch.stack([*y.unbind(2)], 2),
    "pieces of a size": lambda net, y: torch.cat([*y.split(3, 2)], 2),
    "behind a mean": lambda net, y: (lambda z: z.view(*z.shape))(y.mean(1)),
    "the sizes of windows": lambda net, y: (lambda z: z.view(*z.shape))(F.unfold(y, 3)),
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_what_only_a_run_knows_is_refused(case):
    net = Net(UNKNOWN[case]).eval()
    with pytest.raises(TypeError, match="known only when it runs"):
        qx.fuse(net)
    # as a part it runs as it is
    fused, x = qx.fuse(nn.Sequential(nn.Conv2d(3, 3, 1), net).eval()), torch.randn(2, 3, 8, 8)
    assert fused(x).shape == net(x).shape


def test_a_hook_may_change_the_dimensions():
    net = Net(lambda net, y: (lambda z: z.reshape(*z.shape, 1))(net.b(y))).eval()
    net.b.register_forward_hook(lambda module, given, output: output.mean(1))
    x = torch.randn(2, 3, 8, 8)
    try:
        fused = qx.fuse(net)
    except TypeError:
        return
    torch.testing.assert_close(fused(x), net(x))


def conv(inputs, outputs, kernel=1):
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(outputs),
        nn.SiLU(),
    )


class Split(nn.Module):
    """The block of current detectors: a list that starts as two halves of a map and grows."""

    def __init__(self, inputs, outputs, count=2):
        super().__init__()
        self.half = outputs // 2
        self.first, self.last = conv(inputs, outputs), conv((2 + count) * self.half, outputs)
        self.inner = nn.ModuleList(
            nn.Sequential(conv(self.half, self.half, 3), conv(self.half, self.half, 3)) for _ in range(count)
        )

    def forward(self, x):
        parts = list(self.first(x).chunk(2, 1))
        parts.extend(block(parts[-1]) for block in self.inner)
        return self.last(torch.cat(parts, 1))


def test_blocks_that_grow_a_list_are_one_program_and_are_accelerated():
    torch.manual_seed(1)
    net = nn.Sequential(conv(3, 16, 3), Split(16, 16), Split(16, 24)).eval()
    assert not trace(net).whole
    assert not find_pairs(net).untraced
    x = torch.randn(2, 3, 16, 16)
    fused = qx.fuse(net)
    torch.testing.assert_close(fused(x), net(x), rtol=1e-4, atol=1e-5)
    data = [torch.randn(8, 3, 16, 16) for _ in range(4)]
    for method in (qx.SpatialBottleneck(), qx.Perforate(), qx.LowRank(rank=0.4)):
        result = qx.accelerate(net, method, calibration=data)
        assert any(name.startswith("1.inner") for name in result.replaced)
        torch.testing.assert_close(qx.fuse(result.model)(x), result.model(x), rtol=1e-4, atol=1e-5)
