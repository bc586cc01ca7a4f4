"""Build a replacement module from its spec."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from quincunx.layers.binary import (
    BinaryConv2d,
    BinaryLinear,
    PackedConv2d,
    PackedLinear,
)
from quincunx.layers.blocks import PairedFill2d
from quincunx.layers.padded import PaddedConv2d
from quincunx.layers.paired import PairedDown2d, PairedUp2d
from quincunx.layers.quantised import QuantConv2d, QuantLinear
from quincunx.layers.sampled import PerforatedConv2d, SpatialBottleneck2d
from quincunx.layers.separable import (
    CPConv2d,
    EspaceConv2d,
    MaskedConv2d,
    SeparableConv2d,
)
from quincunx.sampling import from_spec

__all__ = ["build_module"]


def _espace(masks: list[str], **settings: Any) -> nn.Module:
    first, second = (from_spec(mask) for mask in masks)
    return EspaceConv2d(**settings, masks=(first, second))


def _padded(module: dict[str, Any], sides: list[int], mode: str) -> nn.Module:
    top, bottom, left, right = sides
    return PaddedConv2d(build_module(module), (top, bottom, left, right), mode)


def _sampled(kind: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    def build(sampling: str, **settings: Any) -> nn.Module:
        return kind(**settings, sampling=from_spec(sampling))

    return build


# the module for each ``kind`` in a spec
_KINDS: dict[str, Callable[..., nn.Module]] = {
    "conv": nn.Conv2d,
    "separable": SeparableConv2d,
    "espace": _espace,
    "masked": _sampled(MaskedConv2d),
    "padded": _padded,
    "perforated": _sampled(PerforatedConv2d),
    "paired-down": _sampled(PairedDown2d),
    "paired-fill": _sampled(PairedFill2d),
    "paired-up": _sampled(PairedUp2d),
    "spatial-bottleneck": _sampled(SpatialBottleneck2d),
    "quantised-conv": QuantConv2d,
    "quantised-linear": QuantLinear,
    "cp": CPConv2d,
    "binary-conv": BinaryConv2d,
    "binary-linear": BinaryLinear,
    "packed-conv": PackedConv2d,
    "packed-linear": PackedLinear,
}


def build_module(spec: dict[str, Any]) -> nn.Module:
    """Return the module that a replacement's spec describes, with fresh weights.

    Raises:
        ValueError: not such a spec.
    """
    settings = dict(spec)
    kind = settings.pop("kind", None)
    if kind not in _KINDS:
        raise ValueError(f"kind={kind!r}: no module of that kind; expected one of {', '.join(_KINDS)}")
    try:
        return _KINDS[kind](**settings)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{kind}: not the settings of such a module ({error})") from error
