"""The operators that take a grid's size, with the size as a tensor, for ``torch.jit.trace``.

A trace records integers as constants, so it would always use the size it was made with. A size that is
read from a map is a tensor to the trace, and these operators pass it on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["as_tensor", "in_forward_mode", "is_tracing", "refuse_forward_mode"]

_LIBRARY = torch.library.Library("quincunx", "FRAGMENT")  # type: ignore[no-untyped-call]
_GEOMETRY = "str sampling, int[] stride, int[] padding, int[] dilation, int groups"


def is_tracing() -> bool:
    """Return whether ``torch.jit.trace`` is recording."""
    return torch._C._get_tracing_state() is not None


def in_forward_mode() -> bool:
    """Return whether ``torch.func.jvp``, or what is made of it, is being computed."""
    if torch.compiler.is_compiling():
        return False
    stack = torch._C._functorch.get_interpreter_stack()
    return bool(stack) and any(one.key() == torch._C._functorch.TransformType.Jvp for one in stack)


def refuse_forward_mode() -> None:
    """Refuse derivatives in forward mode: the operators have them backwards only, and torch would take their
    results for constants, without a word.

    Raises:
        NotImplementedError: one is being computed.
    """
    if in_forward_mode():
        raise NotImplementedError(
            "quincunx: no derivatives in forward mode (torch.func.jvp, jacfwd, hessian); "
            "torch.autograd.functional.jvp works"
        )


def as_tensor(size: Sequence[Any]) -> Tensor:
    """Return (H, W) as one tensor, which a trace follows to the map that it was read from."""
    return torch.stack([torch.as_tensor(value) for value in size])


def _size(size: Tensor) -> tuple[int, int]:
    height, width = size.tolist()
    return int(height), int(width)


def _fill(y: Tensor, sampling: str, size: Tensor) -> Tensor:
    result: Tensor = torch.ops.quincunx.fill(y, sampling, _size(size))
    return result


def _fill_fitted(
    y: Tensor, weight: Tensor, bias: Tensor | None, sampling: str, size: Tensor, reach: int
) -> Tensor:
    result: Tensor = torch.ops.quincunx.fill_fitted(y, weight, bias, sampling, _size(size), reach)
    return result


def _conv_transpose(y: Tensor, weight: Tensor, bias: Tensor | None, size: Tensor, *geometry: Any) -> Tensor:
    result: Tensor = torch.ops.quincunx.conv_transpose(y, weight, bias, _size(size), *geometry)
    return result


def _conv_filled(
    y: Tensor, weight: Tensor, bias: Tensor | None, source: str, size: Tensor, *geometry: Any
) -> Tensor:
    result: Tensor = torch.ops.quincunx.conv_filled(y, weight, bias, source, _size(size), *geometry)
    return result


for _name, _schema, _function in (
    ("traced_fill", "(Tensor y, str sampling, Tensor size) -> Tensor", _fill),
    (
        "traced_fill_fitted",
        "(Tensor y, Tensor weight, Tensor? bias, str sampling, Tensor size, int reach) -> Tensor",
        _fill_fitted,
    ),
    (
        "traced_conv_transpose",
        f"(Tensor y, Tensor weight, Tensor? bias, Tensor size, {_GEOMETRY}) -> Tensor",
        _conv_transpose,
    ),
    (
        "traced_conv_filled",
        f"(Tensor y, Tensor weight, Tensor? bias, str source, Tensor size, {_GEOMETRY}) -> Tensor",
        _conv_filled,
    ),
):
    _LIBRARY.define(_name + _schema)  # type: ignore[no-untyped-call]
    _LIBRARY.impl(_name, _function, "CompositeImplicitAutograd")  # type: ignore[no-untyped-call]
