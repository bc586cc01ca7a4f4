"""The candidates of a search: a method for a layer, with its scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from quincunx.surgery.method import Method

__all__ = [
    "Candidate",
    "pair_name",
]


@dataclass
class Candidate:
    """A method for one layer or pair, and its scores.

    Attributes:
        layers: one name, or the two names of a pair.
        label: the method's settings, in words.
        macs_saved: for one image.
        seconds_saved: [first quartile, median, third quartile] per call, measured in the whole network.
        loss: the task's mean distance from the original network's outputs, with only this candidate.
        why_not: the reason why it cannot be chosen, if there is one.
    """

    layers: tuple[str, ...]
    label: str
    method: Method
    macs_saved: int = 0
    seconds_saved: tuple[float, float, float] | None = None
    loss: float | None = None
    why_not: str | None = None

    @property
    def seconds(self) -> float:
        """Return the median of the seconds saved."""
        return self.seconds_saved[1] if self.seconds_saved is not None else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-ready values."""
        return {**{k: v for k, v in vars(self).items() if k != "method"}, "method": repr(self.method)}


def pair_name(names: Sequence[str]) -> str:
    """Return a layer's name, or a pair's two names with their common parent written once.

    Example:
        >>> pair_name(["layer1.0.conv1", "layer1.0.conv2"])
        'layer1.0.conv1 + conv2'
    """
    parent, dot, _ = names[0].rpartition(".")
    return " + ".join([names[0], *(name.removeprefix(parent + dot) for name in names[1:])])
