"""Forwards that go on both ways of a branch on sizes: one graph, which goes the way of each input."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from tests.helpers.fused import answer
from torch import fx, nn

import quincunx as qx
from quincunx.fusion.program import Program
from quincunx.layers.graph import trace
from quincunx.layers.sizes import SizeGuard
from quincunx.layers.tracing import as_module
from quincunx.layers.ways import Either

SIDES = [(32, 32), (33, 35), (64, 48), (30, 41), (16, 16), (48, 17), (17, 48), (9, 40)]


def double(given, made):
    norms = (nn.Conv2d(given, made, 3, 1, 1, bias=False), nn.BatchNorm2d(made), nn.ReLU(inplace=True))
    return nn.Sequential(*norms, nn.Conv2d(made, made, 3, 1, 1), nn.ReLU(inplace=True))


class UNet(nn.Module):
    """As written in many tutorials: a map that the pooling made too small is enlarged to its skip's size."""

    def __init__(self, widths=(4, 8, 8)):
        super().__init__()
        self.downs, self.ups = nn.ModuleList(), nn.ModuleList()
        given = 3
        for width in widths:
            self.downs.append(double(given, width))
            given = width
        self.bottom = double(given, 2 * given)
        given *= 2
        for width in reversed(widths):
            self.ups.append(nn.ConvTranspose2d(given, width, 2, 2))
            self.ups.append(double(2 * width, width))
            given = width
        self.pool, self.last = nn.MaxPool2d(2), nn.Conv2d(given, 2, 1)

    def forward(self, x):
        skips = []
        for down in self.downs:
            x = down(x)
            skips.append(x)
            x = self.pool(x)
        x = self.bottom(x)
        for i in range(0, len(self.ups), 2):
            x = self.ups[i](x)
            skip = skips[-1 - i // 2]
            if x.shape != skip.shape:
                x = F.interpolate(x, size=skip.shape[2:])
            x = self.ups[i + 1](torch.cat((skip, x), dim=1))
        return self.last(x)


class Block(nn.Module):
    """A residual block that finds out for itself whether its input has to be projected."""

    def __init__(self, given, made, stride):
        super().__init__()
        self.one, self.two = nn.Conv2d(given, made, 3, stride, 1), nn.Conv2d(made, made, 3, 1, 1)
        self.norm, self.project = nn.BatchNorm2d(made), nn.Conv2d(given, made, 1, stride)

    def forward(self, x):
        y = self.two(F.relu(self.norm(self.one(x))))
        if x.shape != y.shape:
            x = self.project(x)
        return F.relu(x + y)


class Net(nn.Module):
    """Layers, and a forward made of a function of the module and the input."""

    def __init__(self, run):
        super().__init__()
        self.run = run
        self.one, self.two, self.up = nn.Conv2d(3, 6, 3, 2, 1), nn.Conv2d(6, 6, 3, 1, 1), nn.Conv2d(3, 6, 1)
        self.norm, self.pool = nn.BatchNorm2d(6), nn.MaxPool2d(2)
        self.averaged, self.drop = Averaged(), nn.Dropout()

    def forward(self, x):
        return self.run(self, x)

    def layers(self, x):
        return F.relu(self.norm(self.one(x)))


def pooled_until_small(m, x):
    x = m.layers(x)
    while x.shape[-1] > 8:
        x = m.pool(x)
    return m.two(x)


def padded_and_cut(m, x):
    h, w = x.shape[-2:]
    down, right = -h % 4, -w % 4
    if down or right:
        x = F.pad(x, (0, right, 0, down), mode="reflect")
    x = F.interpolate(m.two(m.layers(x)), scale_factor=2)
    return x[:, :, :h, :w] if down or right else x


def cut_to_fit(m, x):
    skip, y = m.up(x), F.interpolate(m.layers(x), scale_factor=2)
    if y.shape[2] > skip.shape[2]:
        y = y[:, :, : skip.shape[2]]
    if y.shape[3] > skip.shape[3]:
        y = y[..., : skip.shape[3]]
    return m.two(F.relu(y + skip))


def layers_in_both(m, x):
    return m.two(m.layers(x)).mean(0) if x.shape[0] == 1 else m.two(m.layers(x))


def two_values_chosen(m, x):
    y, z = m.layers(x), F.avg_pool2d(m.up(x), 2, ceil_mode=True)
    wide = x.shape[3] > x.shape[2]
    first, second = (y, z) if wide else (z, y)
    return m.two(first) - second


def a_branch_in_a_branch(m, x):
    x = m.layers(x)
    if x.shape[2] > 10:
        x = F.max_pool2d(x, 2)
        if x.shape[3] % 2:
            x = F.pad(x, (0, 1))
    elif x.shape[3] > 10:
        x = x * 2
    return m.two(x)


def no_value_changes(m, x):
    factor = 2 if x.shape[2] > 20 else 3
    return m.two(m.layers(x)) * factor


def by_turns(m, x):
    """Whether it is turned back depends on whether it was turned."""
    turned = x.shape[2] > x.shape[3]
    if turned:
        x = x.transpose(2, 3)
    x = m.two(m.layers(x))
    return x.transpose(2, 3) if turned else x


def answers(m, x):
    y = m.layers(x)
    return {"map": y, "small": F.max_pool2d(y, 2) if y.shape[2] > 8 else y}


def in_inner_function(m, x):
    def fit(y, sides):
        return y if y.shape[2:] == sides else F.interpolate(y, size=sides, mode="bilinear")

    y = m.layers(x)
    return fit(m.two(y), x.shape[2:]) + m.up(x)


def viewed(m, x):
    y = m.layers(x)
    if y.shape[2] % 2 == 0:
        n, c, h, w = y.shape
        y = y.view(n, c, h // 2, 2 * w)
    return m.two(y)


def raising_behind_two_ways(m, x):
    if x.shape[2] > 20:
        x = F.avg_pool2d(x, 2)
    if x.shape[3] == 17:
        raise ValueError(f"{x.shape[3]} columns")
    return m.two(m.layers(x))


def smallest_sides(m, x):
    h, w = x.shape[2:]
    if h < 20 or w < 20:
        x = F.pad(x, (0, max(0, 20 - w), 0, max(0, 20 - h)))
    return m.two(m.layers(x))


def rounded(m, x):
    y = m.layers(x)
    if x.shape[2] > 20:
        y = F.interpolate(y, size=(round(y.shape[2] * 0.7), 8))
    return m.two(y)


def up_to_a_multiple(m, x):
    h, w = x.shape[2:]
    if h % 4:
        h += 4 - h % 4
    return m.two(F.interpolate(m.layers(x), size=(h, w)))


def a_constant_chosen(m, x):
    factor = 2 if x.shape[2] > 20 else 1
    y = m.two(F.avg_pool2d(m.layers(x), factor))
    return F.interpolate(y, scale_factor=factor)


def counted(m, x):
    x, times = m.layers(x), 0
    while x.shape[-1] > 8:
        x, times = m.pool(x), times + 1
    return m.two(x) * times


def a_map_or_none(m, x):
    y = m.layers(x)
    aux = F.max_pool2d(y, 2) if y.shape[2] > 10 else None
    return m.two(y), aux


def signed_zero(m, x):
    return m.two(m.layers(x)) / (0.0 if x.shape[2] > 20 else -0.0)


class Averaged(nn.Module):
    """Settings that the layers do not print."""

    def __init__(self):
        super().__init__()
        self.some, self.others = (nn.AvgPool2d(3, 1, 1, count_include_pad=how) for how in (True, False))

    def forward(self, y):
        if y.shape[2] > 10:
            return self.some(y) if y.shape[3] > 10 else y
        return self.others(y) if y.shape[3] > 10 else y


def by_what_is_not_printed(m, x):
    return m.two(m.averaged(m.layers(x)))


def dropped(m, x):
    y = m.layers(x)
    return m.two(m.drop(y) if y.shape[2] > 10 else y)


def one_name_for_two_maps(m, x):
    y = m.layers(x)
    if x.shape[2] > 20:
        y = F.max_pool2d(y, 2)
        if y.shape[3] == 9:
            raise ValueError("nine")
    else:
        y = F.max_pool2d(y, 1)
        if y.shape[3] == 9:
            y = F.pad(y, (0, 1))
    return m.two(y)


GOING_ON = [
    *(smallest_sides, rounded, up_to_a_multiple, a_constant_chosen, counted, a_map_or_none, signed_zero),
    *(by_what_is_not_printed, dropped, one_name_for_two_maps),
    *(
        pooled_until_small,
        padded_and_cut,
        cut_to_fit,
        layers_in_both,
        two_values_chosen,
        a_branch_in_a_branch,
    ),
    *(no_value_changes, by_turns, answers, in_inner_function, viewed, raising_behind_two_ways),
]


def assert_alike(model, copies):
    torch.manual_seed(0)
    for images in (1, 3):
        for sides in SIDES:
            x = torch.randn(images, 3, *sides)
            wanted = answer(model, x)
            for fused in copies:
                found = answer(fused, x)
                if isinstance(wanted, Exception):
                    assert repr(found) == repr(wanted)
                else:
                    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def copies_of(fused):
    return [fused, pickle.loads(pickle.dumps(fused)), copy.deepcopy(fused)]


def programs(fused):
    return sum(isinstance(m, Program) for m in fused.modules())


def eithers(graph):
    return sum(isinstance(node.target, Either) for node in graph.nodes)


@pytest.mark.parametrize("run", GOING_ON)
def test_each_input_goes_its_way(run):
    model = Net(run).eval()
    fused = qx.fuse(model)
    assert fused.meta["whole"] == {}
    assert eithers(fused.graph) > 0
    assert programs(fused) > 0
    assert_alike(model, copies_of(fused))


def test_each_input_goes_its_way_where_the_branch_is_in_a_part():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), Net(a_branch_in_a_branch), nn.Conv2d(6, 2, 1)).eval()
    fused = qx.fuse(model)
    assert fused.meta["whole"] == {}
    assert_alike(model, copies_of(fused))


