r"""Batch norm of a training step, a shortcut added and an activation: schema, shapes, derivatives, formulas.

.. math:: y = \mathrm{act}\Big(w_c \frac{x - \mu_c}{\sqrt{\sigma_c^2 + \epsilon}} + b_c + r\Big)

mu and sigma^2 are the mean and the variance of channel c over all images and positions of x, which may be a
dense map [N, C, H, W] or a sampled one [N, C, m, 1]. Backward needs x, and y where a shortcut r was added;
what the activation let pass is else computed again from x. With d = dL/dy where the activation is not
constant and x^ = (x - mu) / sqrt(sigma^2 + eps), a mean being over images and positions:

.. math:: \frac{dL}{dx} = \frac{w_c}{\sqrt{\sigma_c^2 + \epsilon}}
          \big(d - \overline{d} - \hat{x}\, \overline{d \hat{x}}\big), \quad
          \frac{dL}{dw_c} = \sum d \hat{x}, \quad \frac{dL}{db_c} = \sum d, \quad \frac{dL}{dr} = d

Each direction reads the maps twice: once for its sums and once to write its result.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["ACTIVATIONS", "OPERATORS", "computed", "norm_act_and_input", "returned"]

# the kernels have the same numbers (``Activation`` in csrc/kernel_api.h)
ACTIVATIONS = {"none": 0, "relu": 1, "relu6": 2}

_LIBRARY = torch.library.Library("quincunx", "FRAGMENT")  # type: ignore[no-untyped-call]
OPERATORS = {
    # y, and the mean and the variance (over values, not over one less) of each channel
    "norm_act": "(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, float eps, int activation) "
    "-> (Tensor, Tensor, Tensor)",
    # the gradients of x, to which `other` is added, of weight and bias, and with y that of the residual
    "norm_act_backward": "(Tensor grad, Tensor x, Tensor? y, Tensor mean, Tensor variance, Tensor? weight, "
    "Tensor? bias, Tensor? other, float eps, int activation) -> (Tensor, Tensor, Tensor, Tensor)",
}
for _name, _schema in OPERATORS.items():
    _LIBRARY.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]


# ---------------------------------------------------------------- formulas, in any dtype


def wide_of(x: Tensor) -> torch.dtype:
    """Return the dtype of sums over a map: float32 at least."""
    return torch.promote_types(x.dtype, torch.float32)


def _over_channels(value: Tensor) -> Tensor:
    return value.view(1, -1, 1, 1)


def _as_map(value: Tensor, like: Tensor) -> Tensor:
    return value.to(like.dtype).contiguous(memory_format=torch.channels_last)


def check(x: Tensor, activation: int) -> None:
    """Refuse what has no statistics, as torch does, and unknown activations."""
    if x.dim() != 4 or x.shape[0] * x.shape[2] * x.shape[3] <= 1:
        raise ValueError(
            f"x: expected a map [N, C, H, W] with more than 1 value per channel, got shape {tuple(x.shape)}"
        )
    if activation not in ACTIVATIONS.values():
        raise ValueError(f"activation={activation!r}: expected one of {sorted(ACTIVATIONS.values())}")


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    variance, mean = torch.var_mean(x.to(wide_of(x)), (0, 2, 3), correction=0)
    return mean, variance


def _normalised(x: Tensor, mean: Tensor, variance: Tensor, eps: float) -> Tensor:
    return (x.to(wide_of(x)) - _over_channels(mean)) * _over_channels(torch.rsqrt(variance + eps))


def computed(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, mean and variance in torch's own operators."""
    check(x, activation)
    mean, variance = _moments(x)
    z = _scaled(_normalised(x, mean, variance, eps), weight, bias)
    if residual is not None:
        z = z + residual.to(z.dtype)
    return _as_map(_activated(z, activation), x), mean, variance


