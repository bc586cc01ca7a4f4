"""The scale of a score: its name, unit and direction, and how values and losses on it are written."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["ERROR", "Scale", "scale_in"]


@dataclass(frozen=True)
class Scale:
    """A score's scale.

    Attributes:
        name: such as "error" or "PSNR".
        unit: "points" for shares in [0, 1], which are written in percent and whose differences are in points;
            else a unit such as "dB", or "" for none.
        better: "higher" or "lower".

    Raises:
        ValueError: another direction.

    Example:
        >>> psnr = Scale("PSNR", "dB", "higher")
        >>> psnr.shown(29.126), psnr.lost(29.2, 29.1) > 0, ERROR.shown(0.125), ERROR.amount(1.0)
        ('29.13 dB', True, '12.50%', '1 point')
    """

    name: str
    unit: str = "points"
    better: str = "higher"

    def __post_init__(self) -> None:
        for field in ("name", "unit"):
            if not isinstance(getattr(self, field), str):
                raise TypeError(f"{field}={getattr(self, field)!r}: expected a text")
        if self.better not in ("higher", "lower"):
            raise ValueError(f"better={self.better!r}: expected 'higher' or 'lower'")

    @property
    def key(self) -> str:
        """Return the name of the score in result files: "error" in classification, else "score"."""
        return "error" if self == ERROR else "score"

    @property
    def factor(self) -> float:
        """Return the unit's size: differences of shares are counted in points."""
        return 100.0 if self.unit == "points" else 1.0

    def cost(self, score: float) -> float:
        """Return a number that is lower for a better score."""
        return score if self.better == "lower" else -score

    def lost(self, before: float, after: float) -> float:
        """Return how much worse a score is after than before, in the unit; negative if it is better."""
        return self.factor * (self.cost(after) - self.cost(before))

    def limit(self, before: float, lost: float) -> float:
        """Return the score at which so much is lost."""
        down = lost / self.factor
        return before + down if self.better == "lower" else before - down

    def reached(self, score: float, wanted: float) -> bool:
        """Return whether a score is at least as good as another."""
        return self.cost(score) <= self.cost(wanted)

    def shown(self, score: float) -> str:
        """Return a score as text."""
        if self.unit == "points":
            return f"{_rounded(100 * score, 2)}%"
        digits = 4 if math.isfinite(score) and abs(score) < 1 else 2
        return f"{_rounded(score, digits)} {self.unit}".rstrip()

    def amount(self, lost: float, digits: int | None = None) -> str:
        """Return a difference as text: "1 point", "0.25 points", "0.1 dB"."""
        number = f"{lost:g}" if digits is None else _rounded(lost, digits)
        if self.unit == "points":
            return f"{number} point{'' if number == '1' else 's'}"
        return f"{number} {self.unit}".rstrip()

    def of_what(self) -> str:
        """Return what is lost, as text: accuracy in classification, else the score's name."""
        return "accuracy" if self == ERROR else self.name

    def to_dict(self) -> dict[str, str]:
        """Return the fields, JSON-ready."""
        return asdict(self)


def _rounded(number: float, digits: int) -> str:
    """Return a number with so many digits behind the point; with two that count if those are all 0 and it is
    more than rounding."""
    text = f"{number:.{digits}f}"
    return f"{number:.2g}" if abs(number) > _ROUNDING and not text.strip("-0.") else text


# differences of scores that are none
_ROUNDING = 1e-12

# of classification: share of wrong predictions
ERROR = Scale("error", "points", "lower")


def scale_in(result: Mapping[str, Any]) -> Scale:
    """Return the scale of a result file; one without a task is of classification.

    Raises:
        ValueError: its task has no valid scale.

    Example:
        >>> psnr = {"name": "PSNR", "unit": "dB", "better": "higher"}
        >>> scale_in({"task": {"name": "x", "score": psnr}}).unit
        'dB'
        >>> scale_in({}).name
        'error'
    """
    task = result.get("task")
    if task is None:
        return ERROR
    try:
        return Scale(**task["score"])
    except (TypeError, KeyError) as error:
        raise ValueError(f"task={task!r}: expected a name and a score with name, unit and better") from error
