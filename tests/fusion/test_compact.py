"""Compact maps through a fused network: the results of explicit fills, and no filled map on the way."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import quincunx as qx
from helpers.programs import Net
from quincunx.fusion import program
from quincunx.fusion.fuse import fuse
from quincunx.fusion.program import Program
from quincunx.fusion.steps import Follower
from quincunx.layers.sampled import PerforatedConv2d
from quincunx.layers.separable import MaskedConv2d
from quincunx.ops import backend, native
from quincunx.ops.geometry import Geometry
from quincunx.ops.plan import nearest_shares, window_plan

CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # float32, batch norm folded into the weights
SIZES = ((2, 6, 9, 11), (1, 6, 8, 7), (3, 6, 9, 11))
SAMPLINGS = {
    "random": qx.Random(0.3, 1),
    "chessboard": qx.CHESSBOARD,
    "quarter": qx.QUARTER,
    "uniform": qx.Uniform(0.25),
    "one position": qx.Random(0.001, 2),
}
needs_native = pytest.mark.skipif(backend().name != "native", reason="the reference keeps filled maps")


class Called(TorchDispatchMode):
    """Notes every operator that is called, and the shapes of what it returns."""

    def __init__(self):
        super().__init__()
        self.names, self.shapes = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        self.names.append(str(func))
        for value in found if isinstance(found, (list, tuple)) else [found]:
            if isinstance(value, torch.Tensor):
                self.shapes.append(tuple(value.shape))
        return found

    @property
    def fills(self):
        return self.names.count("quincunx.fill.default")


def filled_inside(network, x):
    """Maps that native calls for an input of this shape fill themselves, with means of one row each."""
    network(x)
    count = 0
    for part in network.modules():
        for stages in getattr(part, "_compiled", {}).values():
            for call in [getattr(stage.run, "__self__", None) for stage in stages]:
                if isinstance(call, program.NativeCall):
                    steps = program._in_records(program.StepCode, call.code, len(program.StepCode._fields))
                    count += sum(s.weight < 0 and s.work == 0 and s.num_taps == 1 for s in steps)
    return count


def called(network, x):
    network(x)  # compiled for this shape
    with Called() as calls, torch.no_grad():
        network(x)
    return calls


def perforated(sampling, inner=6, outer=6, size=3):
    return PerforatedConv2d(inner, outer, size, sampling=sampling, padding=size // 2)


def espace(sampling, inner=6, outer=6, **settings):
    """Its last half has the sampling, its first another one."""
    return qx.EspaceConv2d(
        inner, outer, 3, rank=4, masks=(qx.Random(0.4, 5), sampling), padding=1, **settings
    )


def conv(inner=6, outer=6, size=1, **settings):
    return nn.Conv2d(inner, outer, size, **settings)


def chain(m, x):
    y = F.relu(m.norm(m.first(x)))
    return m.last(F.relu6(m.two(F.relu(m.one(y)))))


def beside(m, x):
    """A pre-activation: the layer's output is read as it is and through batch norm and ReLU."""
    y = m.first(x)
    return m.last(m.one(F.relu(m.norm(y))) + y)


def normalised(m, x):
    return m.last(m.pool(m.lrn(m.relu(m.first(x)))))


def pools(m, x):
    y = F.relu(m.first(x))
    return F.max_pool2d(y, 3, 2, ceil_mode=True), m.last(F.max_pool2d(y, (2, 3), (1, 2), (1, 1)))


def fire(m, x):
    y = F.relu(m.first(x))
    return m.last(torch.cat([F.relu(m.one(y)), F.relu(m.two(y))], 1))


def joined(m, x):
    return m.last(F.relu(m.norm(torch.cat((m.first(x), m.second(x)), dim=1))))


def added(m, x):
    return m.last(F.max_pool2d(F.relu(m.first(x) + m.second(x)), 3, 2, 1))


def gated(m, x):
    y = m.first(x)
    return m.last(m.one(y) * torch.sigmoid(m.two(y)))


def averaged(m, x):
    y = F.relu(m.first(x))
    return y.mean((2, 3)), m.one(m.mean(y)), torch.mean(y, dim=[-1, -2], keepdim=True)


