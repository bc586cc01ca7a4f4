"""Named recipes: functions that return a :class:`quincunx.train.Recipe`."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from quincunx.train import Recipe

__all__ = ["RECIPES", "by_name"]


def cifar() -> Recipe:
    """400 epochs, rate 0.1, a tenth at 200 and 300, batch 64 (Peng et al., arXiv:1809.02601, 4.1)."""
    return Recipe(name="cifar", epochs=400, batch_size=64, lr=0.1, milestones=(0.5, 0.75), weight_decay=1e-4)


def short() -> Recipe:
    """20 epochs on small images: a useful accuracy within the hour, not the paper's."""
    return Recipe(
        name="short",
        epochs=20,
        batch_size=128,
        lr=0.2,
        milestones=(0.6, 0.85),
        warmup=0.04,
        weight_decay=5e-4,
    )


def digits() -> Recipe:
    """For the 1,437 training digits: small batches, twelve epochs."""
    return Recipe(name="digits", epochs=12, batch_size=32, lr=0.1, milestones=(0.6, 0.85), warmup=0.04)


RECIPES: dict[str, Callable[[], Recipe]] = {"cifar": cifar, "short": short, "digits": digits}


def by_name(name: str) -> Recipe:
    """A recipe by name.

    Raises:
        ValueError: an unknown name; the nearest one is listed first.

    Example:
        >>> by_name("cifar").epochs
        400
    """
    if name not in RECIPES:
        nearest = difflib.get_close_matches(name, RECIPES, n=1, cutoff=0.0)
        listed = [*nearest, *(n for n in RECIPES if n not in nearest)]
        raise ValueError(f"recipe={name!r}: unknown recipe; nearest first: {', '.join(listed)}")
    return RECIPES[name]()
