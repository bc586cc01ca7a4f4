"""A forward that raises for some sizes is fused for the others, and raises for the same ones."""

import copy
import itertools
import pickle

import pytest
import torch
import torch.nn.functional as F
from tests.helpers.asserting import asserted, careful
from tests.helpers.fused import answer
from torch import fx, nn

from quincunx.fusion.fuse import fuse
from quincunx.fusion.program import Program
from quincunx.layers import sizes, tracing
from quincunx.layers.graph import trace

SHAPES = [
    *itertools.product((1, 2, 5), (3,), (8, 9, 12), (8, 10, 16)),
    *((2, 3, 1, 1), (1, 3, 4, 4), (2, 3, 64, 8), (0, 3, 8, 8)),
]


class Net(nn.Module):
    """A convolution, and a forward made of a function of the module and the input."""

    def __init__(self, run, **modules):
        super().__init__()
        self.run, self.conv, self.norm = run, nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x):
        return self.run(self, x)

    def layers(self, x):
        return F.relu(self.norm(self.conv(x)))


def alike(model, copies):
    """The answers to all shapes: the same, or the same error; how many of each."""
    told = {"answers": 0, "errors": 0}
    for shape in SHAPES:
        x = torch.randn(shape)
        wanted = answer(model, x)
        for fused in copies:
            found = answer(fused, x)
            if isinstance(wanted, Exception):
                assert repr(found) == repr(wanted), shape
            else:
                torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        told["errors" if isinstance(wanted, Exception) else "answers"] += 1
    return told


def guards(fused):
    return sum(isinstance(node.target, sizes.SizeGuard) for node in fused.graph.nodes)


def programs(fused):
    return sum(isinstance(m, Program) for m in fused.modules())


# ---------------------------------------------------------------- one branch raises


