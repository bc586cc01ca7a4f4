"""PyramidNet (Han et al. 2017), additive, of regular blocks or channel bottlenecks, and its SB form.

The number of channels grows by alpha / N at each of the N blocks, from 16 to 16 + alpha. A block has no
ReLU before its first convolution and a batch norm after its last. Shortcuts have no parameters:
average pooling if the resolution changes, and zeros for the new channels.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from quincunx.layers.norms import normalise, normalise_apart
from quincunx.networks.pieces import he_start, middle, sampled_pair, through_pair
from quincunx.sampling import CHESSBOARD, Sampling, parse

__all__ = ["PyramidNet", "pyramidnet", "sb_pyramidnet"]

_STEM = 16
_EXPANSION = 4
# up to this depth the blocks are regular, as in the paper's 110; 164 and deeper are channel bottlenecks
_REGULAR_DEPTHS = 110


class _Block(nn.Module):
    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.extra_channels, self.stride = outside - inside, stride

    def shortcut(self, x: Tensor) -> Tensor:
        if self.stride > 1:
            x = F.avg_pool2d(x, 2, ceil_mode=True)
        return F.pad(x, (0, 0, 0, 0, 0, self.extra_channels)) if self.extra_channels else x


class RegularBlock(_Block):
    """BN, 3 x 3, BN, ReLU, 3 x 3, BN; as a spatial bottleneck the pair is sampled and transposed."""

    def __init__(self, inside: int, channels: int, stride: int, sampling: Sampling | None, down: str) -> None:
        super().__init__(inside, channels, stride)
        self.bn1 = nn.BatchNorm2d(inside)
        self.bn2 = nn.BatchNorm2d(channels)
        self.bn3 = nn.BatchNorm2d(channels)
        self.sampled = sampling is not None
        if sampling is None:
            self.conv1 = nn.Conv2d(inside, channels, 3, stride, 1, bias=False)
            self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        else:
            self.down, self.up = sampled_pair(inside, channels, sampling, down)

    def forward(self, x: Tensor) -> Tensor:
        inner, x = normalise_apart(x, self.bn1)
        if self.sampled:
            inner = through_pair(inner, self.down, self.bn2, self.up)
        else:
            inner = self.conv1(inner)
            inner = self.conv2(normalise(inner, self.bn2, "relu"))
        return normalise(inner, self.bn3, shortcut=self.shortcut(x))


class BottleneckBlock(_Block):
    """BN, 1 x 1, BN, ReLU, 3 x 3, BN, ReLU, 1 x 1, BN; with a sampling the 3 x 3 is a cSB."""

    def __init__(self, inside: int, channels: int, stride: int, sampling: Sampling | None, down: str) -> None:
        outside = channels * _EXPANSION
        super().__init__(inside, outside, stride)
        self.bn1 = nn.BatchNorm2d(inside)
        self.conv1 = nn.Conv2d(inside, channels, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = middle(channels, stride, sampling, down)
        self.bn3 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, outside, 1, bias=False)
        self.bn4 = nn.BatchNorm2d(outside)

    def forward(self, x: Tensor) -> Tensor:
        inner, x = normalise_apart(x, self.bn1)
        inner = self.conv1(inner)
        inner = self.conv2(normalise(inner, self.bn2, "relu"))
        inner = self.conv3(normalise(inner, self.bn3, "relu"))
        return normalise(inner, self.bn4, shortcut=self.shortcut(x))


class PyramidNet(nn.Module):
    """Stem, three stages of growing blocks, batch norm and ReLU, global average pooling, classifier."""

    def __init__(self, blocks: list[nn.Module], outside: int, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(in_channels, _STEM, 3, 1, 1, bias=False)
        self.stem_norm = nn.BatchNorm2d(_STEM)
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.BatchNorm2d(outside)
        self.classifier = nn.Linear(outside, num_classes)
        he_start(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.stem_norm(self.stem(x)))
        scores: Tensor = self.classifier(normalise(x, self.norm, "relu").mean((2, 3)))
        return scores


def _build(
    depth: int, alpha: int, num_classes: int, in_channels: int, sampling: Sampling | None, down: str
) -> PyramidNet:
    convolutions = 2 if depth <= _REGULAR_DEPTHS else 3
    n, rest = divmod(depth - 2, 3 * convolutions)
    if n < 1 or rest:
        raise ValueError(
            f"pyramidnet{depth}: the depth must be 6n + 2 up to {_REGULAR_DEPTHS} (regular blocks), "
            "9n + 2 beyond (channel bottlenecks)"
        )
    if alpha < 1:
        raise ValueError(f"pyramidnet{depth}-a{alpha}: alpha must be at least 1")
    blocks: list[nn.Module] = []
    inside = _STEM
    for i in range(3 * n):
        channels = round(_STEM + alpha * (i + 1) / (3 * n))
        stride = 2 if i in (n, 2 * n) else 1
        if convolutions == 2:
            blocks.append(RegularBlock(inside, channels, stride, sampling if stride == 1 else None, down))
            inside = channels
        else:
            blocks.append(BottleneckBlock(inside, channels, stride, sampling if i % n else None, down))
            inside = channels * _EXPANSION
    return PyramidNet(blocks, inside, num_classes, in_channels)


def pyramidnet(depth: int, alpha: int, num_classes: int = 10, in_channels: int = 3) -> PyramidNet:
    """Return a PyramidNet of a depth (110, 164, ...) and widening alpha (84, 270, ...)."""
    return _build(depth, alpha, num_classes, in_channels, None, "stride")


def sb_pyramidnet(
    depth: int,
    alpha: int,
    num_classes: int = 10,
    in_channels: int = 3,
    *,
    sampling: Sampling | str = CHESSBOARD,
    down: str = "stride",
) -> PyramidNet:
    """Return it with spatial bottlenecks: in regular blocks except those that change the resolution, in
    channel bottlenecks except the first of each stage (Peng et al., arXiv:1809.02601, section 4.5)."""
    return _build(depth, alpha, num_classes, in_channels, parse(sampling), down)
