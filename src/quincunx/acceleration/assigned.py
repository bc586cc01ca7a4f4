"""A method that holds one method for each layer: the result of a search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import nn

from quincunx.surgery.calibration import Context, Layer
from quincunx.surgery.method import Method, Replacement, Work

__all__ = ["Assigned"]


@dataclass(frozen=True)
class Assigned:
    """Replaces each named layer by its own method, all in one pass in forward order.

    Args:
        methods: layer name -> method. A pair of convolutions is replaced together if both have the
            same method and it supports pairs.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1))
        >>> method = Assigned({"0": qx.LowRank(rank=4), "1": qx.SpatialBottleneck(pairs=False, data=False)})
        >>> result = qx.accelerate(net, method)
        >>> result.replaced["0"]["method"], result.replaced["1"]["method"]
        ('lowrank', 'spatialbottleneck')
    """

    methods: Mapping[str, Method]
    name: ClassVar[str] = "assigned"

    @property
    def targets(self) -> tuple[type[nn.Module], ...]:
        """Return the classes of all its methods."""
        return tuple({kind: None for method in self.methods.values() for kind in method.targets})

    @property
    def pairs(self) -> bool:
        """Return whether one of its methods replaces pairs."""
        return any(getattr(method, "pairs", False) for method in self.methods.values())

    def refuse(self, layer: Layer, context: Context) -> str | None:
        """Return why a layer is not replaced, or None."""
        if layer.name not in self.methods:
            return "stays as it is: no method was chosen for it"
        method = self.methods[layer.name]
        if not isinstance(layer.module, method.targets):
            return f"a {type(layer.module).__name__}, which {method.name} does not replace"
        return method.refuse(layer, context)

    def begin(self, layers: Sequence[Layer], context: Context) -> Work:
        """Start every method with its own layers.

        Raises:
            ValueError: anything that a method refuses.
        """
        parts: list[tuple[Method, list[Layer]]] = []
        for layer in layers:
            method = self.methods[layer.name]
            own = next((own for other, own in parts if other == method), None)
            if own is None:
                parts.append((method, [layer]))
            else:
                own.append(layer)
        works = [(method, own, method.begin(own, context)) for method, own in parts]
        return _AssignedWork({x.name: (method, work) for method, own, work in works for x in own})


@dataclass(frozen=True)
class _AssignedWork:
    by_name: dict[str, tuple[Method, Work]]

    def replace(self, layer: Layer) -> Replacement | str:
        """Replace a layer by its own method."""
        method, work = self.by_name[layer.name]
        made = work.replace(layer)
        return made if isinstance(made, str) else _signed(made, method)

    def finish(self, done: Mapping[str, Replacement]) -> Mapping[str, Replacement | str]:
        """Return the final changes of each method to its own layers."""
        works: dict[int, tuple[Method, Work, dict[str, Replacement]]] = {}
        for name, made in done.items():
            method, work = self.by_name[name]
            works.setdefault(id(work), (method, work, {}))[2][name] = made
        return {
            name: made if isinstance(made, str) else _signed(made, method)
            for method, work, own in works.values()
            for name, made in work.finish(own).items()
        }


def _signed(made: Replacement, method: Method) -> Replacement:
    return replace(made, record={"method": method.name, **made.record})
