"""What stands at the positions that a sampled convolution skips: fills, one of them with parameters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from quincunx.ops import fill_fitted
from quincunx.ops.geometry import two_integers
from quincunx.ops.plan import FillPlan, coset_taps, fill_plan, fill_sizes, tap_distances
from quincunx.sampling import Cosets, Positions, Sampling

__all__ = ["FILLS", "REACHES", "FittedFill2d", "check_fill"]

FILLS = ("zero", "nearest", "fitted")
# how far a fitted fill reads by default: a window of 3 x 3 for cosets, so many computed positions for masks
REACHES = {"cosets": 1, "mask": 4}


def check_fill(fill: str) -> str:
    """The name of a fill.

    Raises:
        ValueError: there is no such fill.
    """
    if fill not in FILLS:
        raise ValueError(f"fill={fill!r}: expected one of {', '.join(FILLS)}")
    return fill


class FittedFill2d(nn.Module):
    r"""A sampled map made dense by coefficients that are parameters; see :func:`quincunx.fill_fitted`.

    Maps [N, C, m, 1] to [N, C, H, W]. For cosets there is one depthwise kernel for each residue class,
    w [R, T, C], with a bias [R, C]. For other samplings each skipped position has its own coefficients, which
    all channels share, so that there are few numbers: w = a g, a [R, T], with a gain g [C] and a bias [C].

    The start is the mean of the nearest computed positions, which fills a constant map exactly.

    Args:
        channels: C.
        sampling: which positions are computed.
        reach: rows and columns of the window to each side (1 for 3 x 3, 2 for 5 x 5), or for samplings that
            are no cosets the number of computed positions that are read. By default 1, or 4.
        size: the grid (H, W), needed for samplings that are no cosets and have no grid of their own; such a
            fill serves this grid only.

    Raises:
        ValueError: a non-positive count or reach; no size where one is needed.
        TypeError: ``sampling`` is not one.

    Source: a fixed kernel in its place: Xie et al., Spatially Adaptive Inference (ECCV 2020).

    Example:
        >>> FittedFill2d(8, qx.CHESSBOARD)(torch.randn(2, 8, 18, 1), (6, 6)).shape
        torch.Size([2, 8, 6, 6])
    """

    def __init__(
        self,
        channels: int,
        sampling: Sampling,
        *,
        reach: int | None = None,
        size: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(sampling, Sampling):
            raise TypeError(f"sampling={sampling!r}: expected a sampling such as qx.CHESSBOARD")
        cosets = isinstance(sampling, Cosets)
        if reach is None:
            reach = REACHES["cosets" if cosets else "mask"]
        for name, value in (("channels", channels), ("reach", reach)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r}: expected a positive integer")
        if cosets:
            # coefficients belong to classes, which every grid has
            size = (2 * sampling.period, 2 * sampling.period)  # type: ignore[attr-defined]
        elif isinstance(sampling, Positions):
            size = sampling.size
        elif size is None:
            raise ValueError(
                f"size=None: the coefficients of a fitted fill belong to the positions of {sampling!r} on "
                "one grid; give its (height, width)"
            )
        self.channels, self.sampling, self.reach = channels, sampling, reach
        height, width = two_integers("size", tuple(size), 1)
        self.size = None if cosets else (height, width)
        # no table yet: the sizes of a file's layers are looked at before memory is taken for them
        rows, taps = fill_sizes(sampling, reach, height, width)
        if cosets:
            self.weight = nn.Parameter(torch.empty(rows, taps, channels))
            self.gain = None
            self.bias = nn.Parameter(torch.empty(rows, channels))
        else:
            self.weight = nn.Parameter(torch.empty(rows, taps))
            self.gain = nn.Parameter(torch.empty(channels))
            self.bias = nn.Parameter(torch.empty(channels))
        self.reset_parameters()

    def plan(self, height: int, width: int) -> FillPlan:
        """Which computed positions each skipped one reads on a grid."""
        return fill_plan(self.sampling.spec, height, width, self.reach)

    def _distances(self) -> Tensor:
        if self.size is None:
            return tap_distances(coset_taps(self.sampling.spec, self.reach))
        return self.plan(*self.size).distance

    @property
    def start(self) -> Tensor:
        """The coefficients of the start, [R, T] float64: the mean of the nearest computed positions."""
        distances = self._distances()
        nearest = distances == distances[:, :1]
        return nearest.double() / nearest.sum(1, keepdim=True)

    @property
    def present(self) -> Tensor:
        """Which of the taps there are, BoolTensor [R, T]: a class may have fewer than another."""
        return self._distances().isfinite()

    def reset_parameters(self) -> None:
        """Back to the start."""
        if self.weight.is_meta:
            return
        with torch.no_grad():
            start = self.start.to(self.weight)
            self.weight.copy_(start[:, :, None].expand_as(self.weight) if self.gain is None else start)
            if self.gain is not None:
                self.gain.fill_(1)
            self.bias.zero_()

    def coefficients(self) -> tuple[Tensor, Tensor]:
        """w [R, T, C] and b [R, C]."""
        if self.gain is None:
            return self.weight, self.bias
        return self.weight[:, :, None] * self.gain, self.bias.expand(len(self.weight), -1)

    def forward(self, y: Tensor, size: Sequence[int]) -> Tensor:
        weight, bias = self.coefficients()
        return fill_fitted(y, weight, bias, sampling=self.sampling, size=size, reach=self.reach)

    def extra_repr(self) -> str:
        where = "" if self.size is None else f", size={self.size}"
        return f"{self.channels}, {self.sampling!r}, reach={self.reach}{where}"
