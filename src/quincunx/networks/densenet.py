"""The ImageNet DenseNets of Huang et al. (2017) and their spatial bottleneck forms.

State-dict keys are those of commonly published weights: ``features.conv0``,
``features.denseblock1.denselayer1.conv1``, ``features.transition1.conv``, ``classifier``.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quincunx.layers.norms import normalise, normalise_apart
from quincunx.layers.sampled import SpatialBottleneck2d
from quincunx.networks.pieces import he_start
from quincunx.sampling import CHESSBOARD, Sampling, parse

__all__ = ["DenseNet", "densenet", "sb_densenet"]


@dataclass(frozen=True)
class _Form:
    growth: int
    stem: int
    layers: tuple[int, int, int, int]


_FORMS = {
    121: _Form(32, 64, (6, 12, 24, 16)),
    161: _Form(48, 96, (6, 12, 36, 24)),
    169: _Form(32, 64, (6, 12, 32, 32)),
    201: _Form(32, 64, (6, 12, 48, 32)),
}
# channels between the two convolutions of a layer, in units of the growth
_INNER = 4


class DenseLayer(nn.Module):
    """BN, ReLU, 1 x 1, BN, ReLU, 3 x 3 with ``growth`` new channels, concatenated after the input's.

    With a sampling the 3 x 3 is a linear spatial bottleneck.
    """

    def __init__(self, inside: int, growth: int, sampling: Sampling | None, down: str) -> None:
        super().__init__()
        inner = _INNER * growth
        self.norm1 = nn.BatchNorm2d(inside)
        self.conv1 = nn.Conv2d(inside, inner, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(inner)
        self.conv2: nn.Module
        if sampling is None:
            self.conv2 = nn.Conv2d(inner, growth, 3, 1, 1, bias=False)
        else:
            self.conv2 = SpatialBottleneck2d(inner, growth, 3, sampling=sampling, down=down, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        inner, x = normalise_apart(x, self.norm1, "relu")
        inner = self.conv1(inner)
        return torch.cat([x, self.conv2(normalise(inner, self.norm2, "relu"))], 1)


class Transition(nn.Module):
    """BN, ReLU, 1 x 1 to half the channels, average pooling of 2 x 2."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(inside)
        self.conv = nn.Conv2d(inside, outside, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(self.conv(normalise(x, self.norm, "relu")), 2)


class DenseNet(nn.Module):
    """A 7 x 7 convolution of stride 2, max pooling, four dense blocks with transitions between them,
    global average pooling, a classifier.

    Maps [N, in_channels, H, W] to class scores [N, num_classes]; H and W at least 29,
    with a sampling of period K at least 32 K - 3.
    """

    def __init__(
        self, form: _Form, num_classes: int, in_channels: int, sampling: Sampling | None, down: str
    ) -> None:
        super().__init__()
        parts: OrderedDict[str, nn.Module] = OrderedDict()
        parts["conv0"] = nn.Conv2d(in_channels, form.stem, 7, 2, 3, bias=False)
        parts["norm0"] = nn.BatchNorm2d(form.stem)
        parts["relu0"] = nn.ReLU()
        parts["pool0"] = nn.MaxPool2d(3, 2, 1)
        channels = form.stem
        for i, count in enumerate(form.layers, 1):
            if i > 1:
                parts[f"transition{i - 1}"] = Transition(channels, channels // 2)
                channels //= 2
            layers: OrderedDict[str, nn.Module] = OrderedDict()
            for j in range(count):
                replaced = sampling if j > 0 else None
                layers[f"denselayer{j + 1}"] = DenseLayer(channels, form.growth, replaced, down)
                channels += form.growth
            parts[f"denseblock{i}"] = nn.Sequential(layers)
        parts["norm5"] = nn.BatchNorm2d(channels)
        self.features = nn.Sequential(parts)
        self.classifier = nn.Linear(channels, num_classes)
        he_start(self)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.classifier(F.relu(self.features(x)).mean((2, 3)))
        return scores


def _build(depth: int, num_classes: int, in_channels: int, sampling: Sampling | None, down: str) -> DenseNet:
    if depth not in _FORMS:
        raise ValueError(f"densenet{depth}: the depth must be one of {', '.join(map(str, _FORMS))}")
    return DenseNet(_FORMS[depth], num_classes, in_channels, sampling, down)


def densenet(depth: int, num_classes: int = 1000, in_channels: int = 3) -> DenseNet:
    """Return DenseNet-121, -161, -169 or -201 (Huang et al., arXiv:1608.06993)."""
    return _build(depth, num_classes, in_channels, None, "stride")


def sb_densenet(
    depth: int,
    num_classes: int = 1000,
    in_channels: int = 3,
    *,
    sampling: Sampling | str = CHESSBOARD,
    down: str = "stride",
) -> DenseNet:
    """Return it with a linear spatial bottleneck for the 3 x 3 of every layer but the first of each block.

    A layer is a channel bottleneck, so the rule for channel bottlenecks applies. The 3 x 3 goes from
    C = 4 g channels to the growth g; C g / (C + g) = 0.8 g channels between the halves keep its parameters
    up to rounding (128 to 32 through 26: 37,440 instead of 36,864). The MACs of a replaced 3 x 3 are
    proportional to the density, 0.51 of the original with CHESSBOARD. The 1 x 1 convolutions do not change,
    so DenseNet-121 at 224 x 224 goes from 2.834 G to 2.298 G, 1.23 times fewer.
    """
    return _build(depth, num_classes, in_channels, parse(sampling), down)
