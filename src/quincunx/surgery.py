"""Replace layers of any network, and say what was replaced, what was not, and why. Knows no method.

A *method* says which layers it can take and what stands in for each; surgery finds the layers, hands
each one over with the data that reaches it, and puts the replacement where the layer was.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from quincunx.eligible import Where, chosen, eligible, in_order, pairs_of, reason_of
from quincunx.modules import copied
from quincunx.streams import Calibration, Context, Layer, evaluation, run_order

__all__ = [
    "Accelerated",
    "Attached",
    "Journal",
    "Method",
    "Replacement",
    "Where",
    "Work",
    "accelerate",
    "carry_hooks",
    "each",
    "layer_macs",
    "prepare",
    "put",
    "tried",
]

_WRAPPERS = {
    "torch.nn.parallel": "pass what it wraps (its .module)",
    "torch.distributed.fsdp": "pass the network as it was before",
    "torch._dynamo": "pass what was compiled (its ._orig_mod), and compile the result",
    "torch.jit": "pass the network it was made from",
    "torch.ao.nn": "replace layers first, then quantise",
    "torch.nn.quantized": "replace layers first, then quantise",
}
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


@dataclass(frozen=True)
class Replacement:
    """What a method puts in a layer's place.

    Attributes:
        module: the new module. Surgery gives it the layer's device, training mode, memory format,
            hooks and ``requires_grad``.
        spec: JSON-ready; from it ``quincunx.methods.build_module`` makes such a module again.
        record: JSON-ready facts for people, such as rank, rates and response error; "macs_after" where
            the module cannot be run on the layer's input, and "method" where another one made it.
        maps: tensors that a report draws, such as impact maps.
    """

    module: nn.Module
    spec: dict[str, Any]
    record: dict[str, Any]
    maps: dict[str, Tensor] = field(default_factory=dict)


class Work(Protocol):
    """A method at work on one network."""

    def replace(self, layer: Layer) -> Replacement | str:
        """The replacement of one layer, or why it stays.

        Called once a layer, in forward order; what was made for the layers before is in place.
        """

    def finish(self, done: Mapping[str, Replacement]) -> Mapping[str, Replacement]:
        """Other replacements for some of the layers, once all are in place; may be empty."""


class Method(Protocol):
    """What :func:`accelerate` asks of a method; the methods of ``quincunx.methods`` are such."""

    @property
    def name(self) -> str:
        """For records and messages."""

    @property
    def targets(self) -> tuple[type[nn.Module], ...]:
        """The classes of layers it may replace."""

    def refuse(self, layer: Layer, context: Context) -> str | None:
        """Why it cannot take a layer; None if it can.

        A method with an attribute ``pairs`` that is true finds in ``context.pairs`` which layers can be
        taken two by two.
        """

    def begin(self, layers: Sequence[Layer], context: Context) -> Work:
        """Start on a network, knowing all layers that will be replaced, in forward order.

        Raises:
            ValueError: it needs data and there is none.
        """


class Journal(Protocol):
    """Where finished layers are kept, so that an interrupted run does not make them again.

    A replacement can be written as its spec, its record and its module's state dict.
    """

    def recall(self, layer: Layer) -> Replacement | None:
        """What :meth:`keep` was given for this layer, if anything."""

    def keep(self, layer: Layer, replacement: Replacement) -> None:
        """Called once for each layer as it is finished."""


@runtime_checkable
class Attached(Protocol):
    """A module that works together with another one of its network."""

    def attach(self, network: nn.Module) -> None:
        """Find the other one; called whenever the module was put in a network."""


@dataclass(frozen=True)
class _Each:
    make: Callable[[Layer], Replacement | str]

    def replace(self, layer: Layer) -> Replacement | str:
        return self.make(layer)

    def finish(self, done: Mapping[str, Replacement]) -> Mapping[str, Replacement]:
        return {}


def each(make: Callable[[Layer], Replacement | str]) -> Work:
    """The work of a method that makes every replacement by itself."""
    return _Each(make)


@dataclass(frozen=True)
class Accelerated:
    """What :func:`accelerate` made.

    Attributes:
        model: the new network.
        replaced: for each replaced layer a JSON-ready record: "method", "kind" (the new class),
            "macs_before" and "macs_after" for one image (None where no input was given), "names"
            (all the places of a shared module), "hooks" (how many were carried over), and what the
            method tells, such as "rank", "rates" and "response_error".
        skipped: for each layer of the method's kind that stays, the reason.
        maps: for each replaced layer the tensors a report draws, such as impact maps.
        search: of a network made for a target: target, attempts, choice and scores, JSON-ready; else None.

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


