"""A network as a graph whose leaves are torch's and this library's layers."""

from __future__ import annotations

from torch import nn

from quincunx.layers import tracing
from quincunx.layers.blocks import PairedFill2d
from quincunx.layers.padded import pads_by_size
from quincunx.layers.paired import PairedDown2d, PairedUp2d
from quincunx.layers.quantised import QuantConv2d, QuantLinear
from quincunx.layers.sampled import (
    PerforatedConv2d,
    SampledConv2d,
    SampledConvTranspose2d,
    SampledDown2d,
)
from quincunx.layers.separable import MaskedConv2d
from quincunx.modules import surely

__all__ = ["CONVS", "TRANSPOSED", "is_conv", "is_leaf", "trace", "traced"]

_SAMPLED = (SampledConv2d, PerforatedConv2d, MaskedConv2d, SampledDown2d, PairedDown2d)
TRANSPOSED = (SampledConvTranspose2d, PairedUp2d)
CONVS = (nn.Conv2d, *_SAMPLED, *TRANSPOSED)
# opaque leaves
_WHOLE = (QuantConv2d, QuantLinear, PairedFill2d)


def is_leaf(module: nn.Module) -> bool:
    """Return whether a module is one node of a graph: of ours, or one that ours stands for."""
    return surely(module, *CONVS, *_WHOLE) or pads_by_size(module)


def trace(model: nn.Module) -> tracing.Traced:
    """Return a network's graph for its required arguments; see :func:`quincunx.layers.tracing.trace`."""
    return tracing.trace(model, is_leaf)


def traced(model: nn.Module) -> tracing.Traced | None:
    """Return a network's graph; None if it cannot be traced."""
    try:
        return trace(model)
    except TypeError:
        return None


def is_conv(module: nn.Module | None) -> bool:
    """Return whether a module is certainly a convolution that a step supports."""
    return surely(module, *CONVS)
