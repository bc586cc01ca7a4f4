"""Decide whether a module behaves as a known class: the one rule of the whole library.

A subclass may compute something else than its parent, and so may a single instance. All code that treats a
network's layer as an instance of its class asks here first. Code that changes a network copies it here.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import nn
from torch.nn.parameter import is_lazy

__all__ = [
    "Attached",
    "carry_hooks",
    "copied",
    "evaluation",
    "first_line",
    "forward_hooks",
    "held_at",
    "inference_mode_of",
    "known_class",
    "padding_of",
    "set_module",
    "surely",
    "weight_of",
]

M = TypeVar("M", bound=nn.Module)

# attributes that a subclass may redefine without computing anything else
_HARMLESS = {
    *("__init__", "__doc__", "__module__", "__qualname__", "__annotations__", "__constants__"),
    *("__slots__", "__dict__", "__weakref__", "__parameters__", "__orig_bases__"),
    *("__firstlineno__", "__static_attributes__", "__jit_unused_properties__"),
    *("__repr__", "__str__", "extra_repr", "reset_parameters", "reset_running_stats"),
    *("train", "eval", "_version", "_load_from_state_dict", "_save_to_state_dict", "__setstate__"),
}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def known_class(module: object, classes: tuple[type[nn.Module], ...]) -> type[nn.Module] | None:
    """Return the class among ``classes`` whose forward a module runs; None if this is not certain.

    This holds for an instance of the class itself, and for an instance of a subclass that redefines
    only how it is built or printed. It does not hold for a forward set on the instance, a weight that is
    recomputed at each call, or a subclass with its own forward. Hooks are not considered:
    see :func:`forward_hooks`.

    Example:
        >>> class Standardised(nn.Conv2d):
        ...     def forward(self, x):
        ...         return super().forward(x) * 2
        >>> known_class(nn.Conv2d(3, 8, 3), (nn.Conv2d,)), known_class(Standardised(3, 8, 3), (nn.Conv2d,))
        (<class 'torch.nn.modules.conv.Conv2d'>, None)
    """
    for found in type(module).__mro__:
        if found in classes:
            break
    else:
        return None
    if any(callable(getattr(found, name, None)) for name in vars(module)):
        return None  # a method replaced on the instance
    for between in type(module).__mro__:
        if between is found:
            return found
        if any(hasattr(found, name) for name in vars(between) if name not in _HARMLESS):
            return None
        if any(name in vars(between) for name in _kept(found)):
            return None  # a property computes what the parent stores
    return None


def _kept(found: type[nn.Module]) -> set[str]:
    """Return the names that instances of a class store: tensors, and settings such as a stride."""
    names = {"weight", "bias", "running_mean", "running_var", *getattr(found, "__constants__", ())}
    return names.union(*(vars(base).get("__annotations__", {}) for base in found.__mro__))


def surely(module: object, *classes: type[M]) -> bool:
    """Return whether :func:`known_class` finds a class: the module certainly runs one's forward."""
    return known_class(module, classes) is not None


