"""The end of a block that is computed at sampled positions: its last 1 x 1 layer, then a fitted fill."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quincunx.layers.paired import Grid, first_half, size_known
from quincunx.layers.sampled import PerforatedConv2d
from quincunx.sampling import Sampling

__all__ = ["PairedFill2d"]


class PairedFill2d(PerforatedConv2d):
    """The last 1 x 1 layer of a block, at sampled positions, and the values between them.

    Between a :class:`quincunx.layers.paired.PairedDown2d` and this layer the network's own norms, linear
    layers and activations see a sampled map. MACs: m C O, and those of the fill.

    Args:
        in_channels: channels C of the sampled map.
        out_channels: channels O of the result.
        sampling: the positions of the sampled map.
        partner: the path of the first half in the network.
        channels: "first", [N, C, m, 1] to [N, O, H, W] as a 1 x 1 convolution has it, or "last",
            [N, m, 1, C] to [N, H, W, O] as a linear layer has it.
        bias: whether a trained bias is added.
        fill: of :class:`quincunx.PerforatedConv2d`; "fitted" has coefficients that are trained.
        fill_reach: how far a fitted fill reads.

    Raises:
        ValueError: another place of the channels, an unknown fill.
        RuntimeError: at a call without a size, if an operation between the halves made a plain tensor of the
            map and grids of several sizes have as many positions.

    Example:
        >>> from quincunx.layers.paired import PairedDown2d
        >>> net = nn.Sequential(PairedDown2d(3, 8, sampling=qx.CHESSBOARD), nn.ReLU(),
        ...                     PairedFill2d(8, 4, sampling=qx.CHESSBOARD, partner="0"))
        >>> net[2].attach(net)
        >>> net(torch.randn(1, 3, 6, 6)).shape
        torch.Size([1, 4, 6, 6])
    """

    kind = "paired-fill"

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        sampling: Sampling,
        partner: str,
        channels: str = "first",
        bias: bool = True,
        fill: str = "fitted",
        fill_reach: int | None = None,
    ) -> None:
        if channels not in ("first", "last"):
            raise ValueError(f"channels={channels!r}: expected 'first' or 'last'")
        super().__init__(
            in_channels, out_channels, 1, sampling=sampling, bias=bias, fill=fill, fill_reach=fill_reach
        )
        self.partner, self.channels, self.grid_seen = partner, channels, Grid()
        self.in_features, self.out_features = in_channels, out_channels

    @property
    def spec(self) -> dict[str, Any]:
        """JSON-ready; what builds it again."""
        return {
            "kind": self.kind,
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "sampling": self.sampling.spec,
            "partner": self.partner,
            "channels": self.channels,
            "bias": self.bias is not None,
            "fill": self.fill,
            "fill_reach": None if self.filling is None else self.filling.reach,
        }

    def attach(self, network: nn.Module) -> None:
        """Take the grid's size from the first half in ``network`` from now on.

        Raises:
            AttributeError: the network has no module of the partner's name.
            ValueError: that module is not a first half.
        """
        self.grid_seen = first_half(network, self.partner).grid

    def forward(self, y: Tensor, size: Sequence[int] | None = None) -> Tensor:
        last = self.channels == "last"
        if size is None:
            size = size_known(y, y.shape[1 if last else 2], self.grid_seen, self.partner)
        with torch._C.DisableTorchFunctionSubclass():
            y = y.permute(0, 3, 1, 2) if last else y
            whole = self.made_whole(F.conv2d(y, self.weight, self.bias), self.sampling, size)
            return whole.permute(0, 2, 3, 1) if last else whole