def shortcut(m, x):
    y = m.first(x)
    return m.last(F.relu(m.one(y) + y))


def activations(m, x):
    y = F.leaky_relu(m.act(m.first(x)), 0.2).mul(2.0)
    return m.last(F.silu(y.sub(y.tanh())) + 0.5)


LAST = {"last": conv(6, 4, 3, padding=1)}
NETS = {
    "chain": (chain, lambda s: {"first": espace(s), "norm": nn.BatchNorm2d(6), "one": conv(6, 8),
                                "two": conv(8, 6, groups=2), **LAST}),
    "pre-activation": (beside, lambda s: {"first": perforated(s), "norm": nn.BatchNorm2d(6), "one": conv(),
                                          **LAST}),
    "normalised": (normalised, lambda s: {"first": espace(s), "relu": nn.ReLU(inplace=True),
                                          "lrn": nn.LocalResponseNorm(3, 0.5), "pool": nn.MaxPool2d(3, 2),
                                          **LAST}),
    "pools": (pools, lambda s: {"first": espace(s), **LAST}),
    "fire": (fire, lambda s: {"first": perforated(s), "one": conv(6, 3), "two": conv(6, 5),
                              "last": conv(8, 4, 3)}),
    "joined": (joined, lambda s: {"first": perforated(s), "second": perforated(s, 6, 4),
                                  "norm": nn.BatchNorm2d(10), "last": conv(10, 4, 3)}),
    "added": (added, lambda s: {"first": perforated(s), "second": perforated(s, size=1), **LAST}),
    "gated": (gated, lambda s: {"first": espace(s), "one": conv(), "two": conv(6, 1), **LAST}),
    "averaged": (averaged, lambda s: {"first": espace(s), "one": conv(6, 3),
                                      "mean": nn.AdaptiveAvgPool2d((1, 1))}),
    "shortcut": (shortcut, lambda s: {"first": perforated(s), "one": conv(), **LAST}),
    "activations": (activations, lambda s: {"first": espace(s), "act": nn.PReLU(6), **LAST}),
}  # fmt: skip


def flat(value):
    return [t for v in value for t in flat(v)] if isinstance(value, tuple) else [value]


