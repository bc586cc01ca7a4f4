"""The CIFAR ResNets of He et al. (2015), with activations after the additions, and their SB forms.

Three stages of n blocks on 32 x 32, 16 x 16 and 8 x 8 maps, of 16, 32 and 64 channels. Shortcuts have no
parameters (option A): if the resolution changes they take every second position and add zero channels before
and after. State-dict keys are those of commonly published weights: ``conv1``, ``layer1.0.conv1``, ``linear``.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from quincunx.layers.norms import normalise
from quincunx.layers.subsample import subsample
from quincunx.networks.pieces import check_positive, he_start
from quincunx.networks.resnet import BasicBlock, BasicSBBlock
from quincunx.sampling import CHESSBOARD, Sampling, parse

__all__ = ["CifarResNet", "cifar_resnet", "sb_cifar_resnet"]

_WIDTH = 16


class ZeroPaddedShortcut(nn.Module):
    """Option A: every second position, with zeros for the new channels, half of them before the old ones."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.before = (outside - inside) // 2
        self.behind = outside - inside - self.before

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(subsample(x, 2), (0, 0, 0, 0, self.before, self.behind))


class CifarResNet(nn.Module):
    """Stem, three stages of two-convolution blocks, global average pooling, linear classifier.

    Maps [N, in_channels, H, W] to class scores [N, num_classes].
    """

    def __init__(self, stages: list[list[nn.Module]], width: int, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1, self.layer2, self.layer3 = (nn.Sequential(*blocks) for blocks in stages)
        self.linear = nn.Linear(4 * width, num_classes)
        he_start(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(normalise(self.conv1(x), self.bn1, "relu"))))
        scores: Tensor = self.linear(x.mean((2, 3)))
        return scores


def _build(
    depth: int, num_classes: int, in_channels: int, width: int, sampling: Sampling | None, down: str
) -> CifarResNet:
    """Build the network; with a sampling, replace every block except the two that change the resolution."""
    check_positive("width", width)
    n, rest = divmod(depth - 2, 6)
    if n < 1 or rest:
        near = 6 * max(1, round((depth - 2) / 6)) + 2
        raise ValueError(f"cifar-resnet{depth}: the depth must be 6n + 2 with n >= 1, such as {near}")
    stages: list[list[nn.Module]] = []
    for stage in range(3):
        channels = width * 2**stage
        blocks: list[nn.Module] = []
        for i in range(n):
            if stage > 0 and i == 0:
                shortcut = ZeroPaddedShortcut(channels // 2, channels)
                blocks.append(BasicBlock(channels // 2, channels, 2, shortcut=shortcut))
            elif sampling is None:
                blocks.append(BasicBlock(channels, channels, 1))
            else:
                blocks.append(BasicSBBlock(channels, sampling, down))
        stages.append(blocks)
    return CifarResNet(stages, width, num_classes, in_channels)


def cifar_resnet(
    depth: int, num_classes: int = 10, in_channels: int = 3, *, width: int = _WIDTH
) -> CifarResNet:
    """Return the ResNet of He et al., arXiv:1512.03385, section 4.2, of depth 6n + 2."""
    return _build(depth, num_classes, in_channels, width, None, "stride")


def sb_cifar_resnet(
    depth: int,
    num_classes: int = 10,
    in_channels: int = 3,
    *,
    sampling: Sampling | str = CHESSBOARD,
    down: str = "stride",
    width: int = _WIDTH,
) -> CifarResNet:
    """Return it with spatial bottlenecks in every block except the two that change the resolution."""
    return _build(depth, num_classes, in_channels, width, parse(sampling), down)
