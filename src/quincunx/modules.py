"""What a module surely does: the one rule by which the whole library takes a module for a known class.

A subclass may compute something else than its parent, and so may one instance; whoever takes a network's
layer for what its class says asks here first.
"""

from __future__ import annotations

from typing import TypeVar

from torch import nn

__all__ = ["forward_hooks", "known_class", "surely"]

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


def forward_hooks(module: nn.Module) -> int:
    """How many of a user's hooks run at each call of a module, before or after its forward."""
    return sum(len(getattr(module, name)) for name in _HOOKS)