def accelerate(
    model: nn.Module,
    method: Method,
    *,
    where: Where | None = None,
    example_input: Tensor | tuple[Any, ...] | None = None,
    calibration: Iterable[Any] | None = None,
    journal: Journal | None = None,
) -> Accelerated:
    """A copy of a network in which a method has replaced the layers it can.

    Layers are taken in the order in which the network runs them, each with the input that the
    already changed network gives it. Hooks, training mode, device, dtype and memory format stay, and
    a module that is used in several places stays one module.

    Args:
        model: any network; it is left as it is.
        method: such as ``qx.Espace()`` or ``qx.LowRank()``.
        where: which layers may be replaced, by default all: a function of (name, module), or names, or
            pairs of names for a method that takes two convolutions at once (see
            :class:`quincunx.SpatialBottleneck`).
        example_input: a tensor [N, C, H, W] or a tuple of arguments; tells the layers' order and
            sizes. By default the first batch of ``calibration``.
        calibration: input batches, or (input, target) pairs, that can be read several times: a list
            or a DataLoader, not an iterator.
        journal: keeps each layer as it is finished and gives it back to a later call.

    Returns:
        An :class:`Accelerated`. If nothing was replaced a warning says so.

    Raises:
        TypeError: not a module or a method; a network that is wrapped (DistributedDataParallel),
            compiled, scripted or quantised; a one-shot iterator as ``calibration``.
        ValueError: an empty ``calibration`` or a value in it that is not finite; what the method needs
            is missing.

    Source: the order of the layers is that of Lin et al., ESPACE (AAAI 2017), section 3.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
        >>> images = [torch.randn(8, 3, 12, 12) for _ in range(2)]
        >>> result = accelerate(net, qx.Espace(rank=4, rate=0.5), calibration=images)
        >>> result.replaced["2"]["macs_before"], result.replaced["2"]["macs_after"]
        (36864, 6912)
    """
    network = copied(_checked(model, method))
    with evaluation(network):
        context, layers, skipped, ran = _prepared(model, network, method, where, example_input, calibration)
        accepted = []
        for layer in layers:
            if (reason := reason_of(layer, ran) or method.refuse(layer, context)) is not None:
                skipped[layer.name] = reason
            else:
                accepted.append(layer)
        done = _replace(method, accepted, context, journal, skipped) if accepted else {}
    for layer in accepted:
        if layer.name in done:
            done[layer.name].module.train(layer.module.training)
    if not done:
        warnings.warn(f"accelerate: {method.name} replaced nothing{_why(skipped)}", UserWarning, stacklevel=2)
    records = {
        layer.name: _record(method, layer, done[layer.name]) for layer in accepted if layer.name in done
    }
    _remember(context.network, accepted, done)
    return Accelerated(context.network, records, skipped, {n: r.maps for n, r in done.items() if r.maps})


def prepare(
    model: nn.Module,
    method: Method,
    *,
    where: Where | None = None,
    example_input: Tensor | tuple[Any, ...] | None = None,
    calibration: Iterable[Any] | None = None,
) -> tuple[Context, list[Layer], dict[str, str]]:
    """A copy of a network to try methods on, its layers of a method's classes, and why others are left out.

    Arguments and errors are those of :func:`accelerate`; ``method`` says classes and whether there are pairs.
    """
    network = copied(_checked(model, method)).eval()
    context, layers, skipped, ran = _prepared(model, network, method, where, example_input, calibration)
    fit = [layer for layer in layers if reason_of(layer, ran) is None]
    skipped |= {layer.name: str(reason_of(layer, ran)) for layer in layers if layer not in fit}
    return context, fit, skipped


def _prepared(
    model: nn.Module,
    network: nn.Module,
    method: Method,
    where: Where | None,
    example_input: Tensor | tuple[Any, ...] | None,
    calibration: Iterable[Any] | None,
) -> tuple[Context, list[Layer], dict[str, str], bool]:
    data = None if calibration is None else Calibration(calibration, model)
    may, named = chosen(network, where)
    found, skipped = eligible(network, method.targets, may)
    order = run_order(model, example_input, data)
    layers = in_order(found, order, skipped)
    context = Context(model, network, data)
    if getattr(method, "pairs", False):
        context.pairs = pairs_of(network, layers, order, named)
    return context, layers, skipped, order is not None


def _checked(model: nn.Module, method: Method) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if isinstance(method, type) or not all(hasattr(method, part) for part in ("refuse", "begin", "targets")):
        raise TypeError(f"method={method!r}: expected a method such as qx.Espace()")
    for name, module in model.named_modules():
        for prefix, advice in _WRAPPERS.items():
            if type(module).__module__.startswith(prefix):
                at = f"its part {name!r}" if name else "it"
                raise TypeError(f"model: {at} is a {type(module).__name__}; {advice}")
    return model


