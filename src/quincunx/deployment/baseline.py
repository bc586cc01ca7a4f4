"""What an exported network is compared with: the same network with dense layers."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import nn

from quincunx.deployment.lowering import dense_convolution
from quincunx.layers.attributes import ConvLike
from quincunx.layers.binary import BinaryConv2d, BinaryLinear, PackedConv2d, PackedLinear
from quincunx.layers.quantised import QuantConv2d, QuantLinear
from quincunx.layers.sampled import SampledConvTranspose2d
from quincunx.modules import copied, set_module
from quincunx.sampling import Positions, Sampling

__all__ = ["dense_twin", "describe_layers"]

_LINEAR = (QuantLinear, BinaryLinear, PackedLinear)
_KINDS = (ConvLike, QuantConv2d, BinaryConv2d, PackedConv2d, *_LINEAR)


class _Sized(nn.Conv2d):
    """In place of a layer that is called with its map's size."""

    def forward(self, x: Any, size: Any = None) -> Any:
        return super().forward(x)


def dense_twin(model: nn.Module) -> nn.Module | None:
    """Return a copy of a network with a dense layer in place of each layer of this package, weights at
    random; None if it has none.

    Example:
        >>> twin = dense_twin(qx.networks.build("rsbn8"))
        >>> {type(m).__name__ for m in twin.modules() if "Paired" in type(m).__name__}
        set()
    """
    own, found = copied(model, share=True), False
    for name, layer in list(own.named_modules()):
        if not isinstance(layer, _KINDS):
            continue
        try:
            if own.get_submodule(name) is not layer:
                continue
        except AttributeError:
            continue  # inside a layer that was replaced
        found = True
        own = set_module(own, name, _twin(layer))
    return own.eval() if found else None


def _twin(layer: Any) -> nn.Module:
    # a linear layer's channels are last
    if isinstance(layer, _LINEAR) or getattr(layer, "channels", "") == "last":
        outputs, inputs = layer.weight.shape[:2]
        return nn.Linear(inputs, outputs, layer.bias is not None)
    if isinstance(layer, SampledConvTranspose2d):
        made = nn.Conv2d(
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,
            1,
            layer.borders[::2],
            layer.dilation,
            layer.groups,
            layer.bias is not None,
        )
        made.__class__ = _Sized
        return made
    return dense_convolution(layer)


def describe_layers(model: nn.Module) -> dict[str, Any]:
    """Return what a file says of a network's layers: how many of each kind, and their samplings.

    Example:
        >>> describe_layers(qx.networks.build("rsbn8"))["samplings"]
        ['cosets of period 2: (0, 0), (1, 1)']
    """
    kinds: Counter[str] = Counter()
    samplings = set()
    for module in model.modules():
        if isinstance(module, _KINDS):
            kinds[type(module).__name__] += 1
        sampling = getattr(module, "sampling", None)
        if isinstance(sampling, Sampling):
            samplings.add(_words(sampling))
    return {"layers": dict(sorted(kinds.items())), "samplings": sorted(samplings)}


def _words(sampling: Any) -> str:
    if isinstance(sampling, Positions):
        height, width = sampling.size
        return f"mask of {height} x {width}, density {sampling.density:.3f}"
    if sampling.kind == "cosets":
        return f"cosets of period {sampling.period}: {', '.join(map(str, sampling.offsets))}"
    return repr(sampling)
