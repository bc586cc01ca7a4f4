"""Modules: shells over the functions of ``quincunx.ops``, with weights.

Nothing derived from the geometry is stored in them: tables live in the plan cache and a state dict
holds weights only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quincunx.layers.attributes import ConvLike, kernel_of_bottleneck
from quincunx.layers.fills import FittedFill2d, check_fill
from quincunx.layers.padded import MODES, continued, continued_sampling, pad_map
from quincunx.ops import fill_nearest, fill_zero, sampled_conv2d, sampled_conv_transpose2d
from quincunx.ops.geometry import Geometry, Padding, expand_padding, two_integers
from quincunx.sampling import CHESSBOARD, Cosets, Sampling

__all__ = ["PerforatedConv2d", "SampledConv2d", "SampledConvTranspose2d", "SpatialBottleneck2d"]


def _check_channels(in_channels: int, out_channels: int, groups: int) -> None:
    for name, value in (("in_channels", in_channels), ("out_channels", out_channels), ("groups", groups)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r}: expected a positive integer")
    for name, value in (("in_channels", in_channels), ("out_channels", out_channels)):
        if value % groups:
            raise ValueError(f"{name}={value}: not divisible by groups={groups}")


class _SampledBase(ConvLike):
    """What the sampled convolutions share: geometry, parameters, their start values."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        *,
        sampling: Sampling,
        stride: int | Sequence[int],
        padding: Padding,
        dilation: int | Sequence[int],
        groups: int,
        bias: bool,
        transposed: bool,
    ) -> None:
        super().__init__()
        _check_channels(in_channels, out_channels, groups)
        if not isinstance(sampling, Sampling):
            raise TypeError(f"sampling={sampling!r}: expected a sampling such as qx.CHESSBOARD")
        self.settle(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
        )
        # (top, bottom, left, right), what is computed with; ``padding`` is for whoever reads it
        self.borders = expand_padding(padding, self.kernel_size, self.stride, self.dilation)
        self.sampling = sampling
        first, second = (in_channels, out_channels) if transposed else (out_channels, in_channels)
        self.weight = nn.Parameter(torch.empty(first, second // groups, *self.kernel_size))
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None
        self.reset_parameters()

    @property
    def fan_in(self) -> float:
        """Products summed in one output value, on average over the positions."""
        return self.in_channels // self.groups * math.prod(self.kernel_size)

    def reset_parameters(self) -> None:
        """Uniform within 1 / sqrt(fan_in), the default of ``nn.Conv2d``."""
        bound = 1 / math.sqrt(self.fan_in)
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def extra_repr(self) -> str:
        parts = [f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}"]
        parts.append(f"sampling={self.sampling!r}")
        for name, default in (
            ("stride", (1, 1)),
            ("borders", (0, 0, 0, 0)),
            ("dilation", (1, 1)),
            ("groups", 1),
        ):
            if getattr(self, name) != default:
                parts.append(f"{'padding' if name == 'borders' else name}={getattr(self, name)}")
        if self.bias is None:
            parts.append("bias=False")
        return ", ".join(parts)


class SampledConv2d(_SampledBase):
    """A convolution at the positions of a sampling; see :func:`quincunx.sampled_conv2d`.

    Maps [N, C, H, W] to a sampled map [N, O, m, 1]. Arguments are those of ``nn.Conv2d``, with
    ``padding`` also as (top, bottom, left, right), and ``sampling``.

    Raises:
        ValueError: channels that do not divide by ``groups``, a non-positive size.
        TypeError: ``sampling`` is not one.

    Example:
        >>> SampledConv2d(3, 8, 3, sampling=CHESSBOARD, padding=1)(torch.randn(2, 3, 6, 6)).shape
        torch.Size([2, 8, 18, 1])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        *,
        sampling: Sampling,
        stride: int | Sequence[int] = 1,
        padding: Padding = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            sampling=sampling,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
            bias=bias,
            transposed=False,
        )

    def forward(self, x: Tensor) -> Tensor:
        return sampled_conv2d(
            x,
            self.weight,
            self.bias,
            sampling=self.sampling,
            stride=self.stride,
            padding=self.borders,
            dilation=self.dilation,
            groups=self.groups,
        )


class PerforatedConv2d(SampledConv2d):
    """A convolution at the positions of a sampling; what stands at the others is a fill.

    Maps [N, C, H, W] to [N, O, H', W'] as ``nn.Conv2d`` does and takes its weights (with
    ``load_state_dict(..., strict=False)`` where the fill has parameters of its own).

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias: those of
            ``nn.Conv2d``; ``padding`` also as (top, bottom, left, right).
        sampling: which positions of the H' x W' grid are computed.
        fill: "zero"; "nearest", the value of the nearest computed position; or "fitted", a combination of
            computed neighbours whose coefficients are parameters (:class:`FittedFill2d`), which starts as
            their mean.
        fill_reach: how far a fitted fill reads, as :class:`FittedFill2d` has it.
        fill_size: (H', W') for a fitted fill of a sampling that is no cosets and has no grid of its own.

    Raises:
        ValueError: channels that do not divide by ``groups``, a non-positive size, an unknown fill, settings
            of a fitted fill for another one.
        TypeError: ``sampling`` is not one.

    Source: Figurnov et al., PerforatedCNNs (NIPS 2016); Lin et al., ESPACE (AAAI 2017), eqs. 5 and 6; fills
        that are trained: Xie et al., Spatially Adaptive Inference (ECCV 2020).

    Example:
        >>> PerforatedConv2d(3, 8, 3, sampling=CHESSBOARD, padding=1)(torch.randn(2, 3, 6, 6)).shape
        torch.Size([2, 8, 6, 6])
    """

    kind = "perforated"

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        *,
        sampling: Sampling,
        stride: int | Sequence[int] = 1,
        padding: Padding = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
        fill: str = "nearest",
        fill_reach: int | None = None,
        fill_size: Sequence[int] | None = None,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            sampling=sampling,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
            bias=bias,
        )
        self.fill = check_fill(fill)
        self.filling: FittedFill2d | None = None
        if fill == "fitted":
            self.filling = FittedFill2d(out_channels, sampling, reach=fill_reach, size=fill_size)
        elif fill_reach is not None or fill_size is not None:
            raise ValueError(f"fill={fill!r}: fill_reach and fill_size are settings of fill='fitted'")

    @property
    def spec(self) -> dict[str, Any]:
        """JSON-ready; what builds it again."""
        found = {
            "kind": self.kind,
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "kernel_size": list(self.kernel_size),
            "sampling": self.sampling.spec,
            "stride": list(self.stride),
            "padding": list(self.borders),
            "dilation": list(self.dilation),
            "groups": self.groups,
            "bias": self.bias is not None,
        }
        # as it was before there were others, so that older versions read it
        if self.fill != "nearest":
            found["fill"] = self.fill
        if self.filling is not None:
            found["fill_reach"] = self.filling.reach
            found["fill_size"] = self.filling.size and list(self.filling.size)
        return found

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """(H', W') for an H x W input."""
        return Geometry(self.kernel_size, self.stride, self.borders, self.dilation).grid(height, width)

    def made_whole(self, y: Tensor, sampling: Sampling, size: Sequence[int]) -> Tensor:
        """A sampled map with its fill."""
        if self.filling is not None:
            return self.filling(y, size)  # type: ignore[no-any-return]
        make = fill_zero if self.fill == "zero" else fill_nearest
        return make(y, sampling=sampling, size=size)

    def forward(self, x: Tensor) -> Tensor:
        return self.made_whole(super().forward(x), self.sampling, self.grid(x.shape[2], x.shape[3]))

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.fill == "nearest" else f", fill={self.fill!r}")


class SampledConvTranspose2d(_SampledBase):
    """From a sampled map to every position; see :func:`quincunx.sampled_conv_transpose2d`.

    Maps [N, C, m, 1] to [N, O, H, W]; the weight is [C, O / groups, kh, kw]. The size (H, W) is an
    argument of ``forward``, since a sampled map does not know it; a shortcut to be added is another.

    Raises:
        ValueError: channels that do not divide by ``groups``, a non-positive size.
        TypeError: ``sampling`` is not one.

    Example:
        >>> up = SampledConvTranspose2d(8, 3, 3, sampling=CHESSBOARD, padding=1)
        >>> up(torch.randn(2, 8, 18, 1), size=(6, 6)).shape
        torch.Size([2, 3, 6, 6])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        *,
        sampling: Sampling,
        padding: Padding = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
    ) -> None:
        check_padding_mode(padding_mode)
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            sampling=sampling,
            stride=1,
            padding=padding,
            dilation=dilation,
            groups=groups,
            bias=bias,
            transposed=True,
        )
        self.padding_mode = padding_mode

    @property
    def fan_in(self) -> float:
        """Products summed in one output value, on average: only computed positions contribute."""
        return super().fan_in * self.sampling.density

    @property
    def reach(self) -> tuple[int, int, int, int]:
        """(top, bottom, left, right) of the convolution whose adjoint reads a continued sampled map."""
        # every tap of the smaller grid's convolution lies in the larger grid
        rows, cols = (d * (k - 1) for k, d in zip(self.kernel_size, self.dilation, strict=True))
        return rows, rows, cols, cols

    def forward(self, y: Tensor, size: Sequence[int], shortcut: Tensor | None = None) -> Tensor:
        sampling, borders = self.sampling, self.borders
        if self.padding_mode != "zeros":
            grid = int(size[0]), int(size[1])
            how = sampling.spec, grid, borders, self.padding_mode
            y, sampling, borders = continued(y, *how), continued_sampling(*how), self.reach
        return sampled_conv_transpose2d(
            y,
            self.weight,
            self.bias,
            sampling=sampling,
            size=size,
            padding=borders,
            dilation=self.dilation,
            groups=self.groups,
            shortcut=shortcut,
        )


