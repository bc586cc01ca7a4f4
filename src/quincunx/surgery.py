"""Replace layers of any network, and say what was replaced, what was not, and why. Knows no method.

A *method* says which layers it can take and what stands in for each; surgery finds the layers, hands
each one over with the data that reaches it, and puts the replacement where the layer was.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from quincunx.streams import Calibration, Context, Layer, evaluation, run_order

__all__ = [
    "Accelerated",
    "Journal",
    "Method",
    "Replacement",
    "Work",
    "accelerate",
    "carry_hooks",
    "each",
    "put",
]

Where = Callable[[str, nn.Module], bool]

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
        record: JSON-ready facts for people, such as rank, rates and response error.
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
        """Why it cannot take a layer; None if it can."""

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

    Example:
        >>> result = accelerate(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1)), qx.LowRank(rank=4))
        >>> result.replaced["0"]["rank"], sorted(result.skipped)
        (4, ['1'])
    """

    model: nn.Module
    replaced: dict[str, dict[str, Any]]
    skipped: dict[str, str]
    maps: dict[str, dict[str, Tensor]] = field(default_factory=dict)


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
        where: says for (name, module) whether the layer may be replaced; by default all.
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
    _check(model, method)
    data = None if calibration is None else Calibration(calibration, model)
    network = _copied(model)
    found, skipped = _candidates(network, method, where)
    with evaluation(network):
        order = run_order(model, example_input, data)
        layers = _in_order(found, order, skipped)
        context = Context(model, network, data)
        accepted = []
        for layer in layers:
            if (reason := _reason(layer, order is not None) or method.refuse(layer, context)) is not None:
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


def _check(model: nn.Module, method: Method) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if isinstance(method, type) or not all(hasattr(method, part) for part in ("refuse", "begin", "targets")):
        raise TypeError(f"method={method!r}: expected a method such as qx.Espace()")
    for name, module in model.named_modules():
        for prefix, advice in _WRAPPERS.items():
            if type(module).__module__.startswith(prefix):
                at = f"its part {name!r}" if name else "it"
                raise TypeError(f"model: {at} is a {type(module).__name__}; {advice}")


def _copied(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except (RuntimeError, TypeError) as error:
        raise TypeError(f"model: cannot be copied ({str(error).splitlines()[0]})") from error


# ---------------------------------------------------------------- which layers


def _candidates(
    network: nn.Module, method: Method, where: Where | None
) -> tuple[list[tuple[tuple[str, ...], nn.Module]], dict[str, str]]:
    """Every module of the method's classes, once, with all its names; and what is left out at once."""
    places: dict[int, tuple[list[str], nn.Module]] = {}
    for name, module in network.named_modules(remove_duplicate=False):
        if isinstance(module, method.targets):
            places.setdefault(id(module), ([], module))[0].append(name)
    found, skipped = [], {}
    for names, module in places.values():
        if where is not None and not any(where(name, module) for name in names):
            skipped[names[0]] = "left out by where"
        elif (reason := _unfit(network, names[0], module, method.targets)) is not None:
            skipped[names[0]] = reason
        else:
            found.append((tuple(names), module))
    return found, skipped


def _unfit(
    network: nn.Module, name: str, module: nn.Module, targets: tuple[type[nn.Module], ...]
) -> str | None:
    """Why a module cannot be what its class says."""
    if type(module) not in targets:
        return f"a {type(module).__name__}, whose forward may be another one than its base class's"
    weight = module._parameters.get("weight")
    if weight is None:
        return "its weight is computed anew at each call (weight norm or pruning): make it permanent first"
    if type(weight) is not nn.Parameter or type(weight.data) is not Tensor or weight.is_meta:
        return f"its weight is a {type(weight.data).__name__} on {weight.device}"
    if not weight.is_floating_point():
        return f"its weight is {weight.dtype}"
    for other_name, other in network.named_modules():
        if other is not module and any(p is weight for p in other._parameters.values()):
            return f"its weight is shared with {other_name or '(network)'}"
    if module._state_dict_hooks or module._load_state_dict_pre_hooks:
        return "it has state-dict hooks, which know its parameters by name"
    return None


def _in_order(
    found: list[tuple[tuple[str, ...], nn.Module]],
    order: dict[str, tuple[int, tuple[int, ...], tuple[int, ...]]] | None,
    skipped: dict[str, str],
) -> list[Layer]:
    if order is None:
        return [Layer(names[0], names, module) for names, module in found]
    layers = []
    for names, module in found:
        if names[0] in order:
            layers.append(Layer(names[0], names, module, *order[names[0]]))
        else:
            skipped[names[0]] = "never called for this input"
    position = {name: i for i, name in enumerate(order)}
    return sorted(layers, key=lambda layer: position[layer.name])


def _reason(layer: Layer, ran: bool) -> str | None:
    if ran and not (layer.input_shape and layer.output_shape):
        return "called with or returns something else than one tensor"
    return None


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
    record: dict[str, Any] = {"method": method.name, "kind": type(module).__name__, **made.record}
    record["macs_before"] = record["macs_after"] = None
    if layer.input_shape is not None:
        record["macs_before"] = _macs(layer.module, layer.input_shape)
        record["macs_after"] = _macs(module, layer.input_shape)
    if len(layer.names) > 1:
        record["names"] = list(layer.names)
    if hooks := len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._backward_hooks):
        record["hooks"] = hooks
    return record


def _macs(module: nn.Module, shape: tuple[int, ...]) -> int:
    """For one image. ``forward`` and not a call: the user's hooks are not to see this."""
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
