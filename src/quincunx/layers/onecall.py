"""Functions of ours in a graph that stay one call where somebody traces the graph's own code."""

from __future__ import annotations

from typing import Any

from torch import fx

__all__ = ["OneCall"]


class OneCall:
    """What a graph calls; a tracer does not look into it."""

    def __call__(self, *values: Any) -> Any:
        for value in values:
            if isinstance(value, fx.Proxy):
                return value.tracer.create_proxy("call_function", self, values, {})
        return self.run(*values)

    def run(self, *values: Any) -> Any:
        """Do it, with values that are no stand-ins."""
        raise NotImplementedError
