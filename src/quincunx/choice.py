"""What a search chooses from and towards: candidates, targets, and the best choice for a target."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from quincunx.methods import Assigned
from quincunx.methods.registry import candidates_named
from quincunx.surgery import Method

__all__ = [
    "Candidate",
    "Search",
    "Target",
    "choose",
    "pair_name",
]


@dataclass(frozen=True)
class Target:
    """What a search is to reach; one of the first three, or ``max_drop`` alone.

    Args:
        speedup: seconds before over seconds after, both fused, on this machine.
        latency_ms: milliseconds of one call after.
        macs: MACs after: "50%" of those before, or a number for one image.
        max_drop: points of accuracy that may be lost on the calibration data (without labels: of
            agreement with the network itself). Alone, the fastest network within it is looked for.

    Raises:
        ValueError: nothing or too much was asked for, or a value that makes no sense.
    """

    speedup: float | None = None
    latency_ms: float | None = None
    macs: str | float | None = None
    max_drop: float | None = None

    def __post_init__(self) -> None:
        asked = [f.name for f in dataclasses.fields(self) if getattr(self, f.name) is not None]
        if not asked:
            raise ValueError("target: one of speedup, latency_ms, macs and max_drop is needed")
        if len([name for name in asked if name != "max_drop"]) > 1:
            raise ValueError(f"target: {' and '.join(asked)} cannot be asked for together")
        for name in ("speedup", "latency_ms", "max_drop"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
                raise TypeError(f"{name}={value!r}: expected a number")
            if value is not None and not math.isfinite(value):
                raise ValueError(f"{name}={value!r}: expected a finite number")
        if self.speedup is not None and not self.speedup > 1:
            raise ValueError(f"speedup={self.speedup!r}: expected more than 1")
        for name in ("latency_ms", "max_drop"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ValueError(f"{name}={value!r}: expected a number that is not negative")
        if self.macs is not None:
            self.macs_of(1)

    def macs_of(self, before: int) -> float:
        """The MACs that are allowed for a network of ``before``."""
        text = str(self.macs)
        try:
            value = float(text[:-1]) / 100 * before if text.endswith("%") else float(text)
        except ValueError:
            value = -1.0
        if not 0 < value < math.inf:
            raise ValueError(f"macs={self.macs!r}: expected a share such as '50%' or a positive number")
        return value

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: what was asked for."""
        return {k: v for k, v in dataclasses.asdict(self).items() if v is not None}


@dataclass(frozen=True)
class Search:
    """What the command line asks :func:`search` for, in place of a method.

    Attributes:
        target: to reach.
        methods: names of methods, or "auto".
        time_budget: seconds of scoring.
        scores: file of the score table; by default ``scores.json`` in the result's folder.
    """

    target: Target
    methods: tuple[str, ...] = ("auto",)
    time_budget: float | None = None
    scores: Path | None = None

    @property
    def name(self) -> str:
        """What records and messages call it."""
        return "+".join(self.methods)

    @property
    def targets(self) -> tuple[type[nn.Module], ...]:
        """The classes of layers that its candidates replace."""
        return Assigned({f"{i}": m for i, m in enumerate(candidates_named(self.methods))}).targets


@dataclass
class Candidate:
    """A method for one layer or pair, and its scores.

    Attributes:
        layers: one name, or two of a pair.
        label: the method's settings, in words.
        macs_saved: for one image.
        seconds_saved: [first quartile, median, third] of a call, measured in the whole network.
        loss: mean Kullback-Leibler divergence from the original network's answers, of this one alone.
        why_not: why it cannot be chosen, if so.
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
        """The median of the seconds saved."""
        return self.seconds_saved[1] if self.seconds_saved is not None else 0.0

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**{k: v for k, v in vars(self).items() if k != "method"}, "method": repr(self.method)}


def choose(rows: Sequence[Candidate], gains: Sequence[float], wanted: float) -> list[Candidate]:
    """The rows of least loss that together gain what is wanted, at most one for each layer; if it cannot be
    reached, those of the greatest gain, to a millionth.

    Source: a multiple-choice knapsack, solved by HiGHS as an integer program.
    """
    if not rows or wanted <= 0:
        return []
    losses = np.array([max(row.loss or 0.0, 0.0) for row in rows])
    names = sorted({name for row in rows for name in row.layers})
    once = np.array([[float(name in row.layers) for row in rows] for name in names])
    scale = max(max(abs(g) for g in gains), 1e-30)
    gain = np.array(gains) / scale
    found, worst, least = None, float(losses.max()), wanted / scale
    while np.isfinite(wanted):
        # loss decides; of equal losses the greater gain
        cost_of = losses / max(worst, 1e-30) - 1e-6 * gain
        better = _solved(cost_of, once, losses <= worst, gain, least)
        if better is None:
            break
        found, total = better, float(losses[better].sum())
        if np.array(gains)[better].sum() < wanted and least == wanted / scale:
            least += 2e-6  # the solver's tolerance
        elif total < worst / 2:
            worst = total  # exact to a millionth of the greatest loss, so without those that are too great
        else:
            break
    if found is None:
        found = _solved(-gain, once, losses >= 0, gain, -np.inf)
        most = 0.0 if found is None else float(np.array(gains)[found].sum())
        # what gains as much with less loss
        return choose(rows, gains, most * (1 - 1e-6))
    return [row for row, taken in zip(rows, found, strict=True) if taken]


def _solved(
    cost_of: np.ndarray, once: np.ndarray, allowed: np.ndarray, gain: np.ndarray, least: float
) -> np.ndarray | None:
    """Which columns are of least cost, each row of ``once`` taken at most once; None if none gain enough."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    limits = [LinearConstraint(once, ub=np.ones(len(once)))]
    if np.isfinite(least):
        limits.append(LinearConstraint(gain[None, :], lb=least))
    bounds = Bounds(0, allowed.astype(float))
    options = {"mip_rel_gap": 0.0}
    found = milp(cost_of, constraints=limits, integrality=np.ones(len(gain)), bounds=bounds, options=options)
    return None if found.x is None else found.x > 0.5


def pair_name(names: Sequence[str]) -> str:
    """A layer's name, or those of a pair, what they share said once.

    Example:
        >>> pair_name(["layer1.0.conv1", "layer1.0.conv2"])
        'layer1.0.conv1 + conv2'
    """
    parent, dot, _ = names[0].rpartition(".")
    return " + ".join([names[0], *(name.removeprefix(parent + dot) for name in names[1:])])
