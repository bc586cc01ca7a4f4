"""Convolutions that read something else than zeros outside of their map: an explicit padding in front."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quincunx.layers.attributes import ConvLike
from quincunx.modules import padding_of
from quincunx.ops.geometry import Geometry, two_integers
from quincunx.sampling import Cosets, Positions, Sampling, constant, from_spec, undisturbed

__all__ = [
    "MODES",
    "PaddedBySize2d",
    "PaddedConv2d",
    "continued",
    "continued_cosets",
    "continued_sampling",
    "pad_map",
    "padded_by_size",
    "padded_like",
    "padding_at",
    "pads_by_size",
    "sides_of",
    "without_padding",
]

# the convolution of timm whose zeros depend on its map's size; known by its name, since timm is not needed
_BY_SIZE = ("timm.layers.conv2d_same", "Conv2dSame")
MODES = ("zeros", "reflect", "replicate", "circular")
Sides = tuple[int, int, int, int]


def pad_map(x: Tensor, sides: Sides, mode: str) -> Tensor:
    """Return a map with (top, bottom, left, right) more rows and columns, as ``nn.Conv2d`` pads.

    Example:
        >>> pad_map(torch.tensor([[[[1.0, 2.0, 3.0]]]]), (0, 0, 1, 2), "reflect")
        tensor([[[[2., 1., 2., 3., 2., 1.]]]])
    """
    top, bottom, left, right = sides
    return F.pad(x, (left, right, top, bottom), mode="constant" if mode == "zeros" else mode)


def sides_of(conv: nn.Module) -> Sides | None:
    """Return (top, bottom, left, right) of a convolution's padding by other values than zeros; else None.

    Example:
        >>> sides_of(nn.Conv2d(3, 8, (3, 5), padding=(1, 2), padding_mode="reflect"))
        (1, 1, 2, 2)
    """
    if not isinstance(conv, nn.Conv2d) or conv.padding_mode == "zeros":
        return None
    left, right, top, bottom = conv._reversed_padding_repeated_twice
    return (top, bottom, left, right) if any((top, bottom, left, right)) else None


def without_padding(conv: nn.Conv2d) -> nn.Conv2d:
    """Return the convolution, with the same parameters, that reads the padded map of ``conv``.

    Example:
        >>> conv, x = nn.Conv2d(3, 8, 3, padding=1, padding_mode="circular"), torch.randn(1, 3, 6, 6)
        >>> torch.equal(without_padding(conv)(pad_map(x, sides_of(conv), "circular")), conv(x))
        True
    """
    settings: dict[str, Any] = {"stride": conv.stride, "dilation": conv.dilation, "groups": conv.groups}
    kernel: Any = conv.kernel_size
    made = nn.Conv2d(conv.in_channels, conv.out_channels, kernel, **settings, device="meta")
    made.weight, made.bias = conv.weight, conv.bias
    return made.train(conv.training)


class PaddedBySize2d(nn.Conv2d):
    """A convolution with TensorFlow's padding "SAME": H' = ceil(H / stride), zeros by the size of the map.

    As timm's ``Conv2dSame``, which a fused network has in this form. Arguments as of ``nn.Conv2d``; its own
    ``padding`` is not used.

    Example:
        >>> PaddedBySize2d(3, 8, 3, stride=2)(torch.zeros(1, 3, 8, 7)).shape
        torch.Size([1, 8, 4, 4])
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return the convolution of the padded map [N, C, H, W]."""
        kernel, stride, dilation = (
            two_integers("", v, 1) for v in (self.kernel_size, self.stride, self.dilation)
        )
        sides = Geometry(kernel, stride, dilation=dilation).as_large(*input.shape[2:]).padding
        return F.conv2d(
            pad_map(input, sides, "zeros"), self.weight, self.bias, stride, 0, dilation, self.groups
        )


def pads_by_size(module: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Return whether a module is a convolution of another library that :class:`PaddedBySize2d` stands for."""
    return isinstance(module, nn.Conv2d) and (type(module).__module__, type(module).__qualname__) == _BY_SIZE


def padded_by_size(conv: nn.Conv2d) -> PaddedBySize2d:
    """Return a :class:`PaddedBySize2d` with the parameters and settings of a convolution.

    Example:
        >>> conv = nn.Conv2d(3, 8, 3, stride=2)
        >>> padded_by_size(conv).weight is conv.weight
        True
    """
    settings: dict[str, Any] = {"stride": conv.stride, "dilation": conv.dilation, "groups": conv.groups}
    kernel: Any = conv.kernel_size
    made = PaddedBySize2d(conv.in_channels, conv.out_channels, kernel, **settings, device="meta")
    made.weight, made.bias = conv.weight, conv.bias
    return made.train(conv.training)


class PaddedConv2d(ConvLike):
    """Pads a map by its own values, then applies a module that stands for a convolution without padding.

    A method that replaces a convolution with ``padding_mode`` "reflect", "replicate" or "circular" makes
    ``conv``, which knows nothing of it: equal to torch, since torch pads first, too.

    Args:
        conv: from [N, C, H + top + bottom, W + left + right] to [N, O, H', W'].
        sides: (top, bottom, left, right), rows and columns.
        mode: "reflect", "replicate" or "circular".

    Raises:
        ValueError: another mode, or negative sides.

    Example:
        >>> PaddedConv2d(nn.Conv2d(3, 8, 3), (1, 1, 1, 1), "reflect")(torch.randn(1, 3, 6, 6)).shape
        torch.Size([1, 8, 6, 6])
    """

    kind = "padded"

    def __init__(self, conv: Any, sides: Sides, mode: str) -> None:
        super().__init__()
        if mode not in MODES[1:]:
            raise ValueError(f"mode={mode!r}: expected one of {', '.join(MODES[1:])}")
        if len(sides) != 4 or min(sides) < 0:
            raise ValueError(f"sides={sides!r}: expected (top, bottom, left, right), each at least 0")
        self.settle(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            stride=conv.stride,
            padding=sides,
            dilation=conv.dilation,
            groups=conv.groups,
        )
        top, bottom, left, right = sides
        self.padding_mode, self.sides = mode, (top, bottom, left, right)
        self.conv = conv

    @property
    def weight(self) -> Tensor:
        """That of the convolution behind the padding."""
        return self.conv.weight  # type: ignore[no-any-return]

    @property
    def bias(self) -> Tensor | None:
        """That of the convolution behind the padding."""
        return self.conv.bias  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(pad_map(x, self.sides, self.padding_mode))  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        return f"sides={self.sides}, mode={self.padding_mode!r}"


