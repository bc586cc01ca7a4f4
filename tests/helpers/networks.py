"""Small trained-looking networks, accelerated by each method that replaces layers by sampled ones."""

import warnings

import torch
from torch import nn

import quincunx as qx

METHODS = {
    "espace": lambda: qx.Espace(rank=0.5, rate=0.5),
    "perforate": lambda: qx.Perforate(),
    "lowrank": lambda: qx.LowRank(rank=0.5),
    "bottleneck": lambda: qx.SpatialBottleneck(),
}


class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)

    def forward(self, x):
        y = self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))
        return (x + y).relu()


def accelerated(method, seed=0):
    """A network of 3 classes for images [N, 3, 8, 8], with the convolutions that ``method`` replaces."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), Block(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)
    ).eval()
    images = torch.randn(24, 3, 8, 8)
    with warnings.catch_warnings():
        # a good fit is not what these networks are for
        warnings.filterwarnings("ignore", message="calibration")
        made = qx.accelerate(net, METHODS[method](), calibration=[(images, torch.arange(24) % 3)])
    assert made.replaced, method
    return made.model


def batch(count=6, seed=1):
    """Images and their labels."""
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed)), torch.arange(count) % 3
