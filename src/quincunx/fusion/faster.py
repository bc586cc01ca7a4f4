"""Which of two ways to compute the same is faster here: a short measurement for decisions at run time."""

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
    r"""The median over rounds of the seconds of ``other`` over those of ``one``: how much faster ``one`` is.

    For a decision at run time, so no longer than that takes: after three rounds it ends where every round's
    ratio r lies on one side, :math:`r > 1.2\,\text{level}` or :math:`1.2\,r < \text{level}`, or where the
    budget is spent.

    Args:
        one, other: functions without arguments; each runs once before anything is timed.
        level: the ratio at which the decision changes.
        rounds: at most, and at least 3.
        round_seconds: about how long one round of one function lasts, if a call is not longer.
        budget: seconds in all after which no further round begins.

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


# a decision at run time takes so many rounds, and is beyond doubt where all differ so much
_FEWEST_ROUNDS, _CLEAR = 3, 1.2


def _seconds(run: Callable[[], object], calls: int) -> float:
    """The mean of some calls."""
    begin = perf_counter()
    for _ in range(calls):
        run()
    return (perf_counter() - begin) / calls
