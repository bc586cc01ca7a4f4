"""Lattices by rate: which cosets a method computes where a share of the positions is asked for."""

from __future__ import annotations

from quincunx.sampling import CHESSBOARD, QUARTER, THREE_QUARTERS, Cosets, Sampling

__all__ = ["LATTICES", "lattice_of"]

# of each rate the cosets whose skipped positions lie nearest to computed ones
LATTICES: dict[str, Sampling] = {
    "3/4": THREE_QUARTERS,
    # all but one diagonal of three
    "2/3": Cosets(3, ((0, 0), (1, 1), (2, 2), (1, 0), (2, 1), (0, 2))),
    "2/4": CHESSBOARD,
    # every position lies beside a diagonal
    "1/3": Cosets(3, ((0, 0), (1, 1), (2, 2))),
    "1/4": QUARTER,
    # a knight's move apart: each skipped position lies beside exactly one
    "1/5": Cosets(5, ((0, 0), (2, 1), (4, 2), (1, 3), (3, 4))),
    "1/8": Cosets(4, ((0, 0), (2, 2))),
}
EVERY = Cosets(2, ((0, 0), (0, 1), (1, 0), (1, 1)))
# rates may be given as the tables print them, such as 0.667 for 2/3
_NEAR = 0.005


def lattice_of(rate: float) -> Sampling:
    """Return the lattice of a rate.

    Raises:
        ValueError: there is none.

    Example:
        >>> lattice_of(0.5) == qx.CHESSBOARD
        True
    """
    for found in (EVERY, *LATTICES.values()):
        if abs(found.density - rate) < _NEAR:
            return found
    raise ValueError(f"rate={rate!r}: mask='lattice' has the rates 1, {', '.join(LATTICES)}")
