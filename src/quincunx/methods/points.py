"""A setting of a method as a point of a comparison, and its name in words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from quincunx.surgery.method import Method
from quincunx.writing import file_name

__all__ = ["Point", "worded"]


@dataclass(frozen=True)
class Point:
    """One setting of one method.

    Attributes:
        series: the line that the point belongs to, such as "espace, impact masks".
        label: of this point on the line, such as "rate 1/4".
        method: its settings; or what takes the place of a method, such as a smaller input.
        paper: figures that the paper prints for it: "speedup", "drop" (points of error); empty if unknown.
        draw: distinguishes points of one series and label, such as "seed 1"; a figure shows their range.
    """

    series: str
    label: str
    method: Any
    paper: tuple[tuple[str, float], ...] = ()
    draw: str = ""

    @property
    def name(self) -> str:
        """Return series, label and draw in words."""
        return ", ".join(filter(None, (self.series, self.label, self.draw)))

    @property
    def folder(self) -> str:
        """Return the name of its results folder, such as "espace-impact-rate-1of4"."""
        return file_name(f"{self.series} {self.label} {self.draw}".strip())


def worded(method: Method, pair: bool = False) -> str:
    """Return a method's settings in a few words; without its own ``label``, its name, rank and rate.

    Example:
        >>> worded(qx.Espace(rank=0.5, rate=0.25)), worded(qx.SpatialBottleneck(), pair=True)
        ('espace, rank 0.5, rate 0.25, impact', 'spatialbottleneck of the pair, density 0.5')
    """
    label = getattr(method, "label", None)
    if label is not None:
        return str(label(pair))
    words = [f"{method.name} of the pair" if pair else method.name]
    words += [f"{name} {getattr(method, name)}" for name in ("rank", "rate") if hasattr(method, name)]
    return ", ".join(words)
