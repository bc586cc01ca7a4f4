"""The public functions: they check a user's arguments and call the operators."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quincunx.ops.contract import check_count, sampled_count
from quincunx.ops.geometry import Geometry, Padding, expand_padding, two_integers
from quincunx.ops.traced import as_tensor, is_tracing, refuse_forward_mode
from quincunx.sampling import Sampling

__all__ = [
    "fill_fitted",
    "fill_nearest",
    "fill_zero",
    "filled_conv2d",
    "sampled_conv2d",
    "sampled_conv_transpose2d",
]


def _check_sampling(sampling: Sampling) -> None:
    if not isinstance(sampling, Sampling):
        raise TypeError(
            f"sampling={sampling!r}: expected a quincunx sampling such as qx.CHESSBOARD, got "
            f"{type(sampling).__name__}"
        )


def _check_map(name: str, value: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    refuse_forward_mode()
    if value.dim() != 4:
        raise ValueError(f"{name}: expected 4 dimensions, got shape {tuple(value.shape)}")
    if not value.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point tensor, got {value.dtype}")


def _check_parameters(
    name: str, x: Tensor, weight: Tensor, bias: Tensor | None, in_channels: int, outputs: int, groups: int
) -> None:
    if not isinstance(groups, int) or groups < 1:
        raise ValueError(f"groups={groups!r}: expected a positive integer")
    if weight.shape[0] % groups:
        raise ValueError(
            f"weight: {weight.shape[0]} channels in its first dimension do not divide into groups={groups}"
        )
    if x.shape[1] != in_channels:
        raise ValueError(
            f"{name}: {x.shape[1]} channels, but weight {tuple(weight.shape)} with groups={groups} "
            f"takes {in_channels}"
        )
    if bias is not None and tuple(bias.shape) != (outputs,):
        raise ValueError(f"bias: expected shape ({outputs},), got {tuple(bias.shape)}")
    for other_name, other in (("weight", weight), ("bias", bias)):
        if other is None or (other is weight and x.dtype == torch.bfloat16 and _stays_wide(weight)):
            continue
        if other.dtype != x.dtype or other.device != x.device:
            raise TypeError(
                f"{other_name}: {other.dtype} on {other.device}, but {name} is {x.dtype} on {x.device}"
            )


_has_autocast = torch.amp.is_autocast_available
_WITH_AUTOCAST = frozenset(kind for kind in ("cpu", "cuda", "xpu", "mps") if _has_autocast(kind))


def _autocast(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, packed: bool = True
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Cast all to autocast's dtype if it is on, as torch's own convolutions do; float64 does not change.

    A weight that the operator has ``packed`` may stay wide.
    """
    kind = x.device.type
    # some devices, such as "meta", have no autocast, and asking them raises; compilers cannot ask
    if kind not in _WITH_AUTOCAST and (torch.compiler.is_compiling() or not _has_autocast(kind)):
        return x, weight, bias
    if not torch.is_autocast_enabled(kind):
        return x, weight, bias
    dtype = torch.get_autocast_dtype(kind)

    def cast(value: Tensor) -> Tensor:
        return value if value.dtype == torch.float64 else value.to(dtype)

    wide = packed and x.dtype != torch.float64 and _stays_wide(weight)
    return cast(x), weight if wide else cast(weight), None if bias is None else cast(bias)


def _stays_wide(weight: Tensor) -> bool:
    """Return whether a weight stays float32 beside maps that autocast has in bfloat16.

    The kernels of the CPU round it where they pack it, so that neither it nor its gradient is copied.
    """
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and torch.is_autocast_enabled("cpu")
        and torch.get_autocast_dtype("cpu") == torch.bfloat16
        and not is_tracing()
    )


def _check_grid(grid: tuple[int, int], size: Sequence[int], weight: Tensor) -> None:
    if grid[0] < 1 or grid[1] < 1:
        raise ValueError(
            f"weight: a kernel of {tuple(weight.shape[2:])} does not fit a padded map of {tuple(size)}"
        )


