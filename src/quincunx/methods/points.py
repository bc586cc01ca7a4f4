"""A setting of a method, as comparisons name it; and settings in a few words."""

from __future__ import annotations

from dataclasses import dataclass

from quincunx.surgery.method import Method
from quincunx.writing import file_name

__all__ = ["Point", "worded"]


@dataclass(frozen=True)
class Point:
    """One setting of one method.

    Attributes:
        series: what is drawn as one line, such as "espace, impact masks".
        label: of this point in it, such as "rate 1/4".
        method: its settings.
        paper: what the paper prints for it: "speedup", "drop" (points of error); empty if unknown.
        draw: tells several of one series and label apart, such as "seed 1"; a figure shows their range.
    """

    series: str
    label: str
    method: Method
    paper: tuple[tuple[str, float], ...] = ()
    draw: str = ""

    @property
    def name(self) -> str:
        """All of it in words."""
        return ", ".join(filter(None, (self.series, self.label, self.draw)))

    @property
    def folder(self) -> str:
        """Where its results lie: the words as a file name, such as "espace-impact-rate-1of4"."""
        return file_name(f"{self.series} {self.label} {self.draw}".strip())


def worded(method: Method, pair: bool = False) -> str:
    """A method's settings in a few words: of one without words of its own its name, rank and rate.

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
