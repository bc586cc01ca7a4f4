"""Parts that several families share: spatial bottlenecks, initial values and checks."""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor, nn

from quincunx.layers.norms import normalise, spread_onto
from quincunx.layers.sampled import SampledConvTranspose2d, SampledDown2d, SpatialBottleneck2d
from quincunx.sampling import Sampling

__all__ = [
    "check_dropout",
    "check_form",
    "check_positive",
    "he_start",
    "local_response_norm",
    "middle",
    "sampled_pair",
    "through_pair",
]


def middle(
    channels: int, stride: int, sampling: Sampling | None, down: str = "stride", *, groups: int = 1
) -> nn.Module:
    """Return the 3 x 3 of a channel bottleneck: dense without a sampling, else a linear spatial bottleneck.

    Source: cSB of Peng et al., arXiv:1809.02601, section 3.2.
    """
    if sampling is None:
        return nn.Conv2d(channels, channels, 3, stride, 1, groups=groups, bias=False)
    return SpatialBottleneck2d(channels, channels, 3, sampling=sampling, down=down, groups=groups, bias=False)


def sampled_pair(
    inside: int, channels: int, sampling: Sampling, down: str
) -> tuple[SampledDown2d, SampledConvTranspose2d]:
    """Return the two convolutions that replace a regular block's pair, for :func:`through_pair`.

    A block stores them as ``down`` and ``up``, so that :func:`he_start` finds them.
    """
    return (
        SampledDown2d(inside, channels, 3, sampling=sampling, down=down, bias=False),
        SampledConvTranspose2d(channels, channels, 3, sampling=sampling, padding=1, bias=False),
    )


def through_pair(
    x: Tensor,
    down: SampledDown2d,
    norm: nn.BatchNorm2d,
    up: SampledConvTranspose2d,
    shortcut: Tensor | None = None,
) -> Tensor:
    """Apply sampled convolution, batch norm and ReLU on the sampled map, and transposed convolution.

    A shortcut is a map of x's size to be added.

    Source: rSB of Peng et al., arXiv:1809.02601, section 3.2.
    """
    inner = normalise(down(x), norm, "relu")
    if shortcut is not None:
        return spread_onto(shortcut, inner, up, x.shape[2:])
    out: Tensor = up(inner, x.shape[2:])
    return out


def local_response_norm() -> nn.Module:
    """Return x / (1 + alpha / 5 times the sum of x^2 over five neighbouring channels)^0.75, alpha = 1e-4.

    Source: Krizhevsky et al. (NIPS 2012), section 3.3, with the constants of the Caffe Model Zoo.
    """
    return nn.LocalResponseNorm(5, 1e-4, 0.75, 1.0)


def he_start(network: nn.Module, *, mode: Literal["fan_in", "fan_out"] = "fan_out") -> None:
    """Apply He initialisation to dense and sampled convolutions.

    ``mode`` selects the fan of a dense convolution: "fan_out" keeps the scale of gradients, "fan_in"
    that of activations, which a network without batch norm needs. A transposed convolution sums over
    computed positions only; its fan-in accounts for that. There is no ReLU between the halves of a linear
    spatial bottleneck, so its second half has gain 1.

    Source: He et al., arXiv:1502.01852, section 2.2.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode=mode, nonlinearity="relu")
            continue
        down, up = getattr(module, "down", None), getattr(module, "up", None)
        if isinstance(down, SampledDown2d) and isinstance(up, SampledConvTranspose2d):
            gain = 1 if isinstance(module, SpatialBottleneck2d) else 2
            nn.init.normal_(down.weight, std=math.sqrt(2 / down.fan_in))
            nn.init.normal_(up.weight, std=math.sqrt(gain / up.fan_in))


def check_positive(name: str, value: int) -> None:
    """Check that a setting is a positive integer."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}={value!r}: expected a positive integer")


def check_dropout(value: float, name: str = "dropout") -> None:
    """Check that a value is a probability."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise ValueError(f"{name}={value!r}: expected a number from 0 to less than 1")


def check_form(value: str) -> bool:
    """Return whether ``form`` is the paper's instead of torchvision's."""
    if value not in ("torchvision", "original"):
        raise ValueError(f"form={value!r}: expected 'torchvision' or 'original'")
    return value == "original"
