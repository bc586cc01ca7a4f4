"""The modules: what they hold, what they refuse, and that compilers take them whole."""

import copy

import pytest
import safetensors.torch
import torch
from torch import nn

from quincunx.layers.sampled import (
    PerforatedConv2d,
    SampledConv2d,
    SampledConvTranspose2d,
    SampledDown2d,
    SpatialBottleneck2d,
)
from quincunx.ops import sampled_conv2d, sampled_conv_transpose2d
from quincunx.sampling import CHESSBOARD, QUARTER, Cosets, Positions, Random, Uniform

MAKERS = {
    "sampled": lambda: SampledConv2d(4, 6, 3, sampling=CHESSBOARD, padding=1),
    "perforated": lambda: PerforatedConv2d(4, 6, (3, 1), sampling=Random(0.3, 1), padding=(1, 0), stride=2),
    "bottleneck": lambda: SpatialBottleneck2d(4, 6, sampling=CHESSBOARD),
    "grouped": lambda: SpatialBottleneck2d(
        4, 6, 5, sampling=Cosets(3, [(0, 0), (1, 2)]), groups=2, bias=False
    ),
    "dilated": lambda: SpatialBottleneck2d(4, 6, (3, 5), sampling=QUARTER, dilation=(2, 1)),
    "pooled": lambda: SpatialBottleneck2d(4, 6, sampling=CHESSBOARD, down="avgpool"),
    "positions": lambda: SpatialBottleneck2d(4, 6, sampling=Positions(torch.eye(8, dtype=torch.bool))),
}
makers = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())


@makers
def test_modules_hold_weights_only(make):
    module = make()
    module(torch.randn(2, 4, 8, 8))  # whatever is cached, is cached elsewhere
    assert set(module.state_dict()) == {name for name, _ in module.named_parameters()}
    assert all(name.endswith(("weight", "bias")) for name in module.state_dict())
    assert not list(module.buffers())


@makers
def test_state_round_trip_and_copies(make):
    module, x = make(), torch.randn(2, 4, 8, 8)
    want = module(x)
    assert torch.equal(copy.deepcopy(module)(x), want)
    torch.manual_seed(1)
    other = make()
    assert not torch.equal(other(x), want)
    other.load_state_dict(safetensors.torch.load(safetensors.torch.save(module.state_dict())))
    assert torch.equal(other(x), want)


@makers
def test_every_parameter_learns(make):
    module = make()
    module(torch.randn(2, 4, 8, 8)).square().sum().backward()
    assert all(p.grad.ne(0).any() for p in module.parameters())


@makers
def test_float64_and_channels_last(make):
    module, x = make().double(), torch.randn(2, 4, 8, 8, dtype=torch.float64)
    want = module(x)
    got = module(x.contiguous(memory_format=torch.channels_last))
    assert got.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)  # float64 sums in another order


def test_modules_are_shells_over_the_functions():
    x = torch.randn(2, 4, 9, 8)
    geometry = {"padding": (1, 0, 2, 1), "dilation": 2, "groups": 2}
    down = SampledConv2d(4, 6, 3, sampling=CHESSBOARD, stride=2, **geometry)
    wanted = sampled_conv2d(x, down.weight, down.bias, sampling=CHESSBOARD, stride=2, **geometry)
    assert torch.equal(down(x), wanted)
    up = SampledConvTranspose2d(6, 4, 3, sampling=CHESSBOARD, padding=2, dilation=2, groups=2)
    y = torch.randn(2, 6, CHESSBOARD.count(9, 8), 1)
    wanted = sampled_conv_transpose2d(
        y, up.weight, up.bias, sampling=CHESSBOARD, size=(9, 8), padding=2, dilation=2, groups=2
    )
    assert torch.equal(up(y, (9, 8)), wanted)