# ---------------------------------------------------------------- replacing


def _replace(
    method: Method,
    layers: list[Layer],
    context: Context,
    journal: Journal | None,
    skipped: dict[str, str],
) -> dict[str, Replacement]:
    work = method.begin(layers, context)
    done: dict[str, Replacement] = {}
    for layer in layers:
        made = journal.recall(layer) if journal is not None else None
        result = made if made is not None else work.replace(layer)
        if isinstance(result, str):
            skipped[layer.name] = result
            continue
        if journal is not None and made is None:
            journal.keep(layer, result)
        done[layer.name] = result
        _install(context, layer, result.module)
    changed = work.finish(done)
    for layer in layers:
        if layer.name in changed:
            done[layer.name] = changed[layer.name]
            _install(context, layer, changed[layer.name].module)
    return done


@contextmanager
def tried(context: Context, method: Method, layers: Sequence[Layer]) -> Iterator[dict[str, Replacement]]:
    """Within: a method's replacements of some layers are in the context's network; after, it is as before.

    Raises:
        ValueError: what the method refuses, a layer that it leaves among it.
    """
    skipped: dict[str, str] = {}
    changed = context.changed
    try:
        for layer in layers:
            if (reason := method.refuse(layer, context)) is not None:
                raise ValueError(reason)
        done = _replace(method, list(layers), context, None, skipped)
        for reason in skipped.values():
            raise ValueError(reason)
        yield done
    finally:
        for layer in layers:
            for name in layer.names:
                context.network = put(context.network, name, layer.module)
        context.changed = changed


def _install(context: Context, layer: Layer, module: nn.Module) -> None:
    """Put a module in a layer's places, with the layer's device, dtype, layout and hooks."""
    weight = layer.module.get_parameter("weight")
    module.to(device=weight.device, dtype=weight.dtype)
    if weight.dim() == 4 and weight.is_contiguous(memory_format=torch.channels_last):
        module.to(memory_format=torch.channels_last)  # type: ignore[call-overload, unused-ignore]
    module.eval().requires_grad_(weight.requires_grad)
    carry_hooks(layer.module, module)
    for name in layer.names:
        context.network = put(context.network, name, module)
    if isinstance(module, Attached):
        module.attach(context.network)
    context.changed = True


def carry_hooks(old: nn.Module, new: nn.Module) -> None:
    """Give a module the hooks of the one whose place it takes."""
    for name in _HOOKS:
        setattr(new, name, getattr(old, name))


def put(network: nn.Module, name: str, module: nn.Module) -> nn.Module:
    """The network with a module at a path; the module itself where the path is empty."""
    if not name:
        return module
    parent, _, last = name.rpartition(".")
    network.get_submodule(parent).add_module(last, module)
    return network


def _record(method: Method, layer: Layer, made: Replacement) -> dict[str, Any]:
    module = made.module
    record: dict[str, Any] = {"method": method.name, "kind": type(module).__name__}
    record["macs_before"] = record["macs_after"] = None
    record.update(made.record)
    if layer.input_shape is not None:
        record["macs_before"] = layer_macs(layer.module, layer.input_shape)
        if record["macs_after"] is None:
            record["macs_after"] = layer_macs(module, layer.input_shape)
    if len(layer.names) > 1:
        record["names"] = list(layer.names)
    if hooks := len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._backward_hooks):
        record["hooks"] = hooks
    return record


def layer_macs(module: nn.Module, shape: tuple[int, ...]) -> int:
    """A layer's MACs for one image of an input's shape.

    ``forward`` and not a call: the user's hooks are not to see this.
    """
    parameter = next(module.parameters())
    x = torch.zeros((1, *shape[1:]), device=parameter.device, dtype=parameter.dtype)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module.forward(x)
    return int(counter.get_total_flops()) // 2


def _remember(network: nn.Module, layers: Sequence[Layer], done: Mapping[str, Replacement]) -> None:
    """Note in the network how its new modules are built, for ``qx.save``; earlier notes stay."""
    notes: dict[str, Any] = dict(getattr(network, "quincunx_replaced", {}))
    for layer in layers:
        if layer.name in done:
            notes[layer.name] = done[layer.name].spec
            notes.update({other: {"kind": "same", "as": layer.name} for other in layer.names[1:]})
    network.quincunx_replaced = notes  # type: ignore[assignment]


def _why(skipped: dict[str, str]) -> str:
    if not skipped:
        return ": the network has no layer of its kind"
    name, reason = next(iter(skipped.items()))
    more = f", and {len(skipped) - 1} more" if len(skipped) > 1 else ""
    return f": {name or '(network)'}: {reason}{more}"
