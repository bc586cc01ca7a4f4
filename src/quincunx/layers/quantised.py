"""Layers with product-quantised weights: trainable codebooks and fixed assignments."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quincunx.layers.attributes import ConvLike
from quincunx.ops import decoded, lookup_conv2d
from quincunx.ops.geometry import Padding, expand_padding

__all__ = ["CodebookConv2d", "CodebookLinear", "QuantConv2d", "QuantLinear", "check_codebook"]


def check_codebook(subspace: int, codewords: int, channels: int, vectors: int | None) -> None:
    """Check the settings of a codebook for a layer.

    Args:
        subspace: C'.
        codewords: K.
        channels: C, the input channels of a group.
        vectors: number of sub-vectors that share a codebook; None if none exist yet.

    Raises:
        ValueError: fewer than 2 codewords, or more than sub-vectors or than int16 can index; a
            subspace outside 1..C.
    """
    for name, value in (("subspace", subspace), ("codewords", codewords)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"{name}={value!r}: expected an integer")
    if not 2 <= codewords <= 32767:
        raise ValueError(f"codewords={codewords}: expected 2 to 32767")
    if not 1 <= subspace <= channels:
        raise ValueError(f"subspace={subspace}: expected 1 to {channels}, the input channels of a group")
    if vectors is not None and codewords > vectors:
        raise ValueError(
            f"codewords={codewords}: the codebook is larger than the data, {vectors} sub-vectors a subspace"
        )


class _Quantised(nn.Module):
    """Codebooks, assignments and bias of a layer with C inputs and O outputs."""

    codebooks: nn.Parameter
    assignments: Tensor

    def _make(
        self, channels: int, outputs: int, groups: int, taps: int, subspace: int, codewords: int, bias: bool
    ) -> None:
        for name, value in (("inputs", channels), ("outputs", outputs), ("groups", groups)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r}: expected a positive integer")
        if channels % groups or outputs % groups:
            raise ValueError(f"groups={groups}: do not divide {channels} inputs and {outputs} outputs")
        check_codebook(subspace, codewords, channels // groups, taps * outputs // groups)
        self.subspace, self.codewords, self.groups = subspace, codewords, groups
        many = groups * math.ceil(channels / groups / subspace)
        bound = 1 / math.sqrt(channels // groups * taps)
        self.codebooks = nn.Parameter(torch.empty(many, codewords, subspace).uniform_(-bound, bound))
        kind = torch.uint8 if codewords <= 256 else torch.int16
        drawn = torch.randint(codewords, (many, taps, outputs // groups)).to(kind)
        self.register_buffer("assignments", drawn)
        self.bias = nn.Parameter(torch.empty(outputs).uniform_(-bound, bound)) if bias else None


class QuantConv2d(_Quantised, ConvLike):
    r"""A convolution whose weight consists of codewords.

    .. math:: W_{o,\,mC'+c,\,t} = d_{m,\,a(m,t,o),\,c}

    with one codebook d of K codewords for each subspace m of C' input channels, shared by all outputs o
    and kernel positions t of a channel group. If C' does not divide the channels of a group the last
    subspace is padded with zeros. Codebooks are trained; assignments a are fixed integers in the state
    dict (uint8, or int16 for more than 256 codewords). On the CPU the native back end uses look-up
    tables: H W C K MACs for the tables and H' W' O kh kw ceil(C / C') look-ups, instead of H' W' O C kh kw.

    Args:
        in_channels: channels C of the input.
        out_channels: channels O of the output.
        kernel_size: an integer or (vertical, horizontal).
        stride: an integer or (vertical, horizontal).
        padding: an integer, (vertical, horizontal), (top, bottom, left, right), "same" or "valid".
        dilation: an integer or (vertical, horizontal).
        groups: channel groups.
        bias: whether a trained bias is added.
        subspace: C'.
        codewords: K.

    Raises:
        ValueError: groups that do not divide the channels, a subspace outside 1..C / groups, fewer than
            2 codewords or more than a subspace has sub-vectors, kh kw O / groups.

    Source: Wu et al., arXiv:1512.06473, section 3.2.

    Example:
        >>> layer = QuantConv2d(16, 32, 3, subspace=4, codewords=64, padding=1)
        >>> layer(torch.randn(1, 16, 10, 10)).shape, layer.assignments.shape
        (torch.Size([1, 32, 10, 10]), torch.Size([4, 9, 32]))
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        *,
        subspace: int,
        codewords: int,
        stride: int | Sequence[int] = 1,
        padding: Padding = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.settle(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
        )
        self.borders = expand_padding(padding, self.kernel_size, self.stride, self.dilation)
        self._make(in_channels, out_channels, groups, math.prod(self.kernel_size), subspace, codewords, bias)

    @property
    def spec(self) -> dict[str, Any]:
        """The JSON-ready description that rebuilds the layer."""
        return {
            "kind": "quantised-conv",
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "kernel_size": list(self.kernel_size),
            "subspace": self.subspace,
            "codewords": self.codewords,
            "stride": list(self.stride),
            "padding": self.padding if isinstance(self.padding, str) else list(self.borders),
            "dilation": list(self.dilation),
            "groups": self.groups,
            "bias": self.bias is not None,
        }

    @property
    def weight(self) -> Tensor:
        """The weight from :meth:`decoded`."""
        return self.decoded()

    def decoded(self) -> Tensor:
        """Return the weight [O, C / groups, kh, kw] in the layout of ``nn.Conv2d``."""
        return decoded(
            self.codebooks, self.assignments, self.in_channels // self.groups, self.kernel_size, self.groups
        )

    def forward(self, x: Tensor) -> Tensor:
        return lookup_conv2d(
            x,
            self.codebooks,
            self.assignments,
            self.bias,
            kernel_size=self.kernel_size,
            stride=self.stride,
            padding=self.borders,
            dilation=self.dilation,
            groups=self.groups,
        )

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"subspace={self.subspace}, codewords={self.codewords}, stride={self.stride}, "
            f"padding={self.borders}, dilation={self.dilation}, groups={self.groups}, "
            f"bias={self.bias is not None}"
        )


class QuantLinear(_Quantised):
    r"""A fully connected layer whose weight consists of codewords.

    .. math:: W_{o,\,mC'+c} = d_{m,\,a(m,o),\,c}

    the case of :class:`QuantConv2d` with a kernel of one position. MACs of one input: C K for the tables
    and O ceil(C / C') look-ups.

    Args:
        in_features: features C of an input.
        out_features: features O of an output.
        bias: whether a trained bias is added.
        subspace: C'.
        codewords: K.

    Raises:
        ValueError: a subspace outside 1..C, fewer than 2 codewords or more than outputs.

    Source: Wu et al., arXiv:1512.06473, section 3.1.

    Example:
        >>> QuantLinear(64, 128, subspace=4, codewords=32)(torch.randn(2, 5, 64)).shape
        torch.Size([2, 5, 128])
    """

    def __init__(
        self, in_features: int, out_features: int, *, subspace: int, codewords: int, bias: bool = True
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self._make(in_features, out_features, 1, 1, subspace, codewords, bias)

    @property
    def spec(self) -> dict[str, Any]:
        """The JSON-ready description that rebuilds the layer."""
        return {
            "kind": "quantised-linear",
            "in_features": self.in_features,
            "out_features": self.out_features,
            "subspace": self.subspace,
            "codewords": self.codewords,
            "bias": self.bias is not None,
        }

    @property
    def weight(self) -> Tensor:
        """The weight from :meth:`decoded`."""
        return self.decoded()

    def decoded(self) -> Tensor:
        """Return the weight [O, C] in the layout of ``nn.Linear``."""
        return decoded(self.codebooks, self.assignments, self.in_features, (1, 1), 1).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.in_features:
            raise ValueError(f"x: expected {self.in_features} features, got shape {tuple(x.shape)}")
        if not x.numel():
            return F.linear(x, self.decoded(), self.bias)
        # each input becomes a position of one map
        rows = x.reshape(1, -1, 1, self.in_features).permute(0, 3, 1, 2)
        y = lookup_conv2d(rows, self.codebooks, self.assignments, self.bias, kernel_size=1)
        return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return (
            f"{self.in_features}, {self.out_features}, subspace={self.subspace}, "
            f"codewords={self.codewords}, bias={self.bias is not None}"
        )


# more descriptive names: "quantised" suggests eight bits
CodebookConv2d = QuantConv2d
CodebookLinear = QuantLinear
