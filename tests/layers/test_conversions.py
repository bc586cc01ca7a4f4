"""``int`` and ``float`` of sizes are worked out at each call, and mean what they mean everywhere else."""

import types
from functools import partial
from math import ceil, floor

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import quincunx as qx
from quincunx.layers.conversions import functions_of, handed_on
from quincunx.layers.graph import trace

SIDES = [(16, 16), (17, 20), (9, 31), (40, 12)]


class Net(nn.Module):
    def __init__(self, run):
        super().__init__()
        self.run, self.conv, self.last = run, nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 2, 3, 1, 1)

    def forward(self, x):
        return self.run(self, x)


def doubled(m, x):
    h, w = x.shape[2:]
    return m.last(F.interpolate(m.conv(x), size=(int(h * 2), int(w * 2.0))))


def a_share(m, x):
    y = m.conv(x)
    return m.last(F.adaptive_avg_pool2d(y, (max(1, int(y.size(2) / 3)), int(0.5 + y.shape[3] * 0.4))))


def scaled(m, x):
    y = m.conv(x)
    return m.last(F.interpolate(y, scale_factor=float(x.shape[2]) / float(y.shape[2]), mode="bilinear"))


def normalised(m, x):
    return m.last(m.conv(x)) / float(x.shape[2] * x.shape[3])


def divided(m, x):
    y = m.conv(x)
    rows, rest = divmod(y.shape[2], 4)
    return m.last(F.pad(y, (0, 0, 0, 4 - rest))) * rows


def kept_apart(m, x):
    assert isinstance(3, int)
    assert isinstance(True, (float, int))
    assert not isinstance(3.0, int)
    assert int("12", 16) == 18
    assert len([1, 2]) == 2
    return m.last(m.conv(x)) * int(2.5)


def asked(m, x):
    y = m.conv(x)
    return m.last(y) if int(y.shape[2] / 2) * 2 == y.shape[2] else m.last(y)[:, :, :-1]


def half_of(size):
    return int(size // 2)


def by_a_helper(m, x):
    y = m.conv(x)
    return m.last(y[:, :, : half_of(y.shape[2]), : half_of(y.shape[3])])


def channels_counted(m, x):
    y = m.conv(x)
    return sum(y[:, i : i + 1] for i in range(int(y.shape[1])))


def counted_images(m, x):
    y = m.last(m.conv(x))
    return y.view(len(x), -1) * len(y)


def counted_others(m, x):
    parts = [m.conv(x), len("three"), len([x, x])]
    y = m.last(parts[0]) * parts[1] * len(parts)
    return y + len(x.shape) + len(y.chunk(2, 1))


def rounded_up(m, x):
    y = m.conv(x)
    return m.last(F.adaptive_avg_pool2d(y, (ceil(y.shape[2] / 2), floor(y.shape[3] / 1.5))))


def pooled_whole(m, x):
    y = m.conv(x)
    return m.last(F.avg_pool2d(y, y.size()[2:]) + nn.AvgPool2d((y.shape[2], y.shape[3]))(y))


RUNS = [
    rounded_up,
    pooled_whole,
    counted_images,
    counted_others,
    doubled,
    a_share,
    scaled,
    normalised,
    divided,
    kept_apart,
    asked,
    by_a_helper,
    channels_counted,
]


@pytest.mark.parametrize("run", RUNS)
def test_sizes_are_converted_at_each_call(run):
    model = Net(run).eval()
    fused = qx.fuse(model)
    assert fused.meta["whole"] == {}
    for images in (1, 3):
        for sides in SIDES:
            x = torch.randn(images, 3, *sides)
            torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-5)


def test_names_are_given_back():
    trace(Net(doubled).eval())
    assert not [name for name in globals() if "quincunx_" in name]
    with pytest.raises(TypeError):
        trace(Net(lambda m, x: [m.conv(x) for _ in range(int(x.shape[2]))]).eval())
    assert not [name for name in globals() if "quincunx_" in name]


@pytest.mark.parametrize("make", [lambda x: int(x.sum()), lambda x: float(x.mean())])
def test_of_values_they_are_refused(make):
    def run(m, x):
        return m.last(m.conv(x)) * make(x)

    with pytest.raises(TypeError, match=r"it makes an? \w+ of a value that is known only when it runs"):
        qx.fuse(Net(run).eval())


def codes(code):
    inner = [one for one in code.co_consts if isinstance(one, types.CodeType)]
    return [code, *(found for one in inner for found in codes(one))]


def module(text):
    made = types.ModuleType("a_users_module")
    exec(text, vars(made))
    return made


def test_a_name_with_a_meaning_of_its_own_is_left_alone():
    own = module("int = round\ndef run(m, x):\n    return m.last(m.conv(x)) * int(2.5)\n")
    model = Net(own.run).eval()
    assert own.int is round
    torch.testing.assert_close(qx.fuse(model)(x := torch.randn(1, 3, 8, 8)), model(x), rtol=1e-4, atol=1e-5)
    assert own.int is round


