"""What holds for every method and each of its curves."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import quincunx as qx
from quincunx.acceleration.journal import FolderJournal
from quincunx.methods.registry import METHODS

# the last setting of a curve is the boldest
POINTS = list({point.series: point for method in METHODS.values() for point in method.sweep()}.values())


class Block(nn.Module):
    """As ConvNeXt has it."""

    def __init__(self, channels):
        super().__init__()
        self.wide = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm, self.more = nn.LayerNorm(channels), nn.Linear(channels, 4 * channels)
        self.less = nn.Linear(4 * channels, channels)

    def forward(self, x):
        y = self.norm(self.wide(x).permute(0, 2, 3, 1))
        return self.less(F.gelu(self.more(y))).permute(0, 3, 1, 2) + x


def network():
    def convolution(inputs):
        return nn.Conv2d(inputs, 48, 3, padding=1), nn.BatchNorm2d(48), nn.ReLU()

    layers = [*convolution(3), *convolution(48), *convolution(48), nn.Conv2d(48, 48, 1), Block(48)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 5)).eval()


def step(model, x, dtype):
    """The loss, and the gradients of all parameters."""
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss = F.cross_entropy(model(x), torch.arange(len(x)) % 5)
    loss.backward()
    slopes = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(slope is not None and slope.dtype == torch.float32 for slope in slopes.values()), slopes.keys()
    return float(loss.detach()), torch.cat([slope.flatten() for slope in slopes.values()])


@pytest.mark.filterwarnings("ignore:calibration:UserWarning")
@pytest.mark.parametrize("point", POINTS, ids=[point.folder for point in POINTS])
def test_a_step_in_bfloat16_is_near_that_in_float32(point):
    x = torch.randn(20, 3, 10, 10)
    made = qx.accelerate(network(), point.method, calibration=[x])
    assert made.replaced
    model = made.model.train()
    exact, rounded = (step(model, x, dtype) for dtype in (torch.float32, torch.bfloat16))
    assert rounded[0] == pytest.approx(exact[0], rel=0.05)
    assert float(F.cosine_similarity(exact[1], rounded[1], dim=0)) > 0.98


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:calibration:UserWarning")
@pytest.mark.parametrize("point", POINTS, ids=[point.folder for point in POINTS])
def test_channels_that_tell_nothing_are_fitted_like_others(point):
    """Some are never active and some constant: their maps differ by rounding alone.

    No coefficients may be made of that.
    """
    model, x = network(), torch.randn(20, 3, 10, 10)
    for norm in (model[1], model[4], model[7]):
        for first, level in ((0, -1.0), (1, 1.0)):
            norm.weight[first::3], norm.bias[first::3] = 1e-8, level
    fast = qx.accelerate(model, point.method, calibration=[x]).model
    before, after = (float(max(p.abs().max() for p in m.parameters())) for m in (model, fast))
    assert after < 50 * before
    near, far = (float((fast(x * s) - model(x * s)).norm() / model(x * s).norm()) for s in (1.0, 1.5))
    assert far < 2 * near + 0.1


@pytest.mark.filterwarnings("ignore:calibration:UserWarning")
@pytest.mark.parametrize("point", POINTS, ids=[point.folder for point in POINTS])
def test_layers_that_a_journal_recalls_end_as_those_that_are_made(point, tmp_path):
    """All of them, as of settings that share their fits, and the first ones, as after an interruption."""
    model, x = network(), torch.randn(20, 3, 10, 10)

    def made():
        journal = FolderJournal(tmp_path / "layers", {})
        torch.manual_seed(0)
        fast = qx.accelerate(model, point.method, calibration=[x], journal=journal).model
        return fast.state_dict(), journal.recalled

    wanted, recalled = made()
    assert not recalled
    for keep in (None, 2):
        files = sorted((tmp_path / "layers").glob("*.safetensors"), key=lambda file: file.stat().st_mtime_ns)
        for file in files[keep:] if keep else ():
            file.unlink()
            file.with_suffix(".json").unlink()
        found, recalled = made()
        assert len(recalled) == (keep or len(files))
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], value) for name, value in wanted.items())