def same(got, want):
    assert len(flat(got)) == len(flat(want))
    for a, b in zip(flat(got), flat(want), strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


@pytest.mark.parametrize("prefer", ["ours", "torch", "reference"])
@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("net", NETS)
def test_the_compact_chain_is_the_explicit_fill(net, sampling, prefer, monkeypatch):
    """And no map is filled on the way, whichever kernel takes the dense convolutions."""
    run, modules = NETS[net]
    if prefer == "reference":
        monkeypatch.setattr(program, "backend", lambda: qx.ops.Backend("reference", "asked for"))
    else:
        monkeypatch.setattr(program, "_prefers_torch", lambda *_: prefer == "torch")
    model = Net(run, **copy.deepcopy(modules(SAMPLINGS[sampling])))
    fused = fuse(model)
    for shape in SIZES:
        x = torch.randn(shape)
        same(fused(x), model(x))
    if prefer != "reference" and backend().name == "native":
        assert called(fused, x).fills == 0
        assert called(model, x).fills > 0
        assert [n.op for n in fused.graph.nodes].count("call_module") == 1


@needs_native
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_filled_answer_takes_one_native_call(sampling):
    """With the bits that the fill by itself gives, of positive and negative zeros too."""
    model = Net(lambda m, x: (F.relu(m.b(F.relu(m.a(x)))), m.b(x)),
                a=perforated(SAMPLINGS[sampling]), b=espace(SAMPLINGS[sampling]))  # fmt: skip
    x = torch.randn(2, 6, 9, 11)
    fused = fuse(model)
    calls = called(fused, x)
    assert calls.fills == 0
    assert sum("run_kept" in name for name in calls.names) == 1
    assert filled_inside(fused, x) == 2
    same(fused(x), model(x))
    mask = SAMPLINGS[sampling]
    alone = perforated(mask).eval()
    with torch.no_grad():
        alone.weight.zero_()
        alone.bias.copy_(torch.tensor([0.0, -0.0, 1.0, -1.0, float("inf"), float("nan")]))
        y = fuse(Net(lambda m, x: m.a(x), a=alone))(x)
        z = torch.ops.quincunx.conv(x, alone.weight, alone.bias, mask.spec, (1, 1), (1, 1, 1, 1), (1, 1), 1)
        filled = torch.ops.quincunx.fill(z, mask.spec, (9, 11))
    assert torch.equal(y.view(torch.int32), filled.view(torch.int32))


@needs_native
@pytest.mark.parametrize("net", ["normalised", "pools", "added"])
def test_pooling_reads_the_compact_map(net):
    run, modules = NETS[net]
    fused, x = fuse(Net(run, **copy.deepcopy(modules(qx.QUARTER)))), torch.randn(SIZES[0])
    calls = called(fused, x)
    assert "quincunx_native.window_max.default" in calls.names
    assert "aten.max_pool2d_with_indices.default" not in calls.names
    # no tensor but the input has its grid, and none its number of positions
    assert not [shape for shape in calls.shapes if len(shape) == 4 and shape[2] * shape[3] == 99]


def test_maps_that_nobody_reads_any_more_are_let_go(monkeypatch):
    """As in the network itself: of a long chain with calls in between only the newest maps are there."""
    monkeypatch.setattr(program, "_prefers_torch", lambda *_: True)
    model = Net(
        lambda m, x: m.last(F.max_pool2d(m.c(F.max_pool2d(F.relu(m.a(x) + m.b(x)), 2)), 2)),
        a=perforated(qx.QUARTER), b=perforated(qx.QUARTER), c=conv(size=3), last=conv(),
    )  # fmt: skip
    held = []

    def noting(run):
        def noted(step, maps, values):
            held.append(sorted(values))
            run(step, maps, values)

        return noted

    monkeypatch.setattr(program, "follow", noting(program.follow))
    monkeypatch.setattr(program, "pool", noting(program.pool))
    fuse(model)(torch.randn(1, 6, 12, 12))
    # both terms; their sum; its activation; what the last convolution's input was pooled from
    assert [len(names) for names in held[-4:]] == [2, 1, 1, 1]


@needs_native
def test_pointwise_convolutions_are_computed_at_the_sampled_positions_only(monkeypatch):
    monkeypatch.setattr(program, "_prefers_torch", lambda *_: False)
    mask = qx.Random(0.25, 3)
    model = Net(
        lambda m, x: m.last(F.relu(m.one(m.first(x)))),
        first=perforated(mask, 6, 8),
        one=conv(8, 5),
        last=conv(5, 4, 3, padding=1),
    )
    x, m = torch.randn(2, 6, 9, 11), mask.count(9, 11)
    assert qx.cost(fuse(model), x).macs == 2 * (m * 9 * 6 * 8 + m * 8 * 5 + 99 * 9 * 5 * 4)
    assert qx.cost(model, x).macs == 2 * (m * 9 * 6 * 8 + 99 * 8 * 5 + 99 * 9 * 5 * 4)


S = {"sampling": qx.QUARTER}
FILLED = {
    # network, modules, explicit fills
    "other samplings joined": (lambda m, x: m.c(torch.cat([m.a(x), m.b(x)], 1)),
                               {"a": perforated(qx.QUARTER), "b": perforated(qx.CHESSBOARD),
                                "c": conv(12, 4)}, 2),
    "other samplings added": (lambda m, x: m.c(F.relu(m.a(x) + m.b(x))),
                              {"a": perforated(qx.QUARTER), "b": perforated(qx.Random(0.5)), "c": conv()}, 2),
    "another grid": (lambda m, x: m.c(m.a(x) + m.b(x)),
                     {"a": perforated(qx.Random(0.3)), "c": conv(),
                      "b": PerforatedConv2d(6, 6, 7, stride=9, sampling=qx.Random(0.3))}, 2),
    "joined with a dense map": (lambda m, x: m.c(torch.cat([m.a(x), x], 1)),
                                {"a": perforated(qx.QUARTER), "c": conv(12, 4)}, 1),
    "joined along rows": (lambda m, x: torch.cat([m.a(x), m.a(x)], 2), {"a": perforated(qx.QUARTER)}, 2),
    "batch statistics": (lambda m, x: m.n(m.a(x).tanh()),
                         {"a": perforated(qx.QUARTER),
                          "n": nn.BatchNorm2d(6, affine=False, track_running_stats=False)}, 1),
    "window means": (lambda m, x: m.c(F.avg_pool2d(m.a(x), 3, 2)),
                     {"a": perforated(qx.QUARTER), "c": conv()}, 1),
    "four means": (lambda m, x: m.p(m.a(x)), {"a": perforated(qx.QUARTER), "p": nn.AdaptiveAvgPool2d(2)}, 1),
    "means of rows": (lambda m, x: m.a(x).mean((1, 3)), {"a": perforated(qx.QUARTER)}, 1),
    "a module with indices": (lambda m, x: m.p(m.a(x))[0],
                              {"a": perforated(qx.QUARTER), "p": nn.MaxPool2d(2, return_indices=True)}, 1),
    "indices": (lambda m, x: F.max_pool2d(m.a(x), 2, return_indices=True)[0],
                {"a": perforated(qx.QUARTER)}, 1),
    "added to a dense map": (lambda m, x: m.c(torch.tanh(m.a(x)) + x),
                             {"a": perforated(qx.QUARTER), "c": conv()}, 1),
    "its way out": (lambda m, x: (m.a(x), F.max_pool2d(m.a(x), 2)), {"a": perforated(qx.QUARTER)}, 1),
    # the pooling comes after the softmax: its map is a filled one by then
    "behind another reader": (lambda m, x: (lambda y: (y.softmax(1), F.max_pool2d(y, 2)))(m.a(x)),
                              {"a": perforated(qx.QUARTER)}, 1),
    "strided 1 x 1": (lambda m, x: m.c(m.a(x)), {"a": perforated(qx.QUARTER), "c": conv(stride=2)}, 0),
    "padded 1 x 1": (lambda m, x: m.c(m.a(x)), {"a": perforated(qx.QUARTER), "c": conv(padding=1)}, 0),
    "a dense shortcut": (lambda m, x: m.c(m.a(x)) + x, {"a": perforated(qx.QUARTER), "c": conv()}, 0),
    "another shortcut": (lambda m, x: m.c(m.a(x)) + m.b(x),
                         {"a": perforated(qx.QUARTER), "b": perforated(qx.CHESSBOARD), "c": conv()}, 0),
}  # fmt: skip


@pytest.mark.parametrize("prefer_torch", [False, True])
@pytest.mark.parametrize("net", FILLED)
def test_what_needs_every_position_is_given_them(net, prefer_torch, monkeypatch):
    monkeypatch.setattr(program, "_prefers_torch", lambda *_: prefer_torch)
    run, modules, fills = FILLED[net]
    model = Net(run, **copy.deepcopy(modules))
    fused = fuse(model)
    for shape in SIZES:
        x = torch.randn(shape)
        same(fused(x), model(x))
    if backend().name == "native" and not prefer_torch:
        fused = fuse(model)  # for this shape only
        assert called(fused, x).fills + filled_inside(fused, x) == fills


def test_a_compact_shortcut_of_a_dense_convolution_is_measured_as_it_is_read():
    """The measurement itself ran on a map of another size once."""
    model = Net(lambda m, x: m.c(x) + m.a(x), a=perforated(qx.QUARTER), c=conv(6, 6, 3, padding=1))
    x = torch.randn(2, 6, 9, 10)
    same(fuse(model)(x), model(x))


def test_the_networks_of_the_paper_end_to_end():
    """AlexNet's first layers with their normalisation and overlapping pools, and a fire module."""
    torch.manual_seed(1)
    model = Net(
        lambda m, x: m.head(m.fire(m.body(x)).mean((2, 3))),
        body=nn.Sequential(
            nn.Conv2d(3, 8, 5, 2), nn.ReLU(inplace=True), nn.LocalResponseNorm(5), nn.MaxPool2d(3, 2),
            nn.Conv2d(8, 12, 5, padding=2, groups=2), nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2, ceil_mode=True),
        ),
        fire=Net(fire, first=conv(12, 6), one=conv(6, 8), two=conv(6, 8, 3, padding=1), last=conv(16, 9)),
        head=nn.Linear(9, 5),
    )  # fmt: skip
    method = qx.Espace(rank=0.6, rate=0.4, mask="random", pointwise=True)
    fast = qx.accelerate(model, method).model.eval()
    fused = fuse(fast)
    for side in (45, 52):
        x = torch.randn(2, 3, side, side)
        same(fused(x), fast(x))


