"""Layers with weights +1 and -1: one form to train, with real weights behind the signs, and one for
inference, with one bit per weight."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from quincunx.layers.attributes import ConvLike
from quincunx.modules import carry_hooks, set_module, surely
from quincunx.ops.bits import pack_signs, row_bytes, unpack_signs
from quincunx.ops.geometry import Geometry, Padding, expand_padding, two_integers

__all__ = [
    "BinaryConv2d",
    "BinaryLinear",
    "PackedConv2d",
    "PackedLinear",
    "binarised",
    "pack_binary",
]


class _Signs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, stochastic: bool) -> Tensor:
        positive = torch.rand_like(weight) < (weight + 1) / 2 if stochastic else weight >= 0
        return positive.to(weight.dtype) * 2 - 1

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def binarised(weight: Tensor, stochastic: bool = False) -> Tensor:
    r"""Return +1 or -1 for each weight, with a straight-through gradient.

    .. math:: w_b = \text{sign}(w), \quad \text{sign}(0) = +1; \qquad
        P(w_b = +1) = \text{clip}((w + 1) / 2, 0, 1) \text{ if stochastic}; \qquad
        \partial L / \partial w := \partial L / \partial w_b

    Source: Courbariaux et al., arXiv:1511.00363, eqs. 1 to 3 and algorithm 1.

    Example:
        >>> binarised(torch.tensor([0.3, -0.2, 0.0]))
        tensor([ 1., -1.,  1.])
    """
    signs: Tensor = _Signs.apply(weight, stochastic)  # type: ignore[no-untyped-call]
    return signs


class _Binary(nn.Module):
    """The real weights, their clipping and signs, and the scale."""

    weight: nn.Parameter
    scale: Tensor | None
    spec: dict[str, Any]

    def _start(self, shape: tuple[int, ...], bias: bool, stochastic: bool, scale: bool) -> None:
        if not isinstance(stochastic, bool):
            raise TypeError(f"stochastic={stochastic!r}: expected True or False")
        self.stochastic = stochastic
        self.weight = nn.Parameter(torch.empty(shape).uniform_(-1, 1))
        self.bias = nn.Parameter(torch.zeros(shape[0])) if bias else None
        self.register_buffer("scale", torch.ones(shape[0]) if scale else None)

    def clip(self) -> None:
        """Clip the real weights to [-1, 1], in place."""
        with torch.no_grad():
            self.weight.clamp_(-1, 1)

    def binary_weight(self) -> Tensor:
        """Return the weights of this forward: +1 and -1, random only in training and only if stochastic."""
        if self.training:
            self.clip()
        return binarised(self.weight, self.stochastic and self.training)

    def pack(self) -> nn.Module:
        """Return the same layer in its form for inference.

        Raises:
            ValueError: a weight that is not finite.
        """
        settings = {name: value for name, value in self.spec.items() if name not in ("kind", "stochastic")}
        form = PackedConv2d if self.spec["kind"] == "binary-conv" else PackedLinear
        packed = form(**settings).to(self.weight)
        state = {"bits": pack_signs(self.weight.detach())}
        for name in ("scale", "bias"):
            if (value := getattr(self, name)) is not None:
                state[name] = value.detach()
        packed.load_state_dict(state)
        return packed.train(self.training)


class BinaryConv2d(_Binary, ConvLike):
    r"""A convolution with weights +1 and -1 in its training form, with real weights behind the signs.

    .. math:: y_o = s_o \, (\text{sign}(w_o) * x) + b_o

    Forward and backward use the signs; the gradient of a sign goes unchanged to the real weight behind
    it. Each training forward first clips the real weights to [-1, 1], which the paper does after
    each update: an update may leave that range, but no gradient is ever taken outside it. Maps [N, C, H, W]
    to [N, O, H', W'] as ``nn.Conv2d`` does.

    Args:
        in_channels: channels C of the input.
        out_channels: channels O of the output.
        kernel_size: an integer or (vertical, horizontal).
        stride: an integer or (vertical, horizontal).
        padding: an integer, (vertical, horizontal), (top, bottom, left, right), "same" or "valid".
        dilation: an integer or (vertical, horizontal).
        groups: channel groups.
        bias: whether a trained b_o is added.
        stochastic: draw each sign with probability (w + 1) / 2 of +1, in training only; in evaluation
            mode the signs are always those of the weights.
        scale: whether there is a factor s for each output channel, a buffer that starts at 1.

    Raises:
        ValueError: channels that do not divide by ``groups``, a size below 1; when called, a map
            smaller than the kernel.
        TypeError: an argument of another type.

    Source: Courbariaux et al., arXiv:1511.00363, algorithm 1; the scale is not in the paper.

    Example:
        >>> layer = BinaryConv2d(16, 32, 3, padding=1).eval()
        >>> x = torch.randn(1, 16, 10, 10)
        >>> torch.allclose(layer.pack()(x), layer(x), atol=1e-4)
        True
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        *,
        stride: int | Sequence[int] = 1,
        padding: Padding = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
        stochastic: bool = False,
        scale: bool = False,
    ) -> None:
        super().__init__()
        self.spec = _conv_spec(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, scale
        )
        self.spec |= {"kind": "binary-conv", "stochastic": stochastic}
        self.geometry = _geometry(self.spec)
        self.settle(**_shape(self.spec))
        self._start((out_channels, in_channels // groups, *self.geometry.kernel), bias, stochastic, scale)

    def forward(self, x: Tensor) -> Tensor:
        top, bottom, left, right = self.geometry.padding
        padded = F.pad(x, (left, right, top, bottom)) if (top, left) != (bottom, right) else x
        padding = 0 if padded is not x else (top, left)
        geometry, weight = self.geometry, self.binary_weight()
        if self.scale is None:
            return F.conv2d(
                padded, weight, self.bias, geometry.stride, padding, geometry.dilation, self.groups
            )
        y = F.conv2d(padded, weight, None, geometry.stride, padding, geometry.dilation, self.groups)
        y = y * self.scale.view(-1, 1, 1)
        return y if self.bias is None else y + self.bias.view(-1, 1, 1)

    def extra_repr(self) -> str:
        return _shown(self.spec)


class BinaryLinear(_Binary):
    r"""A linear layer with weights +1 and -1 in its training form; see :class:`BinaryConv2d`.

    .. math:: y_o = s_o \, \langle \text{sign}(w_o), x \rangle + b_o

    Maps [..., in_features] to [..., out_features].

    Args:
        in_features: features of an input.
        out_features: features of an output.
        bias: whether a trained b_o is added.
        stochastic: draw each sign with probability (w + 1) / 2 of +1, in training only; in evaluation
            mode the signs are those of the weights.
        scale: whether there is a factor s for each output, a buffer that starts at 1.

    Raises:
        ValueError: a size below 1.
        TypeError: an argument of another type.

    Source: Courbariaux et al., arXiv:1511.00363, algorithm 1.

    Example:
        >>> BinaryLinear(16, 10)(torch.randn(4, 16)).shape
        torch.Size([4, 10])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        stochastic: bool = False,
        scale: bool = False,
    ) -> None:
        super().__init__()
        self.spec = _linear_spec(in_features, out_features, bias, scale)
        self.spec |= {"kind": "binary-linear", "stochastic": stochastic}
        self.in_features, self.out_features = in_features, out_features
        self._start((out_features, in_features), bias, stochastic, scale)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.binary_weight()
        if self.scale is None:
            return F.linear(x, weight, self.bias)
        y = F.linear(x, weight) * self.scale
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return _shown(self.spec)


# ---------------------------------------------------------------- inference


class PackedConv2d(ConvLike):
    r"""A convolution with weights +1 and -1 stored as one bit each; for inference only.

    .. math:: y_o = s_o \sum_{c,t} \pm x_{c,t} + b_o

    On the CPU, in float32, the native kernel computes it with additions and subtractions: signed sums of
    four channels are computed once for each position and looked up for each output. Elsewhere the bits are
    unpacked to +1 and -1 for an ordinary convolution. :meth:`BinaryConv2d.pack` makes such layers.

    Args:
        in_channels: channels C of the input.
        out_channels: channels O of the output.
        kernel_size: an integer or (vertical, horizontal).
        stride: an integer or (vertical, horizontal).
        padding: an integer, (vertical, horizontal), (top, bottom, left, right), "same" or "valid".
        dilation: an integer or (vertical, horizontal).
        groups: channel groups.
        bias: whether b_o is added.
        scale: whether there is a factor s for each output channel.

    Raises:
        ValueError: channels that do not divide by ``groups``, a size below 1; when called, a map
            smaller than the kernel.
        NotImplementedError: in a backward pass.

    Example:
        >>> packed = BinaryConv2d(64, 64, 3).pack()
        >>> packed.bits.numel() * packed.bits.element_size(), 4 * 64 * 64 * 9
        (4608, 147456)
    """

    bits: Tensor
    scale: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        *,
        stride: int | Sequence[int] = 1,
        padding: Padding = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
        scale: bool = False,
    ) -> None:
        super().__init__()
        self.spec = _conv_spec(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, scale
        )
        self.spec |= {"kind": "packed-conv"}
        self.geometry = _geometry(self.spec)
        self.settle(**_shape(self.spec))
        _packed_buffers(
            self, out_channels, in_channels // groups * math.prod(self.geometry.kernel), bias, scale
        )

    @property
    def weight(self) -> Tensor:
        """Return the signs, times each output's scale, in the layout of ``nn.Conv2d``."""
        return _unpacked(self, (self.out_channels, self.in_channels // self.groups, *self.kernel_size))

    def forward(self, x: Tensor) -> Tensor:
        return _packed_conv(x, self.bits, self.scale, self.bias, self.geometry, self.groups)

    def extra_repr(self) -> str:
        return _shown(self.spec)


class PackedLinear(nn.Module):
    """A linear layer with weights +1 and -1 stored as one bit each; see :class:`PackedConv2d`.

    :meth:`BinaryLinear.pack` makes such layers.

    Args:
        in_features: features of an input.
        out_features: features of an output.
        bias: whether b_o is added.
        scale: whether there is a factor s for each output.

    Raises:
        ValueError: a size below 1; when called, another number of features.
        NotImplementedError: in a backward pass.

    Example:
        >>> BinaryLinear(16, 10).pack()(torch.randn(4, 16)).shape
        torch.Size([4, 10])
    """

    bits: Tensor
    scale: Tensor | None
    bias: Tensor | None

    def __init__(
        self, in_features: int, out_features: int, *, bias: bool = True, scale: bool = False
    ) -> None:
        super().__init__()
        self.spec = _linear_spec(in_features, out_features, bias, scale) | {"kind": "packed-linear"}
        self.in_features, self.out_features = in_features, out_features
        _packed_buffers(self, out_features, in_features, bias, scale)

    @property
    def weight(self) -> Tensor:
        """Return the signs, times each output's scale, in the layout of ``nn.Linear``."""
        return _unpacked(self, (self.out_features, self.in_features))

    def forward(self, x: Tensor) -> Tensor:
        return _packed_linear(x, self.bits, self.scale, self.bias, self.spec["in_features"])

    def extra_repr(self) -> str:
        return _shown(self.spec)


@fx.wrap
def _packed_conv(
    x: Tensor, bits: Tensor, scale: Tensor | None, bias: Tensor | None, geometry: Geometry, groups: int
) -> Tensor:
    if x.dim() != 4 or row_bytes(x.shape[1] // groups * math.prod(geometry.kernel)) != bits.shape[1]:
        raise ValueError(f"x: shape {tuple(x.shape)} is not [N, C, H, W] with this layer's channels")
    if min(geometry.grid(x.shape[2], x.shape[3])) < 1:
        raise ValueError(f"x: {x.shape[2]} x {x.shape[3]} is smaller than the kernel {geometry.kernel}")
    result: Tensor = torch.ops.quincunx.binary_conv(
        x,
        bits,
        scale,
        bias,
        geometry.kernel,
        geometry.stride,
        geometry.padding,
        geometry.dilation,
        groups,
    )
    return result


@fx.wrap
def _packed_linear(
    x: Tensor, bits: Tensor, scale: Tensor | None, bias: Tensor | None, features: int
) -> Tensor:
    if x.shape[-1] != features:
        raise ValueError(f"x: {x.shape[-1]} features, expected {features}")
    flat = x.reshape(-1, features)
    # rows of features have the layout of a map of n x 1 positions in channels_last
    one = (1, 1)
    as_map = flat.t()[None, :, :, None]
    y = torch.ops.quincunx.binary_conv(as_map, bits, scale, bias, one, one, (0, 0, 0, 0), one, 1)
    result: Tensor = y[0, :, :, 0].t().reshape(*x.shape[:-1], bits.shape[0])
    return result


def _unpacked(module: PackedConv2d | PackedLinear, shape: tuple[int, ...]) -> Tensor:
    known = module.bias if module.scale is None else module.scale
    signs = unpack_signs(module.bits, shape[1:], torch.float32 if known is None else known.dtype)
    return signs if module.scale is None else signs * module.scale.view(-1, *(1 for _ in shape[1:]))


def _packed_buffers(module: nn.Module, outputs: int, weights: int, bias: bool, scale: bool) -> None:
    module.register_buffer("bits", torch.zeros(outputs, row_bytes(weights), dtype=torch.uint8))
    module.register_buffer("scale", torch.ones(outputs) if scale else None)
    module.register_buffer("bias", torch.zeros(outputs) if bias else None)


# ---------------------------------------------------------------- settings


def _positive(**values: object) -> None:
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}={value!r}: expected a positive integer")
        if value < 1:
            raise ValueError(f"{name}={value}: expected a positive integer")


def _switches(**values: object) -> None:
    for name, value in values.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name}={value!r}: expected True or False")


def _linear_spec(in_features: int, out_features: int, bias: bool, scale: bool) -> dict[str, Any]:
    _positive(in_features=in_features, out_features=out_features)
    _switches(bias=bias, scale=scale)
    return {"in_features": in_features, "out_features": out_features, "bias": bias, "scale": scale}


def _conv_spec(
    in_channels: int,
    out_channels: int,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int],
    padding: Padding,
    dilation: int | Sequence[int],
    groups: int,
    bias: bool,
    scale: bool,
) -> dict[str, Any]:
    """Return the checked settings that rebuild the layer, JSON-ready."""
    _positive(in_channels=in_channels, out_channels=out_channels, groups=groups)
    _switches(bias=bias, scale=scale)
    for name, value in (("in_channels", in_channels), ("out_channels", out_channels)):
        if value % groups:
            raise ValueError(f"{name}={value}: not divisible by groups={groups}")
    kernel, strides = two_integers("kernel_size", kernel_size, 1), two_integers("stride", stride, 1)
    dilations = two_integers("dilation", dilation, 1)
    four = expand_padding(padding, kernel, strides, dilations)
    return {
        "in_channels": in_channels,
        "out_channels": out_channels,
        "kernel_size": list(kernel),
        "stride": list(strides),
        "padding": padding if isinstance(padding, str) else list(four),
        "dilation": list(dilations),
        "groups": groups,
        "bias": bias,
        "scale": scale,
    }


def _geometry(spec: dict[str, Any]) -> Geometry:
    kernel, stride, dilation = spec["kernel_size"], spec["stride"], spec["dilation"]
    return Geometry.make(kernel, stride, expand_padding(spec["padding"], kernel, stride, dilation), dilation)


def _shape(spec: dict[str, Any]) -> dict[str, Any]:
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
    return {name: spec[name] for name in names}


def _shown(spec: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in spec.items() if name != "kind")


def pack_binary(network: nn.Module) -> nn.Module:
    """Replace a network's binary layers by packed ones, and update its records for ``qx.save``."""
    notes = dict(getattr(network, "quincunx_replaced", {}))
    made: dict[int, nn.Module] = {}
    for name, module in list(network.named_modules(remove_duplicate=False)):
        if surely(module, BinaryConv2d, BinaryLinear):
            if id(module) not in made:
                made[id(module)] = packed = module.pack()
                carry_hooks(module, packed)
                if name in notes:
                    notes[name] = packed.spec
            network = set_module(network, name, made[id(module)])
    if notes:
        network.quincunx_replaced = notes  # type: ignore[assignment]
    return network
