"""Programs as plain operators answer as the network does: methods, samplings, odd sizes, any batch."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import quincunx as qx
from quincunx.deployment.lowering import OnnxNode, TorchNode, decoded, lower
from quincunx.fusion.program import Program
from quincunx.sampling import Cosets


def trained(model):
    """Batch norm as after training, so that folding it is no identity."""
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.5)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    return model.eval()


def check(model, x, node=None):
    """The lowered network, for other batches than the one that it was lowered with."""
    fused = qx.fuse(decoded(model))
    lowered = lower(fused, (x,), node)
    assert not [n for n in lowered.graph.nodes if "quincunx" in getattr(n.target, "__module__", "")]
    assert not [m for m in lowered.modules() if isinstance(m, Program)]
    for batch in (1, 2, 7):
        other = torch.randn(batch, *x.shape[1:])
        with torch.no_grad():
            wanted, found = model(other), lowered(other)
        assert found.shape == wanted.shape
        assert (found - wanted).abs().max() <= 1e-4 * wanted.abs().max()
    return lowered


SIZES = [(16, 16), (15, 17), (13, 14)]
SAMPLINGS = [
    qx.CHESSBOARD,
    qx.QUARTER,
    qx.THREE_QUARTERS,
    Cosets(3, [(0, 0), (1, 2)]),
    Cosets(3, [(2, 1)]),
    qx.Random(0.5, 1),
]


@pytest.mark.parametrize("node", [None, TorchNode], ids=["plain", "plugin"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_spatial_bottlenecks(sampling, size, node):
    model = trained(qx.networks.build("rsbn8", width=4, sampling=sampling))
    check(model, torch.randn(2, 3, *size), node)


@pytest.mark.parametrize("kernel", [1, 2, 3, 5])
@pytest.mark.parametrize("dilation", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2])
def test_kernels_dilations_and_groups(kernel, dilation, groups):
    torch.manual_seed(0)
    for sampling in (qx.CHESSBOARD, Cosets(3, [(1, 0), (2, 2)]), qx.Random(0.4, 2)):
        layer = qx.SpatialBottleneck2d(4, 6, kernel, sampling=sampling, dilation=dilation, groups=groups)
        if kernel % 2:
            check(layer.eval(), torch.randn(1, 4, 11, 10))
        sampled = qx.PerforatedConv2d(
            4, 6, kernel, sampling=sampling, padding=1, stride=2, dilation=dilation, groups=groups
        )
        check(sampled.eval(), torch.randn(1, 4, 23, 22))


METHODS = {
    "espace": qx.Espace(rate=0.5),
    "espace-one": qx.Espace(rate=(0.3, 1.0), mask="random"),
    "lowrank": qx.LowRank(rank=0.5),
    "cp": qx.CP(rank=0.3, iterations=20),
    "fitted": qx.Perforate(),
    "fitted-mask": qx.Perforate(sampling=qx.Random(0.5, 1)),
    "nearest": qx.Perforate(fill="nearest"),
    "nearest-mask": qx.Perforate(sampling=qx.Uniform(0.5), fill="nearest"),
    "zero": qx.Perforate(fill="zero"),
    "spatialbottleneck": qx.SpatialBottleneck(),
    "quarter": qx.SpatialBottleneck(sampling=qx.QUARTER),
    "qcnn": qx.QCNN(subspace=4, codewords=8),
    "binaryconnect": qx.BinaryConnect(),
}


@pytest.mark.filterwarnings("ignore:calibration:UserWarning")
@pytest.mark.parametrize("node", [None, TorchNode], ids=["plain", "plugin"])
@pytest.mark.parametrize("name", METHODS)
def test_methods(name, node):
    torch.manual_seed(0)
    images = torch.randn(16, 3, 15, 16)
    model = trained(qx.networks.build("cifar-resnet8", width=8))
    result = qx.accelerate(model, METHODS[name], calibration=[images], example_input=images[:2])
    assert result.replaced
    check(result.model.eval(), images[:2], node)


class Mixed(nn.Module):
    """Compact maps under pooling, means, concatenation, shortcuts, activations of other kinds; two inputs and
    outputs."""

    def __init__(self, sampling, activation):
        super().__init__()
        where = {"sampling": sampling, "padding": 1}
        self.first = qx.PerforatedConv2d(3, 8, 3, **where)
        self.second = qx.PerforatedConv2d(3, 8, 3, **where)
        self.norm = nn.BatchNorm2d(8)
        self.point = nn.Conv2d(16, 8, 1)
        self.dense = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.last = qx.SpatialBottleneck2d(8, 8, sampling=sampling)
        self.act = activation
        self.head = nn.Linear(16, 5)

    def forward(self, x, other):
        a, b = self.act(self.norm(self.first(x))), self.second(other)
        both = self.point(torch.cat([a, b], 1))
        pooled = F.max_pool2d(both, 3, 2, 1)
        y = self.act(self.dense(pooled) + pooled)
        y = self.last(y) + y
        return self.head(torch.cat([a.mean((2, 3)), y.mean((2, 3))], 1)), F.avg_pool2d(both, 2)


@pytest.mark.parametrize("sampling", [qx.CHESSBOARD, qx.Random(0.5, 1)], ids=str)
@pytest.mark.parametrize("kind", [nn.ReLU(), nn.LeakyReLU(0.2), nn.PReLU(8), nn.GELU(), nn.Hardswish()])
@pytest.mark.parametrize("node", [None, TorchNode], ids=["plain", "plugin"])
def test_mixed_networks(sampling, kind, node):
    torch.manual_seed(0)
    model = trained(Mixed(sampling, copy.deepcopy(kind)))
    x, other = torch.randn(2, 2, 3, 13, 12)
    lowered = lower(qx.fuse(model), (x, other), node)
    x, other = torch.randn(2, 3, 3, 13, 12)
    with torch.no_grad():
        for found, wanted in zip(lowered(x, other), model(x, other), strict=True):
            assert found.shape == wanted.shape
            assert (found - wanted).abs().max() <= 1e-4 * wanted.abs().max()


def test_average_pooling_before_a_bottleneck():
    model = trained(qx.networks.build("rsbn8", width=4))
    layer = qx.SpatialBottleneck2d(4, 4, sampling=qx.CHESSBOARD, down="avgpool")
    check(nn.Sequential(nn.Conv2d(3, 4, 3), layer, nn.ReLU()).eval(), torch.randn(1, 3, 12, 13))
    check(model, torch.randn(1, 3, 12, 13))


def multiplications(module, *inputs):
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(*inputs)
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("sampling", [qx.CHESSBOARD, qx.QUARTER, qx.Random(0.5, 1)], ids=str)
def test_nothing_is_multiplied_by_a_structural_zero(sampling):
    layer = qx.SpatialBottleneck2d(8, 8, sampling=sampling).eval()
    x = torch.randn(1, 8, 16, 16)
    assert multiplications(lower(qx.fuse(layer), (x,)), x) == qx.cost(layer, x).macs


def test_only_operators_of_torch_are_left():
    model = trained(qx.networks.build("rsbn8", width=4))
    x = torch.randn(2, 3, 12, 12)
    program = torch.export.export(lower(qx.fuse(model), (x,)), (x,))
    names = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
    assert names
    assert all(name.startswith("aten.") for name in names)


def test_packed_layers_are_decoded_before_they_are_fused():
    layer = qx.BinaryConv2d(3, 8, 3).eval().pack()
    with pytest.raises(TypeError, match="packed layers of one bit; fuse what decoded"):
        lower(qx.fuse(nn.Sequential(layer)), (torch.randn(1, 3, 9, 9),))


def test_the_fused_network_stays_as_it_is():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), qx.CodebookConv2d(8, 8, 3, subspace=4, codewords=8)).eval()
    x, fused = torch.randn(2, 3, 9, 9), qx.fuse(model)
    before = fused(x)
    lower(fused, (x,))
    assert torch.equal(fused(x), before)


class Hidden(nn.Module):
    """torch.fx cannot trace it: it counts up to the height. What it calls can be traced."""

    def __init__(self, inner, calls=((0, 0),)):
        super().__init__()
        self.inner, self.calls = inner, calls

    def forward(self, x):
        for top, left in self.calls:
            x = self.inner(x[:, :, top : len(range(x.shape[2])), left:])
        return x * 2


class Outer(nn.Module):
    """Layers in sight before and behind one that hides others, and one more behind a second curtain."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32)
        block = nn.Sequential(
            nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1)
        )
        self.hidden = Hidden(nn.Sequential(block, Hidden(nn.Conv2d(32, 32, 3, padding=1))))
        self.last = nn.Conv2d(32, 5, 3)

    def forward(self, x):
        return self.last(F.relu(self.hidden(F.relu(self.norm(self.conv(x))))))


