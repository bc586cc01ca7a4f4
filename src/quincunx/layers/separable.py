"""A convolution as a vertical one and a horizontal one, dense or at masked positions only."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, fx, nn

from quincunx.layers.attributes import ConvLike, kernel_of_halves
from quincunx.layers.sampled import PerforatedConv2d
from quincunx.ops import filled_conv2d, sampled_conv2d
from quincunx.ops.geometry import Padding, expand_padding, two_integers
from quincunx.sampling import Positions, Sampling, constant, from_spec, undisturbed

__all__ = ["CPConv2d", "EspaceConv2d", "MaskedConv2d", "SeparableConv2d", "mask_at_size", "resized"]


class SeparableConv2d(ConvLike):
    r"""A d x 1 convolution to K channels a group, then a 1 x d convolution, with nothing between.

    .. math:: z = T * (V * x) + b, \qquad W_{n,c,i,j} = \sum_k V_{k,c,i}\, T_{n,k,j}

    is what a convolution of rank K computes. Maps [N, C, H, W] to [N, O, H', W'] as ``nn.Conv2d`` does.
    MACs: K dh C H' W + K dw O H' W' for K channels in each group.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups: of the convolution
            it stands for; stride and padding are split into a vertical and a horizontal part.
        rank: K, the channels between the two in each group.
        bias: whether the second one adds one.

    Raises:
        ValueError: channels that do not divide by ``groups``, a non-positive rank.

    Source: Jaderberg et al., arXiv:1405.3866, scheme 2; Lin et al., ESPACE (AAAI 2017), eq. 3.

    Example:
        >>> SeparableConv2d(16, 32, 3, rank=8, padding=1)(torch.randn(1, 16, 10, 10)).shape
        torch.Size([1, 32, 10, 10])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        *,
        rank: int,
        stride: int | Sequence[int] = 1,
        padding: Padding = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
    ) -> None:
        super().__init__()
        if not isinstance(padding, (int, str)) and len(padding) != 2:
            raise ValueError(f"padding={padding!r}: expected an integer, (vertical, horizontal) or a word")
        settings = _Settings(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, rank
        )
        self.spec = settings.spec("separable")
        self.settle(**settings.conv)
        self.vertical = _dense(settings.vertical)
        self.horizontal = _dense(settings.horizontal)

    @property
    def weight(self) -> Tensor:
        """The kernel W that the halves amount to."""
        return kernel_of_halves(self.vertical.weight, self.horizontal.weight, self.groups)

    @property
    def bias(self) -> Tensor | None:
        """That of the second half."""
        return self.horizontal.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.horizontal(self.vertical(x))  # type: ignore[no-any-return]


