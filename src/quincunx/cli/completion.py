"""Values that the shell completes behind an option."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import quincunx as qx
from quincunx.measure.tasks import READY
from quincunx.methods.registry import METHODS
from quincunx.train.recipes import RECIPES

__all__ = ["complete_values"]

# by the parameter's name; a call, since networks are listed by a registry
_VALUES: dict[str, Callable[[], Sequence[str]]] = {
    "data": lambda: ("digits", "cifar10", "cifar100"),
    "device": lambda: ("cpu", "cuda"),
    "down": lambda: ("stride", "avgpool"),
    "dtype": lambda: ("float32", "bfloat16", "int8"),
    "fill": lambda: ("zero", "nearest", "fitted"),
    "mask": lambda: ("impact", "residual", "uniform", "uniform-eq8", "random"),
    "method": lambda: ("auto", *METHODS),
    "network": qx.networks.names,
    "precision": lambda: ("float32", "bfloat16", "float16"),
    "recipe": lambda: tuple(RECIPES),
    "sampling": lambda: ("1/4", "2/4", "3/4"),
    "task": lambda: tuple(READY),
}


def complete_values(name: str, option: Any) -> None:
    """Let the shell complete the values of an option, or of an argument, with this name."""
    if name in _VALUES and option.autocompletion is None:
        option.autocompletion = lambda incomplete: [
            value for value in _VALUES[name]() if value.startswith(incomplete)
        ]
