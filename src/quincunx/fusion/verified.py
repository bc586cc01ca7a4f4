"""Compare a fused copy with the network that it was made from, module by module, on one input."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from quincunx.fusion.fused import copied_argument
from quincunx.fusion.program import Program
from quincunx.modules import evaluation

__all__ = ["Comparison", "difference"]

# relative to the largest magnitude; allows for folding batch norm and summing in another order
_ALLOWED = {torch.float64: 1e-3, torch.float32: 1e-3, torch.bfloat16: 0.06, torch.float16: 0.02}


def difference(found: Any, expected: Any) -> float:
    """Return the largest difference between two outputs, relative to the largest magnitude of each tensor.

    It is infinite if they differ in structure: other containers, shapes, or values that are not finite. For
    integers and truth values it is the share that differs.
    """
    if isinstance(found, Tensor) and isinstance(expected, Tensor):
        return _of_tensors(found, expected)
    some, first = pytree.tree_flatten(found)
    others, second = pytree.tree_flatten(expected)
    if first != second or len(some) != len(others):
        return float("inf")
    return max((_of_leaves(a, b) for a, b in zip(some, others, strict=True)), default=0.0)


def _of_leaves(found: Any, expected: Any) -> float:
    if isinstance(found, Tensor) and isinstance(expected, Tensor):
        return _of_tensors(found, expected)
    if type(found) is not type(expected):
        return float("inf")
    if hasattr(found, "__dict__") and not callable(found):
        return difference(vars(found), vars(expected))
    return 0.0 if found == expected or found is expected else float("inf")


def _of_tensors(found: Tensor, expected: Tensor) -> float:
    if found.shape != expected.shape:
        return float("inf")
    if found.numel() == 0:
        return 0.0
    if not (found.is_floating_point() and expected.is_floating_point()):
        return float((found != expected).float().mean())
    a, b = found.double(), expected.double()
    finite = b.isfinite()
    if not torch.equal(finite, a.isfinite()) or not torch.equal(
        a[~finite].nan_to_num(), b[~finite].nan_to_num()
    ):
        return float("inf")
    if not finite.any():
        return 0.0
    largest = b[finite].abs().max().clamp(min=1e-12)
    return float((a[finite] - b[finite]).abs().max() / largest)


def _allowed(expected: Any, least: float) -> float:
    kinds = [_ALLOWED.get(t.dtype, 0.01) for t in pytree.tree_leaves(expected) if isinstance(t, Tensor)]
    return max([least, *kinds])


class Comparison:
    """Compares a fused network with its model.

    Args:
        modules: name of a node of the traced graph -> path of the module that it calls, and the number of
            the call.
        dtype: the format that the copy's programs compute in, if it differs from the network's.
    """

    def __init__(self, modules: dict[str, tuple[str, int]], dtype: torch.dtype | None = None) -> None:
        self.modules = modules
        self.least = 1e-3 if dtype is None else _ALLOWED[dtype]

    def check(self, model: nn.Module, fused: fx.GraphModule, example_input: Any) -> None:
        """
        Raises:
            TypeError: the outputs differ by more than rounding; the message names the first such module.
        """
        arguments = example_input if isinstance(example_input, tuple) else (example_input,)
        with torch.random.fork_rng(devices=[]), torch.no_grad(), evaluation(model):
            torch.manual_seed(0)
            expected = model(*copied_argument(arguments))
            torch.manual_seed(0)
            found = fused(*copied_argument(arguments))
            off = difference(found, expected)
            if off <= _allowed(expected, self.least):
                return
            at = self._first(model, fused, arguments)
        raise TypeError(
            f"model: {type(model).__name__} cannot be fused: on the example input the copy's answer differs "
            f"by {off:.2g} of its largest value{at}"
        )

    def _first(self, model: nn.Module, fused: fx.GraphModule, arguments: tuple[Any, ...]) -> str:
        """Return the first module whose output differs, and by how much, as the end of a sentence."""
        wanted: dict[str, list[Any]] = {}
        with ExitStack() as stack:
            for path in {path for path, _ in self.modules.values()}:

                def see(_: nn.Module, __: Any, output: Any, path: str = path) -> None:
                    wanted.setdefault(path, []).append(copied_argument(output))

                stack.callback(model.get_submodule(path).register_forward_hook(see).remove)
            torch.manual_seed(0)
            model(*copied_argument(arguments))
        torch.manual_seed(0)
        watcher = _Watcher(fused)
        watcher.run(*copied_argument(arguments))
        for name, value in watcher.seen:
            path, call = self.modules.get(name, ("", 0))
            if call >= len(wanted.get(path, ())):
                continue
            off = difference(value, wanted[path][call])
            if off > _allowed(value, self.least):
                return f", first at {path!r} ({type(model.get_submodule(path)).__name__}) by {off:.2g}"
        return ""


class _Watcher(fx.Interpreter):
    """Runs a fused network and keeps the values of its nodes, by name."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.seen: list[tuple[str, Any]] = []

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        called = self.module.get_submodule(str(n.target)) if n.op == "call_module" else None
        if isinstance(called, Program):
            self.seen += [(name, v.clone()) for name, v in zip(called.outputs, value, strict=True)]
        elif isinstance(value, Tensor):
            self.seen.append((n.name, value.clone()))
        return value