def test_batch_norm_takes_its_statistics_over_the_sampled_positions():
    y = SampledConv2d(3, 4, 3, sampling=CHESSBOARD, padding=1)(torch.randn(2, 3, 6, 6))
    norm = nn.BatchNorm2d(4, momentum=1.0)
    norm(y)
    # the same mean of 36 float32 values, in another order
    torch.testing.assert_close(norm.running_mean, y.mean((0, 2, 3)), rtol=0, atol=1e-6)
    assert nn.Conv2d(4, 5, 1)(y).shape == (2, 5, 18, 1)


@pytest.mark.parametrize(
    ("channels", "groups", "mid"),
    [
        ((16, 16), 1, 8),
        ((64, 64), 1, 32),
        ((16, 48), 1, 12),
        ((12, 12), 4, 8),
        ((1, 1), 1, 1),
        ((4, 4), 4, 4),
    ],
)
def test_default_mid_channels(channels, groups, mid):
    module = SpatialBottleneck2d(*channels, groups=groups)
    assert module.down.out_channels == module.up.in_channels == mid


@pytest.mark.parametrize("channels", [(16, 16), (64, 64), (16, 48), (24, 8)])
def test_default_mid_channels_keep_the_parameter_count(channels):
    dense = nn.Conv2d(*channels, 3, padding=1)
    bottleneck = SpatialBottleneck2d(*channels)
    assert sum(p.numel() for p in bottleneck.parameters()) == sum(p.numel() for p in dense.parameters())


@pytest.mark.parametrize("sampling", [QUARTER, CHESSBOARD, Cosets(3, [(0, 0), (1, 2)])], ids=repr)
def test_start_values_follow_the_average_fan_in(sampling):
    """A transposed convolution sums, on average, density C kh kw products in one output value."""
    up = SampledConvTranspose2d(32, 32, 3, sampling=sampling, padding=1, bias=False)
    assert up.fan_in == pytest.approx(32 * 9 * sampling.density)
    bound = up.fan_in**-0.5
    assert up.weight.abs().max() <= bound
    assert up.weight.abs().max() > 0.99 * bound
    down = SampledConv2d(32, 32, 3, sampling=sampling, padding=1, groups=4)
    assert down.fan_in == 8 * 9


@pytest.mark.parametrize("kernel", [1, 2, 3, 4, 5, (3, 1), (2, 5)])
@pytest.mark.parametrize("down", ["stride", "avgpool"])
def test_a_bottleneck_keeps_the_map_size(kernel, down):
    x = torch.randn(2, 4, 11, 12)
    for dilation in (1, 2):
        module = SpatialBottleneck2d(4, 6, kernel, sampling=CHESSBOARD, down=down, dilation=dilation)
        assert module(x).shape == (2, 6, 11, 12)
    assert module(x[:0]).shape == (0, 6, 11, 12)


def test_a_bottleneck_serves_several_map_sizes():
    module = SpatialBottleneck2d(4, 4, sampling=Uniform(0.3))
    for size in ((8, 8), (5, 11), (8, 8)):
        assert module(torch.randn(1, 4, *size)).shape == (1, 4, *size)