def test_bfloat16():
    model = Net(NETS["pools"][0], **copy.deepcopy(NETS["pools"][1](qx.QUARTER)))
    fused, x = fuse(copy.deepcopy(model).bfloat16()), torch.randn(SIZES[0])
    for got, want in zip(fused(x.bfloat16()), model(x), strict=True):
        assert got.dtype == torch.bfloat16
        assert (got - want).abs().max() < 0.05 * want.abs().max()
    mean = fuse(Net(lambda m, x: m.a(x).mean((2, 3)), a=perforated(qx.Random(0.3, 1))).bfloat16())
    assert mean(x.bfloat16()).dtype == torch.bfloat16


def test_a_fused_copy_of_it_is_another_one():
    model = Net(NETS["normalised"][0], **copy.deepcopy(NETS["normalised"][1](qx.QUARTER)))
    fused, x = fuse(model), torch.randn(SIZES[0])
    same(copy.deepcopy(fused)(x), fused(x))
    assert any(isinstance(s, Follower) for p in fused.modules() if isinstance(p, Program) for s in p.steps)


# ---------------------------------------------------------------- any network

MASKS = (qx.QUARTER, qx.Random(0.3, 1), qx.Uniform(0.25))


@st.composite
def lines(draw):
    """Operations (name, the values they read, code) on maps that so far are known to fit them."""
    shapes, found = [(4, 11, 9)], []  # the input, then the result of each operation
    for _ in range(draw(st.integers(3, 9))):
        # the newest maps more often than old ones
        at = max(0, len(shapes) - 1 - draw(st.sampled_from([0, 0, 0, 1, 2, 4])))
        channels, *size = shapes[at]
        twins = [i for i, other in enumerate(shapes) if other[1:] == (*size,)]
        other = draw(st.sampled_from(twins))
        name = draw(
            st.sampled_from(
                ("masked", "masked", "conv1", "conv1", "conv3", "relu", "norm", "pool", "cat", "add", "add")
            )
        )
        code = draw(st.integers(0, 17))
        if name == "cat" and channels + shapes[other][0] > 16:
            continue
        if name == "add" and channels != shapes[other][0]:
            continue
        if name == "pool" and min(size) < 4:
            continue
        found.append((name, at, other, code))
        if name == "cat":
            channels += shapes[other][0]
        elif name in ("masked", "conv1", "conv3"):
            channels = 4
        elif name == "pool":
            size = F.max_pool2d(torch.zeros(1, 1, *size), *_pool(code)).shape[2:]
        shapes.append((channels, *size))
    return shapes, found


