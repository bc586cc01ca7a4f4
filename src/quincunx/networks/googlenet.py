"""GoogLeNet in torchvision's form (with batch norm) and the original (Szegedy et al. 2015).

Both forms have torchvision's module names: ``conv1.conv``, ``inception3a.branch2.0.conv``, ``aux1.fc1``,
``fc``. torchvision's has batch norm, no bias in its convolutions, and a 3 x 3 where the paper has a 5 x 5,
an error that its trained weights preserve. The original has biases, local response normalisation and the 5 x
5;
:func:`quincunx.networks.weights.from_caffe` converts weights of the Caffe Model Zoo's
bvlc_googlenet.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quincunx.layers.norms import normalise
from quincunx.networks.pieces import check_dropout, check_form, he_start, local_response_norm

__all__ = ["GoogLeNet", "googlenet"]

# input; 1 x 1; 3 x 3 and the 1 x 1 before it; 5 x 5 likewise; 1 x 1 after the pooling
_INCEPTIONS = {
    "3a": (192, 64, 96, 128, 16, 32, 32),
    "3b": (256, 128, 128, 192, 32, 96, 64),
    "4a": (480, 192, 96, 208, 16, 48, 64),
    "4b": (512, 160, 112, 224, 24, 64, 64),
    "4c": (512, 128, 128, 256, 24, 64, 64),
    "4d": (512, 112, 144, 288, 32, 64, 64),
    "4e": (528, 256, 160, 320, 32, 128, 128),
    "5a": (832, 256, 160, 320, 32, 128, 128),
    "5b": (832, 384, 192, 384, 48, 128, 128),
}
_LAST = 1024


class _Conv(nn.Module):
    """A convolution with ReLU: with a bias in the original form, else with batch norm between them."""

    def __init__(self, inside: int, outside: int, kernel: int, original: bool, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inside, outside, kernel, stride, kernel // 2, bias=original)
        self.bn = None if original else nn.BatchNorm2d(outside, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return F.relu(x) if self.bn is None else normalise(x, self.bn, "relu")


class Inception(nn.Module):
    """Four branches side by side: 1 x 1; 1 x 1 and 3 x 3; 1 x 1 and 5 x 5; max pooling and 1 x 1."""

    def __init__(self, channels: tuple[int, ...], original: bool) -> None:
        super().__init__()
        inside, one, three_before, three, five_before, five, pooled = channels
        self.branch1 = _Conv(inside, one, 1, original)
        self.branch2 = nn.Sequential(
            _Conv(inside, three_before, 1, original), _Conv(three_before, three, 3, original)
        )
        self.branch3 = nn.Sequential(
            _Conv(inside, five_before, 1, original),
            _Conv(five_before, five, 5 if original else 3, original),
        )
        self.branch4 = nn.Sequential(
            nn.MaxPool2d(3, 1, 1, ceil_mode=True), _Conv(inside, pooled, 1, original)
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(x)], 1)


class Head(nn.Module):
    """An auxiliary classifier: average pooling to 4 x 4, 1 x 1 convolution, two linear layers."""

    def __init__(self, inside: int, num_classes: int, original: bool, dropout: float) -> None:
        super().__init__()
        self.conv = _Conv(inside, 128, 1, original)
        self.fc1 = nn.Linear(128 * 4 * 4, 1024)
        self.fc2 = nn.Linear(1024, num_classes)
        self.dropout = nn.Dropout(dropout)
        self.original = original

    def forward(self, x: Tensor) -> Tensor:
        if self.original:
            # pools the 14 x 14 map of a 224 x 224 image to 4 x 4, with overlapping windows
            x = F.avg_pool2d(x, 5, 3)
        x = torch.flatten(self.conv(F.adaptive_avg_pool2d(x, 4)), 1)
        scores: Tensor = self.fc2(self.dropout(F.relu(self.fc1(x))))
        return scores


class GoogLeNet(nn.Module):
    """Three convolutions, nine inceptions, global average pooling, a classifier.

    Maps [N, in_channels, H, W] to class scores [N, num_classes]; H and W at least 15 (the original 31, with
    its heads in training mode 79). With auxiliary heads, and in training mode only, to (scores, scores of
    ``aux2``, scores of ``aux1``), the order of torchvision; their losses have weight 0.3 in the paper.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        aux: bool,
        original: bool,
        dropout: float,
        aux_dropout: float,
    ) -> None:
        super().__init__()
        self.conv1 = _Conv(in_channels, 64, 7, original, stride=2)
        self.conv2 = _Conv(64, 64, 1, original)
        self.conv3 = _Conv(64, 192, 3, original)
        for name, channels in _INCEPTIONS.items():
            self.add_module(f"inception{name}", Inception(channels, original))
        self.aux1 = Head(512, num_classes, original, aux_dropout) if aux else None
        self.aux2 = Head(528, num_classes, original, aux_dropout) if aux else None
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(_LAST, num_classes)
        self.norm: nn.Module = local_response_norm() if original else nn.Identity()
        # torchvision's last pooling is 2 x 2
        self.last_window = 3 if original else 2
        he_start(self, mode="fan_in")

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        x = self.norm(_pooled(self.conv1(x)))
        x = _pooled(self.norm(self.conv3(self.conv2(x))))
        x = _pooled(self._inceptions(x, "3a", "3b"))
        early = self._inceptions(x, "4a")
        middle = self._inceptions(early, "4b", "4c", "4d")
        x = _pooled(self._inceptions(middle, "4e"), self.last_window)
        x = self._inceptions(x, "5a", "5b")
        scores: Tensor = self.fc(self.dropout(x.mean((2, 3))))
        if self.training and self.aux1 is not None and self.aux2 is not None:
            return scores, self.aux2(middle), self.aux1(early)
        return scores

    def _inceptions(self, x: Tensor, *names: str) -> Tensor:
        for name in names:
            x = self.get_submodule(f"inception{name}")(x)
        return x


def _pooled(x: Tensor, window: int = 3) -> Tensor:
    return F.max_pool2d(x, window, 2, ceil_mode=True)


def googlenet(
    num_classes: int = 1000,
    in_channels: int = 3,
    *,
    aux: bool = False,
    form: str = "torchvision",
    dropout: float | None = None,
    aux_dropout: float = 0.7,
) -> GoogLeNet:
    """Return GoogLeNet, with ``form`` "torchvision" (6.6 M parameters) or "original" (7.0 M), and two
    auxiliary heads if ``aux`` (6.4 M more).

    ``dropout`` before the classifier defaults to the form's, 0.2 or 0.4. torchvision's trained
    weights expect images normalised with mean and standard deviation 0.5.

    Source: Szegedy et al., arXiv:1409.4842.
    """
    original = check_form(form)
    if not isinstance(aux, bool):
        raise ValueError(f"aux={aux!r}: expected True or False")
    if dropout is None:
        dropout = 0.4 if original else 0.2
    check_dropout(dropout)
    check_dropout(aux_dropout, "aux_dropout")
    return GoogLeNet(num_classes, in_channels, aux, original, dropout, aux_dropout)
