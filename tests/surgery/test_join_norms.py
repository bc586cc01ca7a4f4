"""Norms joined with what follows them, in networks of any kind."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import quincunx as qx
from quincunx.layers.norms import NormAct2d
from quincunx.surgery.norms import join_norms


class Block(nn.Module):
    """A residual block as torchvision's: one ReLU module, in place, for both of its places."""

    def __init__(self, inside, outside, how="iadd"):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inside, outside, 3, 1, 1, bias=False), nn.BatchNorm2d(outside)
        self.conv2, self.bn2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False), nn.BatchNorm2d(outside)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = nn.Sequential(nn.Conv2d(inside, outside, 1, bias=False), nn.BatchNorm2d(outside))
        self.how = how

    def forward(self, x):
        identity = self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.how == "iadd":
            out += identity
        elif self.how == "add":
            out = out + identity
        elif self.how == "other":
            identity += out
            out = identity
        else:
            out = torch.add(identity, out)
        return self.relu(out)


def _network(how="iadd"):
    torch.manual_seed(0)
    stem = [nn.Conv2d(3, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.ReLU6(inplace=True)]
    rest = [Block(8, 16, how), Block(16, 16, how), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)]
    return nn.Sequential(*stem, *rest).to(memory_format=torch.channels_last).train()


def _images():
    return torch.randn(6, 3, 10, 8).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("how", "joined"), [("iadd", 5), ("add", 5), ("torch", 5), ("other", 3)])
def test_the_call_computes_what_the_network_does(how, joined):
    network = _network(how)
    other = copy.deepcopy(network)
    step, x = join_norms(network), _images()
    assert step.joined == joined, step.reason
    assert not step.reason
    for _ in range(2):
        found, wanted = step(x), other(x)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        found.square().sum().backward()
        wanted.square().sum().backward()
    for (name, mine), theirs in zip(network.named_parameters(), other.parameters(), strict=True):
        scale = float(theirs.grad.abs().max())
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-4 * scale + 1e-6, msg=name)
    for mine, theirs in zip(network.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    assert network.state_dict().keys() == other.state_dict().keys()
    assert not any(isinstance(module, NormAct2d) for module in network.modules())


def test_it_runs_the_operator_and_evaluation_runs_the_network(monkeypatch):
    network = _network()
    step, x = join_norms(network), _images()
    counted = []
    own = NormAct2d.forward
    monkeypatch.setattr(NormAct2d, "forward", lambda *a: counted.append(1) or own(*a))
    step(x)
    assert len(counted) == 7  # two of the shortcuts' norms are alone
    network.eval()
    torch.testing.assert_close(step(x), network(x), rtol=0, atol=0)
    assert len(counted) == 7


def test_hooks_and_new_layers_get_the_network_itself():
    network = _network()
    step, x, seen = join_norms(network), _images(), []
    handle = network[3].relu.register_forward_hook(lambda *_: seen.append(1))
    step(x)
    assert len(seen) == 2
    handle.remove()
    step(x)
    assert len(seen) == 2
    network[3].bn1 = nn.BatchNorm2d(16, momentum=1.0).train()
    before = network[3].bn1.running_mean.clone()
    step(x)
    assert not torch.equal(network[3].bn1.running_mean, before)
    assert join_norms(network).joined == 5
    network[3].register_forward_hook(lambda *_: None)
    assert "hooks" in join_norms(network).reason


class Late(nn.Module):
    """What the norm reads is changed before the addition behind it."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, 1, 1), nn.BatchNorm2d(8)

    def forward(self, x):
        x = self.conv(x)
        z = self.bn(x)
        return F.relu(z + x.mul_(2))


class Twice(nn.Module):
    """Somebody else reads the norm's result as well."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, 1, 1), nn.BatchNorm2d(8)

    def forward(self, x):
        z = self.bn(self.conv(x))
        return F.relu(z) + z


class Asking(nn.Module):
    """A forward that torch.fx cannot trace."""

    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x):
        return F.relu(self.bn(x)) if float(x.sum()) > 0 else x


@pytest.mark.parametrize("make", [Late, Twice, Asking])
def test_what_cannot_be_joined_is_left(make):
    network = make().train()
    step, x = join_norms(network), _images()
    assert step.joined == 0
    assert step.reason
    other = copy.deepcopy(network)
    torch.testing.assert_close(step(x), other(x), rtol=0, atol=0)


def test_a_subclass_of_batch_norm_stays_as_it_is():
    class Mine(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x) * 2

    network = nn.Sequential(nn.Conv2d(3, 8, 3), Mine(8), nn.ReLU()).train()
    assert join_norms(network).joined == 0
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    )
    assert join_norms(synced).joined == 0
    assert isinstance(synced[1], nn.SyncBatchNorm)


def test_a_network_with_spatial_bottlenecks_in_place_of_pairs_is_joined():
    torch.manual_seed(0)
    parts = [nn.Conv2d(3, 16, 3, 1, 1), nn.BatchNorm2d(16), nn.ReLU()]
    for _ in range(2):
        parts += [nn.Conv2d(16, 16, 3, 1, 1), nn.BatchNorm2d(16), nn.ReLU()]
    network = nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))
    data = [torch.randn(8, 3, 12, 12) for _ in range(2)]
    made = qx.accelerate(network.eval(), qx.SpatialBottleneck(), calibration=data, example_input=data[0])
    faster = made.model.to(memory_format=torch.channels_last).train()
    other = copy.deepcopy(faster)
    step, x = join_norms(faster), data[0].contiguous(memory_format=torch.channels_last)
    assert step.joined == 3, step.reason
    torch.testing.assert_close(step(x), other(x), rtol=1e-4, atol=1e-4)
