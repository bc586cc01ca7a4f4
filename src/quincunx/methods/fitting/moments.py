"""Second moments of a convolution's input and responses, which suffice to fit it.

They are summed in float64 in one pass over the data; afterwards every rank and every iteration is
linear algebra on the moments, and the data is not read again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from quincunx.layers.padded import pad_map, padding_at
from quincunx.surgery.calibration import Context, Layer, Responses

__all__ = ["Accumulator", "Moments", "completed", "few_images", "moments", "of_noise", "patches"]

# positions drawn on larger maps: neighbouring positions are highly correlated
POSITIONS = 256
# float64 values in one block of patches
_BLOCK = 1 << 23
_STRIPE = 512
# what an accumulator adds up, besides counts
_SUMS = ("gram", "cross", "power", "sum_patch", "sum_response")


@dataclass(frozen=True, eq=False)
class Moments:
    r"""Centred second moments of patches p and responses y, for each channel group.

    Attributes:
        gram: G = E[(p - \bar p)(p - \bar p)^T], [g, P, P] with P = C / g * dh * dw, ordered (c, i, j).
        cross: B = E[(p - \bar p)(y - \bar y)^T], [g, P, O / g].
        power: E|y - \bar y|^2, [g].
        mean_patch, mean_response: \bar p [g, P] and \bar y [g, O / g].
        samples: number of summed positions over all images.
        images: number of images.
    """

    gram: Tensor
    cross: Tensor
    power: Tensor
    mean_patch: Tensor
    mean_response: Tensor
    samples: int
    images: int

    def bias(self, weight: Tensor) -> Tensor:
        r"""Return the best bias for a weight [g, P, O / g]: \bar y - W^T \bar p, [g, O / g]."""
        return self.mean_response - (weight * self.mean_patch[:, :, None]).sum(1)

    def error(self, weight: Tensor) -> float:
        r"""Return E|y - \bar y - W^T (p - \bar p)|^2 / E|y - \bar y|^2 of a weight [g, P, O / g]."""
        weight = weight.to(self.gram)
        squares = self.power - 2 * (weight * self.cross).sum((1, 2))
        squares = squares + (weight * (self.gram @ weight)).sum((1, 2))
        return relative(float(squares.sum()), float(self.power.sum()))


def relative(squares: float, power: float) -> float:
    """Return a squared error over the responses' power; 0 if a layer's output is constant."""
    return max(squares, 0.0) / power if power > 0 else 0.0


def patches(conv: nn.Conv2d, x: Tensor, at: Tensor | None = None) -> Tensor:
    """Return the patch at each position, [N, positions, C, dh, dw]; a view where possible.

    Args:
        conv: the layer; only its geometry is used.
        x: its input [N, C, H, W].
        at: flat positions of the output grid, LongTensor; by default all of them.
    """
    x = pad_map(x, padding_at(conv), conv.padding_mode).contiguous()
    (kh, kw), (sh, sw), (dh, dw) = conv.kernel_size, conv.stride, conv.dilation
    n, c, height, width = x.shape
    rows, cols = (height - dh * (kh - 1) - 1) // sh + 1, (width - dw * (kw - 1) - 1) // sw + 1
    to_image, to_channel, to_row, to_col = x.stride()
    view = x.as_strided(
        (n, rows, cols, c, kh, kw),
        (to_image, sh * to_row, sw * to_col, to_channel, dh * to_row, dw * to_col),
    )
    if at is None:
        return view.flatten(1, 2)
    return view[:, at // cols, at % cols]


class Accumulator:
    """Sums the moments of one layer, batch by batch.

    Args:
        conv: the layer; its geometry and groups are used.
        positions: the most positions of an image that are used; on larger maps this many are drawn for
            each batch.
        seed: of that draw.
        among: flat positions of the output grid to use, LongTensor; by default all.
    """

    def __init__(
        self, conv: nn.Conv2d, positions: int = POSITIONS, seed: int = 0, among: Tensor | None = None
    ) -> None:
        self.conv, self.positions, self.seed, self.among = conv, positions, seed, among
        g = conv.groups
        size = conv.in_channels // g * conv.kernel_size[0] * conv.kernel_size[1]
        outputs = conv.out_channels // g
        wide = {"dtype": torch.float64, "device": conv.weight.device}
        self.gram = torch.zeros(g, size, size, **wide)  # type: ignore[call-overload]
        self.cross = torch.zeros(g, size, outputs, **wide)  # type: ignore[call-overload]
        self.power = torch.zeros(g, **wide)  # type: ignore[call-overload]
        self.sum_patch = torch.zeros(g, size, **wide)  # type: ignore[call-overload]
        self.sum_response = torch.zeros(g, outputs, **wide)  # type: ignore[call-overload]
        self.samples = self.images = self.batches = 0

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add a batch: inputs [N, C, H, W] and target responses [N, O, H', W']."""
        n, _, height, width = y.shape
        at, count = self.among, height * width if self.among is None else len(self.among)
        if count > self.positions:
            generator = torch.Generator().manual_seed(self.seed + self.batches)
            drawn = torch.randperm(count, generator=generator)[: self.positions].sort().values
            at = drawn if at is None else at.cpu()[drawn]
        at = None if at is None else at.to(x.device)
        y = y.flatten(2) if at is None else y.flatten(2)[:, :, at]
        g, size, outputs = self.cross.shape
        step = max(1, _BLOCK // (y.shape[2] * size * g))
        for first in range(0, n, step):
            read = patches(self.conv, x[first : first + step], at)
            count = read.shape[0] * read.shape[1]
            # [g, samples, size], each group's own channels
            p = read.reshape(count, g, size).double().transpose(0, 1)
            r = y[first : first + step].transpose(1, 2).reshape(count, g, outputs).double().transpose(0, 1)
            for row in range(0, size, _STRIPE):
                # compute stripes of the upper triangle; the rest is its mirror image
                stripe = p[:, :, row : row + _STRIPE].transpose(1, 2)
                self.gram[:, row : row + _STRIPE, row:] += stripe @ p[:, :, row:]
            self.cross += p.transpose(1, 2) @ r
            self.power += r.square().sum((1, 2))
            self.sum_patch += p.sum(1)
            self.sum_response += r.sum(1)
        self.samples += n * y.shape[2]
        self.images += n
        self.batches += 1

    def sums(self) -> dict[str, Tensor]:
        """Return what was added up, float64, which :meth:`take` takes back, also added to another's."""
        counts = torch.tensor([self.samples, self.images], dtype=torch.float64)
        return {**{name: getattr(self, name) for name in _SUMS}, "counts": counts}

    def take(self, sums: Mapping[str, Tensor]) -> None:
        """Go on from sums."""
        for name in _SUMS:
            setattr(self, name, sums[name].to(self.gram.device))
        self.samples, self.images = (int(count) for count in sums["counts"])

    def finish(self) -> Moments:
        """Return the centred moments.

        Raises:
            ValueError: nothing was added.
        """
        if not self.samples:
            raise ValueError("moments: no batch was added")
        n = self.samples
        p, r = self.sum_patch / n, self.sum_response / n
        raw = self.power / n
        power = raw - r.square().sum(1)
        # a constant response: only rounding errors are left
        power = power.where(power > 64 * torch.finfo(torch.float64).eps * raw, 0.0)
        return Moments(
            gram=self._centred(p),
            cross=self.cross / n - p[:, :, None] * r[:, None, :],
            power=power,
            mean_patch=p,
            mean_response=r,
            samples=n,
            images=self.images,
        )

    def _centred(self, mean: Tensor) -> Tensor:
        """Return G from the sums' upper triangle, in stripes, since thousands of channels take gigabytes."""
        gram: Tensor = self.gram / self.samples
        for row in range(0, gram.shape[1], _STRIPE):
            rows, behind = slice(row, row + _STRIPE), slice(row + _STRIPE, None)
            own = gram[:, rows, rows].triu()
            gram[:, rows, rows] = own + own.triu(1).transpose(1, 2)
            gram[:, rows, row:] -= mean[:, rows, None] * mean[:, None, row:]
            gram[:, behind, rows] = gram[:, rows, behind].transpose(1, 2)
        return gram


def moments(
    conv: nn.Conv2d, pairs: Iterable[tuple[Tensor, Tensor]], *, positions: int = POSITIONS, seed: int = 0
) -> Moments:
    """Return the moments of (input, response) pairs, in one pass.

    Args:
        conv: the layer; its geometry and groups are used.
        pairs: inputs [N, C, H, W] and responses [N, O, H', W'].
        positions: the most positions of an image that are used.
        seed: of the draw of positions.

    Raises:
        ValueError: no pairs.

    Source: the normal equations of Lin et al., ESPACE (AAAI 2017), eq. 4.

    Example:
        >>> conv, x = nn.Conv2d(3, 4, 3), torch.randn(2, 3, 8, 8)
        >>> found = moments(conv, [(x, conv(x).detach())])
        >>> found.samples, tuple(found.gram.shape)
        (72, (1, 27, 27))
    """
    sums = Accumulator(conv, positions, seed)
    if isinstance(pairs, Responses):
        # the layer's weights are those of the context's own network
        padded = pairs.sides is not None
        work = partial(_summed, pairs.layer, padded, conv, positions, seed)
        sums.take(pairs.context.total(work))
    else:
        _add_all(sums, pairs)
    return sums.finish()


def _summed(
    layer: Layer, padded: bool, conv: nn.Conv2d, positions: int, seed: int, context: Context
) -> dict[str, Tensor]:
    """Return the sums of a layer's moments over a context's data."""
    sums = Accumulator(conv, positions, seed)
    # what is drawn for a batch depends on its number among all
    sums.batches = context.data.start
    _add_all(sums, context.responses(layer, padded))
    return sums.sums()


def _add_all(sums: Accumulator, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    with torch.no_grad():
        for x, y in pairs:
            sums.add(x, y)


def of_noise(weight: Tensor) -> Moments:
    """Return the moments of white noise of power 1 and a weight's responses to it: G = I, B = W.

    Args:
        weight: W [g, P, O / g].
    """
    weight = weight.double()
    g, size, outputs = weight.shape
    return Moments(
        gram=torch.eye(size, dtype=weight.dtype, device=weight.device).expand(g, size, size),
        cross=weight,
        power=weight.square().sum((1, 2)),
        mean_patch=weight.new_zeros(g, size),
        mean_response=weight.new_zeros(g, outputs),
        samples=0,
        images=0,
    )


def completed(data: Moments, needed: int, prior: Moments) -> Moments:
    r"""Return moments with white noise added for the samples that are missing for a full fit.

    With n samples, where :math:`n^*` are needed,

    .. math:: G' = G + t\,s\,G_0, \quad B' = B + t\,s\,B_0, \quad t = \max(0, n^* / n - 1), \quad
        s = \operatorname{tr} G / \operatorname{tr} G_0

    for each channel group: noise of the patches' mean power, with the responses of the layer's own weights.
    A fit to few samples is thus pulled towards those weights, more strongly the fewer there are; with enough
    samples nothing changes. Means, and therefore the bias, are the data's.

    Args:
        data: of the layer's patches and responses.
        needed: :math:`n^*`, the samples of a full fit.
        prior: of noise, as :func:`of_noise` returns for a weight.
    """
    if data.samples >= needed:
        return data
    powers = [found.gram.diagonal(dim1=1, dim2=2).sum(1) for found in (data, prior)]
    scale = (needed / data.samples - 1) * powers[0] / powers[1].clamp_min(torch.finfo(torch.float64).tiny)
    share = scale[:, None, None]
    return replace(
        data,
        gram=data.gram.addcmul(share, prior.gram),
        cross=data.cross.addcmul(share, prior.cross),
        power=data.power + scale * prior.power,
    )


def few_images(data: Moments, needed: int) -> dict[str, Any]:
    """Return the numbers of images given and needed for a full fit, if more are needed, for a record."""
    if data.samples >= needed:
        return {}
    return {"images": data.images, "images_needed": -(-needed * data.images // data.samples)}
