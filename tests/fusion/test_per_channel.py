"""Norms, biases and scales that are written out as multiplications and additions of constants."""

import pytest
import torch
from torch import nn

import quincunx as qx
from quincunx.fusion.program import Program


def conv(inputs=8, outputs=8, **settings):
    return nn.Conv2d(inputs, outputs, 3, padding=1, **settings)


class Frozen(nn.Module):
    """A batch norm of buffers, as detectors have it."""

    def __init__(self, channels=8):
        super().__init__()
        self.register_buffer("weight", torch.rand(channels) + 0.5)
        self.register_buffer("bias", torch.randn(channels))
        self.register_buffer("mean", torch.randn(channels))
        self.register_buffer("variance", torch.rand(channels) + 0.5)

    def forward(self, x):
        scale = self.weight.reshape(1, -1, 1, 1) * (self.variance.reshape(1, -1, 1, 1) + 1e-5).rsqrt()
        return x * scale + (self.bias.reshape(1, -1, 1, 1) - self.mean.reshape(1, -1, 1, 1) * scale)


class Written(nn.Module):
    """A scale and a shift of its own, applied by ``how``."""

    def __init__(self, how, channels=8, shape=(8, 1, 1)):
        super().__init__()
        self.how = how
        self.g, self.b = nn.Parameter(torch.rand(shape) + 0.5), nn.Parameter(torch.randn(1, channels, 1, 1))

    def forward(self, x):
        return self.how(x, self.g, self.b)


def in_place(x, g, b):
    x *= g
    return x.add_(b)


WAYS = {
    "times and plus": lambda x, g, b: x * g + b,
    "from the left": lambda x, g, b: b + g * x,
    "over and minus": lambda x, g, b: x / g - b,
    "functions": lambda x, g, b: torch.add(torch.mul(x, g), b),
    "methods": lambda x, g, b: x.mul(g).sub(b).div(g),
    "views": lambda x, g, b: x * g.view(1, -1, 1, 1) + b[0],
    "numbers": lambda x, g, b: 0.5 * x + b - 1,
    "a tensor of one number": lambda x, g, b: x * torch.tensor(0.5) + b,
    "one number": lambda x, g, b: x * g[:1, 0, 0] + b[0, 0, 0],
    "in place": in_place,
}


def network(part, tail=True):
    return nn.Sequential(
        conv(3), part(), nn.ReLU(), conv(), part(), nn.ReLU(), conv(), *([part()] if tail else [])
    ).eval()


def programs(fused):
    return sum(isinstance(module, Program) for module in fused.modules())


@pytest.mark.parametrize("way", [*WAYS, "frozen", "behind a norm"])
def test_constants_of_channels_ride_on_convolutions(way):
    torch.manual_seed(0)
    if way == "behind a norm":
        model = network(lambda: nn.Sequential(nn.BatchNorm2d(8), Written(WAYS["times and plus"])))
        for part in model.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.running_mean.normal_()
                part.running_var.uniform_(0.5, 2)
    else:
        model = network(Frozen if way == "frozen" else lambda: Written(WAYS[way]))
    x = torch.randn(2, 3, 9, 8)
    fast = qx.fuse(model, check=x)
    assert programs(fast) == 1
    assert not any("mul" in str(node.target) or "add" in str(node.target) for node in fast.graph.nodes)
    for values in (x, torch.randn(1, 3, 12, 7)):
        torch.testing.assert_close(fast(values), model(values), rtol=1e-4, atol=1e-5)


class Around(nn.Module):
    """A residual branch that is scaled, behind a norm in front of its convolution."""

    def __init__(self):
        super().__init__()
        self.norm, self.first, self.second = Frozen(), conv(), conv()

    def forward(self, x):
        y = self.second(torch.relu(self.first(torch.relu(self.norm(x)))))
        return x + 0.2 * y


def test_scaled_branches_and_norms_in_front():
    torch.manual_seed(0)
    model = nn.Sequential(conv(3), Around(), Around(), conv()).eval()
    x = torch.randn(2, 3, 12, 12)
    fast = qx.fuse(model, check=x)
    assert programs(fast) == 1
    torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)
    found = qx.accelerate(model, qx.SpatialBottleneck(), example_input=x)
    assert found.replaced["1.first"]["pair"] == ["1.first", "1.second"]


