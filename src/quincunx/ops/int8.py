r"""Convolutions of eight-bit maps and weights: what the integers mean, and what is computed with them.

A map is stored as uint8 or int8 numbers q on a *grid*: they stand for the real numbers s (q - z) with a
scale s and a zero point z for the whole map. Weights are int8 with one scale t for each output channel and
no zero point. Then

.. math:: y_o = s t_o \sum (q - z) w + b_o + r

with the sum in integers, exact; everything behind it in float32, in this order: float32(sum) times
float32(s t), plus the bias, plus the residual, the activation. The result is stored on a grid of its own,
round(y / s') + z' with ties to even and saturation, where 1 / s' is rounded to float32 before; NaN becomes
the lowest number. A tap that falls outside the map means a real 0, so it reads the zero point. No sum may
have more than 65,536 products, so that it fits 32 bits.

A fitted fill keeps float32 coefficients w: a computed position means s (q - z), any other one is

.. math:: y = b + \sum_t (s w_t) (q_t - z)

in float32, s w_t rounded once beforehand and taps added in their order; shortcut, activation and grid come
behind as above. A fill is bound by memory, so integer products would save no time, and coefficients in eight
bits would only add an error.

The reference sums in float64, which is exact here. The kernels (``csrc/int8_gemm.h``) give the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quincunx.ops import reference
from quincunx.ops.plan import fill_plan

__all__ = [
    "MOST_PRODUCTS",
    "Grid",
    "accumulate",
    "activate",
    "convolve",
    "dequantise",
    "end",
    "fill",
    "finish",
    "grid_of_range",
    "quantise",
    "quantise_weight",
]

# of one sum: 65536 * 255 * 128 < 2^31
MOST_PRODUCTS = 1 << 16

_RANGES = {torch.uint8: (0, 255), torch.int8: (-128, 127)}


@dataclass(frozen=True)
class Grid:
    """The real numbers that the integers of a map stand for: scale (q - zero).

    Args:
        scale: the distance of neighbours; positive, finite, and so is its inverse in float32.
        zero: the integer that stands for 0.
        dtype: ``torch.uint8`` or ``torch.int8``.

    Raises:
        ValueError: a scale, a zero point or a dtype that is none of these.

    Example:
        >>> Grid(0.5, 10).decode(torch.tensor([10, 12], dtype=torch.uint8))
        tensor([0., 1.])
    """

    scale: float
    zero: int = 0
    dtype: torch.dtype = torch.uint8

    def __post_init__(self) -> None:
        if self.dtype not in _RANGES:
            raise ValueError(f"dtype={self.dtype}: expected torch.uint8 or torch.int8")
        if not (self.scale > 0 and math.isfinite(self.scale) and 1e-30 < self.scale < 1e30):
            raise ValueError(f"scale={self.scale}: expected a number between 1e-30 and 1e30")
        low, high = _RANGES[self.dtype]
        if not low <= self.zero <= high:
            raise ValueError(f"zero={self.zero}: expected {low} to {high} for {self.dtype}")

    @property
    def limits(self) -> tuple[int, int]:
        """The lowest and the highest integer."""
        return _RANGES[self.dtype]

    def encode(self, x: Tensor) -> Tensor:
        """Return the integers of a map of real numbers; see :func:`quantise`."""
        return quantise(x, self)

    def decode(self, q: Tensor) -> Tensor:
        """Return float32 numbers that integers stand for; see :func:`dequantise`."""
        return dequantise(q, self)


def quantise(x: Tensor, grid: Grid) -> Tensor:
    """Return the integers nearest to real numbers, ties to even, saturated; NaN becomes the lowest.

    Args:
        x: any shape; computed in float32.
        grid: of the result.

    Example:
        >>> quantise(torch.tensor([0.24, 0.25, 0.75, -9.0, 1e9]), Grid(0.5, 1))
        tensor([  1,   1,   3,   0, 255], dtype=torch.uint8)
    """
    low, high = grid.limits
    inverse = 1 / torch.tensor(grid.scale, dtype=torch.float32)
    scaled = (x.float() * inverse.to(x.device)).nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
    return (scaled.clamp(low - grid.zero, high - grid.zero).round() + grid.zero).to(grid.dtype)


def dequantise(q: Tensor, grid: Grid) -> Tensor:
    """Return the float32 numbers scale (q - zero) that integers stand for.

    Args:
        q: integers of the grid's dtype, any shape.
        grid: what they mean.

    Example:
        >>> dequantise(torch.tensor([-128, 127], dtype=torch.int8), Grid(0.5, 0, torch.int8))
        tensor([-64.0000,  63.5000])
    """
    return (q.int() - grid.zero).float() * torch.tensor(grid.scale, dtype=torch.float32).to(q.device)


def grid_of_range(low: float, high: float, dtype: torch.dtype = torch.uint8) -> Grid:
    """Return the grid that holds 0 exactly and reaches from ``low`` to ``high``.

    A map that is 0 everywhere gets a scale of 1.

    Args:
        low, high: least and greatest value; 0 is always taken in.
        dtype: of the integers.

    Raises:
        ValueError: a bound that is not finite, or ``low`` above ``high``.

    Example:
        >>> grid_of_range(0, 2.55).zero, round(grid_of_range(0, 2.55).scale, 4)
        (0, 0.01)
    """
    if not (math.isfinite(low) and math.isfinite(high) and low <= high):
        raise ValueError(f"low={low}, high={high}: expected finite numbers, the lower one first")
    least, most = _RANGES[dtype]
    low, high = min(low, 0.0), max(high, 0.0)
    scale = max((high - low) / (most - least), 1e-20) if high > low else 1.0
    return Grid(scale, max(least, min(most, least + round(-low / scale))), dtype)


def quantise_weight(weight: Tensor, outputs: int = 0) -> tuple[Tensor, Tensor]:
    """Return a weight in int8 and the scale of each output channel, q = round(w / t), t = max |w| / 127.

    A channel that is 0 everywhere gets a scale of 1.

    Args:
        weight: any shape and real dtype, outputs along dimension ``outputs``.
        outputs: which dimension.

    Returns:
        int8 numbers of the weight's shape within [-127, 127], and float32 scales [O].

    Raises:
        ValueError: a weight that is not finite.

    Example:
        >>> quantise_weight(torch.tensor([[1.0, -0.5], [0.0, 0.0]]))
        (tensor([[127, -64],
                [  0,   0]], dtype=torch.int8), tensor([0.0079, 1.0000]))
    """
    wide = weight.detach().double()
    if not bool(wide.isfinite().all()):
        raise ValueError("weight: expected finite numbers")
    others = [d for d in range(weight.dim()) if d != outputs % weight.dim()]
    largest = wide.abs().amax(others, keepdim=True) if others else wide.abs()
    scale = torch.where(largest > 1e-30 * 127, largest / 127, 1.0).float()
    return (wide / scale.double()).round().clamp(-127, 127).to(torch.int8), scale.flatten()


def accumulate(
    kind: str,
    x: Tensor,
    zero: int,
    weight: Tensor,
    sampling: str,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    size: Sequence[int] = (),
    source: str = "",
) -> Tensor:
    """Return the exact sums of a convolution of integers, int32.

    Args:
        kind: "conv" from a map [N, C, H, W] to a sampled map [N, O, m, 1], or "transposed" from a sampled map
            [N, C, m, 1] to a map [N, O, *size].
        x: integers.
        zero: their zero point; what lies outside the map is this number.
        weight: int8 [O, C / groups, kh, kw]; of "transposed" [C, O / groups, kh, kw].
        sampling: spec of the computed positions; empty for every one, and the result of "conv" is then a map.
        stride, padding, dilation, groups: of the convolution, padding as (top, bottom, left, right).
        size: of "transposed", that of the result; of a compact map, that of the map it stands for.
        source: spec of the sampling at whose positions alone x is stored, [N, C, m', 1], and the nearest one
            is read; empty for a whole map.

    Raises:
        ValueError: more products in a sum than 32 bits surely hold.
    """
    products = weight[0].numel() if kind == "conv" else weight.numel() // (weight.shape[1] * groups)
    check_products(products)
    real, factors = (x.int() - zero).double(), weight.double()
    where = (stride, padding, dilation, groups)
    if kind == "transposed":
        return reference.conv_transpose(real, factors, None, size, sampling, *where).round().int()
    if source:
        real = reference.fill(real, source, size)
    if not sampling:
        padded = reference._pad(real, padding)
        found = torch.nn.functional.conv2d(padded, factors, None, tuple(stride), 0, tuple(dilation), groups)
        return found.round().int()
    return reference.conv(real, factors, None, sampling, *where).round().int()


def check_products(products: int) -> None:
    """
    Raises:
        ValueError: more products in a sum than 32 bits surely hold.
    """
    if products > MOST_PRODUCTS:
        raise ValueError(
            f"weight: {products} products in a sum, expected at most {MOST_PRODUCTS}, so that it fits 32 bits"
        )


def _clipped(x: Tensor) -> Tensor:
    return (x + 3).clamp(0, 6)


# the numbers of fusion/epilogues.py; LEAKY, 3, has a slope
_ACTIVATIONS: dict[int, Callable[[Tensor], Tensor]] = {
    0: lambda x: x,
    1: lambda x: x.clamp_min(0),
    2: lambda x: x.clamp(0, 6),
    4: lambda x: _clipped(x) / 6,
    5: lambda x: x * _clipped(x) / 6,
    6: torch.sigmoid,
    7: torch.nn.functional.silu,
    8: torch.nn.functional.gelu,
    9: lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
}


def activate(kind: int, x: Tensor, slope: Tensor | None = None) -> Tensor:
    """An activation of float32 numbers [N, C, H, W] by its number in ``fusion/epilogues.py``.

    Args:
        kind: 0 to 9.
        x: the numbers.
        slope: of 3, leaky ReLU: for each channel, [C].

    Raises:
        ValueError: an unknown number, or a slope where none belongs.

    Example:
        >>> activate(1, torch.tensor([[[[-1.0]], [[2.0]]]])).flatten()
        tensor([0., 2.])
    """
    if (kind == 3) != (slope is not None):
        raise ValueError(f"activation={kind}: 3, and no other, has a slope")
    if slope is not None:
        return torch.where(x > 0, x, x * slope.float().view(-1, 1, 1))
    if kind not in _ACTIVATIONS:
        raise ValueError(f"activation={kind}: expected 0 to 9")
    return _ACTIVATIONS[kind](x)


def finish(
    sums: Tensor,
    multiplier: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    activation: int = 0,
    slope: Tensor | None = None,
) -> Tensor:
    """Return act(sums multiplier + bias + residual) in float32, each operation rounded by itself.

    Args:
        sums: int32 [N, O, H, W].
        multiplier: float32 [O]: the map's scale times the weight's.
        bias: float32 [O] or None.
        residual: float32 numbers of the result's shape or of fewer channels, its first ones; None.
        activation, slope: of :func:`activate`.

    Example:
        >>> finish(torch.full((1, 2, 1, 1), 8, dtype=torch.int32), torch.tensor([0.5, 1.0]), None).flatten()
        tensor([4., 8.])
    """
    y = sums.float() * multiplier.float().view(-1, 1, 1)
    if bias is not None:
        y = y + bias.float().view(-1, 1, 1)
    return end(y, residual, activation, slope)


def fill(
    q: Tensor,
    grid: Grid,
    weight: Tensor,
    bias: Tensor | None,
    sampling: str,
    size: Sequence[int],
    reach: int,
) -> Tensor:
    """Return the float32 map [N, C, H, W] that a fitted fill makes of integers at computed positions.

    Args:
        q: integers [N, C, m, 1].
        grid: what they mean.
        weight: float32 coefficients [R, T, C], those of :func:`quincunx.fill_fitted`.
        bias: float32 [R, C] or None.
        sampling, size, reach: of the fill.

    Raises:
        ValueError: coefficients that are not those of this sampling on this grid.

    Example:
        >>> q = torch.tensor([3, 5], dtype=torch.uint8).view(1, 1, 2, 1)
        >>> spec = '{"kind": "cosets", "period": 2, "offsets": [[0, 0], [1, 1]]}'
        >>> fill(q, Grid(0.5, 1), torch.full((2, 4, 1), 0.25), None, spec, (2, 2), 1).flatten()
        tensor([1.0000, 1.2500, 1.2500, 2.0000])
    """
    scale = torch.tensor(grid.scale, dtype=torch.float32)
    steps = (q.int() - grid.zero).float()
    whole = reference.fill_fitted(steps, weight.float() * scale, bias, sampling, size, reach)
    # those that were computed are copies of their integers
    computed = fill_plan(sampling, int(size[0]), int(size[1]), reach).computed
    rows = whole.permute(0, 2, 3, 1).flatten(1, 2)
    rows[:, computed] = rows[:, computed] * scale
    return rows.transpose(1, 2).reshape(whole.shape)


def end(
    y: Tensor, residual: Tensor | None = None, activation: int = 0, slope: Tensor | None = None
) -> Tensor:
    """Return act(y + residual) in float32, as :func:`finish` ends; ``y`` may be changed."""
    if residual is not None:
        y[:, : residual.shape[1]] += residual
    return activate(activation, y, slope)


def convolve(
    kind: str,
    x: Tensor,
    grid: Grid,
    weight: Tensor,
    multiplier: Tensor,
    bias: Tensor | None = None,
    *,
    sampling: str = "",
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0, 0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    size: Sequence[int] = (),
    source: str = "",
    residual: Tensor | None = None,
    residual_grid: Grid | None = None,
    activation: int = 0,
    slope: Tensor | None = None,
    out: Grid | torch.dtype = torch.float32,
    back_end: str = "reference",
) -> Tensor:
    """Return a convolution in eight bits with its epilogue, as this module's head defines it.

    Args:
        kind, x, weight, sampling, stride, padding, dilation, groups, size, source: as of :func:`accumulate`.
        grid: of x.
        multiplier: float32 [O], the scale of x times that of each channel's weights.
        bias: float32 [O] or None.
        residual: added before the activation; of the result's positions and at most its channels.
        residual_grid: of a residual of integers; None for one of float32 or bfloat16.
        activation, slope: as of :func:`activate`.
        out: the grid that the result is stored on, or ``torch.float32`` or ``torch.bfloat16``.
        back_end: "reference" or "native".

    Raises:
        ValueError: more products in a sum than 32 bits surely hold; an unknown activation.

    Example:
        >>> x, w = torch.tensor([[[[3]]]], dtype=torch.uint8), torch.tensor([[[[2]]]], dtype=torch.int8)
        >>> convolve("conv", x, Grid(0.5, 1), w, torch.tensor([0.05])).item()  # 0.5 (3 - 1) times 0.1 2
        0.20000000298023224
    """
    if back_end == "native":
        # it imports this module
        from quincunx.ops import native_int8

        shape = (sampling, stride, padding, dilation, groups, size, source)
        ends = (residual, residual_grid, activation, slope, out)
        return native_int8.convolve(kind, x, grid, weight, multiplier, bias, *shape, *ends)
    sums = accumulate(kind, x, grid.zero, weight, sampling, stride, padding, dilation, groups, size, source)
    if residual is not None:
        residual = residual.float() if residual_grid is None else dequantise(residual, residual_grid)
    y = finish(sums, multiplier, bias, residual, activation, slope)
    return quantise(y, out) if isinstance(out, Grid) else y.to(out)