HANDED_ON = {
    "(2 if type(3) is int else 5)": {"int"},
    "(2 if not isinstance(3, tuple) and type(3) is int else 5)": {"int"},
    "(2 if type(3) in (int, float) else 5)": {"int", "float"},
    "torch.ones(1, dtype=float).to(x.dtype)": {"float"},
    "int.from_bytes(b'\\1', 'big')": {"int"},
    "sum(map(len, ['a', 'bc']))": {"len"},
    "{int: 3}[type(2)]": {"int"},
    "x.float().mean() * float(3)": {"float"},
    "max([1.0, 2.0], key=int)": {"int"},
    "(lambda kind: 2 if kind is int else 5)(int)": {"int"},
    "(int(2.5) if isinstance(2.5, (int, float)) else len('abc'))": set(),
    "(2 if isinstance(3, int) and isinstance(2.0, (torch.Tensor, float)) else 5)": set(),
}


@pytest.mark.parametrize("factor", HANDED_ON)
def test_code_that_hands_a_type_on_keeps_it(factor):
    own = module(f"import torch\ndef run(m, x):\n    return m.last(m.conv(x)) * {factor}\n")
    code = own.run.__code__
    assert {
        name for name in ("int", "float", "len") if any(map(partial(handed_on, name=name), codes(code)))
    } == (HANDED_ON[factor])
    model, x = Net(own.run).eval(), torch.ones(1, 3, 8, 8)
    torch.testing.assert_close(qx.fuse(model)(x), model(x), rtol=1e-4, atol=1e-5)
    assert own.run.__code__ is code


class Helper:
    """What the tracer does not find keeps its types."""

    def pick(self, value):
        return 2.0 if type(value) is int else 3.0

    @property
    def kind(self):
        return int


class Sizes:
    factor = 2

    def of(self, y):
        return int(y.shape[2] * self.factor), int(y.shape[3] / self.factor)


@pytest.mark.parametrize("how", ["closure", "partial", "object", "nested", "list", "recursive"])
def test_code_that_is_found_in_other_ways(how):
    def resized(y, sides):
        return F.interpolate(y, size=(int(sides[0] / 2), int(sides[1] * 2)))

    def in_closure(m, x):
        return m.last(resized(m.conv(x), x.shape[2:]))

    def in_partial(m, x):
        return m.last(m.resize(m.conv(x), x.shape[2:]))

    def in_object(m, x):
        y = m.conv(x)
        return m.last(F.interpolate(y, size=m.sizes.of(y)))

    def nested(m, x):
        def inner(size):
            return int(size / 2)

        return m.last(m.conv(x)[..., : inner(x.shape[3])])

    def in_list(m, x):
        return m.last(m.several[0]["third"](m.conv(x)))

    def recursive(m, x):
        def halved(size, times):
            return halved(int(size / 2), times - 1) if times else int(size)

        return m.last(m.conv(x)[..., : 1 + halved(x.shape[3], 3)])

    runs = {"closure": in_closure, "partial": in_partial, "object": in_object, "nested": nested}
    model = Net({**runs, "list": in_list, "recursive": recursive}[how]).eval()
    model.several = [{"third": lambda y: y[:, :, : int(y.shape[2] / 3) + 1]}, 3]
    model.resize, model.sizes = partial(resized), Sizes()
    fused = qx.fuse(model)
    for sides in SIDES:
        x = torch.randn(2, 3, *sides)
        torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "hidden",
    [
        lambda: Helper().pick(5),
        lambda: {"a": lambda v: 2.0 if v.__class__ is int else 3.0}["a"](5),
        partial(lambda v, w: 2.0 if type(v) is int else w, 5, 3.0),
        lambda: 2.0 if Helper().kind is (5).__class__ else 3.0,
    ],
)
def test_code_out_of_sight_is_as_it_was(hidden):
    def run(m, x):
        y = m.conv(x)
        return m.last(y) * hidden() + int(y.shape[2] * 0.5)

    model, x = Net(run).eval(), torch.ones(1, 3, 8, 8)
    assert hidden() == 2.0
    torch.testing.assert_close(qx.fuse(model)(x), model(x), rtol=1e-4, atol=1e-5)


def test_a_list_instead_of_a_map_is_refused_by_name():
    fused = qx.fuse(Net(counted_images).eval())
    with pytest.raises(TypeError, match="this network was fused for a tensor, got list"):
        fused([torch.ones(3, 8, 8)])


def test_only_the_networks_own_code_is_changed():
    assert set(functions_of(Net(by_a_helper))) == {Net.forward, by_a_helper, half_of}


def test_what_else_is_in_the_file_does_not_matter():
    """As of a script that has a network and its arguments in one file."""
    text = "def run(m, x):\n    return m.last(m.conv(x)) * int(x.shape[2] / 4)\n"
    own = module(text + "def main(parser):\n    parser.add_argument('--epochs', type=int)\n")
    model, x = Net(own.run).eval(), torch.ones(1, 3, 12, 8)
    torch.testing.assert_close(qx.fuse(model)(x), model(x), rtol=1e-4, atol=1e-5)


def test_a_helper_in_another_file():
    own = module("def third(size):\n    return int(size / 3)\n")
    helpers = types.ModuleType("helpers_of_a_user")
    helpers.third = own.third
    run = module("def run(m, x):\n    return m.last(m.conv(x))[..., : tools.third(x.shape[3])]\n")
    run.tools = helpers
    model = Net(run.run).eval()
    fused = qx.fuse(model)
    for sides in SIDES:
        x = torch.randn(2, 3, *sides)
        torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-5)
