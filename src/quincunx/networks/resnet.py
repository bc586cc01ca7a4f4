"""The ImageNet ResNets of He et al. (2016) and their spatial bottleneck forms.

A dense network has the module names, and so the state-dict keys, under which its trained weights are
commonly published: ``conv1``, ``layer1.0.conv1``, ``layer1.0.downsample.0``, ``fc``. In a block of three
convolutions the stride is on the 3 x 3 one.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from quincunx.networks.start import he_start
from quincunx.nn import SampledConvTranspose2d, SampledDown2d, SpatialBottleneck2d
from quincunx.sampling import CHESSBOARD, Sampling, parse

__all__ = ["ResNet", "resnet", "sb_resnet"]

_STAGES = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
_EXPANSION = {18: 1, 34: 1, 50: 4, 101: 4}
_WIDTH = 64


def _projection(inside: int, outside: int, stride: int) -> nn.Module | None:
    if stride == 1 and inside == outside:
        return None
    return nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside))


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions, batch norm behind each, ReLU after the addition."""

    def __init__(self, inside: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = _projection(inside, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu(self.bn1(self.conv1(x)))
        inner = self.bn2(self.conv2(inner))
        return F.relu(inner + (x if self.downsample is None else self.downsample(x)))


class BasicSBBlock(nn.Module):
    """rSB: sampled convolution, batch norm, ReLU, transposed convolution, batch norm; ReLU after the
    addition."""

    def __init__(self, channels: int, sampling: Sampling, down: str) -> None:
        super().__init__()
        self.down = SampledDown2d(channels, channels, 3, sampling=sampling, down=down, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.up = SampledConvTranspose2d(channels, channels, 3, sampling=sampling, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu(self.bn1(self.down(x)))
        return F.relu(self.bn2(self.up(inner, x.shape[2:])) + x)


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3, 1 x 1; ``spatial`` takes the place of the 3 x 3 convolution (cSB)."""

    def __init__(self, inside: int, channels: int, stride: int, spatial: nn.Module | None = None) -> None:
        super().__init__()
        outside = 4 * channels
        self.conv1 = nn.Conv2d(inside, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = spatial or nn.Conv2d(channels, channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, outside, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outside)
        self.downsample = _projection(inside, outside, stride)

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu(self.bn1(self.conv1(x)))
        inner = F.relu(self.bn2(self.conv2(inner)))
        inner = self.bn3(self.conv3(inner))
        return F.relu(inner + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """A 7 x 7 convolution of stride 2, max pooling, four stages, global average pooling, a classifier.

    Maps [N, in_channels, H, W] to class scores [N, num_classes].
    """

    def __init__(
        self, stages: list[list[nn.Module]], outside: int, num_classes: int, in_channels: int
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, _WIDTH, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(_WIDTH)
        self.layer1, self.layer2, self.layer3, self.layer4 = (nn.Sequential(*blocks) for blocks in stages)
        self.fc = nn.Linear(outside, num_classes)
        he_start(self)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        scores: Tensor = self.fc(x.mean((2, 3)))
        return scores


def _build(depth: int, num_classes: int, in_channels: int, sampling: Sampling | None, down: str) -> ResNet:
    if depth not in _STAGES:
        raise ValueError(f"resnet{depth}: the depth must be one of {', '.join(map(str, _STAGES))}")
    expansion = _EXPANSION[depth]
    stages: list[list[nn.Module]] = []
    inside = _WIDTH
    for stage, count in enumerate(_STAGES[depth]):
        channels, blocks = _WIDTH * 2**stage, []
        for i in range(count):
            stride = 2 if stage > 0 and i == 0 else 1
            blocks.append(_block(inside, channels, stride, expansion, i > 0, sampling, down))
            inside = channels * expansion
        stages.append(blocks)
    return ResNet(stages, inside, num_classes, in_channels)


def _block(
    inside: int, channels: int, stride: int, expansion: int, later: bool, sampling: Sampling | None, down: str
) -> nn.Module:
    """Regular blocks are replaced but for those that change the resolution, channel bottlenecks but for
    the first of each stage."""
    if expansion == 1:
        if sampling is None or stride > 1:
            return BasicBlock(inside, channels, stride)
        return BasicSBBlock(channels, sampling, down)
    spatial = None
    if sampling is not None and later:
        spatial = SpatialBottleneck2d(channels, channels, 3, sampling=sampling, down=down, bias=False)
    return Bottleneck(inside, channels, stride, spatial)


def resnet(depth: int, num_classes: int = 1000, in_channels: int = 3) -> ResNet:
    """ResNet-18, -34, -50 or -101."""
    return _build(depth, num_classes, in_channels, None, "stride")


def sb_resnet(
    depth: int,
    num_classes: int = 1000,
    in_channels: int = 3,
    *,
    sampling: Sampling | str = CHESSBOARD,
    down: str = "stride",
) -> ResNet:
    """The same with spatial bottlenecks (Peng et al., arXiv:1809.02601, section 4.5)."""
    return _build(depth, num_classes, in_channels, parse(sampling), down)
