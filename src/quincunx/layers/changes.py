"""What the nodes of a graph may change in place."""

from __future__ import annotations

import inspect
import operator
from typing import Any

import torch
from torch import Tensor, fx, nn

from quincunx.layers.sizes import about_sizes
from quincunx.modules import forward_hooks

__all__ = [
    "ASKS_LAYOUT",
    "AUGMENTED",
    "changes",
    "is_opaque",
    "is_torchs_function",
    "module_of",
    "name_of",
    "nodes_in",
    "parameter_of",
    "submodule",
]

AUGMENTED = {
    *(operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv, operator.imod),
    *(operator.ipow, operator.iand, operator.ior, operator.ixor, operator.ilshift, operator.irshift),
    *(operator.imatmul, operator.setitem),
}
# operations that reveal the layout
ASKS_LAYOUT = {
    *("as_strided", "stride", "is_contiguous", "storage", "untyped_storage", "data_ptr"),
    *("resize_", "resize_as_", "set_"),
}


def submodule(model: nn.Module, node: fx.Node) -> nn.Module | None:
    """Return the module that a node calls, with or without hooks."""
    return model.get_submodule(str(node.target)) if node.op == "call_module" else None


def module_of(model: nn.Module, node: fx.Node) -> nn.Module | None:
    """Return the module that a node calls if only its forward runs, without hooks; None otherwise."""
    module = submodule(model, node)
    return module if module is not None and not forward_hooks(module) else None


def name_of(node: fx.Node) -> str:
    if node.op == "call_method":
        return str(node.target)
    return str(getattr(node.target, "__name__", "")).split(".")[0] if node.op == "call_function" else ""


def parameter_of(node: fx.Node, name: str) -> Any:
    """Return the value of a parameter in a call of one of torch's Python functions; None without one."""
    if name in node.kwargs:
        return node.kwargs[name]
    if node.op != "call_function" or not inspect.isfunction(node.target):
        return None
    names = list(inspect.signature(node.target).parameters)
    place = names.index(name) if name in names else len(node.args)
    return node.args[place] if place < len(node.args) else None


def nodes_in(values: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.map_arg(values, found.append)
    return found


def is_torchs_function(function: Any) -> bool:
    home = getattr(function, "__module__", None) or ""
    known = home.split(".")[0] in ("torch", "math", "_operator", "operator", "quincunx", "")
    return (
        known
        or function is getattr
        or isinstance(function, (torch._ops.OpOverload, torch._ops.OpOverloadPacket))
    )


def changes(model: nn.Module, node: fx.Node) -> list[fx.Node]:
    """Return the values that a node may change in place."""
    if node.op == "call_module":
        module = module_of(model, node)
        if module is None or not _known(module):
            return node.all_input_nodes
        return nodes_in(node.args[:1]) if getattr(module, "inplace", False) is True else []
    if node.op == "call_method":
        name = str(node.target)
        in_place = name.endswith("_") and not name.endswith("__")
        if in_place or name == "__setitem__" or not hasattr(Tensor, name):
            return nodes_in(node.args[:1]) + nodes_in(node.kwargs.get("out"))
        return nodes_in(node.kwargs.get("out"))
    if node.op != "call_function" or isinstance(node.target, type) or about_sizes(node) is not None:
        return []
    if node.target in AUGMENTED:
        return nodes_in(node.args[:1])
    if not is_torchs_function(node.target):
        return node.all_input_nodes
    if isinstance(node.target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return _written(node)
    found = nodes_in(node.kwargs.get("out"))
    name = str(getattr(node.target, "__name__", node.target)).split(".")[0]
    if (name.endswith("_") and not name.endswith("__")) or parameter_of(node, "inplace"):
        found += nodes_in(node.args[:1]) or nodes_in(node.kwargs)[:1]
    if name in ("instance_norm", "native_batch_norm") or node.target is torch.batch_norm:
        found += [n for n in node.all_input_nodes if n.op == "get_attr"]  # running statistics are among them
    elif name == "batch_norm" and (parameter_of(node, "training") or (len(node.args) > 5 and node.args[5])):
        found += nodes_in(node.args[1:3]) + nodes_in(
            [node.kwargs.get(k) for k in ("running_mean", "running_var")]
        )
    return found


def _written(node: fx.Node) -> list[fx.Node]:
    """Return the arguments that an operator of torch's dispatcher declares as written."""
    overloads = [node.target]
    if isinstance(node.target, torch._ops.OpOverloadPacket):
        overloads = [getattr(node.target, name) for name in node.target.overloads()]  # type: ignore[no-untyped-call]
    found: list[fx.Node] = []
    for overload in overloads:
        for place, argument in enumerate(overload._schema.arguments):  # type: ignore[union-attr]
            if argument.alias_info is not None and argument.alias_info.is_write:
                given = node.args[place] if place < len(node.args) else node.kwargs.get(argument.name)
                found += nodes_in(given)
    return found


def is_opaque(model: nn.Module, node: fx.Node) -> bool:
    """Return whether a node runs code that cannot be inspected: a user's module, or one with hooks."""
    if node.op == "call_module":
        module = module_of(model, node)
        return module is None or not _known(module)
    called = node.op == "call_function" and not isinstance(node.target, type)
    return called and not is_torchs_function(node.target) and about_sizes(node) is None


def _known(module: nn.Module) -> bool:
    """Return whether a module is one of torch's or ours, which change their input only by a flag."""
    return type(module).__module__.startswith(("torch.nn.", "quincunx.")) and "forward" not in vars(module)
