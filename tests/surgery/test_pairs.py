"""Pairs of convolutions: which are found, and what surgery, saving, fusing and training make of them."""

import copy
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

import quincunx as qx
from helpers.graphs import Graph, steps
from quincunx.layers.paired import PairedDown2d, PairedUp2d
from quincunx.layers.tracing import trace
from quincunx.surgery.pairs import find_pairs, find_pointwise

ALL = qx.Cosets(2, [(0, 0), (0, 1), (1, 0), (1, 1)])
# every position and no data: the weights themselves
EXACT = qx.SpatialBottleneck(ALL, data=False, singles=False)


def conv(inputs=4, outputs=4, size=3, **settings):
    return nn.Conv2d(inputs, outputs, size, **{"padding": "same", **settings})


class Own(nn.Module):
    """A forward given as a function of the module and its input."""

    def __init__(self, run, **parts):
        super().__init__()
        self.run = run
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x):
        return self.run(self, x)


def two(run, **change):
    return Own(run, a=conv(**change), b=conv())


def branching(*parts):
    """Not for torch.fx: the way depends on the data."""

    def run(net, x):
        for part in net.children():
            x = part(x) if x.sum() < 1e30 else x
        return x

    return Own(run, **{f"part{i}": part for i, part in enumerate(parts)})


def block(**change):
    return nn.Sequential(conv(**change), nn.ReLU(), conv())


# ---------------------------------------------------------------- any network


@given(st.lists(steps, min_size=2, max_size=9), st.integers(0, 99))
@settings(max_examples=30)
def test_pairs_at_every_position_change_no_network(choices, seed):
    torch.manual_seed(seed)
    model = Graph([("conv", 0, 2), ("relu", 0, 0), ("conv", 0, 1), *choices]).eval()
    x = torch.randn(2, 3, 7, 6, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "accelerate: spatialbottleneck replaced nothing")
        result = qx.accelerate(model, EXACT, example_input=x)
    ends = [end for pair in find_pairs(model).found for end in pair]
    assert sorted(result.replaced) == sorted(ends)
    assert {*result.replaced, *result.skipped} == {
        name for name, part in model.named_modules() if type(part) is nn.Conv2d
    }
    want = model(x)
    torch.testing.assert_close(result.model(x), want, rtol=0, atol=1e-10 * float(want.detach().abs().max()))


KINDS = {
    "plain": {},
    "dilated": {"dilation": (2, 3)},
    "grouped": {"groups": 2},
    "depthwise": {"groups": 4},
    "bias-free": {"bias": False},
    "tall": {"size": (5, 1)},
    "padding in numbers": {"size": (3, 5), "padding": (1, 2)},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [True, False])
def test_pairs_of_every_kind_keep_their_weights(kind, training):
    model = nn.Sequential(conv(3, 4), conv(**KINDS[kind]), nn.PReLU(), conv(**KINDS[kind]), nn.Flatten())
    model = model.double().train(training)
    with torch.no_grad():
        model[1].weight.mul_(1 + 1e-9)  # what float32 would round away
    x = torch.randn(2, 3, 7, 9, dtype=torch.float64)
    result = qx.accelerate(model, EXACT, where=[("1", "3")], example_input=x)
    assert (sorted(result.replaced), list(result.skipped)) == (["1", "3"], ["0"])
    assert [type(result.model[i]) for i in (1, 3)] == [PairedDown2d, PairedUp2d]
    assert result.model[1].training == training
    torch.testing.assert_close(result.model(x), model(x), rtol=1e-12, atol=1e-12)


