"""Replace layers of any network, and report what was replaced, what was not, and why.

A *method* says which layers it supports and makes their replacements. Surgery knows no method: it finds the
layers, passes each to the method with the data that reaches it, and installs the replacement.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace as dataclass_replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from quincunx.layers.attributes import ConvLike
from quincunx.layers.padded import PaddedConv2d, padded_like
from quincunx.modules import Attached, carry_hooks, copied, evaluation, first_line, set_module
from quincunx.surgery.calibration import (
    Calibration,
    Context,
    Layer,
    Pool,
    run_order,
)
from quincunx.surgery.eligible import (
    Where,
    chosen,
    eligible,
    in_order,
    pairs_of,
    reason_of,
)
from quincunx.surgery.method import Accelerated, Journal, Method, Replacement, T

__all__ = [
    "Where",
    "layer_macs",
    "prepare",
    "replace_layers",
    "temporarily_replaced",
    "undisturbed",
]


_WRAPPERS = {
    "torch.nn.parallel": "pass what it wraps (its .module)",
    "torch.distributed.fsdp": "pass the network as it was before",
    "torch._dynamo": "pass what was compiled (its ._orig_mod), and compile the result",
    "torch.jit": "pass the network it was made from",
    "torch.ao.nn": "replace layers first, then quantise",
    "torch.nn.quantized": "replace layers first, then quantise",
}


def replace_layers(
    model: nn.Module,
    method: Method,
    *,
    where: Where | None = None,
    example_input: Tensor | tuple[Any, ...] | None = None,
    calibration: Iterable[Any] | None = None,
    journal: Journal | None = None,
    loss: Callable[[Any, Any], Tensor] | None = None,
    pool: Pool | None = None,
) -> Accelerated:
    """Return a copy of a network in which a method has replaced the layers that it supports.

    Layers are replaced in the order in which the network runs them, each fitted to its input in the
    network as changed so far. Hooks, training mode, device, dtype, memory format, the choice of trained
    parameters, and the attributes of ``nn.Conv2d`` and ``nn.Linear`` are kept, and a module that is used in
    several places stays one module. Then the changed network runs once: a layer is restored, with the
    reason, if its replacement is not called as often as the layer, or makes the network fail.

    Args:
        model: any network; it is not changed, nor is the state of torch's random generators. Its own hooks
            run with the copies.
        method: such as ``qx.Espace()`` or ``qx.LowRank()``.
        where: which layers may be replaced, by default all: a function of (name, module), or names, or
            pairs of names for a method that replaces two convolutions together (see
            :class:`quincunx.SpatialBottleneck`).
        example_input: a tensor [N, C, H, W] or a tuple of arguments; gives the layers' order and
            sizes. By default the first batch of ``calibration``.
        calibration: a DataLoader, a data set or a list of batches; it is read several times. A batch
            is a tensor, (input, target), several inputs with or without a target, or a dictionary with
            keys such as "pixel_values" and "labels"; see :class:`quincunx.surgery.calibration.Calibration`.
        journal: stores each layer when it is finished and returns it to a later call.
        loss: (output, target) -> a scalar, whose gradient says which positions matter, for methods that ask
            (impact masks); by default the cross-entropy with labels or the network's own predictions.
        pool: adds up what several processes sum over their shares of the data; see
            :class:`quincunx.surgery.calibration.Context`.

    Returns:
        An :class:`Accelerated`. A warning says if nothing was replaced.

    Raises:
        TypeError: not a module or a method; a network that is wrapped (DistributedDataParallel),
            compiled, scripted or quantised, that cannot be copied or whose lazy layers have not run; a
            one-shot iterator as ``calibration``.
        ValueError: an empty ``calibration`` or a value in it that is not finite; anything that the method
            needs is missing.

    Source: the order of the layers is that of Lin et al., ESPACE (AAAI 2017), section 3.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
        >>> images = [torch.randn(8, 3, 12, 12) for _ in range(2)]
        >>> result = replace_layers(net, qx.Espace(rank=4, rate=0.5), calibration=images)
        >>> result.replaced["2"]["macs_before"], result.replaced["2"]["macs_after"]
        (36864, 6912)
    """
    _checked(model, method)
    with undisturbed(model), evaluation(network := copied(model)):
        context, layers, skipped, ran = _prepared(model, network, method, where, example_input, calibration)
        context.loss, context.pool = loss, pool
        accepted = []
        for layer in layers:
            if (reason := reason_of(layer, ran) or method.refuse(layer, context)) is not None:
                skipped[layer.name] = reason
            else:
                accepted.append(layer)

        def check(done: dict[str, Replacement]) -> bool:
            return ran and _restore_uncalled(context, accepted, done, example_input, skipped)

        done = _replace(method, accepted, context, journal, skipped, check) if accepted else {}
    for layer in accepted:
        if layer.name in done:
            done[layer.name].module.train(layer.module.training)
    if line := _few_images(done):
        warnings.warn(line, UserWarning, stacklevel=2)
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
    loss: Callable[[Any, Any], Tensor] | None = None,
) -> tuple[Context, list[Layer], dict[str, str]]:
    """Return a copy of a network to try methods on, its layers of a method's classes, and skipped layers.

    Arguments and errors as for :func:`replace_layers`; ``method`` gives the classes and whether to find
    pairs.
    """
    network = copied(_checked(model, method)).eval()
    context, layers, skipped, ran = _prepared(model, network, method, where, example_input, calibration)
    context.loss = loss
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
    # run a copy of the original too, since a forward may store values in its network
    original = copied(model).eval()
    data = None if calibration is None else Calibration(calibration, original)
    may, named, vain = chosen(network, where, method.targets)
    found, skipped = eligible(network, method.targets, may)
    skipped |= vain
    order = run_order(original, example_input, data)
    layers = in_order(found, order, skipped)
    context = Context(original, network, data)
    if getattr(method, "pairs", False):
        context.pairs = pairs_of(network, layers, order, named)
    return context, layers, skipped, order is not None


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Use ordinary tensors within the context, also in inference mode; restore random generators after it.

    The generators are the CPU's and those of the network's CUDA devices.
    """
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    outside = torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()
    with torch.random.fork_rng(sorted(devices)), outside:
        yield


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
    check: Callable[[dict[str, Replacement]], bool] = lambda done: False,
) -> dict[str, Replacement]:
    """Replace layers. ``check`` undoes invalid replacements, and returns whether there were any.

    It is called when the method fails, since a method may run the network, and at the end.
    """
    work = method.begin(layers, context)
    done: dict[str, Replacement] = {}

    def checked(make: Callable[[], T]) -> T:
        while True:
            try:
                return make()
            except Exception:  # noqa: PERF203 - retried with fewer layers replaced
                if not check(done):
                    raise

    for layer in layers:
        made = journal.recall(layer) if journal is not None else None
        result = made if made is not None else checked(partial(work.replace, layer))
        if isinstance(result, str):
            skipped[layer.name] = result
            continue
        result = _padded(layer, result)
        if journal is not None and made is None:
            journal.keep(layer, result)
        done[layer.name] = result
        _install(context, layer, result.module)
    changed = checked(lambda: work.finish({name: _unpadded(made) for name, made in done.items()}))
    for layer in layers:
        if layer.name not in done or (other := changed.get(layer.name)) is None:
            continue
        if isinstance(other, str):
            unit = next(unit for unit in (*_units(layers, done)[0], (layer,)) if layer in unit)
            _give_up(context, unit, done, skipped, {layer.name: other})
        else:
            done[layer.name] = other = _padded(layer, other)
            _install(context, layer, other.module)
    check(done)
    return done


