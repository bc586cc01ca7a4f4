"""AlexNet in torchvision's form (one column, Krizhevsky 2014) and the original (Krizhevsky et al. 2012).

The original has two columns in its second, fourth and fifth convolution (two groups) and local response
normalisation after the first two. Its modules are named after the layers of the Caffe Model Zoo's
bvlc_alexnet, whose weights :func:`quincunx.networks.weights.from_caffe` converts.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from quincunx.networks.pieces import check_dropout, check_form, he_start, local_response_norm

__all__ = ["AlexNet", "alexnet"]

# the side of the map that the first linear layer reads
_LAST = 6
_LINEAR = 4096


class AlexNet(nn.Module):
    """Five convolutions and three linear layers.

    Maps [N, in_channels, H, W] to class scores [N, num_classes]; 224 x 224 images (torchvision's form)
    or 227 x 227 (the original) reach the linear layers as 6 x 6 maps, others are pooled to that; H and W at
    least 63 (67).
    """

    def __init__(self, features: nn.Sequential, classifier: nn.Sequential) -> None:
        super().__init__()
        self.features = features
        self.avgpool = nn.AdaptiveAvgPool2d(_LAST)
        self.classifier = classifier
        he_start(self, mode="fan_in")

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))
        return scores


def _torchvision(num_classes: int, in_channels: int, dropout: float) -> AlexNet:
    features = nn.Sequential(
        nn.Conv2d(in_channels, 64, 11, 4, 2),
        nn.ReLU(),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(64, 192, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(192, 384, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(3, 2),
    )
    classifier = nn.Sequential(
        nn.Dropout(dropout),
        nn.Linear(256 * _LAST**2, _LINEAR),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(_LINEAR, _LINEAR),
        nn.ReLU(),
        nn.Linear(_LINEAR, num_classes),
    )
    return AlexNet(features, classifier)


def _original(num_classes: int, in_channels: int, dropout: float) -> AlexNet:
    features: OrderedDict[str, nn.Module] = OrderedDict(
        conv1=nn.Conv2d(in_channels, 96, 11, 4),
        relu1=nn.ReLU(),
        norm1=local_response_norm(),
        pool1=nn.MaxPool2d(3, 2),
        conv2=nn.Conv2d(96, 256, 5, padding=2, groups=2),
        relu2=nn.ReLU(),
        norm2=local_response_norm(),
        pool2=nn.MaxPool2d(3, 2),
        conv3=nn.Conv2d(256, 384, 3, padding=1),
        relu3=nn.ReLU(),
        conv4=nn.Conv2d(384, 384, 3, padding=1, groups=2),
        relu4=nn.ReLU(),
        conv5=nn.Conv2d(384, 256, 3, padding=1, groups=2),
        relu5=nn.ReLU(),
        pool5=nn.MaxPool2d(3, 2),
    )
    classifier: OrderedDict[str, nn.Module] = OrderedDict(
        fc6=nn.Linear(256 * _LAST**2, _LINEAR),
        relu6=nn.ReLU(),
        drop6=nn.Dropout(dropout),
        fc7=nn.Linear(_LINEAR, _LINEAR),
        relu7=nn.ReLU(),
        drop7=nn.Dropout(dropout),
        fc8=nn.Linear(_LINEAR, num_classes),
    )
    return AlexNet(nn.Sequential(features), nn.Sequential(classifier))


def alexnet(
    num_classes: int = 1000, in_channels: int = 3, *, form: str = "torchvision", dropout: float = 0.5
) -> AlexNet:
    """Return AlexNet, with ``form`` "torchvision" (61.1 M parameters) or "original" (61.0 M, in two columns).

    Source: Krizhevsky, Sutskever, Hinton (NIPS 2012); Krizhevsky, arXiv:1404.5997.
    """
    check_dropout(dropout)
    build = _original if check_form(form) else _torchvision
    return build(num_classes, in_channels, dropout)
