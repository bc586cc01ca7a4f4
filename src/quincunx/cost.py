"""MACs and parameters of a network, per layer and in total."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["Cost", "Row", "cost", "inference_mode_of"]


@dataclass(frozen=True)
class Row:
    """One layer: a module that has parameters of its own or multiplies in its own forward.

    Attributes:
        name: the module's path in the network.
        kind: its class.
        macs: multiply-adds for the whole example input.
        params: its own parameters, each shared one counted where it is first met.
        output: shape of its output, empty if it never ran.
    """

    name: str
    kind: str
    macs: int
    params: int
    output: tuple[int, ...]


@dataclass(frozen=True)
class Cost:
    """MACs and parameters.

    Attributes:
        macs: multiply-adds of convolutions, matrix products and attention (half of what torch calls
            FLOPs). Normalisation, activation, pooling and additions are not counted, as in the papers.
        params: number of trainable and other parameters.
        rows: one :class:`Row` a layer, in the order of the network's modules; MACs and parameters that
            belong to no layer (a matrix product in the network's own forward) are in a row "(network)".
    """

    macs: int
    params: int
    rows: tuple[Row, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


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


def cost(model: nn.Module, example_input: Tensor | tuple[Any, ...]) -> Cost:
    r"""Multiply-adds and parameters of a network for one input.

    A sampled or transposed sampled convolution costs m kh kw C O / groups a picture, m being the
    computed positions; a dense one H' W' kh kw C O / groups. Taps that fall outside the map count.

    Args:
        model: any module; it is run once in evaluation mode, without gradients, and left as it was.
        example_input: a tensor [N, C, H, W], or a tuple of arguments. MACs are for the whole batch.

    Returns:
        A :class:`Cost`.

    Raises:
        TypeError: ``example_input`` is neither.

    Source: Peng et al., arXiv:1809.02601, section 3.3.

    Example:
        >>> cost(nn.Conv2d(3, 8, 3, padding=1), torch.zeros(1, 3, 32, 32)).macs
        221184
    """
    if not isinstance(example_input, (Tensor, tuple)):
        raise TypeError(f"example_input: expected a tensor or a tuple, got {type(example_input).__name__}")
    arguments = example_input if isinstance(example_input, tuple) else (example_input,)
    counted: dict[str, int] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    names = dict(model.named_modules())
    with ExitStack() as stack:
        for name, module in names.items():

            def remember(_: nn.Module, __: Any, output: Any, name: str = name) -> None:
                shapes[name] = tuple(output.shape) if isinstance(output, Tensor) else ()

            stack.callback(module.register_forward_hook(remember).remove)
        stack.enter_context(inference_mode_of(model))
        # as two matrix products: the counter knows no fused attention of the CPU
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        counter = stack.enter_context(FlopCounterMode(display=False))
        model(*arguments)
    total = counter.get_total_flops() // 2
    prefix = type(model).__name__
    for path, by_op in counter.get_flop_counts().items():
        macs = sum(int(flops) for flops in by_op.values()) // 2
        if path == prefix:
            counted[""] = macs
        elif path.startswith(prefix + "."):
            counted[path[len(prefix) + 1 :]] = macs
    rows: list[Row] = []
    seen: set[int] = set()
    for name, module in names.items():
        inside = name + "." if name else ""
        children = sum(
            macs
            for path, macs in counted.items()
            if path != name and path.startswith(inside) and "." not in path[len(inside) :]
        )
        own = counted.get(name, 0) - children
        params = 0
        for parameter in module.parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                params += parameter.numel()
        if own or params:
            rows.append(Row(name or "(network)", type(module).__name__, own, params, shapes.get(name, ())))
    return Cost(total, sum(p.numel() for p in model.parameters()), tuple(rows))
