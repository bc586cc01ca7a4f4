"""BinaryConnect: one-bit weights, trained through real weights (Courbariaux et al. 2015)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from quincunx.layers.binary import BinaryConv2d, BinaryLinear, pack_binary
from quincunx.methods.fitting.settings import conv_settings
from quincunx.methods.points import Point
from quincunx.modules import copied
from quincunx.ops.bits import row_bytes
from quincunx.surgery.calibration import Context, Layer
from quincunx.surgery.method import Replacement, Work, each

__all__ = [
    "BinaryConnect",
]

_SCALES = ("mean", "glorot", None)


@dataclass(frozen=True)
class BinaryConnect:
    r"""Convolutions and linear layers with weights +1 and -1, to be trained further.

    .. math:: y_o = s_o \, (\text{sign}(w_o) * x) + b_o

    The replacement is a :class:`BinaryConv2d` or :class:`BinaryLinear`, whose real weights are the
    layer's own, divided by their largest magnitude so that they fill [-1, 1]. The signs of a trained
    network are only the start of training; without training they lose accuracy. After training,
    :meth:`pack` (or ``qx.fuse``) makes the form for inference.

    Args:
        stochastic: draw the signs in training, +1 with probability (w + 1) / 2.
        scale: s: "mean", the mean magnitude of each output channel's weights, so that responses keep
            their size (Rastegari et al., arXiv:1603.05279, not in BinaryConnect); "glorot", the layer's
            initial scale sqrt(1.5 / (fan in + fan out)); None for s = 1, as in the paper, for networks
            that train their batch norms again.

    Raises:
        ValueError: another ``scale``.
        TypeError: ``stochastic`` is not a bool.

    Source: Courbariaux, Bengio, David, arXiv:1511.00363.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(16, 32, 3), torch.nn.ReLU())
        >>> result = qx.accelerate(net, BinaryConnect())
        >>> result.replaced["0"]["weight_bytes_before"], result.replaced["0"]["weight_bytes_packed"]
        (18432, 576)
    """

    name: ClassVar[str] = "binaryconnect"
    saves_bytes: ClassVar[bool] = True

    _: KW_ONLY
    stochastic: bool = False
    scale: str | None = "mean"

    def __post_init__(self) -> None:
        if not isinstance(self.stochastic, bool):
            raise TypeError(f"stochastic={self.stochastic!r}: expected True or False")
        if self.scale not in _SCALES:
            raise ValueError(f"scale={self.scale!r}: expected 'mean', 'glorot' or None")

    @property
    def targets(self) -> tuple[type[nn.Module], ...]:
        """Return the classes of layers that it replaces."""
        return (nn.Conv2d, nn.Linear)

    @classmethod
    def candidates(cls) -> tuple[BinaryConnect, ...]:
        """Return the settings that a search tries in each layer."""
        return ()

    @classmethod
    def sweep(cls) -> list[Point]:
        """Return the settings for its curve of accuracy against speed."""
        return [Point("BinaryConnect", "1 bit", cls())]

    def label(self, pair: bool = False) -> str:
        """Return its settings in a few words."""
        return self.name

    def refuse(self, layer: Layer, context: Context) -> str | None:
        """Return why a layer is not replaced, or None."""
        module = layer.module
        if isinstance(module, nn.Conv2d) and module.padding_mode != "zeros":
            return f"padding_mode={module.padding_mode!r}: only zeros are read outside the map"
        weight = module.get_parameter("weight")
        if not bool(weight.isfinite().all()):
            return "its weight is not finite, and has no signs"
        return None

    def begin(self, layers: Sequence[Layer], context: Context) -> Work:
        """Return work that replaces each layer separately."""
        return each(self._replacement)

    def _replacement(self, layer: Layer) -> Replacement:
        conv = layer.module
        own: BinaryConv2d | BinaryLinear
        scaled = self.scale is not None
        if isinstance(conv, nn.Conv2d):
            own = BinaryConv2d(**conv_settings(conv), stochastic=self.stochastic, scale=scaled)
        elif isinstance(conv, nn.Linear):
            own = BinaryLinear(
                conv.in_features,
                conv.out_features,
                bias=conv.bias is not None,
                stochastic=self.stochastic,
                scale=scaled,
            )
        else:
            raise TypeError(f"layer {layer.name!r}: expected a Conv2d or Linear, got {type(conv).__name__}")
        weight = conv.weight.detach()
        own.to(weight)
        with torch.no_grad():
            largest = weight.abs().max()
            own.weight.copy_(weight / largest if largest > 0 else weight)
            if own.bias is not None and conv.bias is not None:
                own.bias.copy_(conv.bias)
            if own.scale is not None:
                own.scale.copy_(self._scales(weight))
        count = weight[0].numel()
        record = {
            "scale": self.scale,
            "stochastic": self.stochastic,
            "weight_bytes_before": weight.numel() * weight.element_size(),
            "weight_bytes_packed": len(weight) * row_bytes(count),
        }
        return Replacement(own, own.spec, record)

    def _scales(self, weight: Tensor) -> Tensor:
        if self.scale == "mean":
            return weight.abs().flatten(1).mean(1)
        taps = weight[0, 0].numel()
        fans = weight.shape[1] * taps + weight.shape[0] * taps
        return weight.new_full((len(weight),), math.sqrt(1.5 / fans))

    @staticmethod
    def pack(model: nn.Module) -> nn.Module:
        """Return a copy of a network with its binary layers in their form for inference: one bit a weight.

        ``qx.save`` then writes the bits; the copy has no real weights and cannot be trained.

        Raises:
            TypeError: the network cannot be copied.
            ValueError: a binary layer with a weight that is not finite.

        Example:
            >>> net = qx.accelerate(qx.networks.build("rrn8"), BinaryConnect()).model
            >>> type(BinaryConnect.pack(net).get_submodule("stem")).__name__
            'PackedConv2d'
        """
        return pack_binary(copied(model))
