"""Start values of all networks."""

from __future__ import annotations

import math

from torch import nn

from quincunx.nn import SampledConvTranspose2d, SampledDown2d, SpatialBottleneck2d

__all__ = ["he_start"]


def he_start(network: nn.Module) -> None:
    """He initialisation of dense and sampled convolutions.

    A transposed convolution sums over computed positions only, which its fan-in says. No ReLU stands
    between the halves of a linear spatial bottleneck, so its second half has gain 1.

    Source: He et al., arXiv:1502.01852, section 2.2.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            continue
        down, up = getattr(module, "down", None), getattr(module, "up", None)
        if isinstance(down, SampledDown2d) and isinstance(up, SampledConvTranspose2d):
            gain = 1 if isinstance(module, SpatialBottleneck2d) else 2
            nn.init.normal_(down.weight, std=math.sqrt(2 / down.fan_in))
            nn.init.normal_(up.weight, std=math.sqrt(gain / up.fan_in))
