"""A fused network gives what the network gives, whatever stands around its convolutions."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import quincunx as qx
from quincunx.fusion import program
from quincunx.fusion.fuse import fuse
from quincunx.fusion.fused import match_layout
from quincunx.fusion.program import Program
from quincunx.layers.sampled import (
    PerforatedConv2d,
    SampledConv2d,
    SampledConvTranspose2d,
    SpatialBottleneck2d,
    window_means,
)
from quincunx.measure.engines import fold_batch_norm
from quincunx.ops import backend
from quincunx.ops.geometry import Geometry
from quincunx.ops.plan import forward_plan

CLOSE = {"rtol": 1e-4, "atol": 1e-4}  # float32, batch norm folded into the weights


def settled(model):
    """Batch norms with statistics and weights of their own, so that a forgotten one shows."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
    return model.eval()


def steps(model):
    return [len(m.steps) for m in model.modules() if isinstance(m, Program)]


def left_in_torch(model):
    """What is no program, but for the order in memory of what leaves the network."""
    calls = [n.target for n in model.graph.nodes if n.op.startswith("call") and n.target is not match_layout]
    return [str(target) for target in calls if "program" not in str(target)]


@pytest.mark.parametrize(
    ("name", "settings", "convolutions"),
    [
        ("rrn14", {}, 13),
        ("rsbn14", {}, 13),
        ("rsbn14", {"sampling": "1/4"}, 13),
        ("rsbn14", {"sampling": "random:0.4:2"}, 13),
        ("rsbn14", {"sampling": "cosets:3:0,0;1,2"}, 13),
        ("crn20", {}, 19),
        ("csbn20", {"sampling": "3/4"}, 22),
    ],
)
def test_our_networks_are_one_program(name, settings, convolutions, monkeypatch):
    monkeypatch.setattr(program, "_prefers_torch", lambda *_: False)
    torch.manual_seed(1)
    model = settled(qx.networks.build(name, width=8, **settings))
    fused = fuse(model)
    assert steps(fused) == [convolutions]
    assert left_in_torch(fused) == ["<built-in function getitem>", "mean", "classifier"]
    for batch, side in ((1, 16), (3, 16), (2, 21), (1, 16)):
        x = torch.randn(batch, 3, side, side)
        torch.testing.assert_close(fused(x), model(x), **CLOSE)