class CPConv2d(ConvLike):
    r"""Four convolutions that are one of CP rank R: 1 x 1 to R channels, d x 1 and 1 x d on each, 1 x 1.

    .. math:: W_{n,c,i,j} = \sum_{r \le R} A_{n,r}\, B_{c,r}\, V_{i,r}\, H_{j,r}

    Maps [N, C, H, W] to [N, O, H', W'] as ``nn.Conv2d`` does.
    MACs: R (C H W + dh H' W + dw H' W' + O H' W') for R in each of the groups, C and O of a group.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups: of the convolution
            it stands for; stride and padding are split into a vertical and a horizontal part.
        rank: R, of each group.
        bias: whether the last one adds one.

    Raises:
        ValueError: channels that do not divide by ``groups``, a non-positive rank.

    Source: Lebedev et al., arXiv:1412.6553, eqs. 3 to 8.

    Example:
        >>> CPConv2d(16, 32, 3, rank=8, padding=1)(torch.randn(1, 16, 10, 10)).shape
        torch.Size([1, 32, 10, 10])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        *,
        rank: int,
        stride: int | Sequence[int] = 1,
        padding: Padding = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
    ) -> None:
        super().__init__()
        _check_rank(rank)
        wide = rank * groups
        # the spatial part is a separable convolution of rank 1 for each of the R channels
        self.spatial = SeparableConv2d(
            wide,
            wide,
            kernel_size,
            rank=1,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=wide,
            bias=False,
        )
        self.first = nn.Conv2d(in_channels, wide, 1, groups=groups, bias=False)
        self.last = nn.Conv2d(wide, out_channels, 1, groups=groups, bias=bias)
        self.spec = self.spatial.spec | {
            "kind": "cp",
            "in_channels": in_channels,
            "out_channels": out_channels,
            "rank": rank,
            "groups": groups,
            "bias": bias,
        }
        self.settle(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
        )

    @property
    def weight(self) -> Tensor:
        """The kernel W that the four amount to."""
        spatial = self.spatial.weight.reshape(self.groups, -1, *self.kernel_size)
        first = self.first.weight.reshape(self.groups, -1, self.in_channels // self.groups)
        last = self.last.weight.reshape(self.groups, self.out_channels // self.groups, -1)
        return torch.einsum("gnr,grij,grc->gncij", last, spatial, first).flatten(0, 1)

    @property
    def bias(self) -> Tensor | None:
        """That of the last one."""
        return self.last.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.spatial(self.first(x)))  # type: ignore[no-any-return]


class EspaceConv2d(ConvLike):
    r"""A separable convolution computed at masked positions, the others filled from the nearest one.

    .. math:: y = \text{fill}(T * \text{fill}(V * x)_{M_1})_{M_2}

    The first filled map is never made: the second convolution reads the compact map through a table
    in which the nearest index is composed with the tap's offset. In the backward pass positions that
    share a computed value add their gradients (eq. 7). MACs: K (dh C m1 + dw O m2) for m1 and m2
    computed positions and K channels in each group.

    Args:
        in_channels, out_channels, kernel_size, rank, stride, padding, dilation, groups, bias: as
            :class:`SeparableConv2d` has them.
        masks: the samplings (M1, M2) of the H' x W grid between the two and of the H' x W' output.
        resize_masks: whether explicit positions may be used on another grid, each of its positions
            taking the nearest one of the mask's grid. Otherwise such a grid is an error; random and
            uniform masks are drawn for any grid.
        fill: of both maps, as :class:`PerforatedConv2d` has it, or a pair for the two.
        fill_reach, fill_sizes: of a fitted fill, as there; the sizes of both grids.

    Raises:
        ValueError: channels that do not divide by ``groups``, a non-positive rank; when called, a
            grid that is not the one a mask was estimated on.
        TypeError: ``masks`` is not a pair of samplings.

    Source: Lin et al., ESPACE (AAAI 2017), eqs. 3 and 5 to 7.

    Example:
        >>> layer = EspaceConv2d(16, 32, 3, rank=8, masks=(qx.Uniform(0.25), qx.Uniform(0.5)), padding=1)
        >>> layer(torch.randn(1, 16, 10, 10)).shape
        torch.Size([1, 32, 10, 10])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        *,
        rank: int,
        masks: tuple[Sampling, Sampling],
        stride: int | Sequence[int] = 1,
        padding: Padding = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
        resize_masks: bool = False,
        fill: str | Sequence[str] = "nearest",
        fill_reach: int | None = None,
        fill_sizes: Sequence[Sequence[int] | None] = (None, None),
    ) -> None:
        super().__init__()
        if len(masks) != 2 or not all(isinstance(mask, Sampling) for mask in masks):
            raise TypeError(f"masks={masks!r}: expected two samplings, of the first and the second half")
        settings = _Settings(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, rank
        )
        self.settle(**settings.conv)
        self._spec = settings.spec("espace") | {
            "masks": [mask.spec for mask in masks],
            "resize_masks": resize_masks,
        }
        fills = (fill, fill) if isinstance(fill, str) else tuple(fill)
        if len(fills) != 2:
            raise ValueError(f"fill={fill!r}: expected one, or a pair of the first and the second half")
        if "fitted" not in fills and (fill_reach is not None or any(fill_sizes)):
            raise ValueError(f"fill={fill!r}: fill_reach and fill_sizes are settings of fill='fitted'")
        halves = []
        for own, mask, name, size in zip(
            (settings.vertical, settings.horizontal), masks, fills, fill_sizes, strict=True
        ):
            shared: dict[str, Any] = {"sampling": mask, "resize_masks": resize_masks, "fill": name}
            if name == "fitted":
                shared |= {"fill_reach": fill_reach, "fill_size": size}
            halves.append(MaskedConv2d(**own, **shared))
        self.vertical, self.horizontal = halves

    @property
    def spec(self) -> dict[str, Any]:
        """JSON-ready; what builds it again."""
        fills = [half.fill for half in (self.vertical, self.horizontal)]
        found: dict[str, Any] = {}
        if fills != ["nearest", "nearest"]:
            found["fill"] = fills[0] if fills[0] == fills[1] else fills
        halves = [half.spec for half in (self.vertical, self.horizontal)]
        if "fitted" in fills:
            found["fill_reach"] = next(half["fill_reach"] for half in halves if "fill_reach" in half)
            found["fill_sizes"] = [half.get("fill_size") for half in halves]
        return self._spec | found

    @property
    def weight(self) -> Tensor:
        """The kernel that the halves amount to where every position is computed."""
        return kernel_of_halves(self.vertical.weight, self.horizontal.weight, self.groups)

    @property
    def bias(self) -> Tensor | None:
        """That of the second half."""
        return self.horizontal.bias

    @property
    def masks(self) -> tuple[Sampling, Sampling]:
        """(M1, M2)."""
        return self.vertical.sampling, self.horizontal.sampling

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, fx.Proxy) or self.vertical.fill != "nearest":
            # a tracer is shown two perforated convolutions; programs join such without filling
            return self.horizontal(self.vertical(x))  # type: ignore[no-any-return]
        between = self.vertical.grid(x.shape[-2], x.shape[-1])
        y = self.vertical(x, compact=True)
        return self.horizontal(y, source=self.vertical.mask_at_size(between), size=between)  # type: ignore[no-any-return]


