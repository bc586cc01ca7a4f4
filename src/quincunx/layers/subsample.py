"""Every second position of a map, for shortcuts without parameters, with a gradient in channels_last."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["subsample"]


class _Subsample(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, stride: int) -> Tensor:
        ctx.size, ctx.stride = x.shape, stride
        return x[:, :, ::stride, ::stride].contiguous(memory_format=torch.channels_last)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,) = grads
        whole = torch.empty(
            ctx.size, dtype=grad.dtype, device=grad.device, memory_format=torch.channels_last
        ).zero_()
        whole[:, :, :: ctx.stride, :: ctx.stride] = grad
        return whole, None


def subsample(x: Tensor, stride: int) -> Tensor:
    """Return x[:, :, ::stride, ::stride].

    The gradient of torch's slices is contiguous and is made twice, once for each dimension; every map that it
    is added to would have to be copied. Here it is one map in channels_last, if x is.

    Args:
        x: map [N, C, H, W].
        stride: positions from one to the next, in both dimensions.

    Example:
        >>> subsample(torch.arange(16.0).view(1, 1, 4, 4), 2).flatten().tolist()
        [0.0, 2.0, 8.0, 10.0]
    """
    if _is_eager(x) and x.requires_grad and torch.is_grad_enabled():
        result: Tensor = _Subsample.apply(x, stride)  # type: ignore[no-untyped-call]
        return result
    if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
        # means of one position each: a graph's gradient of slices is contiguous, theirs is like the map
        return F.avg_pool2d(x, 1, stride)
    return x[:, :, ::stride, ::stride]


def _is_eager(x: Tensor) -> bool:
    """Return whether x is a map in channels_last, and no stand-in of a tracer, compiler or transform."""
    return (
        not torch.compiler.is_compiling()
        and torch._C._get_tracing_state() is None
        and not torch._C._are_functorch_transforms_active()
        and type(x) is Tensor
        and x.is_contiguous(memory_format=torch.channels_last)
    )