def _padded(layer: Layer, made: Replacement) -> Replacement:
    """Return a replacement with the layer's padding in front, if that is not of zeros.

    Modules that pad by themselves stay as they are.
    """
    module = padded_like(layer.module, made.module)
    if module is made.module or not isinstance(module, PaddedConv2d):
        return made
    sides, mode = list(module.sides), module.padding_mode
    spec = {"kind": module.kind, "module": made.spec, "sides": sides, "mode": mode}
    return dataclass_replace(made, module=module, spec=spec)


def _unpadded(made: Replacement) -> Replacement:
    """Return what a method made of a replacement with a padding in front."""
    if not isinstance(made.module, PaddedConv2d):
        return made
    return dataclass_replace(made, module=made.module.conv, spec=made.spec["module"])


@contextmanager
def temporarily_replaced(
    context: Context, method: Method, layers: Sequence[Layer]
) -> Iterator[dict[str, Replacement]]:
    """Install a method's replacements of some layers in the context's network, and undo them at the end.

    Raises:
        ValueError: anything that the method refuses, including a layer that it does not replace.
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
                context.network = set_module(context.network, name, layer.module)
        context.changed = changed


def _install(context: Context, layer: Layer, module: nn.Module) -> None:
    """Put a module in a layer's places, with the layer's device, dtype, layout and hooks."""
    weight = layer.module.get_parameter("weight")
    module.to(device=weight.device, dtype=weight.dtype)
    if _channels_last(weight):
        module.to(memory_format=torch.channels_last)  # type: ignore[call-overload, unused-ignore]
    module.eval()
    bias = layer.module._parameters.get("bias")
    for path, parameter in module.named_parameters():
        like = bias if bias is not None and path.rpartition(".")[2] == "bias" else weight
        parameter.requires_grad_(like.requires_grad)
    if isinstance(module, ConvLike) and isinstance(word := getattr(layer.module, "padding", None), str):
        module.padding = word
    carry_hooks(layer.module, module)
    for name in layer.names:
        context.network = set_module(context.network, name, module)
    if isinstance(module, Attached):
        module.attach(context.network)
    context.changed = True


def _channels_last(weight: Tensor) -> bool:
    """Return whether a weight is channels_last by its strides, not only by its sizes.

    A weight with one input channel or one position fits both layouts, also in a network that was never
    converted.
    """
    return (
        weight.dim() == 4
        and weight.is_contiguous(memory_format=torch.channels_last)
        and weight.stride() != torch.empty(weight.shape, device="meta").stride()
    )


def _restore_uncalled(
    context: Context,
    layers: Sequence[Layer],
    done: dict[str, Replacement],
    example_input: Tensor | tuple[Any, ...] | None,
    skipped: dict[str, str],
) -> bool:
    """Restore each layer whose replacement is called less or more often, or makes the network fail.

    Returns whether there were any. Raises what the network raises without replacements.
    """

    def run() -> dict[str, int] | Exception:
        try:
            order = run_order(context.network, example_input, context.calibration, changed=True) or {}
        except Exception as error:  # noqa: BLE001 - a user's forward fails as it likes
            return error
        return {layer.name: order[layer.name][0] if layer.name in order else 0 for layer in layers}

    before = len(done)
    units, halves = _units(layers, done)
    _install_all(context, halves, None)  # of incomplete pairs
    calls = run()
    if isinstance(calls, Exception):
        for unit in units:
            _install_all(context, unit, None)
        if isinstance(error := run(), Exception):
            raise error
        for unit in units:
            _install_all(context, unit, done)
            if isinstance(error := run(), Exception):
                reason = f"with it replaced the network fails ({type(error).__name__}: {first_line(error)})"
                _give_up(context, unit, done, skipped, dict.fromkeys((x.name for x in unit), reason))
        calls = run()
    while not isinstance(calls, Exception):
        wrong = {
            layer.name: f"the network calls what stands in its place {calls[layer.name]} times, "
            f"and the layer {layer.calls} times"
            for layer in layers
            if layer.name in done and layer not in halves and calls[layer.name] != layer.calls
        }
        if not wrong:
            _install_all(context, halves, done)
            return len(done) < before
        for unit in units:
            if any(layer.name in wrong for layer in unit):
                _give_up(context, unit, done, skipped, wrong)
        calls = run()
    raise calls


def _units(
    layers: Sequence[Layer], done: Mapping[str, Replacement]
) -> tuple[list[tuple[Layer, ...]], tuple[Layer, ...]]:
    """Return the replaced layers, pairs together; and halves whose other half is not replaced."""
    by_name = {layer.name: layer for layer in layers if layer.name in done}
    pairs = dict.fromkeys(tuple(done[name].record.get("pair", (name,))) for name in by_name)
    whole = [tuple(by_name[name] for name in pair) for pair in pairs if set(pair) <= set(by_name)]
    together = {layer.name for unit in whole for layer in unit}
    return whole, tuple(layer for name, layer in by_name.items() if name not in together)


def _install_all(context: Context, unit: Sequence[Layer], done: Mapping[str, Replacement] | None) -> None:
    """Install the replacements of some layers in the network, or the layers if ``done`` is None."""
    for layer in unit:
        for name in layer.names:
            module = layer.module if done is None else done[layer.name].module
            context.network = set_module(context.network, name, module)


def _give_up(
    context: Context,
    unit: Sequence[Layer],
    done: dict[str, Replacement],
    skipped: dict[str, str],
    reasons: Mapping[str, str],
) -> None:
    _install_all(context, unit, None)
    for layer in unit:
        done.pop(layer.name, None)
        others = [name for name in reasons if name in {other.name for other in unit}]
        skipped[layer.name] = (
            reasons.get(layer.name) or f"its partner {others[0]!r} stays: {reasons[others[0]]}"
        )


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
    """Return a layer's MACs for one image of an input's shape.

    Calls ``forward`` directly, so that the user's hooks do not run.
    """
    from torch.utils.flop_counter import FlopCounterMode  # imports Triton, where that is installed

    parameter = next(module.parameters())
    x = torch.zeros((1, *shape[1:]), device=parameter.device, dtype=parameter.dtype)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module.forward(x)
    return int(counter.get_total_flops()) // 2


def _remember(network: nn.Module, layers: Sequence[Layer], done: Mapping[str, Replacement]) -> None:
    """Record in the network how its new modules are built, for ``qx.save``; earlier records stay."""
    notes: dict[str, Any] = dict(getattr(network, "quincunx_replaced", {}))
    for layer in layers:
        if layer.name in done:
            notes[layer.name] = done[layer.name].spec
            notes.update({other: {"kind": "same", "as": layer.name} for other in layer.names[1:]})
    network.quincunx_replaced = notes  # type: ignore[assignment]


def _few_images(done: Mapping[str, Replacement]) -> str | None:
    """Return one line about all layers with too little data; None if there are none.

    A method reports this with "images" and "images_needed" in a record.
    """
    short = {name: made.record for name, made in done.items() if "images_needed" in made.record}
    if not short:
        return None
    most = max(short, key=lambda name: short[name]["images_needed"])
    return (
        f"calibration: {short[most]['images']} images are few for {len(short)} of {len(done)} layers, which "
        f"were held near their own weights; a full fit of all needs {short[most]['images_needed']} images of "
        f"this size (layer {most!r} most)"
    )


def _why(skipped: dict[str, str]) -> str:
    if not skipped:
        return ": the network has no layer of its kind"
    name, reason = next(iter(skipped.items()))
    more = f", and {len(skipped) - 1} more" if len(skipped) > 1 else ""
    return f": {name or '(network)'}: {reason}{more}"