def _pool(code):
    """(kernel, stride, padding, dilation, ceil)."""
    return 2 + code % 2, 1 + code // 2 % 3, code % 2, 1, code >= 9


def built(shapes, found):
    modules = {}
    for i, (name, at, _, code) in enumerate(found):
        inner = shapes[at][0]
        if name == "masked":
            size = 1 + 2 * (code // 3 % 2)
            modules[f"m{i}"] = PerforatedConv2d(inner, 4, size, sampling=MASKS[code % 3], padding=size // 2)
        elif name in ("conv1", "conv3"):
            size = int(name[-1])
            modules[f"m{i}"] = nn.Conv2d(inner, 4, size, padding=size // 2)
        elif name == "norm":
            modules[f"m{i}"] = nn.BatchNorm2d(inner)

    def run(m, x):
        values, read = [x], set()
        for i, (name, at, other, code) in enumerate(found):
            y, z = values[at], values[other]
            read |= {at, other} if name in ("cat", "add") else {at}
            if name == "relu":
                values.append(F.relu(y))
            elif name == "pool":
                values.append(F.max_pool2d(y, *_pool(code)))
            elif name == "cat":
                values.append(torch.cat([y, z], 1))
            elif name == "add":
                values.append(y + z)
            else:
                values.append(m.get_submodule(f"m{i}")(y))
        return tuple(value for i, value in enumerate(values) if i not in read)

    return Net(run, **modules)


@given(lines(), st.booleans())
@settings(max_examples=120)
def test_any_line_of_operations(line, prefer_torch):
    model = built(*line)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program, "_prefers_torch", lambda *_: prefer_torch)
        fused, x = fuse(model), torch.randn(2, 4, 11, 9)
        with torch.no_grad():
            same(fused(x), model(x))


# ---------------------------------------------------------------- other grids


def drawn(height, width, seed=0):
    mask = torch.rand(height, width, generator=torch.Generator().manual_seed(seed)) < 0.3
    mask[0, 0] = True
    return qx.Positions(mask)


@pytest.mark.parametrize("prefer", ["ours", "reference"])
@pytest.mark.parametrize("which", [0, 1])
def test_estimated_masks_on_another_grid_as_the_layer_has_them(which, prefer, monkeypatch):
    """A fused layer resizes its masks where the layer does, and refuses what the layer refuses."""
    if prefer == "reference":
        monkeypatch.setattr(program, "backend", lambda: qx.ops.Backend("reference", "asked for"))
    masks = [qx.Random(0.3), qx.Random(0.3, 1)]
    masks[which] = drawn(9, 8)
    for resize in (False, True):
        layer = qx.EspaceConv2d(6, 5, 3, rank=2, masks=tuple(masks), padding=1, resize_masks=resize).eval()
        model = nn.Sequential(layer, nn.ReLU(), nn.Conv2d(5, 4, 1), nn.MaxPool2d(3, 2), nn.Conv2d(4, 2, 3))
        fused = fuse(model)
        for size in ((9, 8), (12, 10), (9, 8), (7, 15)):
            x = torch.randn(2, 6, *size)
            if resize or size == (9, 8):
                same(fused(x), model(x))
                continue
            for network in (model, fused):
                with pytest.raises(ValueError, match=r"this mask was estimated on 9 x 8; estimate it again"):
                    network(x)


def test_masks_of_a_single_layer_on_another_grid():
    for resize in (False, True):
        layer = MaskedConv2d(6, 5, 1, sampling=drawn(9, 8), resize_masks=resize).eval()
        fused, x = fuse(layer), torch.randn(1, 6, 5, 6)
        if resize:
            same(fused(x), layer(x))
        else:
            with pytest.raises(ValueError, match=r"grid 5 x 6: this mask was estimated on 9 x 8"):
                fused(x)
    explicit = fuse(PerforatedConv2d(6, 5, 1, sampling=drawn(9, 8)))
    with pytest.raises(ValueError, match="these positions belong to a grid of 9 x 8"):
        explicit(torch.randn(1, 6, 5, 6))


# ---------------------------------------------------------------- windows and shares

windows = st.tuples(
    st.tuples(st.integers(1, 4), st.integers(1, 4)),  # kernel
    st.tuples(st.integers(1, 4), st.integers(1, 4)),  # stride
    st.tuples(st.integers(0, 2), st.integers(0, 2)),  # padding
    st.tuples(st.integers(1, 3), st.integers(1, 3)),  # dilation
    st.booleans(),
)


@given(
    windows,
    st.tuples(st.integers(2, 12), st.integers(2, 12)),
    st.sampled_from(list(SAMPLINGS.values())),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(0, 40),
)
def test_a_pooling_through_its_table_is_that_of_the_filled_map(window, size, sampling, dtype, channels):
    kernel, stride, padding, dilation, ceil = window
    padding = tuple(min(p, k // 2) for p, k in zip(padding, kernel, strict=True))
    y = torch.randn(2, channels + 1, sampling.count(*size), 1).to(dtype)
    filled = torch.ops.quincunx.fill(y, sampling.spec, size)
    geometry = Geometry(kernel, stride, (padding[0], padding[0], padding[1], padding[1]), dilation)
    if ceil:
        geometry = geometry.rounded_up(*size)
    assume(min(geometry.grid(*size)) > 0)
    want = F.max_pool2d(filled, kernel, stride, padding, dilation, ceil)
    plan = window_plan(sampling.spec, geometry, *size)
    starts = plan.starts.tolist()
    rows = [plan.index[begin:end].tolist() for begin, end in itertools.pairwise(starts)]
    assert starts[0] == 0
    assert starts[-1] == len(plan.index)
    assert all(len(window) == len(set(window)) for window in rows)  # nothing is read twice for one window
    lowest = y.new_full((2, channels + 1, 1), -torch.inf)
    by_hand = [torch.cat([lowest, y[:, :, window, 0]], 2).amax(2) for window in rows]
    assert torch.equal(torch.stack(by_hand, 2).view(want.shape), want)
    if backend().name == "native":
        assert torch.equal(native.window_max(y, plan), want)


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("size", [(9, 11), (4, 2)])
def test_shares_count_the_positions_a_value_stands_for(sampling, size):
    sampling = SAMPLINGS[sampling]
    m = sampling.count(*size)
    ones = torch.eye(m).view(m, m, 1, 1).transpose(0, 1)
    filled = torch.ops.quincunx.fill(ones.transpose(1, 2).reshape(1, m, m, 1), sampling.spec, size)
    torch.testing.assert_close(nearest_shares(sampling.spec, *size), filled.mean((0, 2, 3)))


@pytest.mark.parametrize("sampling", ["", qx.QUARTER.spec])
def test_a_window_that_does_not_fit_is_refused(sampling):
    with pytest.raises(ValueError, match=r"a pooling by \(3, 3\) does not fit a padded map of \(2, 9\)"):
        window_plan(sampling, Geometry((3, 3)), 2, 9)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_not_a_number_and_empty_windows(dtype):
    plan = window_plan(qx.Random(1.0).spec, Geometry((2, 2), (2, 2), (2, 0, 0, 0)), 4, 4)
    x = torch.arange(-16.0, 0.0).view(1, 1, 16, 1).repeat(2, 19, 1, 1).to(dtype)
    x[0, 3, 5], x[1, 18, 0], x[1, 18, 1] = torch.nan, torch.nan, torch.inf
    want = F.max_pool2d(x.view(2, 19, 4, 4), 2)
    got = native.window_max(x, plan)
    assert torch.equal(got[:, :, 0], torch.full((2, 19, 2), -torch.inf, dtype=dtype))
    torch.testing.assert_close(got[:, :, 1:], want, rtol=0, atol=0, equal_nan=True)
    assert got.isnan().sum() == 2
    assert native.window_max(x[:0], plan).shape == (0, 19, 3, 2)


@needs_native
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"index": [0, 1, 6]}, r"index must lie in \[0, 6\)"),
        ({"index": [0, -1, 2]}, r"index must lie in \[0, 6\)"),
        ({"starts": [0, 2, 4]}, "starts must ascend"),
        ({"starts": [1, 2, 3]}, "starts must ascend"),
        ({"starts": [0, 4, 3]}, "starts must ascend"),
        ({"starts": [0, 3]}, "starts must have 3 entries, got 2"),
        ({"x": torch.randn(2, 3, 6, 1).double()}, "float32 or bfloat16"),
        ({"x": torch.randn(2, 3, 6)}, "4 dimensions"),
        ({"x": torch.randn(2, 3, 0, 1)}, "no positions"),
        ({"out_size": [2]}, "out_size"),
        ({"out_size": [-1, -2]}, "out_size"),
    ],
)
def test_bad_windows_are_refused(change, message):
    good = {"x": torch.randn(2, 3, 6, 1), "index": [0, 1, 2], "starts": [0, 2, 3], "out_size": [2, 1]}
    for arguments in (good, {**good, **change}):
        for name in ("index", "starts"):
            arguments[name] = torch.as_tensor(arguments[name], dtype=torch.int32)
    torch.ops.quincunx_native.window_max(*good.values())
    with pytest.raises(RuntimeError, match=message):
        torch.ops.quincunx_native.window_max(*{**good, **{k: arguments[k] for k in change}}.values())