class Behind(nn.Module):
    """What is read behind a sum, whose readers differ."""

    def __init__(self, read):
        super().__init__()
        self.read = read
        self.first, self.short, self.last = (nn.Conv2d(5, 5, size, padding=size // 2) for size in (3, 1, 3))
        self.norm, self.other = nn.BatchNorm2d(5), nn.BatchNorm2d(5)

    def forward(self, x):
        return self.read(self, x)


# what stands there, and how many calls torch has left
BEHIND = {
    "a norm of a sum that a shortcut reads": (lambda m, x: m.last(m.norm(y := m.first(x) + x)) + y, 0),
    "a norm behind an activation": (lambda m, x: m.last(m.norm(torch.relu(m.first(x)))) + x, 0),
    "a norm that two read": (lambda m, x: m.last(z := m.norm(torch.relu(m.first(x)))) + z, 0),
    "one with an activation before one without": (
        lambda m, x: m.last(torch.relu(m.other(y := m.first(x) + x))) + m.short(m.norm(y)),
        1,
    ),
    "two norms": (lambda m, x: m.last(m.norm(y := m.first(x) + x)) + m.short(m.other(y)), 1),
    "a norm of a norm": (lambda m, x: m.last(m.norm(m.other(torch.relu(m.first(x))))), 1),
    "one norm twice": (lambda m, x: m.last(m.norm(F.relu6(m.short(m.norm(F.silu(m.first(x))))))), 0),
    "a norm that the caller gets": (lambda m, x: m.norm(m.first(x) + x), 0),
}


@pytest.mark.parametrize("what", BEHIND)
def test_a_norm_that_no_weight_can_take_is_a_second_output(what, monkeypatch):
    monkeypatch.setattr(program, "_prefers_torch", lambda *_: False)
    torch.manual_seed(3)
    read, left = BEHIND[what]
    model = settled(Behind(read))
    fused = fuse(model)
    calls = [call for call in left_in_torch(fused) if "getitem" not in call]
    assert len(calls) == left, calls
    for shape in ((2, 5, 9, 8), (1, 5, 4, 3)):
        x = torch.randn(shape)
        torch.testing.assert_close(fused(x), model(x), **CLOSE)
        for dtype, near in ((torch.bfloat16, 0.03), (torch.int8, 0.08)):
            given = {"calibration": torch.randn(32, *shape[1:]), "max_drop": 100.0, "keep_ends": False}
            low = fuse(model, dtype, force=True, **(given if dtype == torch.int8 else {}))
            assert (low(x) - model(x)).norm() < near * model(x).norm()


@pytest.mark.parametrize("name", ["pyramidnet20-a12", "sb-pyramidnet20-a12", "sb-pyramidnet119-a4"])
def test_a_network_whose_blocks_begin_with_a_norm_is_a_program_for_each_pooling(name):
    """Shortcuts of pooled maps with zero channels are added by the steps."""
    torch.manual_seed(4)
    model = settled(qx.networks.build(name))
    fused = fuse(model)
    assert len(steps(fused)) == 3
    assert [call for call in left_in_torch(fused) if "getitem" not in call] == [
        *["<built-in function avg_pool2d>"] * 2,
        "mean",
        "classifier",
    ]
    x = torch.randn(2, 3, 16, 15)
    torch.testing.assert_close(fused(x), model(x), **CLOSE)


@pytest.mark.parametrize("batch", [1, 3, 64])
@pytest.mark.parametrize("sampling", ["2/4", "1/4", "cosets:3:0,0;1,2"])
def test_the_average_pooling_form(sampling, batch, monkeypatch):
    """The means are steps of the one program, made where the convolution reads them."""
    model = settled(qx.networks.build("rsbn14", width=4, down="avgpool", sampling=sampling))
    fused = fuse(model)
    assert steps(fused) == [13 + 4]
    for shape in ((17, 16), (16, 19)):
        x = torch.randn(batch, 3, *shape)
        torch.testing.assert_close(fused(x), model(x), **CLOSE)
    with monkeypatch.context() as patched:
        patched.setattr(program, "backend", lambda: qx.ops.Backend("reference", "asked for"))
        torch.testing.assert_close(fuse(model)(x), model(x), **CLOSE)


def test_means_in_bfloat16_and_of_a_map_that_others_read_too():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = SpatialBottleneck2d(20, 20, down="avgpool")

        def forward(self, x):
            return torch.relu(x + self.body(x))

    torch.manual_seed(2)
    model, x = nn.Sequential(Block(), Block()), torch.randn(2, 20, 9, 12)
    torch.testing.assert_close(fuse(model)(x), model(x), **CLOSE)
    got, wanted = fuse(copy.deepcopy(model).bfloat16())(x.bfloat16()).float(), model(x)
    assert (got - wanted).norm() < 0.02 * wanted.norm()


@pytest.mark.skipif(backend().name != "native", reason="a program's code is the native back end's")
@pytest.mark.parametrize(
    "change",
    [
        {"bias": 0},
        {"scale2": 0, "shift2": 0, "out2": 1},
        {"activation": 1},
        {"channel_groups": 2},
        {"num_taps": 3},
        {"out": -1, "out2": 1},
        {"slope": 0},
    ],
    ids="-".join,
)
def test_a_mean_with_anything_else_is_refused(change):
    table = forward_plan("", Geometry((2, 2), padding=(0, 1, 0, 1)), 4, 4)
    tensors = [torch.zeros(2), table.index, table.rows, table.taps, table.groups]
    fields = dict.fromkeys(program.StepCode._fields, -1) | {
        "residual_channels": 0,
        "activation": 0,
        "work": 0,
    }
    fields |= {"x": 0, "tap_index": 1, "rows": 2, "taps": 3, "groups": 4}
    fields |= {"out": 1, "num_taps": 4, "channel_groups": 1}
    mean = program.StepCode(**fields)
    x = torch.randn(1, 2, 4, 4).contiguous(memory_format=torch.channels_last)
    arguments = ([x], tensors, [0, 2, 4, 4, 0, 2, 2, 4, 4, 0])
    (means,) = torch.ops.quincunx_native.run_program(*arguments, list(mean))
    torch.testing.assert_close(means, window_means(x, 2))
    with pytest.raises(RuntimeError, match=r"a mean has|taps"):
        torch.ops.quincunx_native.run_program(*arguments, list(mean._replace(**change)))


class Net(nn.Module):
    """A network from a function of its modules."""

    def __init__(self, run, **modules):
        super().__init__()
        self.run = run
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x):
        return self.run(self, x)


def conv(inner=6, outer=6, size=3, **settings):
    return nn.Conv2d(inner, outer, size, padding=settings.pop("padding", size // 2), **settings)


def norm(channels=6):
    return nn.BatchNorm2d(channels)


def basic(m, x):
    """A block of the ImageNet ResNets: additions and activations in place, a projection on the shortcut."""
    y = m.relu(m.n1(m.c1(x)))
    y = m.n2(m.c2(y))
    identity = m.n3(m.c3(x))
    y += identity
    return m.relu(y)


def in_place_reuse(m, x):
    y = m.c1(x)
    z = m.relu(y)
    return z + y  # y was changed in place


def changed_later(m, x):
    y = m.c1(x)
    a = m.c2(y)
    return a + F.relu_(y)


def dense_layer(m, x):
    y = m.c2(F.relu(m.n1(m.c1(x))))
    return torch.cat([x, y], 1)


def functions(m, x):
    return torch.add(F.relu6(m.c1(x)), torch.relu(m.c2(x)).mul(2)).flatten(1)


def twice(m, x):
    return m.c1(m.c1(x).relu()) + x


def both_halves(m, x):
    y = m.down(x)
    return F.relu(m.n1(m.up(F.relu(m.n2(y)), x.size()[2:])) + x)


def sampled_pair(m, x):
    return m.up(F.relu(m.down(x)), x.shape[2:]) + x


def several(m, x):
    y = F.relu(m.c1(x))
    return y, {"deep": m.c2(y)}, m.c2(y) + m.c1(x)


def perforated_chain(m, x):
    return m.c3(F.relu(m.n1(m.p2(F.relu(m.p1(x))))))


def perforated_shortcut(m, x):
    y = m.p1(x)
    return m.c2(F.relu(y)) + y


def downsampled(m, x):
    return m.c1(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, 4))


def not_a_shortcut(m, x):
    return m.c1(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 0)) + m.bias


def pooled(m, x):
    return m.c2(F.max_pool2d(F.relu(m.n1(m.c1(x))), 2, ceil_mode=True)).mean((2, 3))


def constant(m, x):
    return F.relu(m.c1(x) + 0.5) - F.hardtanh(m.c2(x), 0.0, 6.0)


P, CHESS = {"sampling": qx.Random(0.4, 1)}, {"sampling": qx.CHESSBOARD}
CASES = {
    "projection": (basic, {"c1": conv(6, 10, stride=2), "n1": norm(10), "c2": conv(10, 10), "n2": norm(10),
                           "c3": conv(6, 10, 1, stride=2), "n3": norm(10), "relu": nn.ReLU(inplace=True)}, 1),
    "in place": (in_place_reuse, {"c1": conv(), "relu": nn.ReLU(inplace=True)}, None),
    "changed later": (changed_later, {"c1": conv(), "c2": conv()}, None),
    "concatenation": (dense_layer, {"c1": conv(), "n1": norm(), "c2": conv()}, 1),
    "functions": (functions, {"c1": conv(), "c2": conv(groups=3)}, 1),
    "shared weights": (twice, {"c1": conv()}, 1),
    "halves": (both_halves, {"down": SampledConv2d(6, 9, 3, padding=1, groups=3, **CHESS), "n2": norm(9),
                             "up": SampledConvTranspose2d(9, 6, 3, padding=1, groups=3, **CHESS),
                             "n1": norm()}, 1),
    "sampled pair": (sampled_pair, {"down": SampledConv2d(6, 9, 3, padding=1, **CHESS),
                                    "up": SampledConvTranspose2d(9, 6, 3, padding=1, **CHESS)}, 1),
    "several outputs": (several, {"c1": conv(), "c2": conv()}, 1),
    "perforated": (perforated_chain, {"p1": PerforatedConv2d(6, 5, (3, 1), padding=(1, 0), **P),
                                      "n1": norm(8),
                                      "p2": PerforatedConv2d(5, 8, (1, 3), padding=(0, 1), **P),
                                      "c3": conv(8, 4)}, 1),
    "perforated shortcut": (perforated_shortcut, {"p1": PerforatedConv2d(6, 6, 3, padding=1, **P),
                                                  "c2": conv()}, 1),
    "strided shortcut": (downsampled, {"c1": conv(6, 10, stride=2)}, 1),
    "other padding": (not_a_shortcut, {"c1": conv(6, 10, stride=2), "bias": nn.Identity()}, None),
    "pooling": (pooled, {"c1": conv(), "n1": norm(), "c2": conv(6, 7, padding="same", dilation=2)}, 1),
    "constants": (constant, {"c1": conv(), "c2": conv(bias=False)}, 1),
    "bottleneck": (lambda m, x: m.n1(m.sb(m.drop(x))), {"sb": SpatialBottleneck2d(6, 6), "n1": norm(),
                                                        "drop": nn.Dropout2d(0.5)}, 1),
    "uneven padding": (lambda m, x: m.c1(x).relu(), {"c1": conv(6, 3, 4, padding="same")}, 1),
    "reflecting": (lambda m, x: m.c1(x).relu(), {"c1": conv(padding_mode="reflect")}, 1),
}  # fmt: skip


def flat(value):
    if isinstance(value, dict):
        value = tuple(value.values())
    return [t for v in value for t in flat(v)] if isinstance(value, tuple) else [value]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("prefer", ["ours", "torch", "reference"])
@pytest.mark.parametrize("case", CASES)
def test_any_network(case, prefer, monkeypatch):
    """Whichever kernel takes the dense convolutions, and on the reference."""
    if prefer == "reference":
        monkeypatch.setattr(program, "backend", lambda: qx.ops.Backend("reference", "asked for"))
    else:
        monkeypatch.setattr(program, "_prefers_torch", lambda *_: prefer == "torch")
    run, modules, programs = CASES[case]
    if case == "other padding":
        modules = {"c1": modules["c1"]}
        run = lambda m, x: m.c1(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 0))  # noqa: E731
    model = settled(Net(run, **copy.deepcopy(modules)))
    fused = fuse(model)
    if programs is not None:
        assert len(steps(fused)) == programs
    for shape in ((2, 6, 8, 8), (1, 6, 9, 7)):
        x = torch.randn(shape)
        want, got = flat(model(x.clone())), flat(fused(x.clone()))
        assert len(want) == len(got)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, **CLOSE)