def _scaled(normalised: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if weight is not None:
        normalised = normalised * _over_channels(weight.to(normalised.dtype))
    return normalised if bias is None else normalised + _over_channels(bias.to(normalised.dtype))


def _activated(z: Tensor, activation: int) -> Tensor:
    if activation == ACTIVATIONS["none"]:
        return z
    return F.relu(z) if activation == ACTIVATIONS["relu"] else F.relu6(z)


def _passed(grad: Tensor, z: Tensor, activation: int) -> Tensor:
    """Return the gradient where the activation of z, or of its own output z, is not constant."""
    if activation == ACTIVATIONS["none"]:
        return grad
    constant = z <= 0 if activation == ACTIVATIONS["relu"] else (z <= 0) | (z >= 6)
    return grad.masked_fill(constant, 0)


def returned(
    grad: Tensor,
    x: Tensor,
    y: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    other: Tensor | None,
    eps: float,
    activation: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight, bias and residual in torch's own operators."""
    normalised = _normalised(x, mean, variance, eps)
    z = (_scaled(normalised, weight, bias) if y is None else y).detach()
    d = _passed(grad.to(normalised.dtype), z, activation)
    to_bias, to_weight = d.sum((0, 2, 3)), (d * normalised).sum((0, 2, 3))
    values = x.numel() // x.shape[1]
    inner = d - _over_channels(to_bias / values) - normalised * _over_channels(to_weight / values)
    to_x = inner * _over_channels(torch.rsqrt(variance + eps))
    if weight is not None:
        to_x = to_x * _over_channels(weight.to(to_x.dtype))
    if other is not None:
        to_x = to_x + other.to(to_x.dtype)
    return _as_map(to_x, x), to_weight, to_bias, x.new_empty(0) if y is None else _as_map(d, x)


# ---------------------------------------------------------------- shapes and derivatives


def _empty_like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _channels(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[1], dtype=wide_of(x))


def _fake(x: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_like(x), _channels(x), _channels(x)


def _fake_backward(
    grad: Tensor, x: Tensor, y: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _empty_like(x), _channels(x), _channels(x), x.new_empty(0) if y is None else _empty_like(x)


for _name, _function in (("norm_act", _fake), ("norm_act_backward", _fake_backward)):
    torch.library.register_fake(f"quincunx::{_name}", _function, lib=_LIBRARY)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias, residual, ctx.eps, ctx.activation = inputs
    y, mean, variance = output
    ctx.mark_non_differentiable(mean, variance)
    ctx.set_materialize_grads(False)
    # a shortcut's gradient without an activation is that of y
    ctx.joined = residual is not None and ctx.activation != ACTIVATIONS["none"]
    ctx.added = residual is not None
    ctx.save_for_backward(x, y if ctx.joined else None, mean, variance, weight, bias)


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 6
    to_x, to_weight, to_bias, to_residual = gradients(ctx.saved_tensors, grad, None, ctx.eps, ctx.activation)
    _, need_weight, need_bias, need_residual = ctx.needs_input_grad[:4]
    return (
        to_x,
        to_weight if need_weight else None,
        to_bias if need_bias else None,
        (to_residual if ctx.joined else grad) if need_residual else None,
        None,
        None,
    )


def gradients(
    saved: tuple[Any, ...], grad: Tensor, other: Tensor | None, eps: float, activation: int
) -> tuple[Tensor, Any, Any, Tensor]:
    """Return the gradients of x, weight, bias and residual from what ``norm_act`` saved.

    Where they are to be differentiated again they come from torch's own operators, with the statistics
    computed again from x, so that derivatives of any order are right.
    """
    x, y, mean, variance, weight, bias = saved
    found: tuple[Tensor, Tensor, Tensor, Tensor]
    if torch.is_grad_enabled():
        found = returned(grad, x, y, *_moments(x), weight, bias, other, eps, activation)
    else:
        found = torch.ops.quincunx.norm_act_backward(
            grad, x, y, mean, variance, weight, bias, other, eps, activation
        )
    to_x, to_weight, to_bias, to_residual = found
    return (
        to_x,
        None if weight is None else to_weight.to(weight.dtype),
        None if bias is None else to_bias.to(bias.dtype),
        to_residual,
    )


torch.library.register_autograd("quincunx::norm_act", _backward, setup_context=_keep, lib=_LIBRARY)


class _WithInput(torch.autograd.Function):
    """``norm_act`` that also returns its input: the gradients of both are added where one is written."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, activation: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        y, mean, variance = torch.ops.quincunx.norm_act(x, weight, bias, None, eps, activation)
        ctx.mark_non_differentiable(mean, variance)
        ctx.set_materialize_grads(False)
        ctx.eps, ctx.activation = eps, activation
        ctx.save_for_backward(x, None, mean, variance, weight, bias)
        return x, y, mean, variance

    @staticmethod
    def backward(ctx: Any, other: Tensor | None, grad: Tensor | None, *rest: Any) -> tuple[Any, ...]:
        if grad is None:
            return other, None, None, None, None
        to_x, to_weight, to_bias, _ = gradients(ctx.saved_tensors, grad, other, ctx.eps, ctx.activation)
        return to_x, to_weight, to_bias, None, None


def norm_act_and_input(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, activation: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return x itself and ``norm_act`` of it, for a map that something else reads as well."""
    found: tuple[Tensor, Tensor, Tensor, Tensor] = _WithInput.apply(x, weight, bias, eps, activation)  # type: ignore[no-untyped-call]
    return found
