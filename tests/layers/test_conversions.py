"""``int`` and ``float`` of sizes are worked out at each call, and mean what they mean everywhere else."""

import builtins
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import quincunx as qx
from quincunx.layers.conversions import convertible, namespaces
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
    assert not isinstance(3.0, int)
    three: object = m.conv.kernel_size[0]
    assert type(three) in (int, float)
    assert {int: "whole"}[type(three)] == "whole"
    assert int("12", 16) == 18
    assert int.from_bytes(b"\1", "big") == 1
    assert issubclass(bool, int)
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


RUNS = [
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
    assert int is builtins.int
    assert "int" not in globals()
    assert "float" not in globals()


@pytest.mark.parametrize("make", [lambda x: int(x.sum()), lambda x: float(x.mean())])
def test_of_values_they_are_refused(make):
    def run(m, x):
        return m.last(m.conv(x)) * make(x)

    with pytest.raises(TypeError, match=r"it makes an? \w+ of a value that is known only when it runs"):
        qx.fuse(Net(run).eval())


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


def test_code_that_compares_types_by_is_keeps_its_types():
    text = "def run(m, x):\n    return m.last(m.conv(x)) * (2 if type(3) {} int else 5)\n"
    for how, names in (("is", [float, len]), ("==", [int, float, len])):
        own = module(text.format(how))
        assert convertible(vars(own)) == names
        model = Net(own.run).eval()
        torch.testing.assert_close(
            qx.fuse(model)(x := torch.ones(1, 3, 8, 8)), model(x), rtol=1e-4, atol=1e-5
        )


def test_only_the_networks_own_code_is_changed():
    found = {names["__name__"] for names in namespaces(Net(by_a_helper))}
    assert found == {__name__}