def sampled_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    sampling: Sampling,
    stride: int | Sequence[int] = 1,
    padding: Padding = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    r"""Compute a 2-D convolution only at the positions of a sampling.

    .. math:: y_{n,o,k} = b_o + \sum_{c,i,j} w_{o,c,i,j}\;
              x_{n,\,c,\,s r_k + d i - p,\,s c_k + d j - p}

    where (r_k, c_k) is the k-th computed position of the *output* grid, in row-major order.

    Args:
        x: input map [N, C, H, W].
        weight: kernel [O, C / groups, kh, kw].
        bias: [O] or None.
        sampling: the computed positions of the H' x W' output grid.
        stride: s, an integer or (vertical, horizontal).
        padding: p, an integer, (vertical, horizontal), (top, bottom, left, right), "same" or "valid".
        dilation: d, an integer or (vertical, horizontal).
        groups: channel groups.

    Returns:
        The sampled map [N, O, m, 1] in channels_last.

    Raises:
        ValueError: shapes that do not match, or a grid that does not fit the sampling.
        TypeError: not a sampling, not floating point, or dtypes or devices that differ.

    Source: Peng et al., arXiv:1809.02601, section 3.2; Lin et al., ESPACE (AAAI 2017), eq. 5.

    Example:
        >>> x, w = torch.randn(1, 3, 8, 8), torch.randn(4, 3, 3, 3)
        >>> y = sampled_conv2d(x, w, sampling=Cosets(2, [(0, 0)]), padding=1)
        >>> dense = torch.nn.functional.conv2d(x, w, padding=1)
        >>> torch.allclose(y.view(1, 4, 4, 4), dense[:, :, ::2, ::2], atol=1e-5)
        True
    """
    _check_sampling(sampling)
    _check_map("x", x)
    _check_map("weight", weight)
    x, weight, bias = _autocast(x, weight, bias)
    strides, dilations = two_integers("stride", stride, 1), two_integers("dilation", dilation, 1)
    paddings = expand_padding(padding, weight.shape[2:], strides, dilations)
    _check_parameters("x", x, weight, bias, weight.shape[1] * groups, weight.shape[0], groups)
    if not is_tracing() and not torch.compiler.is_compiling():  # the operator checks as well
        grid = Geometry.make(weight.shape[2:], strides, paddings, dilations).grid(x.shape[2], x.shape[3])
        _check_grid(grid, x.shape[2:], weight)
        sampled_count(sampling.spec, *grid)  # refuses a grid that does not fit the sampling, by name
    result: Tensor = torch.ops.quincunx.conv(
        x, weight, bias, sampling.spec, strides, paddings, dilations, groups
    )
    return result


def sampled_conv_transpose2d(
    y: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    sampling: Sampling,
    size: Sequence[int],
    padding: Padding = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    shortcut: Tensor | None = None,
) -> Tensor:
    r"""Compute the transposed convolution from a sampled map to every position of a map.

    The sampled map is placed on a grid that is zero elsewhere, followed by a transposed convolution with
    stride 1. It is the adjoint of :func:`sampled_conv2d` with the same weight:
    <sampled_conv2d(x, w), y> = <x, sampled_conv_transpose2d(y, w)>.

    Args:
        y: sampled map [N, C, m, 1]; m is the sampling's count on the grid of
            H + 2 padding - dilation (kh - 1) rows and likewise columns (H x W for "same" padding).
        weight: kernel [C, O / groups, kh, kw].
        bias: [O] or None.
        sampling: the positions of that grid that ``y`` holds.
        size: (H, W) of the result.
        padding: of the convolution whose adjoint it is: an integer, (vertical, horizontal),
            (top, bottom, left, right), "same" or "valid".
        dilation: of that convolution: an integer or (vertical, horizontal).
        groups: channel groups of that convolution.
        shortcut: a map [N, O, H, W] of the result's dtype, added where the result is written, or None.

    Returns:
        A dense map [N, O, H, W] in channels_last.

    Raises:
        ValueError: shapes that do not match, including a wrong m.
        TypeError: not a sampling, not floating point, or dtypes or devices that differ.

    Source: Peng et al., arXiv:1809.02601, section 3.1.

    Example:
        >>> y, w = torch.randn(1, 4, 16, 1), torch.randn(4, 3, 3, 3)
        >>> z = sampled_conv_transpose2d(y, w, sampling=Cosets(2, [(0, 0)]), size=(8, 8), padding=1)
        >>> z.shape
        torch.Size([1, 3, 8, 8])
    """
    _check_sampling(sampling)
    _check_map("y", y)
    _check_map("weight", weight)
    y, weight, bias = _autocast(y, weight, bias)
    dilations = two_integers("dilation", dilation, 1)
    paddings = expand_padding(padding, weight.shape[2:], (1, 1), dilations)
    _check_parameters("y", y, weight, bias, weight.shape[0], weight.shape[1] * groups, groups)
    if is_tracing():
        traced: Tensor = torch.ops.quincunx.traced_conv_transpose(
            y, weight, bias, as_tensor(size), sampling.spec, (1, 1), paddings, dilations, groups
        )
        return traced if shortcut is None else traced + shortcut
    height, width = two_integers("size", size, 1)
    grid = Geometry.make(weight.shape[2:], (1, 1), paddings, dilations).grid(height, width)
    _check_grid(grid, (height, width), weight)
    _check_count(y, sampling, grid)
    if shortcut is not None:
        _check_shortcut(shortcut, y, (y.shape[0], weight.shape[1] * groups, height, width))
    result: Tensor = torch.ops.quincunx.conv_transpose(
        y, weight, bias, (height, width), sampling.spec, (1, 1), paddings, dilations, groups, shortcut
    )
    return result


