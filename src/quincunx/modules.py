"""What a module surely does: the one rule by which the whole library takes a module for a known class.

A subclass may compute something else than its parent, and so may one instance; whoever takes a network's
layer for what its class says asks here first. Whoever changes a network copies it here.
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
]

M = TypeVar("M", bound=nn.Module)

# what a subclass may define again without computing anything else
_HARMLESS = {
    *("__init__", "__doc__", "__module__", "__qualname__", "__annotations__", "__constants__"),
    *("__slots__", "__dict__", "__weakref__", "__parameters__", "__orig_bases__"),
    *("__firstlineno__", "__static_attributes__", "__jit_unused_properties__"),
    *("__repr__", "__str__", "extra_repr", "reset_parameters", "reset_running_stats"),
    *("train", "eval", "_version", "_load_from_state_dict", "_save_to_state_dict", "__setstate__"),
}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def known_class(module: object, classes: tuple[type[nn.Module], ...]) -> type[nn.Module] | None:
    """The class among ``classes`` whose forward a module surely runs; None if there is none.

    An instance of the class itself is one, and so is an instance of a subclass that defines nothing again
    that its parent has but what builds or prints it. A forward set on the instance, a weight that is
    computed anew at each call and a subclass with a forward of its own are not. Hooks are not asked about:
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
            return None  # a property computes what the parent keeps
    return None


def _kept(found: type[nn.Module]) -> set[str]:
    """Names of what instances of a class keep: tensors, and settings such as a stride."""
    names = {"weight", "bias", "running_mean", "running_var", *getattr(found, "__constants__", ())}
    return names.union(*(vars(base).get("__annotations__", {}) for base in found.__mro__))


def surely(module: object, *classes: type[M]) -> bool:
    """Whether a module surely runs the forward of one of some classes: :func:`known_class` as a question."""
    return known_class(module, classes) is not None


def padding_of(conv: nn.Conv2d) -> tuple[int, int, int, int]:
    """(top, bottom, left, right) as a convolution's forward pads with zeros now.

    What its constructor noted for other modes does not follow a padding that is set later.
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
    """What a network holds at a path, as it is held: without the ``__getattr__`` of a user's class."""
    parent, _, name = path.rpartition(".")
    module = model.get_submodule(parent)
    for held in (module._parameters, module._buffers, vars(module)):
        if name in held:
            return held[name]
    return getattr(module, name)


def forward_hooks(module: nn.Module) -> int:
    """How many of a user's hooks run at each call of a module, before or after its forward."""
    return sum(len(getattr(module, name)) for name in _HOOKS)


def copied(model: M) -> M:
    """A deep copy of a network, of ordinary tensors also where inference mode is on.

    Raises:
        TypeError: something in it cannot be copied, whatever that raises, or a lazy layer has no weights
            yet; the part is named.
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
            made = copy.deepcopy(model)
        except Exception as error:
            # whatever is nested too deep is so from the network's own path on
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


def _without_weights(model: nn.Module) -> nn.Module | None:
    """A lazy layer that has not run."""
    left, seen = [model], {id(model)}
    while left:  # no recursion: what is nested too deep is refused later
        module = left.pop()
        own = (*module._parameters.values(), *module._buffers.values())
        if any(t is not None and is_lazy(t) for t in own):
            return module
        fresh = [child for child in module._modules.values() if child is not None and id(child) not in seen]
        seen.update(map(id, fresh))
        left += fresh
    return None


def _uncopied(model: nn.Module) -> str:
    """The path of the innermost module that cannot be copied by itself; empty for the network."""
    for name, child in model.named_children():
        if not _copies(child):
            within = _uncopied(child)
            return f"{name}.{within}" if within else name
    return ""


def _copies(module: nn.Module) -> bool:
    try:
        copy.deepcopy(module)
    except Exception:  # noqa: BLE001 - whatever a user's class raises
        return False
    return True


def first_line(error: Exception) -> str:
    """The first line of what an exception says, or else its class."""
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
    """A module that works together with another one of its network."""

    def attach(self, network: nn.Module) -> None:
        """Find the other one; called whenever the module was put in a network."""


def carry_hooks(old: nn.Module, new: nn.Module) -> None:
    """Give a module the hooks of the one whose place it takes."""
    for name in _CARRIED:
        setattr(new, name, copy.copy(getattr(old, name)))


def set_module(network: nn.Module, name: str, module: nn.Module) -> nn.Module:
    """The network with a module at a path; the module itself where the path is empty."""
    if not name:
        return module
    parent, _, last = name.rpartition(".")
    network.get_submodule(parent).add_module(last, module)
    return network


@contextmanager
def evaluation(network: nn.Module) -> Iterator[None]:
    """Within: every module in evaluation mode, and tensors that can be trained also where inference mode is
    on; each module's own mode after."""
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
    """Within: every module in evaluation mode and no gradients; each module's own mode after."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
