"""timm's convolutions with TensorFlow's padding "SAME" become steps of a program, for maps of any size."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import quincunx as qx
from quincunx.fusion.int8 import Int8Program
from quincunx.fusion.program import Program
from quincunx.layers.padded import PaddedBySize2d

pytestmark = pytest.mark.usefixtures("one_thread")


def padded_as_tensorflow(x, kernel, stride, dilation):
    """Written out by timm's rule: the odd zero lies below and right."""
    amounts = []
    for length, k, s, d in zip(x.shape[2:], kernel, stride, dilation, strict=True):
        count = (length + s - 1) // s
        total = max((count - 1) * s + d * (k - 1) + 1 - length, 0)
        amounts = [total // 2, total - total // 2, *amounts]
    return F.pad(x, amounts)


class Conv2dSame(nn.Conv2d):
    """As timm has it."""

    def forward(self, x):
        x = padded_as_tensorflow(x, self.weight.shape[2:], self.stride, self.dilation)
        return F.conv2d(x, self.weight, self.bias, self.stride, (0, 0), self.dilation, self.groups)


Conv2dSame.__module__, Conv2dSame.__qualname__ = "timm.layers.conv2d_same", "Conv2dSame"


def network(kernel=3, stride=2, dilation=1):
    torch.manual_seed(0)
    made = nn.Sequential(
        Conv2dSame(3, 8, kernel, stride, dilation=dilation, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU6(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.ReLU(),
        Conv2dSame(8, 8, kernel, stride, dilation=dilation, groups=8),
        nn.Hardswish(),
        nn.Conv2d(8, 5, 1),
    ).eval()
    made[1].running_mean.normal_()
    made[1].running_var.uniform_(0.5, 2)
    return made


@pytest.mark.parametrize(
    "settings", [(3, 2, 1), (5, 2, 1), (2, 2, 1), (3, 3, 1), (3, 2, 2), ((3, 5), (2, 1), 1)]
)
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_one_program_computes_it_at_every_size(settings, backend, monkeypatch):
    model = network(*settings)
    with torch.no_grad():
        if backend == "reference":
            monkeypatch.setenv("QUINCUNX_BACKEND", "reference")
        fused = qx.fuse(model)
        assert [type(m).__name__ for m in fused.children()] == ["Program"]
        for size in ((16, 16), (15, 13), (9, 22), (5, 5)):
            x = torch.randn(2, 3, *size)
            assert torch.allclose(fused(x), model(x), rtol=1e-4, atol=1e-5), size
    assert type(model[0]) is Conv2dSame, "the user's network stays"


def test_ours_computes_what_it_stands_for():
    one = Conv2dSame(4, 6, (3, 4), (2, 3), dilation=(1, 2), groups=2)
    ours = PaddedBySize2d(4, 6, (3, 4), (2, 3), dilation=(1, 2), groups=2)
    ours.load_state_dict(one.state_dict())
    for size in ((7, 9), (12, 8), (3, 30)):
        x = torch.randn(1, 4, *size)
        assert torch.equal(ours(x), one(x))


def test_other_formats_have_it_too():
    model, x = network(), torch.randn(32, 3, 15, 14)
    with torch.no_grad():
        expected = model(x)
        low = qx.fuse(model, torch.bfloat16, force=True)(x)
        eight = qx.fuse(model, torch.int8, calibration=x, force=True, max_drop=100)
        found = eight(x)
        other = eight(x[:, :, :12, :11])
    assert any(isinstance(m, Int8Program) for m in eight.modules())
    assert (low - expected).norm() < 0.02 * expected.norm()
    assert (found - expected).norm() < 0.05 * expected.norm()
    expected = model(x[:, :, :12, :11])
    assert (other - expected).norm() < 0.1 * expected.norm()


def test_calibrated_networks_are_saved_fused_and_rounded_as_others(tmp_path):
    model, x = network(), torch.randn(32, 3, 15, 14)
    small = qx.calibrate(model, x, max_drop=100)
    with torch.no_grad():
        direct = qx.fuse(model, torch.int8, calibration=x, force=True, max_drop=100)(x)
        assert torch.equal(qx.fuse(small, torch.int8, force=True)(x), direct)


def test_what_is_not_surely_it_stays_in_torch():
    """Hooks, and a class of another place."""
    x = torch.randn(1, 3, 8, 8)

    class Other(Conv2dSame):
        def forward(self, x):
            return super().forward(x) + 1

    hooked, other = network(), network()
    hooked[0].register_forward_hook(lambda module, given, out: 2 * out)
    other[0] = Other(3, 8, 3, 2)
    for model in (hooked, other):
        with torch.no_grad():
            fused = qx.fuse(model)
            assert torch.allclose(fused(x), model(x), rtol=1e-4, atol=1e-5)
        assert not isinstance(next(iter(fused.children())), Program)
