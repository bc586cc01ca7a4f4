"""The protocols of surgery: a method, its inputs and its results."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from torch import Tensor, nn

from quincunx.surgery.calibration import (
    Context,
    Layer,
)

__all__ = ["Accelerated", "Journal", "Method", "Replacement", "T", "Work", "each"]

T = TypeVar("T")
# layers that a reason in a summary names
_NAMED = 6


@dataclass(frozen=True)
class Replacement:
    """A method's replacement for a layer.

    Attributes:
        module: the new module. Surgery gives it the layer's device, training mode, memory format,
            hooks and ``requires_grad``.
        spec: JSON-ready; ``quincunx.layers.build.build_module`` rebuilds the module from it.
        record: JSON-ready facts for people, such as rank, rates and response error; "macs_after" if
            the module cannot be run on the layer's input, and "method" if another method made it.
        maps: tensors that a report draws, such as impact maps.

    Example:
        >>> new = nn.Conv2d(8, 8, 1)
        >>> spec = {"kind": "conv", "in_channels": 8, "out_channels": 8, "kernel_size": 1}
        >>> qx.Replacement(new, spec, {"kept": "one tap"}).record
        {'kept': 'one tap'}
    """

    module: nn.Module
    spec: dict[str, Any]
    record: dict[str, Any]
    maps: dict[str, Tensor] = field(default_factory=dict)


class Work(Protocol):
    """A method at work on one network."""

    def replace(self, layer: Layer) -> Replacement | str:
        """Return the replacement of one layer, or the reason for keeping it.

        Called at most once per layer, in forward order; the replacements of earlier layers are in place. A
        layer that a journal recalls from an earlier run is not asked for, so nothing that ``finish`` needs
        may be gathered here.
        """

    def finish(self, done: Mapping[str, Replacement]) -> Mapping[str, Replacement | str]:
        """Return changed replacements for some layers, or reasons for keeping them, once all are in place."""


class Method(Protocol):
    """The interface that :func:`accelerate` expects of a method; ``quincunx.methods`` has examples.

    A class with these four members can be used wherever a method is accepted: in ``accelerate``, as a point
    of ``compare_methods``, and as a candidate of a search. A frozen dataclass is best, since
    methods with equal settings then compare equal. ``examples/own_method.py`` writes one.

    Example:
        >>> class Keep:
        ...     name, targets = "keep", (nn.Conv2d,)
        ...     def refuse(self, layer, context):
        ...         return None if layer.module.groups == 1 else "has groups"
        ...     def begin(self, layers, context):
        ...         spec = {"kind": "conv", "in_channels": 3, "out_channels": 8, "kernel_size": 3}
        ...         return each(lambda layer: qx.Replacement(nn.Conv2d(3, 8, 3), spec, {}))
        >>> qx.accelerate(nn.Sequential(nn.Conv2d(3, 8, 3)), Keep()).replaced["0"]["method"]
        'keep'
    """

    @property
    def name(self) -> str:
        """The name in records and messages."""

    @property
    def targets(self) -> tuple[type[nn.Module], ...]:
        """The classes of layers that it may replace."""

    def refuse(self, layer: Layer, context: Context) -> str | None:
        """Return why it cannot replace a layer; None if it can.

        If a method has a true attribute ``pairs``, ``context.pairs`` lists the layers that it can replace
        in pairs.
        """

    def begin(self, layers: Sequence[Layer], context: Context) -> Work:
        """Start on a network, with all layers that will be replaced, in forward order.

        Raises:
            ValueError: it needs data and there is none.
        """


class Journal(Protocol):
    """Stores finished layers, so that an interrupted run does not fit them again.

    A replacement can be written as its spec, its record and its module's state dict.
    """

    def recall(self, layer: Layer) -> Replacement | None:
        """Return what :meth:`keep` stored for this layer, or None."""

    def keep(self, layer: Layer, replacement: Replacement) -> None:
        """Store a layer; called once when it is finished."""


@dataclass(frozen=True)
class _Each:
    make: Callable[[Layer], Replacement | str]

    def replace(self, layer: Layer) -> Replacement | str:
        return self.make(layer)

    def finish(self, done: Mapping[str, Replacement]) -> Mapping[str, Replacement | str]:
        return {}


def each(make: Callable[[Layer], Replacement | str]) -> Work:
    """Return the work of a method that makes every replacement separately."""
    return _Each(make)


@dataclass(frozen=True, repr=False)
class Accelerated:
    """The result of :func:`accelerate`.

    Attributes:
        model: the new network.
        replaced: for each replaced layer a JSON-ready record: "method", "kind" (the new class),
            "macs_before" and "macs_after" for one image (None if no input was given), "names"
            (all the places of a shared module), "hooks" (how many were carried over), and
            the method's own entries, such as "rank", "rates" and "response_error".
        skipped: for each layer of the method's classes that was not replaced, the reason.
        maps: for each replaced layer the tensors that a report draws, such as impact maps.
        search: for a network made for a target: target, attempts, choice and scores, JSON-ready; else None.

    Example:
        >>> result = accelerate(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1)), qx.LowRank(rank=4))
        >>> result.replaced["0"]["rank"], sorted(result.skipped)
        (4, ['1'])
    """

    model: nn.Module
    replaced: dict[str, dict[str, Any]]
    skipped: dict[str, str]
    maps: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    search: dict[str, Any] | None = None

    def __repr__(self) -> str:
        return f"<Accelerated {type(self.model).__name__}: {self._counts()}; .summary() says more>"

    def _counts(self) -> str:
        saved = [r["macs_before"] / r["macs_after"] for r in self.replaced.values() if r.get("macs_after")]
        ratios = f", {min(saved):.2f} to {max(saved):.2f} times fewer MACs each" if saved else ""
        return f"{len(self.replaced)} layers replaced{ratios}, {len(self.skipped)} stay"

    def _reached(self) -> list[str]:
        """What a search was asked for, and what was measured of the network that it chose."""
        attempts = (self.search or {}).get("attempts")
        if not self.search or not attempts:
            return []
        asked = ", ".join(f"{key}={value}" for key, value in self.search["target"].items())
        before, after = (1000 * attempts[-1][key] for key in ("before", "after"))
        verdict = "met" if self.search["met"] else "missed"
        gain = f"{attempts[-1]['speedup']:.2f} times as fast"
        return [f"  asked {asked}, {verdict}: {gain}, {before:.3g} ms became {after:.3g} ms"]

    def summary(self) -> str:
        """Return a line for each replaced layer, with its MACs, and one for each reason why others stay.

        A reason names at most six of its layers; ``skipped`` has all.

        Example:
            >>> net = nn.Sequential(nn.Conv2d(16, 16, 3), nn.Conv2d(16, 8, 1))
            >>> print(accelerate(net, qx.LowRank(rank=8), example_input=torch.zeros(1, 16, 8, 8)).summary())
            Sequential: 1 layers replaced, 2.57 to 2.57 times fewer MACs each, 1 stay
              0: lowrank, rank 8, 0.08 M MACs became 0.03 M
              1 stays: a 1 x 1 kernel has no columns and rows to separate
        """
        lines = [f"{type(self.model).__name__}: {self._counts()}", *self._reached()]
        for name, record in self.replaced.items():
            words = [str(record["method"])]
            words += [f"rank {record['rank']}"] if "rank" in record else []
            words += (
                ["rates " + " and ".join(f"{r:.2g}" for r in record["rates"])] if "rates" in record else []
            )
            if record.get("response_error") is not None:
                words.append(f"response error {100 * record['response_error']:.2f}%")
            if record.get("macs_before") and record.get("macs_after"):
                macs = [f"{record[key] / 1e6:.2f} M" for key in ("macs_before", "macs_after")]
                words.append(f"{macs[0]} MACs became {macs[1]}")
            lines.append(f"  {name or '(network)'}: {', '.join(words)}")
        staying: dict[str, list[str]] = {}
        for name, reason in self.skipped.items():
            staying.setdefault(reason, []).append(name or "(network)")
        for reason, names in staying.items():
            more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
            verb = "stays" if len(names) == 1 else "stay"
            lines.append(f"  {', '.join(names[:_NAMED])}{more} {verb}: {reason}")
        return "\n".join(lines)
