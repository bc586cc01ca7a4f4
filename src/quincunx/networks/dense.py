"""Networks from images to maps of the same size: DnCNN, a small U-Net, an FCN on ResNet-18, and their spatial
bottleneck forms. They take any size at inference.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quincunx.layers.norms import normalise
from quincunx.layers.sampled import SpatialBottleneck2d
from quincunx.networks.pieces import check_positive, he_start, sampled_pair, through_pair
from quincunx.networks.resnet import ResNet, resnet, sb_resnet
from quincunx.sampling import CHESSBOARD, Sampling, parse

__all__ = ["FCN", "DnCNN", "UNet", "dncnn", "fcn_resnet", "sb_dncnn", "sb_fcn_resnet", "sb_unet", "unet"]

_DNCNN_WIDTH, _UNET_WIDTH, _UNET_LEVELS = 64, 32, 3


class SampledPair(nn.Module):
    """Two 3 x 3 convolutions as an rSB: sampled convolution, batch norm, ReLU, transposed convolution, batch
    norm, ReLU. Maps [N, inside, H, W] to [N, channels, H, W].

    Source: Peng et al., arXiv:1809.02601, section 3.2.
    """

    def __init__(self, inside: int, channels: int, sampling: Sampling, down: str) -> None:
        super().__init__()
        self.down, self.up = sampled_pair(inside, channels, sampling, down)
        self.bn1, self.bn2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return normalise(through_pair(x, self.down, self.bn1, self.up), self.bn2, "relu")


def _pair(inside: int, channels: int, sampling: Sampling | None, down: str) -> nn.Module:
    """Return two 3 x 3 convolutions with batch norm and ReLU, or their spatial bottleneck."""
    if sampling is not None:
        return SampledPair(inside, channels, sampling, down)
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    for i, given in enumerate((inside, channels), 1):
        parts[f"conv{i}"] = nn.Conv2d(given, channels, 3, 1, 1, bias=False)
        parts[f"bn{i}"] = nn.BatchNorm2d(channels)
        parts[f"relu{i}"] = nn.ReLU(inplace=True)
    return nn.Sequential(parts)


def _single(channels: int, sampling: Sampling | None, down: str) -> nn.Module:
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    parts["conv1"] = (
        nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        if sampling is None
        else SpatialBottleneck2d(channels, channels, 3, sampling=sampling, down=down, bias=False)
    )
    parts["bn1"], parts["relu1"] = nn.BatchNorm2d(channels), nn.ReLU(inplace=True)
    return nn.Sequential(parts)


class DnCNN(nn.Module):
    """x minus the noise that a chain of 3 x 3 convolutions finds in it: convolution with bias and ReLU, then
    ``depth - 2`` with batch norm and ReLU, then one to the channels of the image.

    Maps [N, C, H, W] in [0, 1] to the same. With a sampling the convolutions between the first and the last
    are rSB pairs, an odd one at the end a linear spatial bottleneck; H and W then at least the period.

    Source: Zhang et al., Beyond a Gaussian Denoiser, arXiv:1608.03981, section 3.
    """

    def __init__(
        self, depth: int, width: int, in_channels: int, sampling: Sampling | None, down: str
    ) -> None:
        super().__init__()
        self.first = nn.Conv2d(in_channels, width, 3, 1, 1)
        pairs, odd = divmod(depth - 2, 2)
        blocks = [_pair(width, width, sampling, down) for _ in range(pairs)]
        blocks += [_single(width, sampling, down)] if odd else []
        self.blocks = nn.Sequential(*blocks)
        self.last = nn.Conv2d(width, in_channels, 3, 1, 1)
        he_start(self)
        # at the start no noise is found, and the network is the identity but for this
        nn.init.normal_(self.last.weight, std=1e-3)
        for conv in (self.first, self.last):
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        noise: Tensor = self.last(self.blocks(F.relu(self.first(x))))
        return x - noise


class UNet(nn.Module):
    """Pairs of 3 x 3 convolutions with batch norm on three resolutions down and two up again, joined by
    concatenation; max pooling of 2 x 2 down, the nearest value up; a 1 x 1 convolution at the end.

    Maps [N, in_channels, H, W] to [N, num_classes, H, W], H and W at least 4, with a sampling of period K at
    least 4 K. With a sampling every pair but the first, which reads the image, is an rSB.

    Source: Ronneberger et al., arXiv:1505.04597, here padded, with batch norm, and smaller.
    """

    def __init__(
        self, width: int, num_classes: int, in_channels: int, sampling: Sampling | None, down: str
    ) -> None:
        super().__init__()
        widths = [width * 2**level for level in range(_UNET_LEVELS)]
        self.down1 = _pair(in_channels, widths[0], None, down)
        self.down2 = _pair(widths[0], widths[1], sampling, down)
        self.down3 = _pair(widths[1], widths[2], sampling, down)
        self.up2 = _pair(widths[2] + widths[1], widths[1], sampling, down)
        self.up1 = _pair(widths[1] + widths[0], widths[0], sampling, down)
        self.head = nn.Conv2d(widths[0], num_classes, 1)
        he_start(self)
        nn.init.zeros_(self.head.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        first = self.down1(x)
        second = self.down2(F.max_pool2d(first, 2))
        third = self.down3(F.max_pool2d(second, 2))
        # an odd side loses its last row on the way down
        up = self.up2(torch.cat([F.interpolate(third, size=second.shape[2:]), second], 1))
        up = self.up1(torch.cat([F.interpolate(up, size=first.shape[2:]), first], 1))
        scores: Tensor = self.head(up)
        return scores


class FCN(nn.Module):
    """FCN-8s: 1 x 1 convolutions to scores of classes from a ResNet's last three stages, each scaled up
    bilinearly and added to the next finer one, the sum to the image's size.

    Maps [N, in_channels, H, W] to [N, num_classes, H, W]; sizes as for :class:`ResNet`. The names of the
    ResNet's modules are its own.

    Source: Long et al., arXiv:1411.4038, section 4.2.
    """

    def __init__(self, backbone: ResNet, num_classes: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = backbone.conv1, backbone.bn1
        self.layer1, self.layer2 = backbone.layer1, backbone.layer2
        self.layer3, self.layer4 = backbone.layer3, backbone.layer4
        outside = backbone.fc.in_features
        self.score8, self.score16, self.score32 = (
            nn.Conv2d(outside // share, num_classes, 1) for share in (4, 2, 1)
        )
        for conv in (self.score8, self.score16, self.score32):
            nn.init.normal_(conv.weight, std=0.01)
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        inner = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        third = self.layer2(self.layer1(inner))
        fourth = self.layer3(third)
        scores = self.score32(self.layer4(fourth))
        scores = _up(scores, fourth) + self.score16(fourth)
        scores = _up(scores, third) + self.score8(third)
        return _up(scores, x)


def _up(scores: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(scores, size=like.shape[2:], mode="bilinear", align_corners=False)


def _dncnn(
    depth: int, num_classes: int, in_channels: int, width: int, sampling: Sampling | None, down: str
) -> DnCNN:
    if depth < 3:
        raise ValueError(f"dncnn{depth}: the depth must be at least 3")
    if num_classes != in_channels:
        raise ValueError(
            f"num_classes={num_classes}: the network gives images of as many channels as it takes, "
            f"{in_channels}"
        )
    check_positive("width", width)
    return DnCNN(depth, width, in_channels, sampling, down)


def dncnn(depth: int, num_classes: int = 3, in_channels: int = 3, *, width: int = _DNCNN_WIDTH) -> DnCNN:
    """Return DnCNN with ``depth`` convolutions, 17 in the paper for known noise."""
    return _dncnn(depth, num_classes, in_channels, width, None, "stride")


def sb_dncnn(
    depth: int,
    num_classes: int = 3,
    in_channels: int = 3,
    *,
    width: int = _DNCNN_WIDTH,
    sampling: Sampling | str = CHESSBOARD,
    down: str = "stride",
) -> DnCNN:
    """Return it with spatial bottlenecks between the first and the last convolution."""
    return _dncnn(depth, num_classes, in_channels, width, parse(sampling), down)


def unet(num_classes: int = 10, in_channels: int = 3, *, width: int = _UNET_WIDTH) -> UNet:
    """Return a U-Net of three resolutions with ``width`` channels in the first, 0.47 M parameters."""
    check_positive("width", width)
    return UNet(width, num_classes, in_channels, None, "stride")


def sb_unet(
    num_classes: int = 10,
    in_channels: int = 3,
    *,
    width: int = _UNET_WIDTH,
    sampling: Sampling | str = CHESSBOARD,
    down: str = "stride",
) -> UNet:
    """Return it with rSB pairs behind the first pair."""
    check_positive("width", width)
    return UNet(width, num_classes, in_channels, parse(sampling), down)


def fcn_resnet(depth: int, num_classes: int = 21, in_channels: int = 3) -> FCN:
    """Return FCN-8s on ResNet-18, -34, -50 or -101."""
    return FCN(resnet(depth, num_classes, in_channels), num_classes)


def sb_fcn_resnet(
    depth: int,
    num_classes: int = 21,
    in_channels: int = 3,
    *,
    sampling: Sampling | str = CHESSBOARD,
    down: str = "stride",
) -> FCN:
    """Return it on the ResNet with spatial bottlenecks."""
    return FCN(sb_resnet(depth, num_classes, in_channels, sampling=sampling, down=down), num_classes)