def test_layers_that_both_ways_have_are_outside_of_the_branch():
    graph = trace(Net(layers_in_both).eval())
    called = [str(node.target) for node in graph.nodes if node.op == "call_module"]
    assert called == ["one", "norm", "two"]
    [either] = [node.target for node in graph.nodes if isinstance(node.target, Either)]
    assert (len(either.yes.steps), len(either.no.steps)) == (1, 0)


def test_unet_is_one_graph():
    model = UNet().eval()
    graph = trace(model)
    assert not graph.whole
    assert eithers(graph) == 3
    assert_alike(model, [qx.fuse(model), qx.fuse(model, check=torch.randn(1, 3, 33, 35))])


def test_blocks_that_compare_shapes_are_fused():
    blocks = (Block(8, 8, 1), Block(8, 16, 2), Block(16, 16, 1), Block(16, 16, 1))
    model = nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1), *blocks).eval()
    fused = qx.fuse(model)
    assert fused.meta["whole"] == {}
    assert programs(fused) == 1
    assert not any(isinstance(node.target, (Either, SizeGuard)) for node in fused.graph.nodes)
    assert_alike(model, copies_of(fused))


def test_what_was_the_same_for_all_sizes_is_asked_again():
    """A map of one position is as large behind a stride as in front of it."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1), Block(8, 8, 2)).eval()
    fused = qx.fuse(model)
    assert fused.meta["whole"] == {}
    torch.testing.assert_close(fused(x := torch.randn(2, 3, 9, 9)), model(x), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"^the network goes another way for images of this size than for"):
        fused(torch.randn(2, 3, 1, 1))


def parameters_in_an_arm(m, x):
    y = m.layers(x)
    return m.two(y) if y.shape[2] > 10 else y


def in_place_in_an_arm(m, x):
    y = m.layers(x)
    if y.shape[2] > 10:
        y += 1
    return m.two(y)


def state_from_branch_to_branch(m, x):
    seen = []
    y = m.layers(x)
    if y.shape[2] > 10:
        seen.append(F.max_pool2d(y, 2))
    y = m.two(y)
    return y + F.interpolate(seen[0], size=y.shape[2:]) if seen else y


def of_a_range(m, x):
    y = m.layers(x)
    return y * 2 if y.shape[2] > 10 else y * len(range(y.shape[3]))


APART = [parameters_in_an_arm, in_place_in_an_arm, of_a_range]


@pytest.mark.parametrize("run", APART)
def test_what_cannot_be_one_graph_is_refused(run):
    with pytest.raises(TypeError, match=r"^model: Net cannot be traced by torch\.fx \(symbolically traced"):
        qx.fuse(Net(run).eval())


@pytest.mark.parametrize("run", APART)
def test_what_cannot_be_one_graph_runs_as_it_is_where_it_is_a_part(run):
    model = nn.Sequential(nn.Conv2d(3, 3, 1), Net(run)).eval()
    fused = qx.fuse(model)
    assert list(fused.meta["whole"]) == ["1"]
    assert_alike(model, [fused])


def test_a_value_of_one_way_that_a_later_branch_reads():
    model = Net(state_from_branch_to_branch).eval()
    try:
        fused = qx.fuse(model)
    except TypeError as error:
        assert "control flow" in str(error)  # noqa: PT017 - either is right, a wrong answer is not
    else:
        assert_alike(model, [fused])


STATE = {"calls": 0}


class Keeping(nn.Module):
    """Keeps something from call to call, on one of its ways."""

    def __init__(self, keep, first):
        super().__init__()
        self.conv, self.keep, self.first, self.seen = nn.Conv2d(3, 4, 3, 1, 1), keep, first, []

    def forward(self, x):
        y = self.conv(x)
        if (y.shape[2] > 8) == self.first:
            return y
        return y * self.keep(self)


def grow(m):
    m.seen.append(1)
    return len(m.seen)


def count(m):
    STATE["calls"] += 1
    return STATE["calls"]


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("keep", [grow, count])
def test_what_is_kept_from_call_to_call_on_one_way_is_refused(keep, first):
    with pytest.raises(TypeError, match=r"^model: Keeping cannot be traced by torch\.fx"):
        qx.fuse(Keeping(keep, first).eval())


@pytest.mark.parametrize(
    "pair",
    [
        (torch.tensor(float("nan")), torch.tensor(0.0)),
        (torch.tensor(float("inf")), torch.tensor(torch.finfo(torch.float32).max)),
        (torch.ones(1), torch.ones(1, dtype=torch.int64)),
        (torch.tensor(0.0), torch.tensor(-0.0)),
    ],
    ids=["no number", "infinite", "type", "sign"],
)
def test_constants_of_two_ways_are_two(pair):
    def filled(m, x):
        fill = torch.tensor(pair[0].tolist(), dtype=pair[0].dtype) if x.shape[2] > 20 else pair[1].clone()
        return torch.cat([m.two(m.layers(x)).flatten()[:2].clamp(0, 1), 1 / fill.reshape(1)])

    model = nn.Sequential(nn.Conv2d(3, 3, 1), Net(filled)).eval()
    fused = qx.fuse(model)
    for side in (16, 32):
        x = torch.randn(1, 3, side, side)
        torch.testing.assert_close(fused(x), model(x), equal_nan=True)


def test_pruned_layers_are_asked_for_their_weights():
    class Pruned(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.conv, self.last = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 9, 1), nn.Conv2d(6, 6, 3, 1, 1)
            for name in ("weight", "bias"):
                setattr(self.conv, name, nn.Parameter(getattr(self.conv, name)[:6].detach()))
            self.last.weight = nn.Parameter(self.last.weight[:, :, 1:2, 1:2].detach())

        def forward(self, x):
            y = self.up(x)
            z = self.conv(y)
            if y.shape != z.shape:
                y = y * 10
            after = self.last(z)
            if after.shape[2:] != z.shape[2:]:
                z = F.pad(z, (1, 1, 1, 1))
            return y.mean() + after + z

    model = Pruned().eval()
    assert_alike(model, [qx.fuse(model)])


def test_a_users_function_of_a_known_name_keeps_nothing():
    model = Net(by_a_users_exp).eval()
    graph = trace(model)
    assert_alike(model, [as_module(model, graph, graph.constants)])


@fx.wrap
def exp(x):
    return x[:, :, ::2]


def by_a_users_exp(m, x):
    y = m.layers(x)
    z = exp(y)
    return m.two(y if y.shape == z.shape else y * 3)


def test_shortcuts_without_parameters():
    """As in the ResNets of CIFAR-10: pooling and zero channels."""

    class Padded(Block):
        def forward(self, x):
            y = self.two(F.relu(self.norm(self.one(x))))
            if x.shape[2] != y.shape[2] or x.shape[3] != y.shape[3]:
                x = F.avg_pool2d(x, 2, ceil_mode=True)
            if x.shape[1] != y.shape[1]:
                x = F.pad(x, (0, 0, 0, 0, 0, y.shape[1] - x.shape[1]))
            return F.relu(x + y)

    blocks = (Padded(8, 8, 1), Padded(8, 16, 2), Padded(16, 16, 1), Padded(16, 32, 2))
    model = nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1), *blocks).eval()
    fused = qx.fuse(model)
    assert fused.meta["whole"] == {}
    assert_alike(model, copies_of(fused))


def test_more_ways_than_are_tried_are_refused():
    def many(m, x):
        height, x = x.shape[2], m.layers(x)
        for place in range(9):
            x = x + 1 if height % (place + 2) else x * 2
        return x

    with pytest.raises(TypeError, match=r"^model: Net cannot be traced by torch\.fx"):
        qx.fuse(Net(many).eval())


# ---------------------------------------------------------------- behind the graph


def test_methods_see_through_branches():
    x = torch.randn(2, 3, 33, 48)
    model = UNet((8, 16, 16)).eval()
    result = qx.accelerate(model, qx.SpatialBottleneck(), example_input=x)
    assert len(result.replaced) >= 6
    assert_alike(result.model, [qx.fuse(result.model)])
    blocks = nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1), Block(8, 16, 1), Block(16, 16, 1)).eval()
    pairs = qx.accelerate(blocks, qx.SpatialBottleneck(), example_input=x)
    assert {"1.one", "2.one"} <= set(pairs.replaced)
    assert_alike(pairs.model, [qx.fuse(pairs.model)])


def test_a_fit_walks_through_branches():
    torch.manual_seed(0)
    model, images = UNet((4, 8)).eval(), torch.randn(8, 3, 33, 20)
    result = qx.accelerate(model, qx.Perforate(fill="fitted"), calibration=[images])
    nearest = qx.accelerate(model, qx.Perforate(fill="nearest"), calibration=[images])
    wanted = model(images)
    assert (result.model(images) - wanted).norm() < (nearest.model(images) - wanted).norm()
    assert_alike(result.model, [qx.fuse(result.model)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_other_formats_go_both_ways(dtype):
    torch.manual_seed(0)
    model = UNet((16, 16, 16)).eval()
    images = torch.randn(16, 3, 33, 20)
    more = {"calibration": images} if dtype == torch.int8 else {}
    fused = qx.fuse(model, dtype, force=True, **more)
    for sides in ((33, 20), (32, 48), (19, 27)):
        x = torch.randn(2, 3, *sides)
        wanted = model(x)
        assert (fused(x) - wanted).norm() < 0.1 * wanted.norm()


@pytest.mark.parametrize("sides", [(32, 32), (33, 21)])
def test_exported_for_one_size(sides):
    model = UNet().eval()
    x = torch.randn(2, 3, *sides)
    batch = {0: torch.export.Dim("images")}
    exported = torch.export.export(qx.fuse(model), (x,), strict=False, dynamic_shapes=(batch,))
    more = torch.randn(5, 3, *sides)
    torch.testing.assert_close(exported.module()(more), model(more), rtol=1e-4, atol=1e-5)


def test_the_graphs_own_code_is_traced():
    model = UNet().eval()
    graph = trace(model)
    module = as_module(model, graph, graph.constants)
    again = fx.symbolic_trace(module)
    assert eithers(again.graph) == 3
    assert_alike(model, [module, again])
