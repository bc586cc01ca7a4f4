r"""The operators: schema, shapes, derivatives and MACs. The arithmetic is in the back ends.

The three sampled convolution operators are partial derivatives of one trilinear form,

.. math:: T(x, w, y) = \sum_{n,p} \langle y_{n,p}, (w * x)_{n,p} \rangle,

the sum over the computed positions p: ``conv`` is dT/dy, ``conv_transpose`` dT/dx and
``conv_weight`` dT/dw. So the derivatives of each are the other two, to any order.
``conv_transpose`` can add a shortcut, a map of its result's shape, where it writes.
``conv_filled`` is ``conv`` of ``fill`` without storing the filled map, which would have the grid ``size``.

``fill_fitted`` is an affine map of a sampled map, linear in its coefficients w [R, T, C]: computed positions
keep their values, the others are combinations of T computed ones. ``collect_fitted`` is its adjoint and
``fill_fitted_weight`` its derivative by w.

``binary_conv`` is the dense convolution with weights +1 and -1, each given as one bit; it is for inference
and has no derivatives.

Tensors: x is a dense map [N, C, H, W], y a sampled map [N, O, m, 1] and w is [O, C / groups, kh, kw].
A weight may be float32 where maps are bfloat16, as autocast has them: it is rounded where it is packed, and
``wide`` asks for its gradient in float32, which is how it is summed.
Every map that an operator returns is channels_last; a weight's gradient is channels_last on GPUs, and
elsewhere where its weight is. A sampling is passed as its ``spec`` text, which ``torch.export`` can store and
which is the key of the plan caches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from quincunx.ops.flops import counted_by
from quincunx.ops.geometry import Geometry
from quincunx.ops.plan import adjoint_plan, fill_plan
from quincunx.sampling import from_spec

__all__ = ["CHANNELS_LAST", "OPERATORS", "check_count", "implement", "sampled_count", "transposed_reads"]

CHANNELS_LAST = torch.channels_last

_LIBRARY = torch.library.Library("quincunx", "DEF")  # type: ignore[no-untyped-call]
_GEOMETRY = "str sampling, int[] stride, int[] padding, int[] dilation, int groups"
OPERATORS = {
    "conv": f"(Tensor x, Tensor weight, Tensor? bias, {_GEOMETRY}) -> Tensor",
    "conv_transpose": f"(Tensor y, Tensor weight, Tensor? bias, SymInt[] size, {_GEOMETRY}, "
    "Tensor? shortcut=None) -> Tensor",
    "conv_weight": f"(Tensor x, Tensor y, int[] kernel, {_GEOMETRY}, bool channels_last=False, "
    "bool wide=False) -> Tensor",
    "conv_filled": "(Tensor y, Tensor weight, Tensor? bias, str source, SymInt[] size, "
    f"{_GEOMETRY}) -> Tensor",
    "fill": "(Tensor y, str sampling, SymInt[] size) -> Tensor",
    "collect": "(Tensor z, str sampling) -> Tensor",
    "fill_fitted": "(Tensor y, Tensor weight, Tensor? bias, str sampling, SymInt[] size, int reach) "
    "-> Tensor",
    "collect_fitted": "(Tensor z, Tensor weight, str sampling, int reach) -> Tensor",
    "fill_fitted_weight": "(Tensor y, Tensor z, str sampling, int reach, SymInt[] shape) -> Tensor",
    "binary_conv": "(Tensor x, Tensor bits, Tensor? scale, Tensor? bias, int[] kernel, int[] stride, "
    "int[] padding, int[] dilation, int groups) -> Tensor",
}
for _name, _schema in OPERATORS.items():
    _LIBRARY.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]


def implement(name: str, function: Callable[..., Tensor], dispatch_key: str) -> None:
    """Register a back end's function for one operator on one kind of device."""
    _LIBRARY.impl(name, function, dispatch_key)  # type: ignore[no-untyped-call]


def sampled_count(sampling: str, height: int, width: int) -> int:
    """Return m of a sampling on a grid, also for a compiler's symbolic sizes."""
    return from_spec(sampling).count(height, width)


def check_count(y: Tensor, sampling: str, grid: Sequence[int]) -> None:
    """Refuse a map [N, C, m, 1] that does not hold the m positions of a sampling on a grid.

    Raises:
        ValueError: it has another number of rows, or the grid does not fit the sampling.
    """
    m = sampled_count(sampling, grid[0], grid[1])
    if y.shape[2] != m or y.shape[3] != 1:
        raise ValueError(
            f"y: expected [N, C, m, 1] with m={m} positions of {from_spec(sampling)!r} on the "
            f"{grid[0]} x {grid[1]} grid, got shape {tuple(y.shape)}"
        )


# ---------------------------------------------------------------- shapes


