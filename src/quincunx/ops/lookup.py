r"""Convolution with a product-quantised weight: schema, shapes, derivatives, MACs and the public check.

The input channels of a group are split into M subspaces of C' channels, the last padded with zeros. Each
has K codewords, and the weight of output o at tap t and subspace m is codeword a[m, t, o]. So

.. math:: y_{n,o,p} = b_o + \sum_{t,m} \langle d_{m,a(m,t,o)}, x_{n,m,p+t} \rangle

and the inner products of all codewords with all input positions form a look-up table for the outputs.
Tensors: codebooks [groups M, K, C'], assignments [groups M, kh kw, O / groups], uint8 or int16.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from quincunx.ops.flops import counted_by
from quincunx.ops.functional import _autocast, _check_map
from quincunx.ops.geometry import Geometry, Padding, expand_padding, two_integers

__all__ = ["OPERATORS", "decoded", "lookup_conv2d"]

_LIBRARY = torch.library.Library("quincunx", "FRAGMENT")  # type: ignore[no-untyped-call]
OPERATORS = {
    "lookup": "(Tensor x, Tensor codebooks, Tensor assignments, Tensor? bias, int[] kernel, int[] stride, "
    "int[] padding, int[] dilation, int groups) -> Tensor",
}
for _name, _schema in OPERATORS.items():
    _LIBRARY.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]


def decoded(
    codebooks: Tensor, assignments: Tensor, channels: int, kernel: Sequence[int], groups: int
) -> Tensor:
    """Return the weight [O, C / groups, kh, kw] that codebooks and assignments encode.

    Args:
        codebooks: [groups M, K, C'].
        assignments: [groups M, kh kw, O / groups].
        channels: C / groups; further channels of the last subspace are dropped.
        kernel: (kh, kw).
        groups: channel groups.
    """
    many, taps, outputs = assignments.shape
    which = torch.arange(many, device=codebooks.device)[:, None, None]
    words = codebooks[which, assignments.long()]
    words = words.view(groups, many // groups, taps, outputs, codebooks.shape[2])
    weight = words.permute(0, 3, 1, 4, 2).flatten(2, 3)[:, :, :channels]
    return weight.reshape(groups * outputs, channels, *kernel)


def _gathered(weight: Tensor, codebooks: Tensor, assignments: Tensor, groups: int) -> Tensor:
    """Return the adjoint of :func:`decoded`: sum a weight's gradient for each codeword."""
    many, taps, outputs = assignments.shape
    width = codebooks.shape[2]
    whole = many // groups * width
    parts = F.pad(weight.flatten(2), (0, 0, 0, whole - weight.shape[1]))
    parts = parts.view(groups, outputs, many // groups, width, taps).permute(0, 2, 4, 1, 3)
    parts = parts.reshape(many, taps * outputs, width)
    index = assignments.long().view(many, -1, 1).expand_as(parts)
    return torch.zeros_like(codebooks).scatter_add(1, index, parts)


def _fake(
    x: Tensor,
    codebooks: Tensor,
    assignments: Tensor,
    bias: Tensor | None,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    grid = Geometry.make(kernel, stride, padding, dilation).grid(x.shape[2], x.shape[3])
    shape = (x.shape[0], assignments.shape[2] * groups, *grid)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, codebooks, assignments, _, *ctx.geometry = inputs
    ctx.save_for_backward(x, codebooks, assignments)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, codebooks, assignments = ctx.saved_tensors
    kernel, stride, (top, bottom, left, right), dilation, groups = ctx.geometry
    need_x, need_codebooks, _, need_bias = ctx.needs_input_grad[:4]
    weight = decoded(codebooks, assignments, x.shape[1] // groups, kernel, groups)
    to_x, to_weight, _ = torch.ops.aten.convolution_backward(
        grad,
        F.pad(x, (left, right, top, bottom)),
        weight,
        None,
        stride,
        (0, 0),
        dilation,
        False,
        (0, 0),
        groups,
        (need_x, need_codebooks, False),
    )
    to_codebooks = to_bias = None
    if need_x:
        to_x = to_x[:, :, top : top + x.shape[2], left : left + x.shape[3]]
    if need_codebooks:
        to_codebooks = _gathered(to_weight, codebooks, assignments, groups)
    if need_bias:
        to_bias = grad.sum((0, 2, 3))
    return to_x, to_codebooks, None, to_bias, None, None, None, None, None


torch.library.register_fake("quincunx::lookup", _fake, lib=_LIBRARY)
torch.library.register_autograd("quincunx::lookup", _backward, setup_context=_keep, lib=_LIBRARY)


def _flops(x: Any, codebooks: Any, assignments: Any, *_: Any, out_shape: Any, **__: Any) -> int:
    """Return twice the MACs: the products of every table, and one for each value looked up and added."""
    batch, _, height, width = x
    tables = height * width * codebooks[0] * codebooks[1] * codebooks[2]
    look_ups = out_shape[2] * out_shape[3] * assignments[0] * assignments[1] * assignments[2]
    return int(2 * batch * (tables + look_ups))


counted_by(_flops, torch.ops.quincunx.lookup)


def lookup_conv2d(
    x: Tensor,
    codebooks: Tensor,
    assignments: Tensor,
    bias: Tensor | None = None,
    *,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    padding: Padding = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    r"""Compute a convolution whose weight is given by codebooks and assignments; this module has the formula.

    MACs: H W C K for the tables and H' W' O kh kw M / groups look-ups, each counted as one, M being the
    number of subspaces of all groups.

    Args:
        x: input map [N, C, H, W].
        codebooks: [groups M, K, C'], M = ceil(C / groups / C').
        assignments: [groups M, kh kw, O / groups], uint8 or int16, below K.
        bias: [O] or None.
        kernel_size: of the convolution, an integer or (vertical, horizontal).

    Returns:
        A map [N, O, H', W'] in channels_last.

    Raises:
        ValueError: shapes that do not match, a kernel that does not fit the map.
        TypeError: dtypes or devices that differ.

    Source: Wu et al., arXiv:1512.06473, sections 3.1 and 3.2.

    Example:
        >>> words = torch.tensor([[[1.0], [10.0]]])
        >>> which = torch.tensor([[[0, 1, 1]]], dtype=torch.uint8)
        >>> lookup_conv2d(torch.full((1, 1, 1, 1), 2.0), words, which, kernel_size=1).flatten().tolist()
        [2.0, 20.0, 20.0]
    """
    _check_map("x", x)
    x, codebooks, bias = _autocast(x, codebooks, bias, packed=False)
    kernel, strides = two_integers("kernel_size", kernel_size, 1), two_integers("stride", stride, 1)
    dilations = two_integers("dilation", dilation, 1)
    paddings = expand_padding(padding, kernel, strides, dilations)
    _check_quantised(x, codebooks, assignments, bias, kernel, groups)
    grid = Geometry.make(kernel, strides, paddings, dilations).grid(x.shape[2], x.shape[3])
    if grid[0] < 1 or grid[1] < 1:
        raise ValueError(
            f"kernel_size={kernel}: does not fit a padded map of {tuple(x.shape[2:])} and {paddings}"
        )
    result: Tensor = torch.ops.quincunx.lookup(
        x, codebooks, assignments, bias, kernel, strides, paddings, dilations, groups
    )
    return result


def _check_quantised(
    x: Tensor, codebooks: Tensor, assignments: Tensor, bias: Tensor | None, kernel: Sequence[int], groups: int
) -> None:
    if codebooks.dim() != 3 or not codebooks.numel():
        raise ValueError(f"codebooks: expected shape (M, K, C'), got {tuple(codebooks.shape)}")
    if assignments.dtype not in (torch.uint8, torch.int16):
        raise TypeError(f"assignments: expected uint8 or int16, got {assignments.dtype}")
    expected = (codebooks.shape[0], kernel[0] * kernel[1])
    if assignments.dim() != 3 or tuple(assignments.shape[:2]) != expected or not assignments.shape[2]:
        raise ValueError(
            f"assignments: expected shape {expected} and the outputs of a group, got "
            f"{tuple(assignments.shape)}"
        )
    if not isinstance(groups, int) or groups < 1 or x.shape[1] % groups:
        raise ValueError(f"groups={groups!r}: expected a positive divisor of the {x.shape[1]} channels of x")
    subspaces = -(-(x.shape[1] // groups) // codebooks.shape[2]) * groups
    if subspaces != codebooks.shape[0]:
        raise ValueError(
            f"x: {x.shape[1]} channels in {groups} groups have {subspaces} subspaces of "
            f"{codebooks.shape[2]} channels, but there are {codebooks.shape[0]} codebooks"
        )
    outputs = groups * assignments.shape[2]
    if bias is not None and tuple(bias.shape) != (outputs,):
        raise ValueError(f"bias: expected shape ({outputs},), got {tuple(bias.shape)}")
    for name, other in (("codebooks", codebooks), ("bias", bias)):
        if other is not None and (other.dtype != x.dtype or other.device != x.device):
            raise TypeError(f"{name}: {other.dtype} on {other.device}, but x is {x.dtype} on {x.device}")
