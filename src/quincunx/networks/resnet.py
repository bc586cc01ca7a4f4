"""The ImageNet ResNets of He et al. (2016), their grouped and gated relatives, and all their spatial
bottleneck forms.

ResNeXt (Xie et al. 2017) has grouped 3 x 3 convolutions, SE-ResNet (Hu et al. 2018) a gate per channel at
the end of each block. A dense network has the module names, and so the state-dict keys, of commonly
published weights: ``conv1``, ``layer1.0.conv1``, ``layer1.0.downsample.0``,
``layer1.0.se.fc1``, ``fc``. In a block of three convolutions the 3 x 3 has the stride.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quincunx.layers.norms import normalise
from quincunx.networks.pieces import check_positive, he_start, middle, sampled_pair, through_pair
from quincunx.sampling import CHESSBOARD, Sampling, parse

__all__ = ["ResNet", "resnet", "resnext", "sb_resnet", "sb_resnext", "sb_seresnet", "seresnet"]

_STAGES = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
_EXPANSION = {18: 1, 34: 1, 50: 4, 101: 4}
_WIDTH = 64
# channels of each of the 32 groups in the first stage: 32x4d and 32x8d
_RESNEXT_GROUPS, _RESNEXT_WIDTH = 32, {50: 4, 101: 8}
_REDUCTION = 16


@dataclass(frozen=True)
class _Kind:
    """The differences between the families: sampling of the replaced blocks, groups, gates."""

    sampling: Sampling | None = None
    down: str = "stride"
    groups: int = 1
    group_width: int = _WIDTH
    reduction: int | None = None
    width: int = _WIDTH


class SqueezeExcitation(nn.Module):
    """x * sigmoid(fc2(relu(fc1(mean of x over the map)))), a gate per channel.

    Source: Hu et al., arXiv:1709.01507, section 3.
    """

    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        inner = max(1, channels // reduction)
        self.fc1 = nn.Conv2d(channels, inner, 1)
        self.fc2 = nn.Conv2d(inner, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.fc2(F.relu(self.fc1(x.mean((2, 3), keepdim=True))))
        return x * torch.sigmoid(gate)


def _gate(channels: int, reduction: int | None) -> nn.Module | None:
    return None if reduction is None else SqueezeExcitation(channels, reduction)


def _projection(inside: int, outside: int, stride: int) -> nn.Module | None:
    if stride == 1 and inside == outside:
        return None
    return nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside))


class _Block(nn.Module):
    """relu(residual + shortcut), with a gated residual if the family has gates."""

    se: nn.Module | None
    downsample: nn.Module | None

    def joined(self, residual: Tensor, norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
        if self.se is not None:
            residual = self.se(norm(residual))
            return F.relu(residual + (x if self.downsample is None else self.downsample(x)))
        shortcut = x if self.downsample is None else self.downsample(x)
        return normalise(residual, norm, "relu", shortcut)


class BasicBlock(_Block):
    """Two 3 x 3 convolutions, each followed by batch norm, with ReLU after the addition."""

    def __init__(
        self,
        inside: int,
        channels: int,
        stride: int,
        *,
        shortcut: nn.Module | None = None,
        reduction: int | None = None,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.se = _gate(channels, reduction)
        self.downsample = shortcut

    def forward(self, x: Tensor) -> Tensor:
        inner = normalise(self.conv1(x), self.bn1, "relu")
        return self.joined(self.conv2(inner), self.bn2, x)


class BasicSBBlock(_Block):
    """rSB: sampled convolution, batch norm, ReLU, transposed convolution, batch norm; ReLU after the
    addition."""

    def __init__(self, channels: int, sampling: Sampling, down: str, *, reduction: int | None = None) -> None:
        super().__init__()
        first, second = sampled_pair(channels, channels, sampling, down)
        self.down = first
        self.bn1 = nn.BatchNorm2d(channels)
        self.up = second
        self.bn2 = nn.BatchNorm2d(channels)
        self.se = _gate(channels, reduction)
        self.downsample = None

    def forward(self, x: Tensor) -> Tensor:
        return self.joined(through_pair(x, self.down, self.bn1, self.up), self.bn2, x)


class Bottleneck(_Block):
    """1 x 1, 3 x 3, 1 x 1; with a sampling the 3 x 3 is a linear spatial bottleneck (cSB)."""

    def __init__(self, inside: int, channels: int, stride: int, kind: _Kind) -> None:
        super().__init__()
        outside = 4 * channels
        width = channels * kind.group_width // _WIDTH * kind.groups
        self.conv1 = nn.Conv2d(inside, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = middle(width, stride, kind.sampling, kind.down, groups=kind.groups)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outside, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outside)
        self.se = _gate(outside, kind.reduction)
        self.downsample = _projection(inside, outside, stride)

    def forward(self, x: Tensor) -> Tensor:
        inner = normalise(self.conv1(x), self.bn1, "relu")
        inner = normalise(self.conv2(inner), self.bn2, "relu")
        return self.joined(self.conv3(inner), self.bn3, x)


class ResNet(nn.Module):
    """A 7 x 7 convolution of stride 2, max pooling, four stages, global average pooling, a classifier.

    Maps [N, in_channels, H, W] to class scores [N, num_classes]; with a sampling of period K, H and W at
    least 32 K - 31.
    """

    def __init__(
        self,
        stages: list[list[nn.Module]],
        outside: int,
        num_classes: int,
        in_channels: int,
        width: int = _WIDTH,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1, self.layer2, self.layer3, self.layer4 = (nn.Sequential(*blocks) for blocks in stages)
        self.fc = nn.Linear(outside, num_classes)
        he_start(self)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(normalise(self.conv1(x), self.bn1, "relu"), 3, 2, 1)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        scores: Tensor = self.fc(x.mean((2, 3)))
        return scores


def _build(name: str, depth: int, num_classes: int, in_channels: int, kind: _Kind) -> ResNet:
    depths = _RESNEXT_WIDTH if name == "resnext" else _STAGES
    if depth not in depths:
        raise ValueError(f"{name}{depth}: the depth must be one of {', '.join(map(str, depths))}")
    expansion = _EXPANSION[depth]
    stages: list[list[nn.Module]] = []
    check_positive("width", kind.width)
    inside = kind.width
    for stage, count in enumerate(_STAGES[depth]):
        channels, blocks = kind.width * 2**stage, []
        for i in range(count):
            stride = 2 if stage > 0 and i == 0 else 1
            block = _regular if expansion == 1 else _bottleneck
            blocks.append(block(inside, channels, stride, kind, i > 0))
            inside = channels * expansion
        stages.append(blocks)
    return ResNet(stages, inside, num_classes, in_channels, kind.width)


def _regular(inside: int, channels: int, stride: int, kind: _Kind, _: bool) -> nn.Module:
    """Build a block; blocks that change the resolution are not replaced."""
    if kind.sampling is None or stride > 1:
        shortcut = _projection(inside, channels, stride)
        return BasicBlock(inside, channels, stride, shortcut=shortcut, reduction=kind.reduction)
    return BasicSBBlock(channels, kind.sampling, kind.down, reduction=kind.reduction)


def _bottleneck(inside: int, channels: int, stride: int, kind: _Kind, later: bool) -> nn.Module:
    """Build a block; the first block of each stage is not replaced."""
    return Bottleneck(inside, channels, stride, kind if later else replace(kind, sampling=None))


def resnet(depth: int, num_classes: int = 1000, in_channels: int = 3, *, width: int = _WIDTH) -> ResNet:
    """Return ResNet-18, -34, -50 or -101, with ``width`` channels in its first stage."""
    return _build("resnet", depth, num_classes, in_channels, _Kind(width=width))


def sb_resnet(
    depth: int,
    num_classes: int = 1000,
    in_channels: int = 3,
    *,
    sampling: Sampling | str = CHESSBOARD,
    down: str = "stride",
    width: int = _WIDTH,
) -> ResNet:
    """Return it with spatial bottlenecks (Peng et al., arXiv:1809.02601, section 5)."""
    return _build("resnet", depth, num_classes, in_channels, _Kind(parse(sampling), down, width=width))


def _resnext(depth: int, num_classes: int, in_channels: int, sampling: Sampling | None, down: str) -> ResNet:
    kind = _Kind(sampling, down, _RESNEXT_GROUPS, _RESNEXT_WIDTH.get(depth, 1))
    return _build("resnext", depth, num_classes, in_channels, kind)


def resnext(depth: int, num_classes: int = 1000, in_channels: int = 3) -> ResNet:
    """Return ResNeXt-50 32x4d or ResNeXt-101 32x8d (Xie et al., arXiv:1611.05431)."""
    return _resnext(depth, num_classes, in_channels, None, "stride")


def sb_resnext(
    depth: int,
    num_classes: int = 1000,
    in_channels: int = 3,
    *,
    sampling: Sampling | str = CHESSBOARD,
    down: str = "stride",
) -> ResNet:
    """Return it with grouped linear spatial bottlenecks, each group with half as many channels inside.

    Grouped convolutions have a small share of the MACs, so they save little: 4.231 to 4.144 G for ResNeXt-50.
    """
    return _resnext(depth, num_classes, in_channels, parse(sampling), down)


def seresnet(
    depth: int, num_classes: int = 1000, in_channels: int = 3, *, reduction: int = _REDUCTION
) -> ResNet:
    """Return SE-ResNet-18, -34, -50 or -101; a gate has 1 / ``reduction`` of its block's channels inside."""
    check_positive("reduction", reduction)
    return _build("seresnet", depth, num_classes, in_channels, _Kind(reduction=reduction))


def sb_seresnet(
    depth: int,
    num_classes: int = 1000,
    in_channels: int = 3,
    *,
    sampling: Sampling | str = CHESSBOARD,
    down: str = "stride",
    reduction: int = _REDUCTION,
) -> ResNet:
    """Return it with spatial bottlenecks; the gates read whole maps, as before."""
    check_positive("reduction", reduction)
    kind = _Kind(parse(sampling), down, reduction=reduction)
    return _build("seresnet", depth, num_classes, in_channels, kind)
