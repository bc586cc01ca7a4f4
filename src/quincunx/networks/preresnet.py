"""The pre-activation CIFAR ResNets of He et al. (2016) and their spatial bottleneck forms.

Three stages of n blocks on 32 x 32, 16 x 16 and 8 x 8 maps, of 16, 32 and 64 channels (four times as
many at the ends of a channel-bottleneck block). Shortcuts have no parameters: if the resolution
or the number of channels changes, they take every second position and add zeros for the new channels.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from quincunx.layers.norms import normalise, normalise_apart
from quincunx.layers.subsample import subsample
from quincunx.networks.pieces import check_positive, he_start, middle, sampled_pair, through_pair
from quincunx.sampling import CHESSBOARD, Sampling, parse

__all__ = ["PreResNet", "crn", "csbn", "rrn", "rsbn"]

_WIDTH = 16
_EXPANSION = 4


class _Block(nn.Module):
    """x + residual(x), with the parameter-free shortcut."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.extra_channels, self.stride = out_channels - in_channels, stride

    def shortcut(self, x: Tensor) -> Tensor:
        if self.stride > 1:
            x = subsample(x, self.stride)
        return F.pad(x, (0, 0, 0, 0, 0, self.extra_channels)) if self.extra_channels else x


class RegularBlock(_Block):
    """rRB: two 3 x 3 convolutions, each after batch norm and ReLU."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__(in_channels, channels, stride)
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        inner, x = normalise_apart(x, self.bn1, "relu")
        inner = self.conv1(inner)
        out: Tensor = self.conv2(normalise(inner, self.bn2, "relu"))
        return out + self.shortcut(x)


class RegularSBBlock(_Block):
    """rSB: the pair of convolutions as sampled convolution, batch norm, ReLU, transposed convolution."""

    def __init__(self, channels: int, sampling: Sampling, down: str) -> None:
        super().__init__(channels, channels, 1)
        self.bn1 = nn.BatchNorm2d(channels)
        first, second = sampled_pair(channels, channels, sampling, down)
        self.down = first
        self.bn2 = nn.BatchNorm2d(channels)
        self.up = second

    def forward(self, x: Tensor) -> Tensor:
        inner, x = normalise_apart(x, self.bn1, "relu")
        return through_pair(inner, self.down, self.bn2, self.up, self.shortcut(x))


class BottleneckBlock(_Block):
    """cRB: 1 x 1, 3 x 3, 1 x 1; with a sampling the 3 x 3 is a linear spatial bottleneck (cSB)."""

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int,
        sampling: Sampling | None = None,
        down: str = "stride",
    ) -> None:
        out_channels = channels * _EXPANSION
        super().__init__(in_channels, out_channels, stride)
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = middle(channels, stride, sampling, down)
        self.bn3 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        inner, x = normalise_apart(x, self.bn1, "relu")
        inner = self.conv1(inner)
        inner = self.conv2(normalise(inner, self.bn2, "relu"))
        out: Tensor = self.conv3(normalise(inner, self.bn3, "relu"))
        return out + self.shortcut(x)


class PreResNet(nn.Module):
    """Stem, three stages of blocks, batch norm and ReLU, global average pooling, linear classifier.

    Maps [N, in_channels, H, W] to class scores [N, num_classes].
    """

    def __init__(
        self, stages: list[list[nn.Module]], channels: int, width: int, num_classes: int, in_channels: int
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(in_channels, width, 3, 1, 1, bias=False)
        self.stages = nn.Sequential(*(nn.Sequential(*blocks) for blocks in stages))
        self.norm = nn.BatchNorm2d(channels)
        self.classifier = nn.Linear(channels, num_classes)
        he_start(self)

    def forward(self, x: Tensor) -> Tensor:
        x = normalise(self.stages(self.stem(x)), self.norm, "relu")
        scores: Tensor = self.classifier(x.mean((2, 3)))
        return scores


def _blocks_per_stage(name: str, depth: int, convolutions: int) -> int:
    n, rest = divmod(depth - 2, 3 * convolutions)
    if n < 1 or rest:
        at = max(1, round((depth - 2) / (3 * convolutions)))
        raise ValueError(
            f"{name}{depth}: the depth must be {3 * convolutions}n + 2 with n >= 1, such as "
            f"{3 * convolutions * at + 2}"
        )
    return n


def _regular(
    name: str,
    depth: int,
    num_classes: int,
    in_channels: int,
    width: int,
    sampling: Sampling | None,
    down: str,
) -> PreResNet:
    """Build the network; with a sampling, replace every block except the two that change the resolution."""
    check_positive("width", width)
    n = _blocks_per_stage(name, depth, 2)
    stages: list[list[nn.Module]] = []
    channels = width
    for stage in range(3):
        blocks: list[nn.Module] = []
        for i in range(n):
            before, channels = channels, width * 2**stage
            stride = 2 if stage > 0 and i == 0 else 1
            if sampling is None or stride == 2:
                blocks.append(RegularBlock(before, channels, stride))
            else:
                blocks.append(RegularSBBlock(channels, sampling, down))
        stages.append(blocks)
    return PreResNet(stages, channels, width, num_classes, in_channels)


def _bottleneck(
    name: str,
    depth: int,
    num_classes: int,
    in_channels: int,
    width: int,
    sampling: Sampling | None,
    down: str,
) -> PreResNet:
    """Build the network; with a sampling, replace every block except the first of each stage."""
    check_positive("width", width)
    n = _blocks_per_stage(name, depth, 3)
    stages: list[list[nn.Module]] = []
    outside = width
    for stage in range(3):
        blocks: list[nn.Module] = []
        channels = width * 2**stage
        for i in range(n):
            stride = 2 if stage > 0 and i == 0 else 1
            blocks.append(BottleneckBlock(outside, channels, stride, sampling if i > 0 else None, down))
            outside = channels * _EXPANSION
        stages.append(blocks)
    return PreResNet(stages, outside, width, num_classes, in_channels)


def rrn(depth: int, num_classes: int = 10, in_channels: int = 3, *, width: int = _WIDTH) -> PreResNet:
    """Return rRN: the pre-activation ResNet of regular blocks, depth 6n + 2."""
    return _regular("rrn", depth, num_classes, in_channels, width, None, "stride")


def rsbn(
    depth: int,
    num_classes: int = 10,
    in_channels: int = 3,
    *,
    sampling: Sampling | str = CHESSBOARD,
    down: str = "stride",
    width: int = _WIDTH,
) -> PreResNet:
    """Return rSBN: rRN with spatial bottlenecks in all blocks but the two that change the resolution."""
    return _regular("rsbn", depth, num_classes, in_channels, width, parse(sampling), down)


def crn(depth: int, num_classes: int = 10, in_channels: int = 3, *, width: int = _WIDTH) -> PreResNet:
    """Return cRN: the pre-activation ResNet of channel-bottleneck blocks, depth 9n + 2."""
    return _bottleneck("crn", depth, num_classes, in_channels, width, None, "stride")


def csbn(
    depth: int,
    num_classes: int = 10,
    in_channels: int = 3,
    *,
    sampling: Sampling | str = CHESSBOARD,
    down: str = "stride",
    width: int = _WIDTH,
) -> PreResNet:
    """Return cSBN: cRN with a linear spatial bottleneck per 3 x 3 but in the first block of each stage."""
    return _bottleneck("csbn", depth, num_classes, in_channels, width, parse(sampling), down)