def padded_like(conv: nn.Module, module: nn.Module) -> nn.Module:
    """Return a module for a convolution's padded map with the padding in front, if that is not of zeros.

    Any other module, such as one with a padding of its own, pads by itself, and stays as it is.
    """
    sides = sides_of(conv)
    known = isinstance(module, (nn.Conv2d, ConvLike)) and module.padding_mode == "zeros"
    if sides is None or not known or module.padding not in ("valid", (0, 0)):
        return module
    return PaddedConv2d(module, sides, str(conv.padding_mode))


# ---------------------------------------------------------------- sampled maps


def continued_cosets(sampling: Sampling, sides: Sides, mode: str) -> Cosets | None:
    """Return the positions that a continued sampled map holds where they are cosets on every grid, or None.

    A reflection maps a residue r to -r, and those modulo 2 are the same.

    Example:
        >>> continued_cosets(Cosets(2, [(0, 0)]), (1, 1, 1, 1), "reflect")
        Cosets(period=2, offsets=((1, 1),))
    """
    if mode != "reflect" or not isinstance(sampling, Cosets) or sampling.period != 2:
        return None
    top, _, left, _ = sides
    return Cosets(2, [((a + left) % 2, (b + top) % 2) for a, b in sampling.offsets])


def continued(y: Tensor, spec: str, size: tuple[int, int], sides: Sides, mode: str) -> Tensor:
    """Return a sampled map continued beyond its grid: the computed positions of the padded grid, row-major.

    The padding of the map in which skipped positions are marked: what is computed there is a copy of what
    is computed inside.

    Args:
        y: sampled map [N, C, m, 1].
        spec: of its sampling.
        size: (H, W) of its grid.
        sides: (top, bottom, left, right).
        mode: of the padding.

    Returns:
        [N, C, m', 1], at the positions of :func:`continued_sampling`.

    Raises:
        ValueError: ``y`` does not have m positions.

    Example:
        >>> y = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 1, 4, 1)
        >>> continued(y, Cosets(2, [(0, 0)]).spec, (4, 4), (0, 0, 2, 0), "circular").flatten()
        tensor([2., 1., 2., 4., 3., 4.])
    """
    how = spec, (int(size[0]), int(size[1])), sides, mode
    m = _count(*how[:2])
    if y.shape[2] != m:
        raise ValueError(
            f"y: expected [N, C, m, 1] with m={m} positions on the {how[1][0]} x {how[1][1]} grid, "
            f"got shape {tuple(y.shape)}"
        )
    if type(y) is Tensor and not torch.compiler.is_compiling():
        return y[:, :, _rows_on(*how, y.device)]
    # a map without values takes an index that is made beside it
    return y[:, :, torch.tensor(_rows_of(*how), device=y.device)]


@constant
def _count(spec: str, size: tuple[int, int]) -> int:
    return from_spec(spec).count(*size)


@constant
def continued_sampling(spec: str, size: tuple[int, int], sides: Sides, mode: str) -> Sampling:
    """Return the sampling, of the padded grid, of a continued map."""
    found = continued_cosets(from_spec(spec), sides, mode)
    return found or _continued_positions(spec, size, sides, mode)


@lru_cache(maxsize=256)
def _continued_positions(spec: str, size: tuple[int, int], sides: Sides, mode: str) -> Positions:
    return undisturbed(lambda: Positions(_ranks(spec, size, sides, mode) >= 0))


@lru_cache(maxsize=256)
def _rows(spec: str, size: tuple[int, int], sides: Sides, mode: str) -> list[int]:
    """Return the number of each value of a continued map among those of the map."""

    def make() -> list[int]:
        ranks = _ranks(spec, size, sides, mode).flatten()
        return ranks[ranks >= 0].tolist()

    return undisturbed(make)


@constant
def _rows_of(spec: str, size: tuple[int, int], sides: Sides, mode: str) -> list[int]:
    return _rows(spec, size, sides, mode)


@lru_cache(maxsize=256)
def _rows_on(spec: str, size: tuple[int, int], sides: Sides, mode: str, device: torch.device) -> Tensor:
    rows = _rows(spec, size, sides, mode)
    return undisturbed(lambda: torch.tensor(rows, device=device))


def _ranks(spec: str, size: tuple[int, int], sides: Sides, mode: str) -> Tensor:
    """Return the padded grid with the number of each computed position, and -1 at the others."""
    mask = from_spec(spec).mask(*size)
    ranks = torch.where(mask, mask.flatten().cumsum(0).view(size) - 1, -1)
    # padding knows floating-point numbers only
    return pad_map(ranks[None, None].double(), sides, mode)[0, 0].long()


def padding_at(conv: nn.Conv2d) -> Sides:
    """Return (top, bottom, left, right) of a convolution's padding in any mode."""
    return sides_of(conv) or padding_of(conv)
