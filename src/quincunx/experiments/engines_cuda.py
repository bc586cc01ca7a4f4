"""Other ways to run a network on an NVIDIA GPU, each a function of a module and an example on the card.

Each gets its best configuration: batch norm folded, channels_last, cuDNN's own search for algorithms. Calls
launch kernels and decide nothing, so they can be captured as a CUDA graph.
"""

from __future__ import annotations

import copy
import importlib.util
import operator
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from quincunx.fusion import program
from quincunx.fusion.effects import added_to
from quincunx.fusion.fuse import fuse
from quincunx.layers.graph import trace
from quincunx.measure.engines import fold_batch_norm, quiet

__all__ = ["Strided", "can_capture", "cudnn_fused", "dense_peers", "on_card", "ours", "uncaptured"]

Run = Callable[[], object]

_ATEN = torch.ops.aten
_ADDS = {operator.add, torch.add, added_to, "add"}
_RELUS = {F.relu, torch.relu, "relu"}


def on_card(model: nn.Module, x: Tensor) -> nn.Module:
    """Return a copy in evaluation mode on the example's device, in its type and in channels_last."""
    own = copy.deepcopy(model).eval().requires_grad_(False)
    return own.to(device=x.device, dtype=x.dtype, memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


# ---------------------------------------------------------------- ours


def uncaptured() -> AbstractContextManager[Any]:
    """Make fused networks launch their kernels within the context instead of recording graphs."""
    found: Any = getattr(program, "uncaptured", None)
    return nullcontext() if found is None else found()


def can_capture() -> bool:
    """Return whether a fused network can be part of another graph."""
    return hasattr(program, "uncaptured") or hasattr(program, "launches")


def ours(model: nn.Module, x: Tensor) -> Run:
    """Run the network by ``qx.fuse``."""
    quick = fuse(on_card(model, x))

    def run() -> object:
        with torch.inference_mode(), uncaptured():
            return quick(x)

    return run


# ---------------------------------------------------------------- cuDNN


def eager(model: nn.Module, x: Tensor) -> Run:
    """Run torch's own operators: cuDNN's convolutions, and a separate kernel for everything else."""
    folded = on_card(fold_batch_norm(model), x)

    def run() -> object:
        with torch.inference_mode():
            return folded(x)

    return run


class _Ridden(nn.Module):
    """A cuDNN convolution with bias, shortcut and ReLU in its epilogue."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv
        self.where = (list(conv.stride), [int(p) for p in conv.padding], list(conv.dilation), conv.groups)

    def forward(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
        weight, bias = self.conv.weight, self.conv.bias
        if shortcut is None:
            found: Tensor = _ATEN.cudnn_convolution_relu(x, weight, bias, *self.where)
        else:
            found = _ATEN.cudnn_convolution_add_relu(x, weight, shortcut, 1.0, bias, *self.where)
        return found


def cudnn_fused(model: nn.Module) -> nn.Module:
    """Return a copy with batch norm folded, in which convolutions absorb a ReLU, or an addition and a ReLU.

    cuDNN has only these two epilogues; other nodes do not change.
    """
    folded = fold_batch_norm(model)
    traced = fx.GraphModule(folded, trace(folded))
    graph = traced.graph
    for number, node in enumerate(list(graph.nodes)):
        if not _is_relu(traced, node):
            continue
        before = node.args[0]
        shortcut = None
        conv = before if _rides(traced, before) else None
        if conv is None and isinstance(before, fx.Node) and before.target in _ADDS and len(before.users) == 1:
            for this, other in (before.args[:2], before.args[1::-1]):
                if _rides(traced, this) and isinstance(other, fx.Node):
                    conv, shortcut = this, other
                    break
        if conv is None:
            continue
        name = f"ridden{number}"
        traced.add_submodule(name, _Ridden(traced.get_submodule(str(conv.target))))  # type: ignore[arg-type]
        # at the ReLU's place: the added value may be computed after the convolution's input
        with graph.inserting_before(node):
            whole = graph.call_module(name, (conv.args[0], *([] if shortcut is None else [shortcut])))
        node.replace_all_uses_with(whole)
        for old in dict.fromkeys((node, before, conv)):
            graph.erase_node(old)
    graph.lint()
    traced.recompile()
    return traced


def _module(traced: fx.GraphModule, node: object) -> nn.Module | None:
    if not isinstance(node, fx.Node) or node.op != "call_module":
        return None
    return traced.get_submodule(str(node.target))


def _is_relu(traced: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        return isinstance(_module(traced, node), nn.ReLU)
    return node.target in _RELUS


def _rides(traced: fx.GraphModule, node: object) -> bool:
    """Return whether a node is an ordinary convolution with only one reader."""
    conv = _module(traced, node)
    return (
        isinstance(conv, nn.Conv2d)
        and not isinstance(conv.padding, str)
        and conv.padding_mode == "zeros"
        and isinstance(node, fx.Node)
        and len(node.users) == 1
        and len(node.args) == 1
    )


def fused_by_cudnn(model: nn.Module, x: Tensor) -> Run:
    """Run :func:`cudnn_fused` on the card."""
    own = on_card(cudnn_fused(model), x)

    def run() -> object:
        with torch.inference_mode():
            return own(x)

    return run


class Strided(nn.Module):
    """QUARTER with ordinary operators: a convolution of stride 2 and a transposed one, with the shortcut.

    Args:
        down: the weight and bias of the first half, as our modules have them.
        up: the weight and bias of the second half.
    """

    def __init__(self, down: nn.Module, up: nn.Module) -> None:
        super().__init__()
        # own modules, so that they move and change type together
        self.down, self.up = copy.deepcopy(down), copy.deepcopy(up)
        self.on_cudnn = True

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.down.weight, self.down.bias
        if self.on_cudnn:
            inner = _ATEN.cudnn_convolution_relu(x, weight, bias, [2, 2], [1, 1], [1, 1], 1)
        else:
            inner = F.relu(F.conv2d(x, weight, bias, 2, 1))  # type: ignore[arg-type]
        # rows in the last window's stride that the window does not reach
        rest = [
            size - (2 * (small - 1) + 1) for size, small in zip(x.shape[2:], inner.shape[2:], strict=True)
        ]
        out = F.conv_transpose2d(inner, self.up.weight, self.up.bias, 2, 1, rest)  # type: ignore[arg-type]
        return F.relu_(out.add_(x)) if self.on_cudnn else F.relu(out + x)


def strided(model: Strided, x: Tensor) -> Run:
    """Run :class:`Strided` on the card."""
    own = on_card(model, x)

    def run() -> object:
        with torch.inference_mode():
            return own(x)

    return run


# ---------------------------------------------------------------- compilers


def compiled(model: nn.Module, x: Tensor) -> Run:
    """Run torch.compile with its best settings, without its own graphs: it is captured like the others."""
    return _compiled(on_card(fold_batch_norm(model), x), x)


def _compiled(own: nn.Module, x: Tensor) -> Run:
    with quiet(), torch.no_grad():
        fast: Callable[[Tensor], object] = torch.compile(
            own, mode="max-autotune-no-cudagraphs", dynamic=False
        )
        fast(x)

    def run() -> object:
        with torch.no_grad():
            return fast(x)

    return run


def compiled_strided(model: Strided, x: Tensor) -> Run:
    """Run :class:`Strided` with torch.compile, which fuses bias, shortcut and ReLU into one kernel."""
    own = on_card(model, x)
    own.on_cudnn = False  # type: ignore[assignment]
    return _compiled(own, x)


def tensorrt(model: nn.Module, x: Tensor) -> Run:
    """Run TensorRT through torch_tensorrt, if that is installed."""
    torch_tensorrt: Any = importlib.import_module("torch_tensorrt")
    own = on_card(fold_batch_norm(model), x)
    with quiet(), torch.no_grad():
        fast: Callable[[Tensor], object] = torch_tensorrt.compile(own, ir="dynamo", arg_inputs=(x,))
        fast(x)

    def run() -> object:
        with torch.no_grad():
            return fast(x)

    return run


def dense_peers(*, compilers: bool) -> dict[str, Callable[[nn.Module, Tensor], Run]]:
    """Return how to run a dense network, by name; compilers take a minute and more per network."""
    found: dict[str, Callable[[nn.Module, Tensor], Run]] = {
        "cuDNN": eager,
        "cuDNN, fused": fused_by_cudnn,
    }
    if compilers:
        # compilations for other shapes count against the limit for one function
        torch.compiler.reset()
        found["torch.compile"] = compiled
        if importlib.util.find_spec("torch_tensorrt") is not None:
            found["TensorRT"] = tensorrt
    return found