def _check_shortcut(shortcut: Tensor, y: Tensor, shape: tuple[int, ...]) -> None:
    _check_map("shortcut", shortcut)
    if tuple(shortcut.shape) != shape:
        raise ValueError(f"shortcut: expected the result's shape {shape}, got {tuple(shortcut.shape)}")
    if shortcut.dtype != y.dtype or shortcut.device != y.device:
        raise TypeError(f"shortcut: {shortcut.dtype} on {shortcut.device}, but y is {y.dtype} on {y.device}")


def fill_nearest(y: Tensor, *, sampling: Sampling, size: Sequence[int]) -> Tensor:
    """Fill a sampled map: every position takes the value of the nearest computed one.

    The distance is Euclidean; ties go to the position with the lowest row-major index,
    so that results are the same everywhere. In the backward pass positions that share a computed
    value add their gradients.

    Args:
        y: sampled map [N, C, m, 1].
        sampling: the positions of the H x W grid that ``y`` holds.
        size: (H, W).

    Returns:
        A dense map [N, C, H, W] in channels_last.

    Raises:
        ValueError: ``y`` does not have m positions.
        TypeError: not a sampling or not floating point.

    Source: Lin et al., ESPACE (AAAI 2017), eqs. 6 and 7.

    Example:
        >>> y = torch.tensor([1.0, 2.0]).view(1, 1, 2, 1)
        >>> mask = torch.tensor([[True, False, False, True]])
        >>> fill_nearest(y, sampling=Positions(mask), size=(1, 4)).flatten().tolist()
        [1.0, 1.0, 2.0, 2.0]
    """
    _check_sampling(sampling)
    _check_map("y", y)
    if is_tracing():
        traced: Tensor = torch.ops.quincunx.traced_fill(y, sampling.spec, as_tensor(size))
        return traced
    height, width = two_integers("size", size, 1)
    _check_count(y, sampling, (height, width))
    result: Tensor = torch.ops.quincunx.fill(y, sampling.spec, (height, width))
    return result


def fill_fitted(
    y: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    sampling: Sampling,
    size: Sequence[int],
    reach: int,
) -> Tensor:
    r"""A sampled map made dense: every other position is a combination of a few computed ones.

    .. math:: z_{n,c,p} = \begin{cases} y_{n,c,k(p)} & p \text{ computed} \\
              b_{r(p),c} + \sum_{t} w_{r(p),t,c}\; y_{n,c,k_t(p)} & \text{otherwise} \end{cases}

    k(p) is a computed position's number in y. For cosets r(p) is the residue class of p and k_t(p) are the
    computed positions of the window of (2 reach + 1)^2 around it, so that w is a depthwise kernel for each
    class; on the border a tap takes the computed position nearest to it. For other samplings r(p) numbers
    the skipped positions and k_t(p) are the ``reach`` computed ones nearest to p. k_0(p) is the one that
    :func:`fill_nearest` copies. Coefficients that sum to 1 fill a constant map exactly.

    Args:
        y: sampled map [N, C, m, 1].
        weight: w [R, T, C]: classes or skipped positions, taps, channels.
        bias: b [R, C] or None.
        sampling: which positions of the H x W grid ``y`` holds.
        size: (H, W).
        reach: how far a fill reads; see above.

    Returns:
        A dense map [N, C, H, W] in channels_last.

    Raises:
        ValueError: sizes that do not fit together.
        TypeError: not a sampling, not floating point, or another device.

    Source: a fixed kernel in place of w: Xie et al., Spatially Adaptive Inference (ECCV 2020), section 3.3.

    Example:
        >>> from quincunx.sampling import CHESSBOARD
        >>> y, mean = torch.ones(1, 3, 8, 1), torch.full((2, 4, 3), 0.25)
        >>> fill_fitted(y, mean, sampling=CHESSBOARD, size=(4, 4), reach=1).unique().tolist()
        [1.0]
    """
    _check_sampling(sampling)
    _check_map("y", y)
    if isinstance(reach, bool) or not isinstance(reach, int) or reach < 0:
        raise ValueError(f"reach={reach!r}: expected an integer of at least 0")
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None and value.device != y.device:
            raise TypeError(f"{name}: on {value.device}, but y is on {y.device}")
    weight, bias = weight.to(y.dtype), None if bias is None else bias.to(y.dtype)
    if is_tracing():
        traced: Tensor = torch.ops.quincunx.traced_fill_fitted(
            y, weight, bias, sampling.spec, as_tensor(size), reach
        )
        return traced
    height, width = two_integers("size", size, 1)
    _check_count(y, sampling, (height, width))
    result: Tensor = torch.ops.quincunx.fill_fitted(y, weight, bias, sampling.spec, (height, width), reach)
    return result