def padding_of(conv: nn.Conv2d) -> tuple[int, int, int, int]:
    """Return (top, bottom, left, right) of the zero padding in a convolution's forward.

    The copy that its constructor stores for other modes does not follow a later change of the padding.
    """
    kernel, dilation = conv.weight.shape[2:], conv.dilation
    spread = (dilation, dilation) if isinstance(dilation, int) else tuple(dilation)
    if conv.padding == "same":
        total = [d * (k - 1) for k, d in zip(kernel, spread, strict=True)]
        top, left = (t // 2 for t in total)
        return top, total[0] - top, left, total[1] - left
    padding = 0 if conv.padding == "valid" else conv.padding
    vertical, horizontal = (padding, padding) if isinstance(padding, int) else (padding[0], padding[-1])
    return int(vertical), int(vertical), int(horizontal), int(horizontal)


def held_at(model: nn.Module, path: str) -> Any:
    """Return a network's attribute at a path, bypassing ``__getattr__`` of a user's class."""
    parent, _, name = path.rpartition(".")
    module = model.get_submodule(parent)
    for held in (module._parameters, module._buffers, vars(module)):
        if name in held:
            return held[name]
    return getattr(module, name)


def forward_hooks(module: nn.Module) -> int:
    """Return the number of a user's hooks that run at each call of a module, before or after its forward."""
    return sum(len(getattr(module, name)) for name in _HOOKS)


def copied(model: M, share: bool = False) -> M:
    """Return a deep copy of a network, with ordinary tensors also in inference mode.

    Args:
        model: the network.
        share: parameters keep their memory, for a copy that nobody trains; buffers are copied all the same,
            since a forward may write to them.

    Raises:
        TypeError: a part cannot be copied, for whatever reason, or a lazy layer has no weights
            yet; the message names the part.
    """
    if (lazy := _without_weights(model)) is not None:
        raise TypeError(
            f"model: a {type(lazy).__name__} in it has no weights yet; run the network once, "
            "which makes lazy layers what they are to be"
        )
    # tensors made in inference mode could never be trained
    outside = torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()
    with outside:
        try:
            made = copy.deepcopy(model, computed_tensors(model) | (_aliases(model) if share else {}))
        except Exception as error:
            # too deep nesting starts at the network's own path
            at = "" if isinstance(error, RecursionError) else _uncopied(model)
            part = "" if at == "" else f"its part {at!r}, a {type(model.get_submodule(at)).__name__}, "
            raise TypeError(f"model: {part}cannot be copied ({first_line(error)})") from error
    own = {id(module) for module in model.modules()}
    for name, module in made.named_modules():
        if id(module) in own:
            raise TypeError(
                f"model: its part {name!r}, a {type(module).__name__}, cannot be copied (its copy is itself)"
            )
    return made


def computed_tensors(model: nn.Module) -> dict[int, Any]:
    """Return, by its identity, a copy of each tensor that a forward left in a module with its history, which
    torch does not copy: the weight of torch's older ``weight_norm``, a masked weight of ``prune``."""
    found = {}
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, torch.Tensor) and value.grad_fn is not None:
                found[id(value)] = value.detach().clone()
    return found


def _aliases(model: nn.Module) -> dict[int, Any]:
    """Return, by a parameter's identity, another one in the same memory."""
    plain = [p for p in model.parameters() if type(p) is nn.Parameter and type(p.data) is torch.Tensor]
    return {id(p): nn.Parameter(p.detach(), p.requires_grad) for p in plain if not p.is_inference()}


def _without_weights(model: nn.Module) -> nn.Module | None:
    """Return a lazy layer that has not run, or None."""
    left, seen = [model], {id(model)}
    while left:  # no recursion: too deep nesting is refused later
        module = left.pop()
        own = (*module._parameters.values(), *module._buffers.values())
        if any(t is not None and is_lazy(t) for t in own):
            return module
        fresh = [child for child in module._modules.values() if child is not None and id(child) not in seen]
        seen.update(map(id, fresh))
        left += fresh
    return None


def _uncopied(model: nn.Module) -> str:
    """Return the path of the innermost module that cannot be copied; empty for the network."""
    for name, child in model.named_children():
        if not _copies(child):
            within = _uncopied(child)
            return f"{name}.{within}" if within else name
    return ""


def _copies(module: nn.Module) -> bool:
    try:
        copy.deepcopy(module, computed_tensors(module))
    except Exception:  # noqa: BLE001 - a user's class may raise anything
        return False
    return True


def first_line(error: Exception) -> str:
    """Return the first line of an exception's message, or else its class."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


_CARRIED = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


@runtime_checkable
class Attached(Protocol):
    """A module that works together with another module of its network."""

    def attach(self, network: nn.Module) -> None:
        """Find the other module; called whenever this module was put in a network."""


def weight_of(model: nn.Module) -> float:
    """Return the sum of a network's absolute weights, which tells it from others of the same structure."""
    return sum(float(p.detach().double().abs().sum()) for p in model.parameters())


def carry_hooks(old: nn.Module, new: nn.Module) -> None:
    """Give a module the hooks of the module that it replaces."""
    for name in _CARRIED:
        setattr(new, name, copy.copy(getattr(old, name)))


def set_module(network: nn.Module, name: str, module: nn.Module) -> nn.Module:
    """Put a module at a path and return the network, or the module if the path is empty."""
    if not name:
        return module
    parent, _, last = name.rpartition(".")
    network.get_submodule(parent).add_module(last, module)
    return network


@contextmanager
def evaluation(network: nn.Module) -> Iterator[None]:
    """Use evaluation mode and trainable tensors within the context, also in inference mode; restore each
    module's mode after it."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        with ExitStack() as stack:
            if torch.is_inference_mode_enabled():
                stack.enter_context(torch.inference_mode(False))
                stack.enter_context(torch.no_grad())
            yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def inference_mode_of(model: nn.Module) -> Iterator[None]:
    """Use evaluation mode without gradients within the context; restore each module's mode after it."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
