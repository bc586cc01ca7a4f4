"""Formulas for torch's FLOP counter, registered when it is first imported.

Not earlier: where Triton is installed the counter imports it, which takes a good part of a second.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

__all__ = ["counted_by"]

_COUNTER = "torch.utils.flop_counter"
_FORMULAS: list[tuple[tuple[Any, ...], Callable[..., int]]] = []


def counted_by(formula: Callable[..., int], *operators: Any) -> None:
    """Register the cost of operators: a function of their arguments (tensors as shapes) to FLOPs."""
    if _COUNTER in sys.modules:
        sys.modules[_COUNTER].register_flop_formula(list(operators))(formula)
    elif not _FORMULAS:
        sys.meta_path.insert(0, _Watch())
    _FORMULAS.append((operators, formula))


class _Watch(MetaPathFinder):
    """Finds the counter like the default finders, and registers the formulas after its import."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def run(module: ModuleType) -> None:
                execute(module)
                for operators, formula in _FORMULAS:
                    module.register_flop_formula(list(operators))(formula)

            spec.loader.exec_module = run  # type: ignore[method-assign]
        return spec