@pytest.mark.filterwarnings("ignore:calibration:UserWarning", "ignore:accelerate:UserWarning")
@pytest.mark.parametrize("node", [None, TorchNode], ids=["plain", "plugin"])
@pytest.mark.parametrize("name", METHODS)
def test_layers_in_modules_that_cannot_be_traced(name, node):
    torch.manual_seed(0)
    images, model = torch.randn(16, 3, 15, 16), Outer().eval()
    # half of the rank saves nothing in a square layer
    method = qx.LowRank(rank=0.25) if name == "lowrank" else METHODS[name]
    result = qx.accelerate(model, method, calibration=[images], example_input=images[:2])
    assert any(layer.startswith("hidden.inner") for layer in result.replaced)
    hidden = copy.deepcopy(result.model.eval())
    assert qx.fuse(hidden).meta["whole"].keys() == {"hidden"}
    check(hidden, images[:2], node)


def test_a_fused_network_keeps_the_layers_that_are_lowered_apart():
    model = Hidden(qx.SpatialBottleneck2d(3, 3)).eval()
    model = nn.Sequential(nn.Conv2d(3, 3, 1), model).eval()
    x, fused = torch.randn(2, 3, 9, 9), qx.fuse(model)
    before = [type(module) for module in fused.modules()]
    lower(fused, (x,))
    assert [type(module) for module in fused.modules()] == before


