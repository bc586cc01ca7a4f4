"""What ``fuse`` leaves to torch reads weights in the layout of its maps, and answers as before."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from quincunx.fusion.fuse import fuse
from quincunx.fusion.layouts import LaidOut
from quincunx.fusion.program import Program

LAST = torch.channels_last
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


class Opaque(nn.Module):
    """A head that cannot be looked into, and that takes a view of its map."""

    def __init__(self):
        super().__init__()
        self.wide = nn.Conv2d(4, 6, 3)
        self.one = nn.Conv2d(6, 5, 1)

    def forward(self, x):
        if x.shape[-1] < 8:
            x = F.adaptive_avg_pool2d(x, (8, 8))
        y = self.one(F.relu(self.wide(x)))
        return y.view(y.shape[0], -1) if y.is_contiguous() else y.flatten(1)


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.up = nn.ConvTranspose2d(4, 4, 2, 2)
        self.reflected = nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")
        self.head = Opaque()

    def forward(self, x):
        return self.head(self.reflected(self.up(F.relu(self.conv(x)))))


@pytest.fixture
def weights(monkeypatch):
    """(whether the map, whether the weight is in channels_last) of each convolution that torch runs."""
    seen = []

    def watch(plain):
        def watched(x, weight, *rest, **named):
            if weight.shape[2] > 1:
                last = (t.is_contiguous(memory_format=LAST) and not t.is_contiguous() for t in (x, weight))
                seen.append(tuple(last))
            return plain(x, weight, *rest, **named)

        return watched

    for name in ("conv2d", "conv_transpose2d"):
        monkeypatch.setattr(F, name, watch(getattr(F, name)))
    return seen


@pytest.mark.parametrize("size", [3, 9])
def test_weights_lie_as_their_maps_do(size, weights):
    model = Network().eval()
    before = [(p.data_ptr(), p.stride(), p.clone()) for p in model.parameters()]
    fused = fuse(model)
    assert set(fused.meta["whole"]) == {"head"}
    for form in (LAST, torch.contiguous_format, LAST):
        x = torch.randn(2, 3, size, size).contiguous(memory_format=form)
        with torch.no_grad():
            wanted = model(x)
        weights.clear()
        torch.testing.assert_close(fused(x), wanted, **CLOSE)
        assert weights
        assert all(of_map == of_weight for of_map, of_weight in weights)
    for p, (place, stride, value) in zip(model.parameters(), before, strict=True):
        assert (p.data_ptr(), p.stride()) == (place, stride)
        assert torch.equal(p, value)


def hooked(conv):
    conv.register_forward_hook(lambda *_: None)
    return conv


FIRST = {
    "hooked": hooked(nn.Conv2d(3, 4, 3, padding=1)),
    "circular": nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"),
}


@pytest.mark.parametrize("first", FIRST)
@pytest.mark.parametrize("form", [LAST, torch.contiguous_format])
def test_a_head_gets_maps_as_the_network_would_give_them(form, first, weights):
    """Its own convolutions give maps in the layout that they always gave: it may take a view."""

    class Viewing(Opaque):
        def forward(self, x):
            y = super().forward(x)
            z = self.wide(x)
            return y, (z.view(z.shape[0], -1) if form is torch.contiguous_format else z)

    model = nn.Sequential(FIRST[first], Viewing()).eval()
    x = torch.randn(2, 3, 9, 9).contiguous(memory_format=form)
    fused = fuse(model)
    with torch.no_grad():
        wanted = model(x)
    weights.clear()
    found = fused(x)
    torch.testing.assert_close(found, wanted, **CLOSE)
    assert [t.stride() for t in found] == [t.stride() for t in wanted]
    assert all(of_map == of_weight for of_map, of_weight in weights)
    assert (True in weights[-1]) == (form is LAST and first == "hooked")


def test_dense_steps_hold_what_torch_reads():
    fused = fuse(Network().eval())
    programs = [m for m in fused.modules() if isinstance(m, Program)]
    assert len(programs) == 2  # before the transposed convolution, and behind the reflection
    assert all(program.steps[0].weight.is_contiguous(memory_format=LAST) for program in programs)


def test_copies_and_changed_weights():
    """A copy's convolution reads the copy's weight, and a weight that was changed is laid out anew."""
    model = Network().eval()
    fused = fuse(model)
    x = torch.randn(1, 3, 9, 9).contiguous(memory_format=LAST)
    first = fused(x)
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert isinstance(other.head.wide._conv_forward, LaidOut)
        assert other.head.wide._conv_forward.conv is other.head.wide
        torch.testing.assert_close(other(x), first)
        with torch.no_grad():
            other.head.wide.weight.mul_(0)
            model.head.wide.weight, kept = nn.Parameter(torch.zeros_like(model.head.wide.weight)), None
            kept = model(x)
        torch.testing.assert_close(other(x), kept, **CLOSE)
        torch.testing.assert_close(fused(x), first)


def test_a_weight_that_is_made_at_each_call_is_read_as_it_is():
    class Scaled(nn.Conv2d):
        def forward(self, x):
            if x.sum() > 1e9:
                return x
            return self._conv_forward(x, self.weight * 2, self.bias)

    model = nn.Sequential(nn.Conv2d(3, 4, 3), Scaled(4, 4, 3)).eval()
    fused = fuse(model)
    x = torch.randn(1, 3, 9, 9).contiguous(memory_format=LAST)
    torch.testing.assert_close(fused(x), model(x).detach(), **CLOSE)
    assert fused.get_submodule("1")._conv_forward.kept is None


def test_under_inference_mode():
    fused = fuse(Network().eval())
    x = torch.randn(1, 3, 9, 9).contiguous(memory_format=LAST)
    with torch.inference_mode():
        first = fused(x).clone()
    torch.testing.assert_close(fused(x), first)


@pytest.mark.parametrize("strict", [False, True])
def test_what_a_weight_is_traced_as_has_no_layout_to_change(strict):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.ConvTranspose2d(4, 6, 2, 2), nn.GELU(), nn.Conv2d(6, 6, 3), nn.ConvTranspose2d(6, 6, 3)
    )
    x = torch.randn(2, 4, 8, 8).contiguous(memory_format=torch.channels_last)
    net, fused = net.eval(), fuse(net)
    wanted = fused(x)
    exported = torch.export.export(fused, (x,), strict=strict)
    torch.testing.assert_close(exported.module()(x), wanted)
    torch.testing.assert_close(torch.compile(fused, backend="aot_eager")(x), wanted)
    assert any(isinstance(vars(module).get("forward"), LaidOut) for module in fused.modules())