class SampledDown2d(SampledConv2d):
    """The first half of a spatial bottleneck: to a sampled map, by stride or by average pooling.

    ``down="stride"`` is the sampled convolution. ``down="avgpool"`` takes the mean over the K x K
    window that begins at each position and convolves, with stride 1, the pooled map of each coset:
    neighbours on that map are K positions apart, so it is the sampled convolution of the means with
    K times the dilation. Windows that cross the border take the mean of what is inside.

    The grid has H - (dilation (k - 1) mod 2) rows, likewise columns: the map's own size for odd
    kernels.

    With a stride or a padding of its own the grid is that of ``nn.Conv2d``; the means have neither.

    Raises:
        ValueError: "avgpool" with a stride, a padding, or a sampling that has no cosets.

    Source: Peng et al., arXiv:1809.02601, sections 3.1 and 4.4; strides are our addition.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int] = 3,
        *,
        sampling: Sampling,
        down: str = "stride",
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        stride: int | Sequence[int] = 1,
        padding: Padding | None = None,
    ) -> None:
        kernel, spread = two_integers("kernel_size", kernel_size, 1), two_integers("dilation", dilation, 1)
        if down not in ("stride", "avgpool"):
            raise ValueError(f"down={down!r}: expected 'stride' or 'avgpool'")
        check_padding_mode(padding_mode, down)
        window = 1
        if down == "avgpool":
            if not isinstance(sampling, Cosets):
                raise ValueError(f"down='avgpool' pools once per coset: sampling={sampling!r} has no cosets")
            window = sampling.period
            if padding is not None or two_integers("stride", stride, 1) != (1, 1):
                raise ValueError(f"down='avgpool': has no stride or padding, got {stride!r} and {padding!r}")
        half = half_padding(kernel, spread)
        sides: list[int] = []
        for i in (0, 1):
            before = window * spread[i] * ((kernel[i] - 1) // 2)
            # as much behind as gives the grid that the strided form has
            if window == 1:
                before = half[i]
            after = 2 * half[i] - spread[i] * (kernel[i] - 1) + window * spread[i] * (kernel[i] - 1) - before
            sides += [before, after]
        super().__init__(
            in_channels,
            out_channels,
            kernel,
            sampling=sampling,
            stride=stride,
            padding=sides if padding is None else padding,
            dilation=(window * spread[0], window * spread[1]),
            groups=groups,
            bias=bias,
        )
        self.down, self.window, self.padding_mode = down, window, padding_mode

    def forward(self, x: Tensor) -> Tensor:
        if self.padding_mode == "zeros":
            return super().forward(window_means(x, self.window) if self.window > 1 else x)
        return sampled_conv2d(
            pad_map(x, self.borders, self.padding_mode),
            self.weight,
            self.bias,
            sampling=self.sampling,
            stride=self.stride,
            dilation=self.dilation,
            groups=self.groups,
        )


def check_padding_mode(mode: str, down: str = "stride") -> None:
    """Refuse an unknown padding, and one of other values than zeros around window means.

    Raises:
        ValueError: names the setting.
    """
    if mode not in MODES:
        raise ValueError(f"padding_mode={mode!r}: expected one of {', '.join(MODES)}")
    if mode != "zeros" and down == "avgpool":
        raise ValueError(f"padding_mode={mode!r}: window means (down='avgpool') have zeros around them")


def half_padding(kernel: tuple[int, int], dilation: tuple[int, int]) -> tuple[int, int]:
    """The padding on each side that keeps an odd kernel's map size."""
    return dilation[0] * (kernel[0] - 1) // 2, dilation[1] * (kernel[1] - 1) // 2


