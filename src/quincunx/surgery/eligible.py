"""Find the layers that may be replaced, the order in which they run, and the pairs among them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence

from torch import Tensor, nn

from quincunx.modules import surely
from quincunx.surgery.blocks import find_blocks
from quincunx.surgery.calibration import Layer
from quincunx.surgery.pairs import find_pairs, is_pair, keeps_grid

__all__ = ["Where", "chosen", "eligible", "in_order", "pairs_of", "reason_of"]

Where = Callable[[str, nn.Module], bool] | Iterable[str | tuple[str, str]]
Order = dict[str, tuple[int, tuple[int, ...], tuple[int, ...]]]


def chosen(
    network: nn.Module, where: Where | None, targets: tuple[type[nn.Module], ...]
) -> tuple[Callable[[str, nn.Module], bool] | None, dict[str, str] | None, dict[str, str]]:
    """Return ``where`` as a function, the pairs that it names, if any, and what it names in vain.

    Raises:
        TypeError: neither a function nor names and pairs of names.
        ValueError: a name that the network does not have, or of a module that holds layers, or a layer in
            two pairs.
    """
    if where is None or callable(where):
        return where, None, {}
    names: set[str] = set()
    pairs: dict[str, str] = {}
    if not isinstance(where, Iterable):
        raise TypeError(f"where={where!r}: expected a function, a layer's name, or names and pairs of names")
    for entry in [where] if isinstance(where, str) else where:
        ends = tuple(entry) if isinstance(entry, (tuple, list)) else (entry,)
        if len(ends) not in (1, 2) or not all(isinstance(end, str) for end in ends):
            raise TypeError(f"where: {entry!r}: expected a layer's name or two names")
        if len(ends) == 2:
            if twice := {ends[0], ends[1]} & {*pairs, *pairs.values()} or set(ends[:1]) & set(ends[1:]):
                raise ValueError(f"where: {entry!r}: {min(twice)!r} cannot be in a pair twice")
            pairs[ends[0]] = ends[1]
        names.update(ends)
    known = dict(network.named_modules(remove_duplicate=False))
    if unknown := sorted(names - set(known)):
        raise ValueError(f"where: the network has no layer {unknown[0]!r}")
    vain = {}
    for name in sorted(names):
        kind = type(known[name]).__name__
        if isinstance(known[name], targets):
            continue
        if any(True for _ in known[name].children()):
            within = f"{name}." if name else ""
            raise ValueError(
                f"where: {name!r} is a {kind}, which holds layers; name those, or give "
                f"lambda name, _: name.startswith({within!r})"
            )
        vain[name] = f"a {kind}: only {' and '.join(target.__name__ for target in targets)} can be replaced"
    return (lambda name, _: name in names), pairs or None, vain


def pairs_of(
    network: nn.Module,
    layers: Sequence[Layer],
    order: Order | None,
    named: dict[str, str] | None,
) -> tuple[tuple[Layer, Layer], ...]:
    """Return the pairs that the user named, or else those found in the network's graph.

    Raises:
        ValueError: a named pair whose layers are not on one grid, or not consecutive.
    """
    by_name = {name: layer for layer in layers if layer.calls in (1, None) for name in layer.names}
    if named is not None:
        for first, second in named.items():
            whole = second in by_name and keeps_grid(by_name[second].module)
            both = whole and first in by_name and is_pair(by_name[first].module, by_name[second].module)
            for name, fits in ((second, whole), (first, both)):
                if not fits:
                    raise ValueError(
                        f"where: {first!r} and {second!r} are no pair: {name!r} has to be a convolution "
                        "larger than 1 x 1, or before a depthwise one 1 x 1, that keeps the map's size and "
                        "is called once"
                    )
            if (reason := _apart(by_name[first], by_name[second], layers)) is not None:
                raise ValueError(f"where: {first!r} and {second!r} are no pair: {reason}")
        return tuple((by_name[first], by_name[second]) for first, second in named.items())
    pairs = find_pairs(network)
    if pairs.untraced:
        warnings.warn(
            f"accelerate: {_untraced(pairs.untraced)}; pairs are looked for in the parts of these, and of "
            "what holds them",
            UserWarning,
            stacklevel=5,
        )
    blocks, around = find_blocks(network)
    return tuple(
        (by_name[first], by_name[second])
        for found, within in ((dict(pairs.found), pairs.within), (blocks, around))
        for first, second in found.items()
        if first in by_name and second in by_name and _runs_once(within[first], order)
    )


def _untraced(reasons: Mapping[str, str]) -> str:
    """Say which modules could not be looked into, by those that hold no other such module: they are why."""
    inner = [
        name
        for name in reasons
        if not any(other != name and (not name or other.startswith(f"{name}.")) for other in reasons)
    ]
    kinds: dict[str, list[str]] = {}
    for name in inner:
        kinds.setdefault(reasons[name], []).append(name or "the network")
    said = []
    for reason, names in kinds.items():
        rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
        said.append(f"{', '.join(names[:3])}{rest}: {reason}")
    return "; ".join(said)


def _apart(first: Layer, second: Layer, layers: Sequence[Layer]) -> str | None:
    """Return why a convolution cannot read another one's output; ``layers`` are in forward order."""
    if first.output_shape is None:
        return None
    if layers.index(first) >= layers.index(second):
        return f"{second.name!r} runs first"
    if first.output_shape != second.input_shape:
        return f"maps of {first.output_shape} come out, and {second.input_shape} go in"
    return None


def _runs_once(name: str, order: Order | None) -> bool:
    """Return whether a module's own graph holds in the network: it is called exactly once."""
    return name == "" or (order is not None and order.get(name, (0,))[0] == 1)


def eligible(
    network: nn.Module, targets: tuple[type[nn.Module], ...], where: Callable[[str, nn.Module], bool] | None
) -> tuple[list[tuple[tuple[str, ...], nn.Module]], dict[str, str]]:
    """Return each module of the method's classes once, with all its names; and the skipped ones."""
    places: dict[int, tuple[list[str], nn.Module]] = {}
    for name, module in network.named_modules(remove_duplicate=False):
        if isinstance(module, targets):
            places.setdefault(id(module), ([], module))[0].append(name)
    found, skipped = [], {}
    for names, module in places.values():
        if where is not None and not any(where(name, module) for name in names):
            skipped[names[0]] = "left out by where"
        elif (reason := _unfit(network, names[0], module, targets)) is not None:
            skipped[names[0]] = reason
        else:
            found.append((tuple(names), module))
    return found, skipped


def _unfit(
    network: nn.Module, name: str, module: nn.Module, targets: tuple[type[nn.Module], ...]
) -> str | None:
    """Return why a module may not behave as its class says, or None."""
    if not surely(module, *targets):
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


def in_order(
    found: list[tuple[tuple[str, ...], nn.Module]],
    order: Order | None,
    skipped: dict[str, str],
) -> list[Layer]:
    """Return the layers in the order in which the network runs them; others go to ``skipped``."""
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


def reason_of(layer: Layer, ran: bool) -> str | None:
    """Return why no method can replace a layer, or None."""
    if ran and not (layer.input_shape and layer.output_shape):
        return "called with or returns something else than one tensor"
    shape = list(layer.input_shape or ())
    if isinstance(layer.module, nn.Conv2d) and len(shape) == 3:
        return f"called with a map {shape} without a batch dimension, which unsqueeze(0) adds"
    return None