@pytest.mark.parametrize("case", ["projection", "halves", "sampled pair", "strided shortcut", "bottleneck"])
def test_nothing_is_left_in_torch(case):
    """Shortcuts, batch norms and activations all ride on convolutions."""
    run, modules, _ = CASES[case]
    assert set(left_in_torch(fuse(Net(run, **copy.deepcopy(modules))))) == {"<built-in function getitem>"}


def test_the_model_is_left_as_it_was():
    model = settled(qx.networks.build("rsbn8", width=4)).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    fused = fuse(model)
    fused(torch.randn(2, 3, 16, 16))
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())
    want = fused(torch.ones(1, 3, 16, 16))
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert torch.equal(fused(torch.ones(1, 3, 16, 16)), want)


def test_bfloat16():
    model = settled(qx.networks.build("rsbn14", width=16))
    fused = fuse(copy.deepcopy(model).bfloat16())
    x = torch.randn(4, 3, 16, 16)
    got = fused(x.bfloat16())
    assert got.dtype == torch.bfloat16
    want = model(x)
    assert (got - want).abs().max() < 0.1 * want.abs().max()


def test_float64_is_served_by_the_reference():
    model = settled(qx.networks.build("rsbn8", width=4)).double()
    x = torch.randn(1, 3, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(fuse(model)(x), model(x), rtol=1e-5, atol=1e-5)  # biases are kept in float32


def test_it_is_frozen():
    fused = fuse(qx.networks.build("rsbn8", width=4))
    with pytest.raises(RuntimeError, match="convert the model first"):
        fused.bfloat16()
    with pytest.raises(TypeError, match=r"bfloat16, but the network was fused in torch.float32"):
        fused(torch.randn(1, 3, 16, 16).bfloat16())
    assert not fused.training
    x = torch.randn(1, 3, 16, 16)
    torch.testing.assert_close(copy.deepcopy(fused)(x), fused(x), **CLOSE)


def test_single_layers():
    x = torch.randn(1, 6, 8, 8)
    for layer in (conv(), SampledConv2d(6, 4, 3, sampling=qx.QUARTER), SpatialBottleneck2d(6, 6)):
        torch.testing.assert_close(fuse(layer)(x), layer(x), **CLOSE)


class Asking(nn.Module):
    """Its forward asks for an argument that need not be there."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x, mask=None, scale=2.0, *, bias=None):
        x = self.conv(x) * scale
        if mask is not None:
            x = x * mask
        return x if bias is None else x + bias


def test_arguments_that_are_none_by_default():
    model, x = Asking().eval(), torch.randn(2, 3, 8, 8)
    fused = fuse(model)
    torch.testing.assert_close(fused(x), model(x), **CLOSE)
    torch.testing.assert_close(fused(x, scale=3.0), model(x, scale=3.0), **CLOSE)
    with pytest.raises(TypeError, match="mask"):
        fused(x, mask=torch.zeros(1))
    inside = nn.Sequential(model, nn.ReLU())
    torch.testing.assert_close(fuse(inside)(x), model(x).relu(), **CLOSE)
    torch.testing.assert_close(fold_batch_norm(model)(x), model(x), **CLOSE)


def test_no_gradient_is_kept():
    fused = fuse(qx.networks.build("rsbn8", width=4))
    assert not fused(torch.randn(1, 3, 16, 16)).requires_grad


def test_macs_of_a_fused_network_are_those_of_the_network():
    if backend().name != "native":
        pytest.skip("the reference runs the network's own operators")
    model = qx.networks.build("rsbn20")
    x = torch.randn(2, 3, 32, 32)
    assert qx.cost(fuse(model), x).macs == qx.cost(model, x).macs


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (torch.randn(3), "model: expected a torch.nn.Module"),
        (Net(lambda m, x: m.c(x) if x.sum() > 0 else x, c=conv()), "Net cannot be traced by torch.fx"),
    ],
)
def test_refuses(model, message):
    with pytest.raises(TypeError, match=message):
        fuse(model)
