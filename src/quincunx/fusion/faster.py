"""Decide at run time which of two ways to compute the same result is faster, by a short measurement."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter

import numpy as np

__all__ = ["speed_ratio"]


def speed_ratio(
    one: Callable[[], object],
    other: Callable[[], object],
    *,
    level: float = 1.0,
    rounds: int = 7,
    round_seconds: float = 0.005,
    budget: float = 0.3,
) -> float:
    r"""Return the speed-up of ``one``: the median over rounds of the seconds of ``other`` over its own.

    The measurement ends early, since it runs at run time: after three rounds if every round's
    ratio r is on one side, :math:`r > 1.2\,\text{level}` or :math:`1.2\,r < \text{level}`, or when the
    budget is spent.

    Args:
        one: function without arguments; runs once before anything is timed.
        other: as ``one``.
        level: the ratio at which the decision changes.
        rounds: the most rounds, at least 3.
        round_seconds: approximate duration of a round of one function, if a call is not longer.
        budget: total seconds after which no further round starts.

    Raises:
        ValueError: ``rounds`` below 3.

    Example:
        >>> speed_ratio(lambda: sum(range(10)), lambda: sum(range(10_000))) > 1
        True
    """
    if rounds < _FEWEST_ROUNDS:
        raise ValueError(f"rounds={rounds}: expected at least {_FEWEST_ROUNDS}")
    begin = perf_counter()
    calls = []
    for run in (one, other):
        run()
        calls.append(max(1, int(round_seconds / max(_seconds(run, 1), 1e-9))))
    ratios: list[float] = []
    while len(ratios) < rounds:
        taken = _seconds(one, calls[0])
        ratios.append(_seconds(other, calls[1]) / max(taken, 1e-9))
        clear = min(ratios) > _CLEAR * level or max(ratios) * _CLEAR < level
        if len(ratios) >= _FEWEST_ROUNDS and (clear or perf_counter() - begin > budget):
            break
    return float(np.median(ratios))


# a decision at run time takes this many rounds, and is clear if all ratios exceed this
_FEWEST_ROUNDS, _CLEAR = 3, 1.2


def _seconds(run: Callable[[], object], calls: int) -> float:
    """Return the mean seconds of some calls."""
    begin = perf_counter()
    for _ in range(calls):
        run()
    return (perf_counter() - begin) / calls