def fill_zero(y: Tensor, *, sampling: Sampling, size: Sequence[int]) -> Tensor:
    """A sampled map made dense: zero at every other position.

    Args:
        y: sampled map [N, C, m, 1].
        sampling: which positions of the H x W grid ``y`` holds.
        size: (H, W).

    Returns:
        A dense map [N, C, H, W] in channels_last.

    Raises:
        ValueError: ``y`` has not m positions.
        TypeError: not a sampling or not floating point.

    Source: Peng et al., arXiv:1809.02601, section 3.1.

    Example:
        >>> mask = torch.tensor([[True, False, False, True]])
        >>> fill_zero(torch.ones(1, 1, 2, 1), sampling=Positions(mask), size=(1, 4)).flatten().tolist()
        [1.0, 0.0, 0.0, 1.0]
    """
    _check_sampling(sampling)
    _check_map("y", y)
    return fill_fitted(y, y.new_empty((0, 0, y.shape[1])), sampling=sampling, size=size, reach=0)


def _check_count(y: Tensor, sampling: Sampling, grid: tuple[int, int]) -> None:
    """Refuse another number of positions; for a compiler, which cannot read a sampling, the operator does."""
    if not torch.compiler.is_compiling():
        check_count(y, sampling.spec, grid)


def filled_conv2d(
    y: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    source: Sampling,
    size: Sequence[int],
    sampling: Sampling,
    stride: int | Sequence[int] = 1,
    padding: Padding = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """Compute a sampled convolution of a sampled map read as if filled, without storing the filled map.

    Equal to ``sampled_conv2d(fill_nearest(y, sampling=source, size=size), weight, bias, ...)``.

    Args:
        y: sampled map [N, C, m, 1].
        weight: kernel [O, C / groups, kh, kw].
        bias: [O] or None.
        source: the positions of the H x W grid that ``y`` holds.
        size: (H, W).
        sampling: the computed positions of the output grid.
        stride: an integer or (vertical, horizontal).
        padding: an integer, (vertical, horizontal), (top, bottom, left, right), "same" or "valid".
        dilation: an integer or (vertical, horizontal).
        groups: channel groups.

    Returns:
        The sampled map [N, O, m', 1] in channels_last.

    Raises:
        ValueError: shapes that do not match, or a grid that does not fit a sampling.
        TypeError: not a sampling, not floating point, or dtypes or devices that differ.

    Source: Lin et al., ESPACE (AAAI 2017), eqs. 5 to 7.

    Example:
        >>> from quincunx.sampling import QUARTER, Uniform
        >>> y, w = torch.randn(1, 3, 16, 1), torch.randn(4, 3, 1, 3)
        >>> filled_conv2d(y, w, source=QUARTER, size=(8, 8), sampling=Uniform(0.5), padding=(0, 1)).shape
        torch.Size([1, 4, 32, 1])
    """
    _check_sampling(source)
    _check_sampling(sampling)
    _check_map("y", y)
    _check_map("weight", weight)
    y, weight, bias = _autocast(y, weight, bias)
    strides, dilations = two_integers("stride", stride, 1), two_integers("dilation", dilation, 1)
    paddings = expand_padding(padding, weight.shape[2:], strides, dilations)
    _check_parameters("y", y, weight, bias, weight.shape[1] * groups, weight.shape[0], groups)
    where = (strides, paddings, dilations, groups)
    if is_tracing():
        traced: Tensor = torch.ops.quincunx.traced_conv_filled(
            y, weight, bias, source.spec, as_tensor(size), sampling.spec, *where
        )
        return traced
    height, width = two_integers("size", size, 1)
    _check_count(y, source, (height, width))
    grid = Geometry.make(weight.shape[2:], strides, paddings, dilations).grid(height, width)
    _check_grid(grid, (height, width), weight)
    if not torch.compiler.is_compiling():
        sampled_count(sampling.spec, *grid)
    result: Tensor = torch.ops.quincunx.conv_filled(
        y, weight, bias, source.spec, (height, width), sampling.spec, *where
    )
    return result