def test_the_second_half_makes_up_for_the_positions_left_out():
    model, x = block(), torch.randn(2, 4, 8, 8)
    new = qx.accelerate(model, qx.SpatialBottleneck(qx.QUARTER, data=False), example_input=x).model
    first, second = (model[i].weight.detach() for i in (0, 2))
    assert torch.equal(new[0].weight, first)
    torch.testing.assert_close(new[2].weight, 4 * second.transpose(0, 1).flip((2, 3)))
    sampled = F.relu(model[0](x)) * qx.QUARTER.mask(8, 8)
    want = 4 * F.conv2d(sampled, second, None, padding=1) + model[2].bias.view(-1, 1, 1)
    torch.testing.assert_close(new(x), want, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- what is a pair


class Pointless(nn.ReLU):
    """Of a class that passes, with a forward that does not."""

    def forward(self, x):
        return x - x.mean((2, 3), keepdim=True)


PAIRS = {
    "alone": two(lambda n, x: n.b(n.a(x))),
    "functional relu": two(lambda n, x: n.b(F.relu(n.a(x), inplace=True))),
    "method": two(lambda n, x: n.b(n.a(x).relu())),
    "dropout": two(lambda n, x: n.b(F.dropout(F.leaky_relu(n.a(x), 0.2), 0.1, n.training))),
    "norm and activation": nn.ModuleDict({"a": conv(), "b": conv()}),
    "silu": two(lambda n, x: n.b(F.silu(n.a(x))) + x),
    "dilated": two(lambda n, x: n.b(n.a(x)), dilation=3),
    "tall": two(lambda n, x: n.b(n.a(x)), size=(1, 3)),
    "a number is added": two(lambda n, x: n.b(n.a(x) + 1)),
    "constants of channels": two(lambda n, x: n.b(2 * n.a(x) / torch.ones(4, 1, 1) - torch.ones(1, 4, 1, 1))),
}


@pytest.mark.parametrize("case", PAIRS)
def test_what_is_a_pair(case):
    model = PAIRS[case]
    if case == "norm and activation":
        parts = {"a": conv(), "norm": nn.BatchNorm2d(4), "act": nn.GELU(), "off": nn.Dropout2d(), "b": conv()}
        model = nn.Sequential()
        for name, part in parts.items():
            model.add_module(name, part)
    assert find_pairs(model).found == (("a", "b"),)


NO_PAIRS = {
    "another reader": two(lambda n, x: (lambda y: n.b(F.relu(y)) + y)(n.a(x))),
    "read after the activation": two(lambda n, x: (lambda y: n.b(y) + y)(F.relu(n.a(x)))),
    "returned too": two(lambda n, x: (lambda y: (n.b(y), y))(n.a(x))),
    "1 x 1": two(lambda n, x: n.b(n.a(x)), size=1),
    "even kernel": two(lambda n, x: n.b(n.a(x)), size=(3, 4)),
    "no padding": two(lambda n, x: n.b(n.a(x)), padding=0),
    "too much padding": two(lambda n, x: n.b(n.a(x)), padding=2),
    "padding that dilation outgrows": two(lambda n, x: n.b(n.a(x)), padding=1, dilation=2),
    "called twice": two(lambda n, x: n.b(n.a(n.a(x)))),
    "second called twice": two(lambda n, x: n.b(n.b(n.a(x)))),
    "pooling": two(lambda n, x: n.b(F.max_pool2d(n.a(x), 3, 1, 1))),
    "addition": two(lambda n, x: n.b(n.a(x) + x)),
    "a constant for each position": two(lambda n, x: n.b(n.a(x) + torch.ones(6, 6))),
    "a scale of its own": two(lambda n, x: n.b(n.a(x) * n.a(x))),
    "group norm": nn.Sequential(conv(), nn.GroupNorm(2, 4), conv()),
    "a subclass's own forward": nn.Sequential(conv(), Pointless(), conv()),
    "softmax over positions": two(lambda n, x: n.b(F.softmax(n.a(x), -1))),
    "transposed back": two(lambda n, x: n.b(n.a(x).transpose(2, 3))),
}


@pytest.mark.parametrize("case", NO_PAIRS)
def test_what_is_no_pair(case):
    found = find_pairs(NO_PAIRS[case])
    assert (found.found, found.untraced) == ((), {})


def test_a_part_without_convolutions_that_cannot_be_traced_hides_no_pair():
    norm = branching(nn.ReLU())
    net = nn.Sequential(conv(), nn.ReLU(), conv(), norm, conv(), nn.ReLU(), conv())
    found = find_pairs(net)
    assert dict(found.found) == {"0": "2", "4": "6"}
    assert not found.untraced


def _in_pieces(split):
    def run(net, x):
        return torch.cat([part(piece) for piece, part in zip(split(x), net.children(), strict=True)], 1)

    return Own(run, a=block(inputs=2, outputs=4), b=nn.Sequential(conv(2, 4), nn.ReLU(), conv()))


SPLITS = {
    "chunk": lambda x: x.chunk(2, 1),
    "torch.chunk": lambda x: torch.chunk(x, chunks=2, dim=1),
    "sizes": lambda x: x.split([2, 2], 1),
    "torch.split": lambda x: torch.split(x, split_size_or_sections=(2, 2), dim=1),
}


@pytest.mark.parametrize("case", SPLITS)
def test_a_loop_through_the_pieces_of_a_map_is_looked_into(case):
    net = _in_pieces(SPLITS[case]).eval()
    found = find_pairs(net)
    assert dict(found.found) == {"a.0": "a.2", "b.0": "b.2"}
    assert not found.untraced
    x = torch.randn(2, 4, 6, 6)
    assert not trace(net).whole
    torch.testing.assert_close(qx.fuse(net)(x), net(x))


def test_a_piece_that_is_missing_is_never_made_up():
    net = Own(lambda _, x: sum(piece for piece in x.chunk(4, 1)))
    net.weight = nn.Parameter(torch.ones(1))
    fast = qx.fuse(net)
    x = torch.randn(1, 8, 2, 2)
    assert torch.equal(fast(x), net(x))
    with pytest.raises(IndexError):
        fast(x[:, :5])  # chunk gives three pieces of it


def test_what_cannot_be_looked_into_is_told_once_and_by_the_parts_that_are_why():
    torch.manual_seed(0)
    parts = [branching(conv(), nn.ReLU(), conv()) for _ in range(5)]
    net = nn.Sequential(conv(), nn.ModuleDict({"all": nn.Sequential(*parts)})["all"])
    loop = Own(lambda net, x: next(net.b(y) for y in net.a(x)), a=conv(), b=nn.ModuleList([conv()]))
    assert "it goes through a value in a loop" in find_pairs(loop).untraced[""]
    assert "b" not in find_pairs(loop).untraced  # a list of modules has no forward to look into
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        qx.accelerate(net, EXACT, example_input=torch.randn(1, 4, 6, 6))
    said = [str(one.message) for one in caught if "torch.fx" in str(one.message)]
    assert len(said) == 1
    assert said[0].startswith("accelerate: 1.0, 1.1, 1.2 and 2 more: Own cannot be traced by torch.fx (")


def test_a_shared_weight_or_a_layer_left_out_makes_no_pair():
    x = torch.randn(1, 4, 6, 6)
    model = nn.Sequential(conv(), conv(), nn.ReLU(), conv())
    model[3].weight = model[0].weight
    result = qx.accelerate(model, qx.SpatialBottleneck(data=False), example_input=x)
    assert list(result.replaced) == ["1"]
    assert "pair" not in result.replaced["1"]
    result = qx.accelerate(
        block(), qx.SpatialBottleneck(data=False), where=lambda name, _: name == "2", example_input=x
    )
    assert "pair" not in result.replaced["2"]
    with pytest.warns(UserWarning, match="replaced nothing"):
        result = qx.accelerate(block(), EXACT, where=["2"], example_input=x)
    assert result.skipped["2"] == "no other convolution on its grid makes a pair with it"


def test_a_module_with_two_names_that_is_called_once_is_in_a_pair():
    model = block()
    model.add_module("9", nn.Identity())
    model[3].add_module("inner", model[0])  # a second name, not a second call
    x = torch.randn(1, 4, 6, 6)
    result = qx.accelerate(model, EXACT, example_input=x)
    assert result.replaced["2"]["pair"] == ["0", "2"]
    assert result.model[0] is result.model[3].inner
    torch.testing.assert_close(result.model(x), model(x), rtol=1e-4, atol=1e-5)


def test_of_a_chain_the_first_two_are_a_pair_and_the_next_two():
    model = nn.Sequential(*(conv() for _ in range(5)))
    assert find_pairs(model).found == (("0", "1"), ("2", "3"))
    result = qx.accelerate(model, qx.SpatialBottleneck(data=False), example_input=torch.randn(1, 4, 6, 6))
    assert [made.get("pair") for made in result.replaced.values()] == [
        ["0", "1"],
        ["0", "1"],
        ["2", "3"],
        ["2", "3"],
        None,
    ]
    assert result.replaced["4"]["kind"] == "SpatialBottleneck2d"
    assert result.model(torch.randn(2, 4, 5, 7)).shape == (2, 4, 5, 7)


def test_looking_for_pairs_leaves_no_trace_in_the_network():
    def run(net, x):
        net.seen = net.a(x)
        return net.b(net.seen)

    model = two(run)
    assert find_pairs(model).found == (("a", "b"),)
    assert not hasattr(model, "seen")
    result = qx.accelerate(model, EXACT, example_input=torch.randn(1, 4, 6, 6))
    copy.deepcopy(result.model)


# ---------------------------------------------------------------- networks that cannot be traced


def test_the_parts_of_a_network_that_cannot_be_traced():
    model, x = branching(block(), branching(block())), torch.randn(2, 4, 6, 6)
    with pytest.warns(UserWarning, match="cannot be traced") as told:
        result = qx.accelerate(model, EXACT, example_input=x)
    texts = [str(warning.message) for warning in told]
    assert len(texts) == 1
    assert texts[0].startswith("accelerate: part1: Own cannot be traced by torch.fx (")
    assert texts[0].endswith("of these, and of what holds them")
    assert sorted(result.replaced) == ["part0.0", "part0.2", "part1.part0.0", "part1.part0.2"]
    assert result.replaced["part0.2"]["pair"] == ["part0.0", "part0.2"]
    torch.testing.assert_close(result.model(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:accelerate")
def test_a_part_that_is_called_twice_or_never_or_unknown_has_no_pairs():
    twice = Own(lambda n, x: n.a(n.a(x)) if x.sum() < 1e30 else x, a=block())
    assert find_pairs(twice).found == (("a.0", "a.2"),)
    result = qx.accelerate(twice, EXACT, example_input=torch.randn(1, 4, 6, 6))
    assert sorted(result.skipped) == ["a.0", "a.2"]
    never = Own(lambda n, x: n.a(x) if x.sum() < 1e30 else n.b(x), a=block(), b=block())
    result = qx.accelerate(never, EXACT, example_input=torch.randn(1, 4, 6, 6))
    assert sorted(result.replaced) == ["a.0", "a.2"]
    assert result.skipped == dict.fromkeys(["b.0", "b.2"], "never called for this input")
    # without an input nobody knows how often a part is called
    assert qx.accelerate(never, EXACT).replaced == {}


def test_pairs_that_the_user_names():
    model, x = branching(conv(), nn.ReLU(), conv(), conv()), torch.randn(2, 4, 6, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing has to be found
        result = qx.accelerate(model, EXACT, where=[("part0", "part2")], example_input=x)
    assert sorted(result.replaced) == ["part0", "part2"]
    assert result.skipped == {"part3": "left out by where"}
    torch.testing.assert_close(result.model(x), model(x), rtol=1e-4, atol=1e-5)
    result = qx.accelerate(
        model, qx.SpatialBottleneck(data=False), where=[("part0", "part2"), "part3"], example_input=x
    )
    assert [made.get("pair") for made in result.replaced.values()] == [["part0", "part2"]] * 2 + [None]


@pytest.mark.parametrize(
    ("error", "match", "where"),
    [
        (ValueError, "the network has no layer 'x'", ["x"]),
        (ValueError, "the network has no layer 'x'", [("0", "x")]),
        (TypeError, "expected a layer's name or two names", [("0", "2", "3")]),
        (TypeError, "expected a layer's name or two names", [(), "0"]),
        (TypeError, "expected a layer's name or two names", [("0", 2)]),
        (ValueError, "'0' and '3' are no pair: '3' has to be a convolution larger than 1 x 1", [("0", "3")]),
        (ValueError, "'0' and '1' are no pair: '1' has to be", [("0", "1")]),
        (ValueError, "'2' and '0' are no pair: '0' runs first", [("2", "0")]),
        (ValueError, "'2' cannot be in a pair twice", [("0", "2"), ("2", "4")]),
        (ValueError, "'0' cannot be in a pair twice", [("0", "2"), ("0", "4")]),
        (ValueError, "'0' cannot be in a pair twice", [("0", "0")]),
        (ValueError, r"'0' and '4' are no pair: maps of \(1, 4, 6, 6\) come out, and \(1, 5", [("0", "4")]),
    ],
)
def test_bad_names(error, match, where):
    model = nn.Sequential(conv(), nn.ReLU(), conv(), conv(4, 5, 1), conv(5, 4))
    with pytest.raises(error, match=match):
        qx.accelerate(model, EXACT, where=where, example_input=torch.randn(1, 4, 6, 6))


@pytest.mark.parametrize(
    "method", [qx.SpatialBottleneck(data=False), qx.LowRank(rank=2), qx.Perforate()], ids=lambda m: m.name
)
def test_names_of_what_is_no_layer(method):
    model = nn.Sequential(nn.Sequential(conv(), nn.BatchNorm2d(4)), nn.ReLU(), conv()).eval()
    x = torch.randn(1, 4, 6, 6)
    said = r"where: '0' is a Sequential, which holds layers; name those, or give .*startswith\('0\.'\)"
    for where in (["0"], "0", [("0", "2")]):
        with pytest.raises(ValueError, match=said):
            qx.accelerate(model, method, where=where, example_input=x)
    with pytest.raises(ValueError, match="where: '' is a Sequential, which holds layers"):
        qx.accelerate(model, method, where=[""], example_input=x)
    found = qx.accelerate(model, method, where=iter(["0.1", "0.0"]), example_input=x)
    assert list(found.replaced) == ["0.0"]
    assert found.skipped["0.1"].startswith("a BatchNorm2d: only Conv2d")
    assert found.skipped["2"] == "left out by where"


# ---------------------------------------------------------------- life of a pair


def made(sampling=qx.CHESSBOARD, down="stride", model=None, **change):
    model = model or nn.Sequential(
        conv(3, 6), nn.BatchNorm2d(6), nn.ReLU(), conv(6, 4), nn.BatchNorm2d(4), nn.ReLU(), conv(4, 2)
    )
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.normal_()
            part.running_var.uniform_(0.5, 2)
    method = qx.SpatialBottleneck(sampling, down=down, data=False, singles=False)
    return qx.accelerate(model.eval(), method, example_input=torch.randn(1, 3, 8, 8), **change)


def test_hooks_survive():
    calls = []
    model = block()
    model[0].register_forward_hook(lambda m, *_: calls.append(type(m).__name__))
    model[2].register_forward_pre_hook(lambda m, args: (args[0] * 2,))
    x = torch.randn(2, 4, 6, 6)
    result = qx.accelerate(model, EXACT, example_input=x)
    assert [result.replaced[name]["hooks"] for name in ("0", "2")] == [1, 1]
    calls.clear()
    torch.testing.assert_close(result.model(x), model(x), rtol=1e-4, atol=1e-5)
    assert calls == ["PairedDown2d", "Conv2d"]


def test_the_size_of_the_input_may_change_from_call_to_call():
    model = made().model
    for size in ((8, 8), (5, 9), (7, 2), (8, 8)):
        assert model(torch.randn(1, 3, *size)).shape == (1, 2, *size)
    with pytest.raises(ValueError, match="smaller than the sampling's period"):
        model(torch.randn(1, 3, 1, 8))


def test_a_copy_has_a_grid_of_its_own():
    model = made().model
    other = copy.deepcopy(model)
    model(torch.randn(1, 3, 9, 9))
    assert other[3].grid is other[0].grid is not model[0].grid
    assert other(torch.randn(1, 3, 4, 6)).shape == (1, 2, 4, 6)
    assert set(model[0].grid.sizes.values()) - set(other[0].grid.sizes.values()) == {(9, 9)}


def test_a_half_on_its_own():
    up = PairedUp2d(4, 2, sampling=qx.CHESSBOARD, partner="first")
    with pytest.raises(RuntimeError, match="pair of 'first': the grid's size is unknown"):
        up(torch.randn(1, 4, 18, 1))
    assert up(torch.randn(1, 4, 18, 1), (6, 6)).shape == (1, 2, 6, 6)
    with pytest.raises(AttributeError, match="first"):
        up.attach(nn.Sequential(up))
    with pytest.raises(ValueError, match="partner='first': expected a PairedDown2d, got ReLU"):
        up.attach(Own(None, first=nn.ReLU()))


@pytest.mark.parametrize("down", ["stride", "avgpool"])
def test_saved_and_loaded(tmp_path, down):
    def make():
        return nn.Sequential(
            conv(3, 6), nn.BatchNorm2d(6), nn.ReLU(), conv(6, 4), nn.BatchNorm2d(4), nn.ReLU(), conv(4, 2)
        )

    model = made(down=down, model=make()).model
    loaded = qx.load(qx.save(model, tmp_path / "fast", factory="mine:make"), factory=make)
    for size in ((8, 8), (5, 7)):
        x = torch.randn(2, 3, *size)
        assert torch.equal(loaded(x), model(x))
    again = qx.load(qx.save(loaded, tmp_path / "again", factory="mine:make"), factory=make)
    assert torch.equal(again(x), model(x))


def test_a_spec_whose_first_half_is_missing_is_refused(tmp_path):
    model = made().model
    model.quincunx_replaced = {"3": model.quincunx_replaced["3"]}
    folder = qx.save(model, tmp_path / "fast", factory="mine:make")
    with pytest.raises(ValueError, match=r"spec.json: .*partner='0': expected a PairedDown2d, got Conv2d"):
        qx.load(
            folder,
            factory=lambda: nn.Sequential(
                conv(3, 6), nn.BatchNorm2d(6), nn.ReLU(), conv(6, 4), nn.BatchNorm2d(4), nn.ReLU(), conv(4, 2)
            ),
        )


def residual():
    """Two blocks in which a shortcut is added behind the pair."""
    model = Own(
        lambda n, x: F.relu(n.b2(F.relu(n.b1(F.relu(n.a2(F.gelu(n.a1(x))) + x)))) + x),
        a1=conv(3, 8),
        a2=nn.Sequential(conv(8, 3), nn.BatchNorm2d(3)),
        b1=nn.Sequential(conv(3, 8), nn.BatchNorm2d(8)),
        b2=conv(8, 3),
    )
    model.a2[1].running_mean.normal_()
    return model


@pytest.mark.parametrize("down", ["stride", "avgpool"])
@pytest.mark.parametrize("sampling", [qx.CHESSBOARD, qx.QUARTER, qx.Uniform(0.3)])
def test_fused(down, sampling):
    if down == "avgpool" and sampling == qx.Uniform(0.3):
        pytest.skip("pooling is by coset")
    model = made(sampling, down, residual()).model
    assert sum(isinstance(part, PairedUp2d) for part in model.modules()) == 2
    fast = qx.fuse(model)
    for size in ((8, 8), (7, 9), (5, 3)):
        x = torch.randn(2, 3, *size)
        torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("down", ["stride", "avgpool"])
def test_compiled_and_exported(down):
    model = made(down=down).model
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for size in ((8, 8), (9, 7), (6, 5)):
        x = torch.randn(2, 3, *size)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    program = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(program(x), model(x), rtol=1e-4, atol=1e-5)
    # no stand-in of the compiler's was kept
    assert model[0].grid.symbols is None
    assert all(type(value) is int for size in model[0].grid.sizes.values() if size for value in size)


def test_the_second_half_is_fused_into_a_program_on_the_native_back_end():
    if qx.backend().name != "native":
        pytest.skip("the native back end is not built")
    fast = qx.fuse(made().model)
    assert not any(isinstance(part, PairedUp2d) for part in fast.modules())


@pytest.mark.parametrize("down", ["stride", "avgpool"])
def test_gradients_through_a_pair(down):
    model = nn.Sequential(conv(2, 2), nn.Tanh(), conv(2, 1)).double()
    method = qx.SpatialBottleneck(qx.CHESSBOARD, down=down, data=False)
    model = qx.accelerate(model, method).model
    x = torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    names, values = zip(*model.named_parameters(), strict=True)
    assert len(names) == 4

    def run(x, *values):
        return torch.func.functional_call(model, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *values))


def test_a_pair_trains():
    result = made()
    model = result.model.train()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.01)
    x, want = torch.randn(4, 3, 8, 8), torch.zeros(4, 2, 8, 8)
    losses = []
    for _ in range(5):
        loss = F.mse_loss(model(x), want)
        optimiser.zero_grad()
        loss.backward()
        assert all(
            p.grad is not None and bool(p.grad.abs().sum() > 0)
            for n, p in model.named_parameters()
            if n in ("0.weight", "3.weight", "3.bias")
        )
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


# ---------------------------------------------------------------- the size that a map carries


class Between(nn.Module):
    """What a test puts between the halves."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, y):
        return self.function(y)


def halves(*between, **settings):
    """A pair with modules between its halves."""
    first = PairedDown2d(3, 6, sampling=qx.CHESSBOARD, **settings)
    second = PairedUp2d(6, 2, sampling=qx.CHESSBOARD, partner="0")
    model = nn.Sequential(first, *between, second)
    second.attach(model)
    return model.eval()


# two sizes of as many positions, and one of its own
SIZES = ((6, 10), (10, 6), (5, 4))


def told(model, x):
    """What a pair answers when its second half is told the size."""
    y = x
    for part in model[:-1]:
        y = part(y)
    return model[-1](torch.Tensor.as_subclass(y, torch.Tensor), x.shape[2:])


def scripted():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(nn.Hardswish())


@pytest.mark.parametrize(
    "between",
    [
        (),
        (nn.BatchNorm2d(6), nn.ReLU(inplace=True)),
        (nn.GroupNorm(2, 6), nn.Dropout2d(0.5), nn.PReLU(6)),
        (Between(lambda y: F.layer_norm(y.permute(0, 2, 3, 1), (6,)).permute(0, 3, 1, 2)),),
        (Between(lambda y: y * torch.sigmoid(y.mean((2, 3), keepdim=True))),),
        (Between(lambda y: y.mul_(2).add_(torch.ones(1, 6, 1, 1))),),
        (Between(lambda y: torch.cat(y.chunk(2, 1)[::-1], 1).contiguous()),),
        (scripted(),),
    ],
)
def test_a_map_carries_its_size_through_what_stands_between(between):
    model = halves(*between)
    for size in SIZES * 2:
        x = torch.randn(2, 3, *size)
        got = model(x)
        assert type(got) is torch.Tensor
        torch.testing.assert_close(got, told(model, x))


def test_two_threads_between_the_halves_with_two_sizes():
    meeting = threading.Barrier(2, timeout=20)
    model = halves(nn.SiLU(), Between(lambda y: (meeting.wait(), y)[1]))
    images = [torch.randn(1, 3, *size) for size in SIZES[:2]]
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(model, images))
    meeting.abort()
    quiet = nn.Sequential(model[0], model[1], model[3])
    for image, answer in zip(images, answers, strict=True):
        torch.testing.assert_close(answer, told(quiet, image))


class Recomputed(nn.Module):
    """A pair whose halves are in two parts that are computed again in the backward pass."""

    def __init__(self, model, at, reentrant):
        super().__init__()
        self.parts, self.reentrant = nn.ModuleList([model[:at], model[at:]]), reentrant

    def forward(self, x):
        for part in self.parts:
            x = checkpoint(part, x, use_reentrant=self.reentrant)
        return x


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("at", [1, 2, 3])
def test_crops_of_several_sizes_in_one_loss_under_checkpointing(reentrant, at):
    model = halves(nn.BatchNorm2d(6), nn.ELU())
    crops = [torch.randn(2, 3, *size, requires_grad=True) for size in SIZES]
    gradients = []
    for net in (model, Recomputed(model, at, reentrant)):
        model.zero_grad()
        sum(net(crop).square().sum() for crop in crops).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for want, got in zip(*gradients, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_a_map_that_lost_its_size_is_taken_only_where_one_size_is_possible():
    model = halves(Between(lambda y: torch.from_numpy(y.detach().numpy() * 2)))
    first, second, third = (torch.randn(1, 3, *size) for size in SIZES)
    torch.testing.assert_close(model(first), told(model, first))
    with pytest.raises(RuntimeError, match="pair of '0': the grid's size is unknown"):
        model(second)
    with pytest.raises(RuntimeError, match="pair of '0': the grid's size is unknown"):
        model(first)
    torch.testing.assert_close(model(third), told(model, third))
    # a compiled first half notes nothing
    torch.compile(model[0], backend="eager")(torch.randn(1, 3, 4, 5))
    with pytest.raises(RuntimeError, match="pair of '0': the grid's size is unknown"):
        model(third)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
@pytest.mark.parametrize("inplace", [True, False])
def test_compiled_with_a_break_between_the_halves(inplace):
    model = halves(nn.ReLU(inplace), Between(lambda y: (torch._dynamo.graph_break(), y)[1]))
    compiled = torch.compile(model, backend="aot_eager")
    for size in SIZES:
        x = torch.randn(2, 3, *size)
        torch.testing.assert_close(compiled(x), told(model, x))


def test_a_kept_map_can_be_copied_and_stored(tmp_path):
    model = halves(nn.ReLU())
    model.kept = model[0](torch.randn(1, 3, 4, 7)).detach()
    kept = copy.deepcopy(model).kept
    assert kept.grid_size == (4, 7) == model.kept.data.grid_size
    assert torch.equal(kept, model.kept)
    assert kept.data_ptr() != model.kept.data_ptr()
    leaf = model.kept.requires_grad_()
    leaf.square().sum().backward()
    assert type(leaf.grad) is torch.Tensor


def test_what_is_no_sampled_map_any_more_is_an_ordinary_tensor():
    y = halves()[0](torch.randn(2, 3, 6, 5))
    assert y.grid_size == (6, 5) == (y + 1).grid_size
    assert type(y.sum()) is type(y.flatten()) is type(qx.fill_nearest(y, sampling=qx.CHESSBOARD, size=(6, 5)))
    assert type(y.sum()) is torch.Tensor
    other = halves()[0](torch.randn(2, 3, 5, 6))
    assert type(y + other) is torch.Tensor


def inverted_residual(kernel=3, **change):
    """An inverted residual in eval mode, with an expansion of 3."""
    channels, padding = 12, kernel // 2
    parts = [
        *(nn.Conv2d(4, channels, 1), nn.BatchNorm2d(channels), nn.ReLU6()),
        nn.Conv2d(channels, channels, kernel, **{"padding": padding, "groups": channels, **change}),
        *(nn.BatchNorm2d(channels), nn.Hardswish(), nn.Conv2d(channels, 4, 1)),
    ]
    return nn.Sequential(*parts).eval()


def test_finds_the_expansion_before_a_depthwise_convolution():
    assert find_pairs(inverted_residual()).found == (("0", "3"),)
    assert find_pairs(inverted_residual(stride=2)).found == ()
    assert find_pairs(inverted_residual(groups=1)).found == ()  # there the second half has the work
    for net in (inverted_residual(), inverted_residual(5, stride=2)):
        assert find_pointwise(net) == {"3": "6"}


def test_an_expansion_at_every_position_changes_nothing():
    net, x = inverted_residual(), torch.randn(2, 4, 8, 6)
    result = qx.accelerate(net, EXACT, example_input=x)
    assert result.replaced["0"]["pair"] == result.replaced["3"]["pair"] == ["0", "3"]
    assert "6" in result.skipped
    torch.testing.assert_close(result.model(x), net(x))


@pytest.mark.parametrize("sampling", [qx.CHESSBOARD, qx.QUARTER], ids=str)
def test_an_inverted_residual_is_fitted_and_fused(sampling):
    net, x = inverted_residual(5), torch.randn(4, 4, 12, 12)
    result = qx.accelerate(net, qx.SpatialBottleneck(sampling), calibration=[torch.randn(32, 4, 12, 12)])
    unfitted = qx.accelerate(net, qx.SpatialBottleneck(sampling, data=False), example_input=x)
    with torch.no_grad():
        wrong, worse = ((made.model(x) - net(x)).square().mean() for made in (result, unfitted))
        assert wrong < worse
        torch.testing.assert_close(qx.fuse(result.model, check=x)(x), result.model(x), rtol=1e-4, atol=1e-5)
    assert qx.cost(result.model, x).macs < qx.cost(net, x).macs


def test_a_norm_that_is_traced_joins_a_pair():
    """As timm's, whose forward asserts on the map and calls the function."""

    class Norm(nn.BatchNorm2d):
        def forward(self, x):
            torch._assert(x.ndim == 4, "expected 4D")
            return F.relu(F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias))

    net = nn.Sequential(nn.Conv2d(4, 8, 1), Norm(8), nn.Conv2d(8, 8, 3, padding=1, groups=8)).eval()
    assert find_pairs(net).found == (("0", "2"),)
    x = torch.randn(1, 4, 6, 6)
    torch.testing.assert_close(qx.accelerate(net, EXACT, example_input=x).model(x), net(x))
    shifted = Own(
        lambda self, x: self.b(F.batch_norm(self.a(x), None, x.mean((0, 2, 3)))), a=conv(), b=conv()
    )
    assert find_pairs(shifted).found == ()
