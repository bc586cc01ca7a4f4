"""LRD: split every convolution into d x 1 then 1 x d, dense (Jaderberg et al. 2014, scheme 2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from quincunx.methods.fitting.separable import separable
from quincunx.methods.fitting.settings import SeparableFit, conv_of
from quincunx.methods.points import Point
from quincunx.surgery.calibration import Context, Layer
from quincunx.surgery.method import Replacement, Work, each

__all__ = ["LowRank"]


@dataclass(frozen=True)
class LowRank(SeparableFit):
    r"""Splits a convolution into a vertical and a horizontal one with K channels between them.

    .. math:: W_{n,c,i,j} \approx \sum_{k \le K} V_{k,c,i}\, T_{n,k,j}

    A full fit to data takes n* = max(8 u, 2 C dh dw) samples, positions of images, with
    u = max(K dw, K dh C / O) + 1. With fewer samples n, the minimised error includes
    (n* / n - 1) s ``||W - V T||^2``, s being the mean variance of an input: the fewer samples, the nearer the
    result is to the weights' own solution. One warning then says how many images all layers would need.

    Args:
        rank: K of each channel group: an integer (capped at the layer's full rank), a share in (0, 1]
            of the full rank min(C dh, O dw), or "full", which changes nothing but rounding. A
            layer for which a number or share saves no multiply-adds is not replaced. A
            mapping of patterns to these, such as {"conv2": 71, "*": 0.3}, sets the rank of single layers: the
            first pattern that matches a name counts, and layers without a match are not replaced.
        data: True fits V and T to the layer's responses on the calibration data; False truncates the SVD of
            the weight; None fits if there is calibration data.
        budget: instead of ``rank``, the share of the layers' dense MACs that all of them together may
            cost; ranks are chosen by PCA energies and rounded to multiples of ``multiple``.
        multiple: of ranks chosen for a budget.
        iterations: the most iterations of alternating least squares.
        positions: the most positions of an image that the fit sums over; on larger maps this many are drawn.
        seed: of that draw.

    Raises:
        ValueError: a rank, budget or count outside its range.
        TypeError: a rank of another type.

    Source: Jaderberg et al., arXiv:1405.3866, scheme 2 (filter and data reconstruction); ranks: Zhang
        et al., arXiv:1505.06798, section 3.4.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(16, 16, 3, padding=1))
        >>> qx.accelerate(net, LowRank(rank=8)).model[0].vertical.weight.shape
        torch.Size([8, 16, 3, 1])
    """

    name: ClassVar[str] = "lowrank"
    saves_bytes: ClassVar[bool] = False

    @classmethod
    def candidates(cls) -> tuple[LowRank, ...]:
        """Return the settings that a search tries in each layer."""
        return tuple(cls(rank=rank) for rank in (0.5, 0.25))

    @classmethod
    def sweep(cls) -> list[Point]:
        """Return the settings for its curve of accuracy against speed."""
        return [Point("LRD", f"rank {share:g}", cls(rank=share)) for share in (0.45, 0.35, 0.25)]

    def label(self, pair: bool = False) -> str:
        """Return its settings in a few words."""
        return ", ".join([f"{self.name} of the pair" if pair else self.name, f"rank {self.rank}"])

    def refuse(self, layer: Layer, context: Context) -> str | None:
        """Return why a layer cannot be split into two convolutions, or None."""
        return self.separable_refusal(layer, self.with_data(context))

    def begin(self, layers: Sequence[Layer], context: Context) -> Work:
        """Choose all ranks, then fit layer by layer."""
        with_data = self.with_data(context)
        ranks = self.ranks(layers, context, with_data)

        def replace(layer: Layer) -> Replacement | str:
            if (reason := self.no_saving(layer, ranks[layer.name])) is not None:
                return reason
            found, record = self.fitted(layer, ranks[layer.name], context, with_data)
            module = separable(conv_of(layer), found)
            return Replacement(module, module.spec, record)

        return each(replace)
