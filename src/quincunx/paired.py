"""The two halves of a spatial bottleneck that takes the place of a pair of convolutions.

Between them stand the network's own norm and activation, which see a sampled map. A network calls the
second half with that map alone, which does not tell the grid's size, so the first half notes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from quincunx.nn import SampledConvTranspose2d, SampledDown2d, half_padding
from quincunx.ops.functional import pair
from quincunx.sampling import Sampling

__all__ = ["PairedDown2d", "PairedUp2d"]


class Grid:
    """The size (H, W) that the first half saw last; shared by both halves, also in a deep copy."""

    def __init__(self) -> None:
        self.size: Sequence[int] | None = None


class PairedDown2d(SampledDown2d):
    """The first half: a convolution at the positions of a sampling, [N, C, H, W] to [N, O, m, 1].

    Arguments and geometry are those of the first half of :class:`quincunx.SpatialBottleneck2d`; it keeps
    the map's size in ``grid`` for its partner.

    Source: Peng et al., arXiv:1809.02601, section 3 (rSB).

    Example:
        >>> down = PairedDown2d(3, 8, sampling=qx.CHESSBOARD)
        >>> down(torch.randn(1, 3, 6, 6)).shape, tuple(down.grid.size)
        (torch.Size([1, 8, 18, 1]), (6, 6))
    """

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.grid = Grid()

    def forward(self, x: Tensor) -> Tensor:
        self.grid.size = x.shape[2:]
        return super().forward(x)


class PairedUp2d(SampledConvTranspose2d):
    """The second half: from the sampled map [N, C, m, 1] to every position, [N, O, H, W].

    Args:
        in_channels, out_channels, kernel_size, sampling, dilation, groups, bias: as in
            :class:`quincunx.SampledConvTranspose2d`, with the padding that keeps the size.
        partner: the path of the first half in the network.

    Raises:
        RuntimeError: at a call without a size before the first half was called.

    Source: Peng et al., arXiv:1809.02601, section 3 (rSB).

    Example:
        >>> net = nn.Sequential(PairedDown2d(3, 8, sampling=qx.CHESSBOARD), nn.ReLU(),
        ...                     PairedUp2d(8, 3, sampling=qx.CHESSBOARD, partner="0"))
        >>> net[2].attach(net)
        >>> net(torch.randn(1, 3, 6, 6)).shape
        torch.Size([1, 3, 6, 6])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int] = 3,
        *,
        sampling: Sampling,
        partner: str,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
    ) -> None:
        kernel, spread = pair("kernel_size", kernel_size, 1), pair("dilation", dilation, 1)
        super().__init__(
            in_channels,
            out_channels,
            kernel,
            sampling=sampling,
            padding=half_padding(kernel, spread),
            dilation=spread,
            groups=groups,
            bias=bias,
        )
        self.partner, self.grid = partner, Grid()

    def attach(self, network: nn.Module) -> None:
        """Take the grid's size from the first half in ``network`` from now on.

        Raises:
            AttributeError: the network has no module of the partner's name.
            ValueError: that module is no first half.
        """
        first = network.get_submodule(self.partner)
        if not isinstance(first, PairedDown2d):
            raise ValueError(f"partner={self.partner!r}: expected a PairedDown2d, got {type(first).__name__}")
        self.grid = first.grid

    def forward(self, y: Tensor, size: Sequence[int] | None = None) -> Tensor:
        size = self.grid.size if size is None else size
        if size is None:
            raise RuntimeError(f"the first half, {self.partner}, was not called: the grid's size is unknown")
        return super().forward(y, size)
