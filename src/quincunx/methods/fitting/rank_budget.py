"""Choose the ranks of all layers together, within a budget of MACs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from quincunx.surgery.calibration import Layer

__all__ = ["RankOption", "candidate", "check_budget", "select_ranks"]


@dataclass(frozen=True)
class RankOption:
    """The data from which one layer's rank is chosen.

    Attributes:
        energies: PCA energies, falling; rank K keeps the first K.
        macs: MACs of the layer per unit of rank, for one image.
        dense: MACs of the dense layer.
    """

    energies: tuple[float, ...]
    macs: int
    dense: int

    def kept(self, rank: int) -> float:
        """Return the share of the energy that a rank keeps; 1 for a layer without energy."""
        total = math.fsum(self.energies)
        return math.fsum(self.energies[:rank]) / total if total > 0 else 1.0


def candidate(layer: Layer, energies: Tensor) -> RankOption:
    """Return a convolution's data for the choice.

    MACs of rank K: K (dh C H' W + dw O H' W'), summed over the channel groups, for an H x W input.
    """
    conv = layer.module
    if not isinstance(conv, nn.Conv2d):
        raise TypeError(f"layer {layer.name!r}: expected a Conv2d, got {type(conv).__name__}")
    (height, width), (_, wide) = layer.grid, layer.input_size
    unit = conv.kernel_size[0] * conv.in_channels * height * wide
    unit += conv.kernel_size[1] * conv.out_channels * height * width
    dense = conv.weight.numel() * height * width
    return RankOption(tuple(energies.tolist()), unit, dense)


def check_budget(budget: float) -> None:
    """
    Raises:
        ValueError: it is no share of the layers' multiply-adds.
    """
    if isinstance(budget, bool) or not isinstance(budget, (int, float)) or not 0 < budget <= 1:
        raise ValueError(f"budget={budget!r}: expected a share of the layers' MACs, above 0 and at most 1")


def select_ranks(layers: Mapping[str, RankOption], budget: float, *, multiple: int = 16) -> dict[str, int]:
    r"""Return the rank of each layer that keeps a large product of PCA energies within the MACs.

    .. math:: \max \prod_l \frac{\sum_{k \le K_l} \sigma_{l,k}}{\sum_k \sigma_{l,k}}
              \quad\text{with}\quad \sum_l K_l m_l \le \text{budget} \sum_l M_l

    Greedy: starting from full ranks, repeatedly take the step down that loses least of the logarithm per
    MAC saved; finally, give the remaining budget back where it gains most.

    Args:
        layers: a :class:`RankOption` for each layer, with energies sigma, m and M.
        budget: share of the layers' dense MACs.
        multiple: ranks are multiples of this, or the full rank; 16 fills a register tile.

    Returns:
        The rank of each layer.

    Raises:
        ValueError: a budget that is no share, or smaller than the cost of the smallest ranks.

    Source: Zhang et al., arXiv:1505.06798, section 3.4.

    Example:
        >>> layers = {"a": RankOption((9.0, 1.0), 10, 40), "b": RankOption((5.0, 5.0), 10, 40)}
        >>> select_ranks(layers, 0.4, multiple=1)
        {'a': 1, 'b': 2}
    """
    check_budget(budget)
    if isinstance(multiple, bool) or not isinstance(multiple, int) or multiple < 1:
        raise ValueError(f"multiple={multiple!r}: expected a positive integer")
    allowed = budget * sum(layer.dense for layer in layers.values())
    steps = {name: _steps(len(layer.energies), multiple) for name, layer in layers.items()}
    at = {name: len(choices) - 1 for name, choices in steps.items()}

    def spent() -> int:
        return sum(layers[name].macs * steps[name][i] for name, i in at.items())

    def price(name: str, lower: int, upper: int) -> float:
        """Return the loss of the logarithm per MAC between two steps."""
        small, large = (layers[name].kept(steps[name][i]) for i in (lower, upper))
        saved = layers[name].macs * (steps[name][upper] - steps[name][lower])
        return (math.log(large) - math.log(small)) / saved if small > 0 else math.inf

    while spent() > allowed:
        lower = [name for name, i in at.items() if i > 0]
        if not lower:
            least = spent() / sum(layer.dense for layer in layers.values())
            raise ValueError(
                f"budget={budget!r}: the smallest ranks (multiples of {multiple}) already cost {least:.3g}"
            )
        chosen = min(lower, key=lambda name: price(name, at[name] - 1, at[name]))
        at[chosen] -= 1
    while True:
        room = allowed - spent()
        higher = [
            name
            for name, i in at.items()
            if i + 1 < len(steps[name]) and layers[name].macs * (steps[name][i + 1] - steps[name][i]) <= room
        ]
        if not higher:
            return {name: steps[name][i] for name, i in at.items()}
        at[max(higher, key=lambda name: price(name, at[name], at[name] + 1))] += 1


def _steps(full: int, multiple: int) -> list[int]:
    """Return the ranks that a layer may get, in rising order."""
    return [*range(multiple, full, multiple), full]