def divisible(m, x):
    """As decoders of segmentation networks ask."""
    h, w = x.shape[-2:]
    if h % 4 != 0 or w % 4 != 0:
        new_h = (h // 4 + 1) * 4 if h % 4 != 0 else h
        new_w = (w // 4 + 1) * 4 if w % 4 != 0 else w
        raise RuntimeError(f"Wrong height={h}, width={w:>4}. Pad to ({new_h}, {new_w}).")
    return m.layers(x)


def on_the_batch(m, x):
    if x.dim() != 4:
        raise ValueError("expected a batch")
    if x.size(0) > 2:
        raise ValueError("at most two images")
    return m.layers(x)


def on_both_sides(m, x):
    if x.shape[2:] == (12, 16):
        raise NotImplementedError(str(x.shape))
    if x.shape[3] >= 8:
        y = m.layers(x)
    else:
        raise ValueError(f"{x.shape[3]} is too narrow")
    return y


def nested(m, x):
    h, w = x.shape[2], x.size(-1)
    if h % 2 != 0:
        if w % 4 != 0:
            raise ValueError(f"odd {h}, and {w}")
        raise TypeError(f"odd {h}, {w / 4:.1f} times four")
    return m.layers(x)


def of_a_map(m, x):
    y = m.layers(x)
    small = F.max_pool2d(y, 2)
    if small.shape[-1] * 2 != y.shape[-1] or small.shape[-2] * 2 != y.shape[-2]:
        raise ValueError(f"{small.shape} of {y.shape}")
    return y + F.interpolate(small, scale_factor=2)


def by_a_helper(m, x):
    refuse_odd(x.shape[2], "height")
    refuse_odd(x.shape[3], "width")
    return m.layers(x)


def refuse_odd(size, name):
    if size % 2:
        raise ValueError(f"{name} {size} is odd")


def counted(m, x):
    if x.numel() > 1200 or x.shape.numel() == 0:
        raise MemoryError("too large")
    return m.layers(x)


class OddError(ValueError):
    def __init__(self, size):
        super().__init__(f"{size} is odd")


RAISING = [divisible, asserted, on_the_batch, on_both_sides, nested, of_a_map, by_a_helper]


@pytest.mark.parametrize("run", RAISING)
def test_sizes_for_which_a_forward_raises_are_refused_by_the_same_error(run):
    model = Net(run).eval()
    fused = fuse(model, check=torch.randn(1, 3, 8, 8))
    told = alike(model, [fused, pickle.loads(pickle.dumps(fused)), copy.deepcopy(fused)])
    assert min(told.values()) > 0, told
    assert guards(fused) > 0
    assert programs(fused) > 0


@pytest.mark.parametrize("run", RAISING)
def test_within_a_part_too(run):
    model = nn.Sequential(nn.Conv2d(3, 3, 1), Net(run), nn.Conv2d(4, 2, 1)).eval()
    fused = fuse(model)
    assert min(alike(model, [fused]).values()) > 0
    assert fused.meta["whole"] == {}
    assert guards(fused) > 0


def test_errors_of_other_classes():
    """Python's own keep theirs; of a user's class the name is told."""

    def raising(m, x):
        if x.shape[2] % 2:
            raise OddError(x.shape[2])
        return m.layers(x)

    fused = fuse(Net(raising).eval())
    with pytest.raises(ValueError, match="OddError: 9 is odd"):
        fused(torch.randn(1, 3, 9, 8))
    fused = fuse(Net(counted).eval())
    with pytest.raises(RuntimeError, match="MemoryError: too large"):
        fused(torch.randn(2, 3, 64, 8))


def test_many_questions():
    model = Net(careful).eval()
    fused = fuse(model)
    assert guards(fused) == 40
    with pytest.raises(AssertionError, match="33"):
        fused(torch.randn(1, 3, 33, 8))
    alike(model, [fused])


def test_a_map_whose_shape_was_changed_in_place_is_asked_anew():
    def turning(m, x):
        y = m.layers(x)
        if y.shape[2] % 4:
            raise ValueError(f"first {y.shape[2]}")
        y.transpose_(2, 3)
        if y.shape[2] % 4:
            raise ValueError(f"then {y.shape[2]}")
        return y + 0

    model = Net(turning).eval()
    assert min(alike(model, [fuse(model)]).values()) > 0


# ---------------------------------------------------------------- both branches go on


def two_ways(m, x):
    y = m.layers(x)
    return y * 2 if x.shape[2] > 8 else y


def two_ways_and_an_error(m, x):
    if x.shape[2] % 2:
        raise ValueError("odd")
    return two_ways(m, x)


def an_error_behind_two_ways(m, x):
    if x.shape[2] > 8:
        if x.shape[3] > 8:
            raise ValueError("large")
        return m.layers(x) * 2
    return m.layers(x)


def smaller(m, x):
    return F.adaptive_avg_pool2d(m.layers(x), min(x.shape[2], x.shape[3]))


def larger(m, x):
    return m.layers(x) * max(x.shape[2], x.shape[3])


def one_image(m, x):
    return m.layers(x).mean(0) if x.shape[0] == 1 else m.layers(x)


def caught(m, x):
    try:
        refuse_odd(x.shape[2], "height")
    except ValueError:
        x = F.pad(x, (0, 0, 0, 1))
    return m.layers(x)


def repeated(m, x):
    while x.shape[2] > 8:
        x = F.max_pool2d(x, 2)
    return m.layers(x)


def endless(m, x):
    while x.shape[2] > 12:
        pass
    return m.layers(x)


def measured(m, x):
    return m.layers(x) * (1 if x.shape[2] % 2 else len(range(x.shape[2])))


def both_raise(m, x):
    if x.shape[2] % 2:
        raise ValueError("odd")
    raise ValueError("even")


def of_values(m, x):
    if x.sum() > 0:
        raise ValueError("positive")
    return m.layers(x)


def of_values_and_sizes(m, x):
    if x.sum() > x.shape[2]:
        raise ValueError("large")
    return m.layers(x)


GOING_ON = [two_ways, two_ways_and_an_error, one_image, caught, repeated]
LEFT = [an_error_behind_two_ways, measured, both_raise, of_values, of_values_and_sizes, endless]


@pytest.mark.parametrize("run", [smaller, larger])
def test_the_smaller_and_the_larger_of_sizes_are_no_branch(run):
    model = Net(run).eval()
    fused = fuse(model)
    assert guards(fused) == 0
    assert alike(model, [fused, pickle.loads(pickle.dumps(fused))])["errors"] == 0


@pytest.mark.parametrize("run", GOING_ON)
def test_where_both_branches_go_on_each_input_goes_its_way(run):
    model = Net(run).eval()
    fused = fuse(model)
    assert programs(fused) == 1
    assert alike(model, [fused, pickle.loads(pickle.dumps(fused))])["answers"] > 20


@pytest.mark.parametrize("run", LEFT)
def test_where_no_graph_is_known_it_is_refused(run):
    with pytest.raises(TypeError, match=r"^model: Net cannot be traced by torch\.fx \(symbolically traced"):
        fuse(Net(run).eval())


@pytest.mark.parametrize("run", [run for run in LEFT if run is not endless])
def test_a_part_of_which_no_graph_is_known_runs_as_it_is(run):
    """Here with an error of its own around it, which is still guarded."""

    def around(m, x):
        if x.shape[0] > 4:
            raise ValueError(f"{x.shape[0]} images")
        return m.part(m.one(x)) * 1.0

    model = Net(around, one=nn.Conv2d(3, 3, 1), part=Net(run)).eval()
    fused = fuse(model)
    assert set(fused.meta["whole"]) == {"part"}
    assert guards(fused) == 1
    assert programs(fused) == 1
    assert alike(model, [fused])["errors"] > 0


class Guarding(nn.Module):
    def forward(self, x):
        if x.shape[2] % 2:
            raise ValueError(f"{x.shape[2]} is odd")
        return x * 2


def test_an_error_of_a_part_that_is_caught_outside_is_no_end():
    """What is done instead is what the network does for these sizes."""

    def saved(m, x):
        try:
            x = m.part(x)
        except ValueError:
            x = x * 3
        return m.layers(x)

    model = Net(saved, part=Guarding()).eval()
    fused = fuse(model)
    assert fused.meta["whole"] == {}
    assert guards(fused) == 0
    assert alike(model, [fused])["errors"] == 0


def test_questions_of_two_calls_of_a_part_are_two():
    def twice(m, x):
        y = m.part(x)
        return m.layers(m.part(y[:, :, :, :8].transpose(2, 3)).contiguous())

    model = Net(twice, part=Guarding()).eval()
    fused = fuse(model)
    assert guards(fused) == 2
    assert min(alike(model, [fused]).values()) > 0


def test_runs_that_are_spent_leave_what_is_not_settled(monkeypatch):
    monkeypatch.setattr(sizes, "_MOST_RUNS", 3)
    monkeypatch.setattr(tracing, "SIZES", ())

    with pytest.raises(TypeError, match="control flow"):
        fuse(Net(careful).eval())
    fused = fuse(nn.Sequential(nn.Conv2d(3, 3, 1), Net(careful)).eval())
    assert set(fused.meta["whole"]) == {"1"}


def test_a_traced_graph_may_be_traced_again():
    model = Net(divisible).eval()
    first, second = (trace(model) for _ in range(2))
    assert [str(n.target) for n in first.nodes] == [str(n.target) for n in second.nodes]
    fused = fuse(fx.GraphModule(model, first))
    assert guards(fused) == 2
    assert min(alike(model, [fused]).values()) > 0
