"""Choose a candidate for each layer: minimum loss for a wanted speed, as an integer program."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from quincunx.acceleration.candidates import Candidate

__all__ = ["choose"]


def choose(
    rows: Sequence[Candidate],
    gains: Sequence[float],
    wanted: float,
    losses: Sequence[float] | None = None,
) -> list[Candidate]:
    """Return the rows of least total loss that together gain ``wanted``, at most one per layer. If that
    cannot be reached, return the rows of the greatest gain, to a millionth.

    ``losses`` replaces the rows' own losses.

    Source: a multiple-choice knapsack, solved by HiGHS as an integer program.
    """
    if not rows or wanted <= 0:
        return []
    costs = np.array([max(loss, 0.0) for loss in losses or [row.loss or 0.0 for row in rows]])
    names = sorted({name for row in rows for name in row.layers})
    once = np.array([[float(name in row.layers) for row in rows] for name in names])
    scale = max(max(abs(g) for g in gains), 1e-30)
    gain = np.array(gains) / scale
    found, worst, least = None, float(costs.max()), wanted / scale
    while np.isfinite(wanted):
        # minimise the loss; of equal losses take the greater gain
        cost_of = costs / max(worst, 1e-30) - 1e-6 * gain
        better = _solved(cost_of, once, costs <= worst, gain, least)
        if better is None:
            break
        found, total = better, float(costs[better].sum())
        if np.array(gains)[better].sum() < wanted and least == wanted / scale:
            least += 2e-6  # the solver's tolerance
        elif total < worst / 2:
            worst = total  # exact to a millionth of the greatest loss, so solve again without larger losses
        else:
            break
    if found is None:
        found = _solved(-gain, once, costs >= 0, gain, -np.inf)
        most = 0.0 if found is None else float(np.array(gains)[found].sum())
        # the same gain with less loss
        return choose(rows, gains, most * (1 - 1e-6), losses)
    return [row for row, taken in zip(rows, found, strict=True) if taken]


def _solved(
    cost_of: np.ndarray, once: np.ndarray, allowed: np.ndarray, gain: np.ndarray, least: float
) -> np.ndarray | None:
    """Return the columns of least cost, each row of ``once`` at most once; None if none gain enough."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    limits = [LinearConstraint(once, ub=np.ones(len(once)))]
    if np.isfinite(least):
        limits.append(LinearConstraint(gain[None, :], lb=least))
    bounds = Bounds(0, allowed.astype(float))
    options = {"mip_rel_gap": 0.0}
    found = milp(cost_of, constraints=limits, integrality=np.ones(len(gain)), bounds=bounds, options=options)
    return None if found.x is None else found.x > 0.5
