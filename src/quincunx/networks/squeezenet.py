"""SqueezeNet 1.1 (Iandola et al. 2016).

State-dict keys are those of commonly published weights: ``features.0``, ``features.3.squeeze``,
``classifier.1``. The first convolution is unpadded and pooling windows may reach beyond the border.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quincunx.networks.pieces import check_dropout, he_start

__all__ = ["SqueezeNet", "squeezenet1_1"]


class Fire(nn.Module):
    """1 x 1 to few channels; then a 1 x 1 and a 3 x 3 in parallel; ReLU after each."""

    def __init__(self, inside: int, squeezed: int, expanded: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(inside, squeezed, 1)
        self.expand1x1 = nn.Conv2d(squeezed, expanded, 1)
        self.expand3x3 = nn.Conv2d(squeezed, expanded, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.squeeze(x))
        return torch.cat([F.relu(self.expand1x1(x)), F.relu(self.expand3x3(x))], 1)


class SqueezeNet(nn.Module):
    """A 3 x 3 convolution of stride 2, eight fire modules, a 1 x 1 classifier, global average pooling.

    Maps [N, in_channels, H, W] to class scores [N, num_classes]; H and W at least 17.
    """

    def __init__(self, num_classes: int, in_channels: int, dropout: float) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(in_channels, 64, 3, 2),
            nn.ReLU(),
            nn.MaxPool2d(3, 2, ceil_mode=True),
            Fire(64, 16, 64),
            Fire(128, 16, 64),
            nn.MaxPool2d(3, 2, ceil_mode=True),
            Fire(128, 32, 128),
            Fire(256, 32, 128),
            nn.MaxPool2d(3, 2, ceil_mode=True),
            Fire(256, 48, 192),
            Fire(384, 48, 192),
            Fire(384, 64, 256),
            Fire(512, 64, 256),
        )
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Conv2d(512, num_classes, 1), nn.ReLU())
        he_start(self, mode="fan_in")

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x)).mean((2, 3))  # type: ignore[no-any-return]


def squeezenet1_1(num_classes: int = 1000, in_channels: int = 3, *, dropout: float = 0.5) -> SqueezeNet:
    """Return SqueezeNet 1.1: the accuracy of 1.0 with 2.4 times fewer MACs.

    Source: Iandola et al., arXiv:1602.07360, and the authors' release of version 1.1.
    """
    check_dropout(dropout)
    return SqueezeNet(num_classes, in_channels, dropout)