def test_repr_says_what_it_is():
    text = repr(SpatialBottleneck2d(4, 6, sampling=QUARTER, groups=2, bias=False))
    assert "SampledConvTranspose2d" in text
    assert "4, 2, kernel_size=(3, 3), sampling=Cosets(period=2, offsets=((0, 0),))" in text
    assert "groups=2" in text
    assert "bias=False" in text


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: SpatialBottleneck2d(6, 8, groups=4), ValueError, "in_channels=6.*groups=4"),
        (lambda: SpatialBottleneck2d(8, 6, groups=4), ValueError, "out_channels=6.*groups=4"),
        (lambda: SpatialBottleneck2d(8, 8, groups=4, mid_channels=6), ValueError, "6.*groups=4"),
        (lambda: SpatialBottleneck2d(0, 8), ValueError, "in_channels=0"),
        (lambda: SpatialBottleneck2d(8, 8, mid_channels=0), ValueError, "=0"),
        (lambda: SpatialBottleneck2d(8, 8, 0), ValueError, "kernel_size=0"),
        (lambda: SpatialBottleneck2d(8, 8, (3, 3, 3)), ValueError, r"kernel_size=\(3, 3, 3\)"),
        (lambda: SpatialBottleneck2d(8, 8, dilation=0), ValueError, "dilation=0"),
        (lambda: SpatialBottleneck2d(8, 8, down="max"), ValueError, "down='max'.*'stride' or 'avgpool'"),
        (lambda: SpatialBottleneck2d(8, 8, sampling="2/4"), TypeError, "sampling='2/4'"),
        (lambda: SampledConv2d(8, 8, 3, sampling=None), TypeError, "sampling=None"),
        (lambda: SampledConv2d(8, 8, 3, sampling=QUARTER, groups=0), ValueError, "groups=0"),
        (lambda: SampledConv2d(8, 8, 3, sampling=QUARTER, stride=0), ValueError, "stride=0"),
        (lambda: SampledConvTranspose2d(8, -1, 3, sampling=QUARTER), ValueError, "out_channels=-1"),
        (lambda: PerforatedConv2d(8, 8, 3, sampling=QUARTER, padding="half"), ValueError, "padding='half'"),
        (lambda: SampledDown2d(8, 8, sampling=Random(0.5), down="avgpool"), ValueError, "avgpool.*Random"),
        (
            lambda: SpatialBottleneck2d(8, 8, sampling=Cosets(4, [(0, 0)]))(torch.zeros(1, 8, 3, 8)),
            ValueError,
            "grid 3 x 8.*K=4",
        ),
        (lambda: SpatialBottleneck2d(8, 8)(torch.zeros(1, 7, 6, 6)), ValueError, "x: 7 channels"),
        (
            lambda: SampledConvTranspose2d(2, 2, 3, sampling=QUARTER, padding=1)(
                torch.zeros(1, 2, 8, 1), (6, 6)
            ),
            ValueError,
            "y: expected .*m=9",
        ),
        (lambda: SpatialBottleneck2d(8, 8)(torch.zeros(1, 8, 6, 6).double()), TypeError, "float32.*float64"),
    ],
)
def test_refuses(make, error, match):
    with pytest.raises(error, match=match):
        make()


# ---------------------------------------------------------------- compilers


def gradients(function, module, x):
    x = x.clone().requires_grad_()
    out = function(x)
    return [out, *torch.autograd.grad(out.square().sum(), (x, *module.parameters()))]


def check_compiled(module, backend, batches=(2,), dynamic=None):
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend=backend, dynamic=dynamic)
    for batch in batches:
        x = torch.randn(batch, 4, 8, 8)
        for got, want in zip(gradients(compiled, module, x), gradients(module, module, x), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)  # float32, fused elsewhere


@makers
def test_compiles_whole(make):
    check_compiled(make(), "aot_eager")


def test_compiles_for_any_batch():
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    check_compiled(MAKERS["bottleneck"](), counter, batches=(2, 5, 3), dynamic=True)
    assert counter.frame_count == 1


def test_compiles_for_any_map_size():
    torch._dynamo.reset()
    module = SpatialBottleneck2d(4, 4, sampling=CHESSBOARD)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in ((8, 8), (9, 6), (7, 12)):
        x = torch.randn(2, 4, *size)
        torch.testing.assert_close(compiled(x), module(x), rtol=1e-4, atol=1e-4)


def test_compiles_with_inductor():
    check_compiled(MAKERS["bottleneck"](), "inductor")


@pytest.mark.parametrize("kind", ["bottleneck", "pooled", "perforated"])
def test_exports(kind):
    module = MAKERS[kind]().eval()
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(module, (torch.randn(2, 4, 8, 8),), dynamic_shapes=({0: batch},))
    for n in (1, 3):
        x = torch.randn(n, 4, 8, 8)
        torch.testing.assert_close(program.module()(x), module(x), rtol=0, atol=1e-5)  # float32
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert any(target.startswith("quincunx.conv") for target in called)
