"""What the user asks of an acceleration: a speed or an accuracy, and the methods to search."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from quincunx.acceleration.assigned import Assigned
from quincunx.methods.registry import candidates_named

__all__ = ["FREE", "Search", "Target"]

# what a search may be allowed besides methods; neither needs a fit
FREE = ("format", "size")


@dataclass(frozen=True)
class Target:
    """What a search has to reach: one of the first three arguments, or only ``max_drop``, or both.

    Args:
        speedup: seconds before over seconds after, both fused, on this machine.
        latency_ms: milliseconds per call after.
        macs: MACs after: "50%" of those before, or a number for one image.
        max_drop: points of accuracy that may be lost on the calibration data (without labels: points of
            agreement with the network itself). On its own, the search looks for the fastest network within
            it.

    Raises:
        ValueError: no target or too many, or an impossible value.
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
        if self.latency_ms == 0:
            raise ValueError(f"latency_ms={self.latency_ms!r}: expected more than 0")
        if self.speedup is not None and not self.speedup > 1:
            raise ValueError(f"speedup={self.speedup!r}: expected more than 1")
        for name in ("latency_ms", "max_drop"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ValueError(f"{name}={value!r}: expected a number that is not negative")
        if self.macs is not None:
            self.macs_of(1)

    def macs_of(self, before: int) -> float:
        """Return the MACs allowed for a network that had ``before``."""
        text = str(self.macs)
        share = text.endswith("%")
        try:
            value = float(text.removesuffix("%"))
        except ValueError:
            value = -1.0
        if not (0 < value <= 100 if share else 1 <= value < math.inf):
            raise ValueError(
                f"macs={self.macs!r}: expected a share of at most '100%', such as '50%', or a number of "
                "multiply-adds"
            )
        return value / 100 * before if share else value

    def to_dict(self) -> dict[str, Any]:
        """Return the targets that were set, JSON-ready."""
        return {k: v for k, v in dataclasses.asdict(self).items() if v is not None}


@dataclass(frozen=True)
class Search:
    """The settings of :func:`search` from the command line, used like a method.

    Attributes:
        target: what to reach.
        methods: names of methods, or "auto".
        time_budget: seconds of scoring.
        scores: file of the score table; by default ``scores.json`` in the result's folder.
        free: what it may choose besides methods, and tries first: "format", another number format, and
            "size", a smaller input.

    Raises:
        ValueError: nothing to choose from, or something else in ``free``.
    """

    target: Target
    methods: tuple[str, ...] = ("auto",)
    time_budget: float | None = None
    scores: Path | None = None
    free: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in self.free:
            if name not in FREE:
                raise ValueError(f"free={name!r}: expected some of {', '.join(FREE)}")
        if not (self.methods or self.free):
            raise ValueError("methods=(): nothing to choose from")

    @property
    def name(self) -> str:
        """Return its name in records and messages."""
        return "+".join((*self.free, *self.methods))

    @property
    def targets(self) -> tuple[type[nn.Module], ...]:
        """Return the classes of layers that its candidates replace."""
        return Assigned({f"{i}": m for i, m in enumerate(candidates_named(self.methods))}).targets