class MaskedConv2d(PerforatedConv2d):
    """A perforated convolution that says what to do when its mask belongs to another grid.

    Maps [N, C, H, W] to [N, O, H', W'] as ``nn.Conv2d`` does and takes its weights.

    Args:
        in_channels, out_channels, kernel_size, sampling, stride, padding, dilation, groups, bias: as
            :class:`PerforatedConv2d` has them.
        resize_masks: as :class:`EspaceConv2d` has it.
        fill, fill_reach, fill_size: as :class:`PerforatedConv2d` has them.

    Raises:
        ValueError: masks that may be resized with a fitted fill; when called, a grid that is not the one a
            mask of explicit positions belongs to.

    Source: Lin et al., ESPACE (AAAI 2017), eqs. 5 and 6.

    Example:
        >>> MaskedConv2d(3, 8, 1, sampling=qx.Uniform(0.25))(torch.randn(2, 3, 6, 6)).shape
        torch.Size([2, 8, 6, 6])
    """

    kind = "masked"

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
        resize_masks: bool = False,
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
            fill=fill,
            fill_reach=fill_reach,
            fill_size=fill_size,
        )
        if resize_masks and fill == "fitted" and isinstance(sampling, Positions):
            raise ValueError("resize_masks=True: the coefficients of a fitted fill belong to one grid")
        self.resize_masks = resize_masks

    @property
    def spec(self) -> dict[str, Any]:
        """JSON-ready; what builds it again."""
        return super().spec | {"resize_masks": self.resize_masks}

    def mask_at_size(self, size: tuple[int, int]) -> Sampling:
        """The mask on a grid.

        Raises:
            ValueError: it belongs to another one and may not be resized.
        """
        return mask_at_size(self.sampling, size, self.resize_masks)

    def forward(
        self,
        x: Tensor,
        source: Sampling | None = None,
        size: tuple[int, int] | None = None,
        compact: bool = False,
    ) -> Tensor:
        """From a map; or from a sampled map ``x`` of ``source`` on a grid of ``size``.

        With ``compact`` the result is a sampled map as well.
        """
        grid = self.grid(x.shape[-2], x.shape[-1]) if size is None else self.grid(*size)
        mask = self.mask_at_size(grid)
        where: dict[str, Any] = {
            "sampling": mask,
            "stride": self.stride,
            "padding": self.borders,
            "dilation": self.dilation,
            "groups": self.groups,
        }
        if source is None or size is None:
            y = sampled_conv2d(x, self.weight, self.bias, **where)
        else:
            y = filled_conv2d(x, self.weight, self.bias, source=source, size=size, **where)
        return y if compact else self.made_whole(y, mask, grid)