def window_means(x: Tensor, window: int) -> Tensor:
    """At each position the mean of the window that begins there, over what lies inside the map."""
    height, width = x.shape[2:]
    padded = F.pad(x, (0, window - 1, 0, window - 1))
    sums = F.avg_pool2d(padded, window, stride=1, divisor_override=1)
    rows = torch.arange(height, 0, -1, device=x.device).clamp(max=window)
    cols = torch.arange(width, 0, -1, device=x.device).clamp(max=window)
    return sums / (rows[:, None] * cols).to(x.dtype)


class SpatialBottleneck2d(ConvLike):
    r"""A spatial bottleneck in place of one convolution: sampled convolution, then transposed.

    .. math:: z = W_2^{T} * \uparrow (W_1 * x)_{\text{sampling}} + b

    Linear in x up to the bias: no normalisation or activation inside. Both halves use one kernel for
    all cosets, so every position sampled means an ordinary pair of convolutions.
    MACs: m kh kw (in_channels mid_channels + mid_channels out_channels) / groups.

    Args:
        in_channels, out_channels: D1 and D2; maps [N, D1, H, W] to [N, D2, H, W].
        kernel_size: of both halves, an integer or (vertical, horizontal).
        sampling: positions computed between the halves.
        mid_channels: D_mid; by default the number that keeps the parameter count of one convolution
            D1 -> D2, D1 D2 / (D1 + D2) (half of D1 when D1 = D2, as in the paper's cSB), rounded
            to a multiple of ``groups``.
        down: "stride", or "avgpool" for the paper's ablation (section 4.4).
        groups: channel groups of both halves.
        bias: whether the second half adds one; the first needs none.
        dilation: of both halves.
        padding_mode: of both halves, as ``nn.Conv2d`` has it; the sampled map between them is continued
            beyond its grid, too.

    Raises:
        ValueError: channels that do not divide by ``groups``, an unknown ``down``, "avgpool" with a
            sampling that has no cosets or with another ``padding_mode`` than "zeros".
        TypeError: ``sampling`` is not one.

    Source: Peng et al., arXiv:1809.02601, section 3.

    Example:
        >>> SpatialBottleneck2d(16, 16)(torch.randn(1, 16, 32, 32)).shape
        torch.Size([1, 16, 32, 32])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int] = 3,
        *,
        sampling: Sampling = CHESSBOARD,
        mid_channels: int | None = None,
        down: str = "stride",
        groups: int = 1,
        bias: bool = True,
        dilation: int | Sequence[int] = 1,
        padding_mode: str = "zeros",
    ) -> None:
        super().__init__()
        _check_channels(in_channels, out_channels, groups)
        if mid_channels is None:
            keeping = in_channels * out_channels / (in_channels + out_channels)
            mid_channels = groups * max(1, round(keeping / groups))
        kernel, spread = two_integers("kernel_size", kernel_size, 1), two_integers("dilation", dilation, 1)
        self.down = SampledDown2d(
            in_channels,
            mid_channels,
            kernel,
            sampling=sampling,
            down=down,
            dilation=spread,
            groups=groups,
            bias=False,
            padding_mode=padding_mode,
        )
        self.up = SampledConvTranspose2d(
            mid_channels,
            out_channels,
            kernel,
            sampling=sampling,
            padding=half_padding(kernel, spread),
            dilation=spread,
            groups=groups,
            bias=bias,
            padding_mode=padding_mode,
        )
        self.settle(
            in_channels,
            out_channels,
            kernel,
            padding=half_padding(kernel, spread),
            dilation=spread,
            groups=groups,
        )
        self.padding_mode = padding_mode

    @property
    def weight(self) -> Tensor:
        """The mean over all positions of the kernel that the halves amount to, within the size of one."""
        density = self.down.sampling.density
        return kernel_of_bottleneck(self.down.weight, self.up.weight, self.groups, density)

    @property
    def bias(self) -> Tensor | None:
        """That of the second half."""
        return self.up.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x), x.shape[2:])  # type: ignore[no-any-return]