class Others(nn.Module):
    """Constants that are not one for each channel of what they meet, or of another type."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.one, self.conv, self.norm = kind, conv(8, 1), conv(), nn.BatchNorm2d(8)
        self.g = nn.Parameter(torch.randn(8, 1, 1))
        self.position = nn.Parameter(torch.randn(8, 9, 9))
        self.width = nn.Parameter(torch.randn(9))
        self.register_buffer("twice", torch.randn(8, 1, 1).double())
        self.register_buffer("infinite", torch.full((8, 1, 1), float("inf")))

    def forward(self, x):
        if self.kind == "more channels":
            return self.conv(self.one(x) * self.g)
        if self.kind == "positions":
            return self.conv(self.conv(x) * self.position)
        if self.kind == "columns":
            return self.conv(self.conv(x) * self.width)
        if self.kind == "another type":
            return (self.conv(x) * self.twice).float()
        if self.kind == "zeros":
            return self.conv(x) / (self.g * 0)
        if self.kind == "infinite":
            return self.conv(x).abs() + self.infinite
        if self.kind == "infinity":
            return self.conv(x).abs() + float("inf")
        if self.kind == "changed after its norm":
            y = self.conv(x)
            z = self.norm(y)
            y.add_(1)
            return y + self.conv(z * self.g)
        if self.kind == "read before":
            y = self.conv(x)
            z = y[:, :4]
            y *= self.g
            return y[:, :4] + z
        # the constant of the last dimension where that is the channels'
        return self.conv(x).permute(0, 2, 3, 1) * self.g.view(8)


KINDS = (
    *("more channels", "positions", "columns", "another type", "zeros", "infinite", "read before"),
    *("channels last", "infinity", "changed after its norm"),
)


@pytest.mark.parametrize("kind", KINDS)
def test_other_constants_stay_where_they_are(kind):
    torch.manual_seed(0)
    model = nn.Sequential(conv(3), Others(kind)).eval()
    x = torch.randn(2, 3, 9, 9)
    found, wanted = qx.fuse(model)(x), model(x)
    assert found.dtype == wanted.dtype
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5, equal_nan=True)
    made = qx.accelerate(model, qx.SpatialBottleneck(), example_input=x).model
    torch.testing.assert_close(qx.fuse(made)(x), made(x), rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("part", [Frozen, lambda: Written(WAYS["numbers"])], ids=["frozen", "written"])
def test_what_lies_between_a_pair_and_a_fit_that_reads_through_it(part):
    torch.manual_seed(0)
    model = network(part)
    images = [torch.randn(32, 3, 10, 10) for _ in range(4)]
    found = qx.accelerate(model, qx.SpatialBottleneck(), calibration=images)
    assert found.replaced["0"]["pair"] == ["0", "3"]
    x = torch.randn(2, 3, 10, 10)
    with torch.no_grad():
        fast = qx.fuse(found.model, check=x)
        assert programs(fast) == 1
        torch.testing.assert_close(fast(x), found.model(x), rtol=1e-4, atol=1e-5)
        # as with the norm that is torch's
        usual = network(lambda: nn.BatchNorm2d(8))
        usual.load_state_dict(
            {name: value for name, value in model.state_dict().items() if name in usual.state_dict()},
            strict=False,
        )
        for own, norm in (
            (own, norm) for own, norm in zip(model, usual, strict=True) if isinstance(norm, nn.BatchNorm2d)
        ):
            one = own(torch.zeros(1, 8, 1, 1)).flatten()
            norm.bias.copy_(one)
            norm.weight.copy_(own(torch.ones(1, 8, 1, 1)).flatten() - one)
            norm.eps = 0.0
        torch.testing.assert_close(usual(x), model(x), rtol=1e-4, atol=1e-5)
        other = qx.accelerate(usual, qx.SpatialBottleneck(), calibration=images)
        torch.testing.assert_close(other.model(x), found.model(x), rtol=1e-3, atol=1e-3)


def test_fits_of_all_methods_go_through_constants_of_the_forward():
    torch.manual_seed(0)
    images = [torch.randn(16, 3, 10, 10) for _ in range(4)]
    for method in (qx.Perforate(), qx.Espace(rank=4, rate=0.5), qx.LowRank(rank=4)):
        model = network(Frozen, tail=False)
        made = qx.accelerate(model, method, calibration=images).model
        x = torch.randn(2, 3, 10, 10)
        torch.testing.assert_close(qx.fuse(made, check=x)(x), made(x), rtol=1e-4, atol=1e-4)


def test_a_block_with_a_scale_within():
    class Block(nn.Module):
        def __init__(self, last):
            super().__init__()
            self.last = last
            self.deep = nn.Conv2d(8, 8, 7, padding=3, groups=8)
            self.g = nn.Parameter(torch.rand(8) if last else torch.rand(8, 1, 1))
            self.one = nn.Linear(8, 32) if last else nn.Conv2d(8, 32, 1)
            self.two = nn.Linear(32, 8) if last else nn.Conv2d(32, 8, 1)

        def forward(self, x):
            y = self.deep(x)
            y = y.permute(0, 2, 3, 1) if self.last else y
            y = self.two(torch.relu(self.one(y * self.g)))
            return x + (y.permute(0, 3, 1, 2) if self.last else y)

    for last in (False, True):
        model = nn.Sequential(conv(3), Block(last), Block(last)).eval()
        images = [torch.randn(16, 3, 12, 12)]
        found = qx.accelerate(model, qx.SpatialBlock(), calibration=images)
        assert {"1.deep", "1.two"} <= found.replaced.keys(), last
        x = torch.randn(2, 3, 12, 12)
        torch.testing.assert_close(qx.fuse(found.model, check=x)(x), found.model(x), rtol=1e-4, atol=1e-4)


def test_arithmetic_that_would_ride_on_nothing_stays_arithmetic():
    class Hardswish(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = conv(3), conv()

        def forward(self, x):
            y = self.first(x)
            y = y * nn.functional.relu6(y + 3) / 6
            return torch.relu(self.second(y)) * 2

    model, x = Hardswish().eval(), torch.randn(1, 3, 8, 8)
    fast = qx.fuse(model, check=x)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fast.modules())