def _empty_map(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=CHANNELS_LAST)


def _conv_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    sampling: str,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    geometry = Geometry.make(weight.shape[2:], stride, padding, dilation)
    m = sampled_count(sampling, *geometry.grid(x.shape[2], x.shape[3]))
    return _empty_map(x, (x.shape[0], weight.shape[0], m, 1))


def _conv_transpose_fake(
    y: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    size: Sequence[int],
    sampling: str,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    shortcut: Tensor | None = None,
) -> Tensor:
    geometry = Geometry.make(weight.shape[2:], stride, padding, dilation)
    check_count(y, sampling, geometry.grid(size[0], size[1]))
    return _empty_map(y, (y.shape[0], weight.shape[1] * groups, size[0], size[1]))


def _conv_weight_fake(
    x: Tensor,
    y: Tensor,
    kernel: Sequence[int],
    sampling: str,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    channels_last: bool = False,
    wide: bool = False,
) -> Tensor:
    shape = (y.shape[1], x.shape[1] // groups, kernel[0], kernel[1])
    # in the layout in which each device's convolutions read weights, so that a gradient is not converted
    layout = CHANNELS_LAST if channels_last or x.device.type == "cuda" else torch.contiguous_format
    dtype = torch.float32 if wide else x.dtype
    return torch.empty(shape, dtype=dtype, device=x.device, memory_format=layout)


def _conv_filled_fake(
    y: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    source: str,
    size: Sequence[int],
    sampling: str,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    check_count(y, source, size)
    geometry = Geometry.make(weight.shape[2:], stride, padding, dilation)
    m = sampled_count(sampling, *geometry.grid(size[0], size[1]))
    return _empty_map(y, (y.shape[0], weight.shape[0], m, 1))


def _fill_fake(y: Tensor, sampling: str, size: Sequence[int]) -> Tensor:
    check_count(y, sampling, size)
    return _empty_map(y, (y.shape[0], y.shape[1], size[0], size[1]))


def _collect_fake(z: Tensor, sampling: str) -> Tensor:
    m = sampled_count(sampling, z.shape[2], z.shape[3])
    return _empty_map(z, (z.shape[0], z.shape[1], m, 1))


def _fill_fitted_fake(
    y: Tensor, weight: Tensor, bias: Tensor | None, sampling: str, size: Sequence[int], reach: int
) -> Tensor:
    return _fill_fake(y, sampling, size)


def _collect_fitted_fake(z: Tensor, weight: Tensor, sampling: str, reach: int) -> Tensor:
    return _collect_fake(z, sampling)


def _fill_fitted_weight_fake(y: Tensor, z: Tensor, sampling: str, reach: int, shape: Sequence[int]) -> Tensor:
    return y.new_empty(tuple(shape))


def _binary_conv_fake(
    x: Tensor,
    bits: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    grid = Geometry.make(kernel, stride, padding, dilation).grid(x.shape[2], x.shape[3])
    return _empty_map(x, (x.shape[0], bits.shape[0], *grid))


for _name, _fake in (
    ("conv", _conv_fake),
    ("conv_transpose", _conv_transpose_fake),
    ("conv_weight", _conv_weight_fake),
    ("conv_filled", _conv_filled_fake),
    ("fill", _fill_fake),
    ("collect", _collect_fake),
    ("fill_fitted", _fill_fitted_fake),
    ("collect_fitted", _collect_fitted_fake),
    ("fill_fitted_weight", _fill_fitted_weight_fake),
    ("binary_conv", _binary_conv_fake),
):
    torch.library.register_fake(f"quincunx::{_name}", _fake, lib=_LIBRARY)

# ---------------------------------------------------------------- derivatives

_OPS = torch.ops.quincunx


def _form(weight: Tensor, x: Tensor) -> tuple[bool, bool]:
    """Whether a weight is in channels_last, and wider than a map: so is its gradient, or torch copies it."""
    _, c, h, w = weight.shape
    # strides and not is_contiguous, to which a weight of one channel is both
    return weight.stride() == (h * w * c, 1, w * c, c), weight.dtype != x.dtype


def _keep_conv(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, *ctx.geometry = inputs
    ctx.save_for_backward(x, weight)


def _conv_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, weight = ctx.saved_tensors
    need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
    to_x = to_weight = to_bias = None
    if need_x:
        to_x = _OPS.conv_transpose(grad, weight, None, x.shape[2:], *ctx.geometry)
    if need_weight:
        to_weight = _OPS.conv_weight(x, grad, weight.shape[2:], *ctx.geometry, *_form(weight, x))
    if need_bias:
        to_bias = grad.sum((0, 2, 3))
    return to_x, to_weight, to_bias, None, None, None, None, None


def _keep_conv_transpose(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    y, weight, _, _, *ctx.geometry, shortcut = inputs
    ctx.added = shortcut is not None
    ctx.save_for_backward(y, weight)


def _conv_transpose_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    y, weight = ctx.saved_tensors
    need_y, need_weight, need_bias = ctx.needs_input_grad[:3]
    to_y = to_weight = to_bias = None
    if need_y:
        to_y = _OPS.conv(grad, weight, None, *ctx.geometry)
    if need_weight:
        to_weight = _OPS.conv_weight(grad, y, weight.shape[2:], *ctx.geometry, *_form(weight, y))
    if need_bias:
        to_bias = grad.sum((0, 2, 3))
    # torch leaves out the last arguments where they are the defaults
    to_shortcut = grad if ctx.added and ctx.needs_input_grad[9] else None
    return to_y, to_weight, to_bias, None, None, None, None, None, None, to_shortcut


def _keep_conv_weight(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, y, _, *ctx.geometry, _, _ = inputs
    ctx.save_for_backward(x, y)


def _conv_weight_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, y = ctx.saved_tensors
    to_x = to_y = None
    if ctx.needs_input_grad[0]:
        to_x = _OPS.conv_transpose(y, grad, None, x.shape[2:], *ctx.geometry)
    if ctx.needs_input_grad[1]:
        to_y = _OPS.conv(x, grad, None, *ctx.geometry)
    return to_x, to_y, None, None, None, None, None, None, None, None


def _keep_conv_filled(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    y, weight, _, ctx.source, ctx.size, *ctx.geometry = inputs
    ctx.save_for_backward(y, weight)


def _conv_filled_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    y, weight = ctx.saved_tensors
    need_y, need_weight, need_bias = ctx.needs_input_grad[:3]
    to_y = to_weight = to_bias = None
    if need_y:
        to_filled = _OPS.conv_transpose(grad, weight, None, ctx.size, *ctx.geometry)
        to_y = _OPS.collect(to_filled, ctx.source)
    if need_weight:
        filled = _OPS.fill(y, ctx.source, ctx.size)
        to_weight = _OPS.conv_weight(filled, grad, weight.shape[2:], *ctx.geometry, *_form(weight, y))
    if need_bias:
        to_bias = grad.sum((0, 2, 3))
    return to_y, to_weight, to_bias, None, None, None, None, None, None, None


def _keep_fill(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.sampling = inputs[1]


def _fill_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return _OPS.collect(grad, ctx.sampling), None, None


def _keep_collect(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.sampling, ctx.size = inputs[1], inputs[0].shape[2:]


def _collect_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return _OPS.fill(grad, ctx.sampling, ctx.size), None


def _keep_fill_fitted(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    y, weight, _, ctx.sampling, _, ctx.reach = inputs
    ctx.save_for_backward(y, weight)


def _fill_fitted_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    y, weight = ctx.saved_tensors
    need_y, need_weight, need_bias = ctx.needs_input_grad[:3]
    to_y = to_weight = to_bias = None
    if need_y:
        to_y = _OPS.collect_fitted(grad, weight, ctx.sampling, ctx.reach)
    if need_weight:
        to_weight = _OPS.fill_fitted_weight(y, grad, ctx.sampling, ctx.reach, weight.shape)
    if need_bias:
        # a bias is the coefficient of a map of ones, and every class has a first tap
        ones = torch.ones_like(y)
        sums = _OPS.fill_fitted_weight(ones, grad, ctx.sampling, ctx.reach, weight.shape)
        to_bias = sums[:, 0] if weight.shape[1] else sums.sum(1)
    return to_y, to_weight, to_bias, None, None, None


def _keep_collect_fitted(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    z, weight, ctx.sampling, ctx.reach = inputs
    ctx.save_for_backward(z, weight)


def _collect_fitted_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    z, weight = ctx.saved_tensors
    to_z = to_weight = None
    if ctx.needs_input_grad[0]:
        to_z = _OPS.fill_fitted(grad, weight, None, ctx.sampling, z.shape[2:], ctx.reach)
    if ctx.needs_input_grad[1]:
        to_weight = _OPS.fill_fitted_weight(grad, z, ctx.sampling, ctx.reach, weight.shape)
    return to_z, to_weight, None, None


def _keep_fill_fitted_weight(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    y, z, ctx.sampling, ctx.reach, _ = inputs
    ctx.save_for_backward(y, z)


def _fill_fitted_weight_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    # the skipped positions alone: what the coefficients do, without the values that are kept
    y, z = ctx.saved_tensors
    none = torch.zeros_like(grad)
    to_y = to_z = None
    if ctx.needs_input_grad[0]:
        to_y = _OPS.collect_fitted(z, grad, ctx.sampling, ctx.reach)
        to_y = to_y - _OPS.collect_fitted(z, none, ctx.sampling, ctx.reach)
    if ctx.needs_input_grad[1]:
        to_z = _OPS.fill_fitted(y, grad, None, ctx.sampling, z.shape[2:], ctx.reach)
        to_z = to_z - _OPS.fill_fitted(y, none, None, ctx.sampling, z.shape[2:], ctx.reach)
    return to_y, to_z, None, None, None


def _keep_nothing(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    pass


def _binary_conv_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    raise NotImplementedError("binary_conv: packed weights are for inference; train with BinaryConv2d")


for _name, _backward, _keep in (
    ("conv", _conv_backward, _keep_conv),
    ("conv_transpose", _conv_transpose_backward, _keep_conv_transpose),
    ("conv_weight", _conv_weight_backward, _keep_conv_weight),
    ("conv_filled", _conv_filled_backward, _keep_conv_filled),
    ("fill", _fill_backward, _keep_fill),
    ("collect", _collect_backward, _keep_collect),
    ("fill_fitted", _fill_fitted_backward, _keep_fill_fitted),
    ("collect_fitted", _collect_fitted_backward, _keep_collect_fitted),
    ("fill_fitted_weight", _fill_fitted_weight_backward, _keep_fill_fitted_weight),
    ("binary_conv", _binary_conv_backward, _keep_nothing),
):
    torch.library.register_autograd(f"quincunx::{_name}", _backward, setup_context=_keep, lib=_LIBRARY)


# ---------------------------------------------------------------- MACs
# torch counts two FLOPs per multiply-add. A tap outside the map counts, as it does for Conv2d.


def _conv_flops(x: Any, weight: Any, *_: Any, out_shape: Any, **__: Any) -> int:
    batch, _, m, _ = out_shape
    out_channels, in_channels, kh, kw = weight
    return int(2 * batch * m * out_channels * in_channels * kh * kw)


def _conv_transpose_flops(y: Any, weight: Any, bias: Any, size: Any, spec: str, *where: Any, **_: Any) -> int:
    batch, _, m, _ = y
    in_channels, out_channels, kh, kw = weight
    return int(2 * batch * transposed_reads(m, (kh, kw), size, spec, *where[:3]) * in_channels * out_channels)


def transposed_reads(
    m: int, kernel: Any, size: Any, spec: str, stride: Any, padding: Any, dilation: Any
) -> int:
    """Return how many pairs of an output position and a tap a transposed convolution multiplies.

    All taps of all m computed positions, except where the sampled map's grid is larger than the result:
    there, taps that lead outside of the result are left out.
    """
    geometry = Geometry.make(kernel, stride, padding, dilation)
    height, width = int(size[0]), int(size[1])
    grid = geometry.grid(height, width)
    if grid[0] <= height and grid[1] <= width:
        return int(m * kernel[0] * kernel[1])
    return adjoint_plan(spec, geometry, height, width).reads


def _conv_weight_flops(x: Any, y: Any, *_: Any, out_shape: Any, **__: Any) -> int:
    batch, _, m, _ = y
    out_channels, in_channels, kh, kw = out_shape
    return int(2 * batch * m * out_channels * in_channels * kh * kw)


def _fill_fitted_flops(
    y: Any, weight: Any, bias: Any, sampling: str, size: Any, reach: int, *_: Any, **__: Any
) -> int:
    return int(2 * y[0] * y[1] * fill_plan(sampling, int(size[0]), int(size[1]), reach).reads)


def _collect_fitted_flops(z: Any, weight: Any, sampling: str, reach: int, *_: Any, **__: Any) -> int:
    return int(2 * z[0] * z[1] * fill_plan(sampling, int(z[2]), int(z[3]), reach).reads)


def _fill_fitted_weight_flops(y: Any, z: Any, sampling: str, reach: int, *_: Any, **__: Any) -> int:
    return _collect_fitted_flops(z, None, sampling, reach)


def _binary_conv_flops(
    x: Any, bits: Any, scale: Any, bias: Any, kernel: Any, *where: Any, out_shape: Any, **__: Any
) -> int:
    """Count an addition as the multiply-add that it replaces."""
    batch, out_channels, height, width = out_shape
    return int(2 * batch * height * width * out_channels * (x[1] // where[3]) * kernel[0] * kernel[1])


counted_by(_conv_flops, _OPS.conv, _OPS.conv_filled)
counted_by(_conv_transpose_flops, _OPS.conv_transpose)
counted_by(_conv_weight_flops, _OPS.conv_weight)
counted_by(_fill_fitted_flops, _OPS.fill_fitted)
counted_by(_collect_fitted_flops, _OPS.collect_fitted)
counted_by(_fill_fitted_weight_flops, _OPS.fill_fitted_weight)
counted_by(_binary_conv_flops, _OPS.binary_conv)
