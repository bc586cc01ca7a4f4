"""Functions by their import path, for files that cannot name them otherwise."""

from __future__ import annotations

import importlib
from typing import Any

from torch import fx

__all__ = ["found_at", "path_of"]


def path_of(function: Any) -> Any:
    """Return the import path of a function; pickle cannot name functions that torch defines inside others."""
    path = fx.node._get_qualified_name(function) if callable(function) else ""
    try:
        return path if found_at(path) is function else function
    except (ImportError, AttributeError):
        return function  # pickle reports the error


def found_at(path: str) -> Any:
    parts = path.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:cut]))
        except ImportError:
            continue
        for part in parts[cut:]:
            found = getattr(found, part)
        return found
    raise ImportError(path)