def mask_at_size(mask: Sampling, size: tuple[int, int], resize: bool) -> Sampling:
    """A mask on a grid; only explicit positions belong to one.

    Raises:
        ValueError: they belong to another one and may not be resized.
    """
    if not isinstance(mask, Positions) or mask.size == size:
        return mask
    if not resize:
        raise ValueError(
            f"grid {size[0]} x {size[1]}: this mask was estimated on {mask.size[0]} x {mask.size[1]}; "
            "estimate it again on inputs of this size, or ask for resize_masks=True"
        )
    return resized(mask.spec, *size)


@constant
def resized(spec: str, height: int, width: int) -> Positions:
    """Explicit positions on another grid: each position is computed if its nearest one on theirs is."""
    return _resized(spec, height, width)


@lru_cache(maxsize=1024)
def _resized(spec: str, height: int, width: int) -> Positions:
    mask = from_spec(spec)
    if not isinstance(mask, Positions):
        raise TypeError(f"spec={spec!r}: only explicit positions need resizing")

    def make() -> Positions:
        own = mask.mask(*mask.size)
        rows = (2 * torch.arange(height) + 1) * mask.size[0] // (2 * height)
        cols = (2 * torch.arange(width) + 1) * mask.size[1] // (2 * width)
        kept = own[rows[:, None], cols]
        if not bool(kept.any()):
            # every computed position fell between those of a smaller grid; the first one stays
            row, col = mask.positions(*mask.size)[0].tolist()
            kept[row * height // mask.size[0], col * width // mask.size[1]] = True
        return Positions(kept)

    return undisturbed(make)


def _check_rank(rank: int) -> None:
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"rank={rank!r}: expected a positive integer")


class _Settings:
    """The settings of a separable convolution, and those of its halves."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int],
        padding: Padding,
        dilation: int | Sequence[int],
        groups: int,
        bias: bool,
        rank: int,
    ) -> None:
        _check_rank(rank)
        kernel, strides = two_integers("kernel_size", kernel_size, 1), two_integers("stride", stride, 1)
        dilations = two_integers("dilation", dilation, 1)
        top, bottom, left, right = expand_padding(padding, kernel, strides, dilations)
        self._plain: dict[str, Any] = {
            "in_channels": in_channels,
            "out_channels": out_channels,
            "kernel_size": list(kernel),
            "rank": rank,
            "stride": list(strides),
            "padding": padding if isinstance(padding, (str, int)) else list(padding),
            "dilation": list(dilations),
            "groups": groups,
            "bias": bias,
        }
        self.conv = {name: value for name, value in self._plain.items() if name not in ("rank", "bias")}
        self.vertical: dict[str, Any] = {
            "in_channels": in_channels,
            "out_channels": rank * groups,
            "kernel_size": (kernel[0], 1),
            "stride": (strides[0], 1),
            "padding": (top, bottom, 0, 0),
            "dilation": (dilations[0], 1),
            "groups": groups,
            "bias": False,
        }
        self.horizontal: dict[str, Any] = {
            "in_channels": rank * groups,
            "out_channels": out_channels,
            "kernel_size": (1, kernel[1]),
            "stride": (1, strides[1]),
            "padding": (0, 0, left, right),
            "dilation": (1, dilations[1]),
            "groups": groups,
            "bias": bias,
        }

    def spec(self, kind: str) -> dict[str, Any]:
        """JSON-ready; the keyword arguments, and the kind of module that takes them."""
        return {"kind": kind, **self._plain}


def _dense(settings: dict[str, Any]) -> nn.Conv2d:
    """The same half as torch's own convolution."""
    top, bottom, left, right = settings.pop("padding")
    if top == bottom and left == right:
        return nn.Conv2d(**settings, padding=(top, left))
    # an even kernel with padding="same", whose odd row or column torch puts behind too
    return nn.Conv2d(**settings, padding="same")
