"""Forwards that ask for a map's format or device are looked into, and do the same for inputs of that kind."""

import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import quincunx as qx
from helpers.fused import same_answers
from quincunx.acceleration.prefix import Tails
from quincunx.acceleration.search import search
from quincunx.acceleration.target import Target
from quincunx.layers.graph import trace
from quincunx.layers.kinds import KindGuard, suits
from quincunx.surgery.calibration import Calibration


class Net(nn.Module):
    def __init__(self, run):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.register_buffer("scale", torch.rand(8, 1, 1))
        self.run = [run]

    def forward(self, x):
        return self.run[0](self, x)


def made(run, seed=0):
    torch.manual_seed(seed)
    return Net(run).eval()


KINDS = {
    "format": lambda net, x: net.a(x) if x.dtype == torch.float32 else net.b(net.a(x.float())),
    "another format": lambda net, x: net.a(x.float()) if x.dtype != torch.float32 else net.b(net.a(x)),
    "one of several": lambda net, x: net.a(x) * (2 if x.dtype in (torch.float16, torch.bfloat16) else 3),
    "both asked": lambda net, x: net.a(x) * (2 if (x.dtype == torch.float32) & (not x.is_cuda) else 3),
    "type of device": lambda net, x: net.b(net.a(x)) if x.device.type == "mps" else net.a(x),
    "on a card": lambda net, x: net.b(net.a(x)) if x.is_cuda else net.a(x),
    "device of a buffer": lambda net, x: net.a(x) * (net.scale if net.scale.device == x.device else 2),
    "format of a parameter": lambda net, x: net.a(x if x.dtype == net.a.weight.dtype else x.double()),
    "real numbers": lambda net, x: net.a(x) if x.is_floating_point() else net.a(x / 255),
    "by torch": lambda net, x: net.a(x) if torch.is_floating_point(x) else net.a(x / 255),
    "behind a layer": lambda net, x: (lambda y: net.b(y) if y.dtype == torch.float32 else y)(net.a(x)),
    "behind more": lambda net, x: (lambda y: y * (2 if y.dtype == torch.float32 else 3))(
        F.relu(net.norm(net.a(x))) + net.b(net.a(x))
    ),
    "behind a cast": lambda net, x: (lambda y: y * (2 if y.dtype == torch.float32 else 3))(net.a(x).float()),
    "device behind a layer": lambda net, x: (lambda y: net.b(y) if y.is_cpu else y)(net.a(x)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_graph_does_what_the_forward_does(kind):
    net = made(KINDS[kind])
    assert not trace(net).whole
    fused, low = qx.fuse(net), qx.fuse(net, torch.bfloat16, force=True)
    again = pickle.loads(pickle.dumps(fused))
    with torch.no_grad():
        for shape in ((2, 3, 8, 8), (1, 3, 6, 12)):
            x = torch.randn(shape)
            torch.testing.assert_close(fused(x), net(x), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(again(x), net(x), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(low(x).float(), net(x), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("kind", ["behind a layer", "behind more", "another format"])
def test_of_another_format_the_other_way_is_taken(kind):
    net = made(KINDS[kind]).double()
    if kind == "another format":
        net.b.float(), net.a.float()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        if kind == "another format":
            # of mixed formats nothing is known
            with pytest.raises(TypeError, match="control flow"):
                trace(net)
            return
        graph = fx.GraphModule(net, trace(net))
        torch.testing.assert_close(graph(x), net(x))


@pytest.mark.parametrize("kind", ["format", "another format", "real numbers"])
def test_inputs_of_another_kind_are_refused_by_a_sentence(kind):
    net = made(KINDS[kind])
    fused, x = qx.fuse(net), torch.randint(0, 255, (2, 3, 8, 8))
    other = x.to(torch.uint8) if kind == "real numbers" else x.double()
    net(other)
    found = str(other.dtype)
    with pytest.raises(
        TypeError, match=f"x: the network goes another way for {found} than for torch.float32"
    ):
        fused(other)


def test_a_guard_looks_at_tensors_only():
    guard = KindGuard("x", "cpu")
    guard(torch.ones(1)), guard(3)
    with pytest.raises(TypeError, match="x: the network goes another way for meta than for cpu"):
        guard(torch.ones(1, device="meta"))


UNKNOWN = {
    "moved": lambda net, x: (lambda y: y if y.device.type == "cpu" else 2 * y)(net.a(x).to("cpu")),
    "made elsewhere": lambda net, x: (lambda y: y if y.is_cuda else 2 * y)(
        net.a(x) + torch.arange(x.shape[3])
    ),
    "cast by a value": lambda net, x: (lambda y: y if y.dtype == torch.half else 2 * y)(net.a(x).to(x.dtype)),
    "needs a gradient": lambda net, x: net.a(x) if x.requires_grad else net.b(net.a(x)),
    "a layout": lambda net, x: net.a(x) if x.layout == torch.strided else x,
}


@pytest.mark.parametrize("kind", UNKNOWN)
def test_what_does_not_follow_from_the_weights_is_refused(kind):
    net = made(UNKNOWN[kind])
    net(torch.randn(1, 3, 8, 8))
    with pytest.raises(TypeError, match="cannot be traced"):
        trace(net)


def test_of_several_inputs_nothing_is_assumed():
    class Masked(Net):
        def forward(self, x, mask):
            y = self.a(x)
            return y.masked_fill(mask if mask.dtype == torch.bool else mask > 0, 0)

    with pytest.raises(TypeError, match="cannot be traced"):
        trace(Masked(None).eval())


def test_a_hook_may_give_another_format():
    net = made(KINDS["behind a layer"])
    net.a.register_forward_hook(lambda _, __, output: output.half().float())
    with pytest.raises(TypeError, match="cannot be traced"):
        trace(net)


def test_images_in_bytes_are_fitted_as_they_are():
    """The network's own forward makes real numbers of them, which its graph does not."""
    net = made(lambda net, x: net.b(F.relu(net.a(x.float() / 255 if x.dtype == torch.uint8 else x))))
    images = [torch.randint(0, 256, (16, 3, 8, 8), dtype=torch.uint8) for _ in range(2)]
    assert not suits(trace(net), lambda: images[0])
    assert suits(trace(net), lambda: images[0].float())
    assert Tails(net, Calibration(images, net)).graph is None
    assert Tails(net, Calibration([x.float() for x in images], net)).graph is not None
    made_of_bytes = qx.accelerate(net, qx.Perforate(), calibration=images)
    made_of_numbers = qx.accelerate(net, qx.Perforate(), calibration=[x.float() / 255 for x in images])
    assert set(made_of_bytes.replaced) == {"a", "b"}
    for one, other in zip(made_of_bytes.model.parameters(), made_of_numbers.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    found = search(net, Target(macs="90%"), images, candidates=[qx.Perforate()])
    # how fast that is, is not asked
    assert [row.loss is not None for row in found.rows] == [True, True]


CHANNELS = {
    "one number": lambda net, y: net.b(y) if y.shape[1] == 8 else y,
    "counted from the end": lambda net, y: net.b(y) if y.shape[-3] > 3 else y,
    "two maps": lambda net, y: (lambda z: y + z if y.shape[1] == z.shape[1] else z)(net.b(y)),
    "size()": lambda net, y: y if y.size(1) != 8 else net.b(y),
    "an integer": lambda net, y: y.view(y.shape[0], 2, int(y.shape[1] / 2), *y.shape[2:]).transpose(1, 2),
    "each": lambda net, y: torch.stack([i * part for i, part in enumerate(y.unbind(1))], 1),
    "each, by torch": lambda net, y: torch.stack([*torch.unbind(F.relu(y), dim=1)][::-1], 1),
    "of a join": lambda net, y: (lambda z: z if z.shape[1] == 16 else y)(torch.cat([y, net.norm(y)], 1)),
}


@pytest.mark.parametrize("case", CHANNELS)
def test_channels_are_known_from_the_layers(case):
    net = made(lambda net, x: CHANNELS[case](net, net.a(x)))
    assert not trace(net).whole
    same_answers(qx.fuse(net), net, ((2, 3, 8, 8), (1, 3, 6, 20)))


@pytest.mark.parametrize(
    "case", ["an integer", "each", "each, by torch", "one number", "pieces", "last pieces"]
)
def test_an_image_without_a_batch_has_other_channels_and_is_never_answered_wrongly(case):
    """Its second size is a height."""
    loops = {
        "pieces": lambda net, y: torch.cat([p.sum(0, keepdim=True) for p in y.split(4, 1)]),
        "last pieces": lambda net, y: sum(p.sum() for p in y.split(2, dim=1)[1:]),
    }
    net = made(lambda net, x: {**CHANNELS, **loops}[case](net, net.a(x)))
    for graph in (fx.GraphModule(net, trace(net)), qx.fuse(net)):
        with pytest.raises((IndexError, ValueError), match=r"other dimensions than|images in batches"):
            graph(torch.randn(3, 12, 12))


@pytest.mark.parametrize(
    "run",
    [
        lambda net, x: torch.stack([*net.a(x).unbind(0)]),
        lambda net, x: torch.stack([*F.pad(net.a(x), (0, 0, 0, 0, 1, 0)).unbind(1)]),
    ],
    ids=["images", "padded channels"],
)
def test_what_no_layer_says_is_refused(run):
    with pytest.raises(TypeError, match="cannot be traced"):
        trace(made(run))


@pytest.mark.parametrize(
    "run",
    [
        lambda net, x: (lambda y, z: y + z if y.shape == z.shape else y)(net.a(x), net.b(net.a(x))),
        lambda net, x: (lambda y, z: y + z if y.shape[2:] == z.shape[2:] else y)(net.a(x), net.b(net.a(x))),
        lambda net, x: net.a(x).view(int(x.shape[2] * x.shape[3]), -1),
    ],
    ids=["shapes", "sides", "an area"],
)
def test_what_each_image_says_is_asked_of_it(run):
    net = made(run)
    fused = qx.fuse(net)
    assert fused.meta["whole"] == {}
    same_answers(fused, net, ((2, 3, 12, 12), (1, 3, 7, 10)))


SIZES = {
    "padded to a multiple": lambda net, y: F.pad(y, (0, max(0, 16 - y.shape[3]), 0, max(16 - y.shape[2], 0))),
    "as for a stride": lambda net, y: F.pad(y, [0, max((-(-y.shape[-1] // 2) - 1) * 2 + 3 - y.shape[-1], 0)]),
    "the smaller side": lambda net, y: F.adaptive_avg_pool2d(y, min(y.shape[-2:])),
    "the smallest of three": lambda net, y: y[..., : min([y.shape[2], y.shape[3], 5])],
    "rounded": lambda net, y: F.interpolate(y, size=(round(y.shape[2] * 0.7), round(y.shape[3] / 3))),
    "zeros": lambda net, y: torch.cat([y, torch.zeros(y.shape[0], 1, *y.shape[2:])], 1),
    "ones": lambda net, y: y + torch.ones(y.shape[0], 1, 1, 1, dtype=y.dtype, device=y.device),
    "a tensor": lambda net, y: y / torch.tensor(y.shape[2] * 2.0) + torch.as_tensor(y.shape[3]),
    "a tensor of several": lambda net, y: y * torch.tensor([y.shape[2], y.shape[3]]).float().mean(),
    "the least number": lambda net, y: y / (y.norm(dim=1, keepdim=True) + torch.finfo(y.dtype).eps),
    "pieces of one size": lambda net, y: sum(y.split(4, 1)),
    "pieces with a rest": lambda net, y: torch.cat([2 * p for p in torch.split(y, 3, dim=1)], 1),
    "pieces of a join": lambda net, y: sum(torch.cat([y, F.relu(net.norm(y))], 1).split(4, dim=1)),
}


@pytest.mark.parametrize("case", SIZES)
def test_what_is_worked_out_from_sizes_is_worked_out_at_each_call(case):
    net = made(lambda net, x: SIZES[case](net, net.a(x)))
    assert not trace(net).whole
    same_answers(qx.fuse(net), net, ((2, 3, 8, 8), (1, 3, 6, 20), (3, 3, 31, 9)))


@pytest.mark.parametrize(
    "run",
    [
        lambda net, x: net.a(x) * max(net.a(x).mean(), net.a(x).std()),
        lambda net, x: sum(net.a(x).split(4, 2)),
        lambda net, x: sum(F.pad(net.a(x), (0, 0, 0, 0, 0, 1)).split(3, 1)),
    ],
    ids=["the larger of two values", "pieces of a size that is not known", "padded channels"],
)
def test_what_only_a_run_knows_is_refused(run):
    with pytest.raises(TypeError, match="cannot be traced"):
        trace(made(run))


def test_functions_of_python_are_themselves_again():
    def now():
        made_by = (
            torch.zeros,
            torch.ones,
            torch.empty,
            torch.tensor,
            torch.as_tensor,
            torch.finfo,
            torch.iinfo,
        )
        return (max, min, isinstance, *made_by)

    before = now()
    trace(made(KINDS["format"]))
    with pytest.raises(TypeError):
        trace(made(lambda net, x: net.a(x) if x.mean() > 0 else x))
    assert before == now()