@pytest.mark.parametrize(
    "calls", [((0, 0), (1, 1)), ((2, 0), (0, 3), (0, 0))], ids=["two sizes", "three sizes"]
)
def test_a_layer_that_meets_several_sizes_out_of_sight_is_refused_by_name(calls):
    model = nn.Sequential(nn.Conv2d(3, 3, 1), Hidden(qx.SpatialBottleneck2d(3, 3), calls)).eval()
    x = torch.randn(1, 3, 9, 9)
    assert qx.fuse(model)(x).shape == model(x).shape
    with pytest.raises(TypeError, match=r"'1\.inner' \(SpatialBottleneck2d\).*several sizes"):
        lower(qx.fuse(model), (x,))


def test_a_program_in_another_format_is_refused():
    model = trained(qx.networks.build("rsbn8", width=4))
    with pytest.raises(ValueError, match=r"bfloat16; plain operators are made from float32"):
        lower(qx.fuse(model, torch.bfloat16, force=True), (torch.randn(1, 3, 8, 8),))


def test_a_node_states_its_results_shapes():
    [piece] = qx.fusion.serialise.pieces(
        qx.fuse(trained(qx.networks.build("rsbn8", width=4))).program0, (1, 3, 8, 8)
    )
    node = TorchNode(piece)
    x = torch.randn(2, 3, 8, 8)
    assert [tuple(y.shape[1:]) for y in node(x)] == list(piece.output_shapes)
    node.sizes[1] += 1
    with pytest.raises(RuntimeError, match="other sizes than the graph says"):
        node(x)
    assert OnnxNode(piece).shapes == list(piece.output_shapes)
