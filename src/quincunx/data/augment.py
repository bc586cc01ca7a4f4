"""Augmentation of CIFAR images and photographs, one at a time in a worker or in batches in memory.

In training, a photograph is a random part of the image (8 to 100% of the area, aspect ratio 3/4 to 4/3;
Szegedy et al. 2015), resized to the crop's side, mirrored with probability 1/2, with random brightness,
contrast, saturation and lighting, as in the training of ImageNet ResNets (Gross and
Wilber 2016; Peng et al., arXiv:1809.02601, section 5). Each change of colour is an affine map of
colours, so the four together are one matrix and one offset per image.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from quincunx.data.images import Pixels

if TYPE_CHECKING:
    from PIL.Image import Image

Floats = NDArray[np.float64]

_AREA = (0.08, 1.0)
_RATIO = (3 / 4, 4 / 3)
# draws of area and aspect ratio per image; the first that lies inside is used
_TRIES = 10
# the largest relative change of brightness, contrast and saturation
_JITTER = 0.4
# standard deviation of the lighting noise along each principal direction of colour
_LIGHTING = 0.1
# for ImageNet's colours in [0, 1]: roots of the covariance's eigenvalues, and its eigenvectors as columns
# (Krizhevsky et al. 2012, section 4.1, with the values of Gross and Wilber 2016)
_DEVIATION = np.array([0.2175, 0.0188, 0.0045])
_DIRECTION = np.array([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]])
# weights of the three channels in a grey value (ITU-R BT.601)
_GREY = np.array([0.299, 0.587, 0.114])


@dataclass(frozen=True)
class Draws:
    """Random numbers for n photographs.

    Attributes:
        parts: uniform, [n, 10, 2], for area and aspect ratio.
        place: uniform, [n, 2], for top and left.
        mirror: whether to mirror, [n].
        strength: uniform, [n, 3], for brightness, contrast and saturation.
        light: normal, [n, 3].
    """

    parts: Floats
    place: Floats
    mirror: NDArray[np.bool_]
    strength: Floats
    light: Floats


def draws_of_image(key: int, index: int) -> Draws:
    """Return draws that depend only on the epoch's ``key`` and the image's number."""
    generator = np.random.default_rng((key, index))
    uniform = generator.random(2 * _TRIES + 6)
    return _arranged(uniform[None], generator.standard_normal((1, 3)))


def draws_of_batch(count: int, generator: torch.Generator) -> Draws:
    uniform = torch.rand(count, 2 * _TRIES + 6, generator=generator, dtype=torch.float64)
    normal = torch.randn(count, 3, generator=generator, dtype=torch.float64)
    return _arranged(uniform.numpy(), normal.numpy())


def _arranged(uniform: Floats, normal: Floats) -> Draws:
    parts, rest = uniform[:, : 2 * _TRIES].reshape(-1, _TRIES, 2), uniform[:, 2 * _TRIES :]
    return Draws(parts, rest[:, :2], rest[:, 2] < 0.5, rest[:, 3:], normal)


def boxes(draws: Draws, height: int, width: int) -> Floats:
    """Return (top, left, height, width) of a part of each H x W image, in fractional pixels, [n, 4].

    If none of ten draws lies inside the image, return its largest central part with an allowed aspect ratio.
    """
    area = height * width * (_AREA[0] + (_AREA[1] - _AREA[0]) * draws.parts[:, :, 0])
    low, high = map(math.log, _RATIO)
    ratio = np.exp(low + (high - low) * draws.parts[:, :, 1])
    tall, wide = np.sqrt(area / ratio), np.sqrt(area * ratio)
    inside = (tall <= height) & (wide <= width)
    each, first = np.arange(len(inside)), inside.argmax(1)
    tall, wide = tall[each, first], wide[each, first]
    top, left = draws.place[:, 0] * (height - tall), draws.place[:, 1] * (width - wide)
    most_wide, most_tall = min(width, height * _RATIO[1]), min(height, width / _RATIO[0])
    none = ~inside.any(1)
    tall[none], wide[none] = most_tall, most_wide
    top[none], left[none] = (height - most_tall) / 2, (width - most_wide) / 2
    return np.stack([top, left, tall, wide], axis=1)


def colour_maps(draws: Draws, mean: Floats) -> tuple[Floats, Floats]:
    """Return (M, c) that map each image's colours x in [0, 1] to M x + c, [n, 3, 3] and [n, 3].

    Brightness maps x to a x, contrast to a x + (1 - a) times the mean of g over the image, saturation to
    a x + (1 - a) g(x), where g is the grey value and a = 1 + 0.4 u, u uniform in [-1, 1]. Saturation
    keeps g, so the three commute and no order is drawn; the lighting is added last.

    Args:
        mean: colour of each image, [n, 3].
    """
    bright, contrast, colour = (1 + _JITTER * (2 * draws.strength - 1)).T[:, :, None]
    keep, grey = np.eye(3), np.tile(_GREY, (3, 1))
    mix = colour[:, :, None] * keep + (1 - colour[:, :, None]) * grey
    light = (_LIGHTING * draws.light * _DEVIATION) @ _DIRECTION.T
    offset = (1 - contrast) * bright * (mean @ _GREY)[:, None]
    return (bright * contrast)[:, :, None] * mix, offset + light


def photograph(image: Image, side: int, draws: Draws) -> Pixels:
    """Return a training crop [side, side, 3] of one photograph of any size."""
    from PIL import Image as pillow

    top, left, tall, wide = boxes(draws, image.height, image.width)[0]
    # a rounding error must not lead out of the image
    corner = (left, top, min(left + wide, image.width), min(top + tall, image.height))
    part = image.resize((side, side), pillow.Resampling.BICUBIC, box=corner)
    # exact, and faster than a mean over pixels
    counts = np.array(part.histogram(), dtype=np.float64).reshape(3, 256)
    mean = counts @ np.arange(256) / (255 * side * side)
    matrix, offset = colour_maps(draws, mean[None])
    # rows of four: a row of the matrix, then its offset
    rows = np.concatenate([matrix[0], 255 * offset[0][:, None]], axis=1)
    pixels = np.asarray(part.convert("RGB", matrix=tuple(rows.flatten().tolist())))
    return pixels[:, ::-1] if draws.mirror[0] else pixels


def photographs(images: Tensor, drawn: int, ours: slice, generator: torch.Generator) -> Tensor:
    """Return training crops [B, C, H, W] in [0, 1] of byte images [B, H, W, C], for whole batches.

    Random numbers are drawn for ``drawn`` images; ``images`` are those in ``ours``. Colours change if there
    are three channels.
    """
    count, height, width, channels = images.shape
    draws = draws_of_batch(drawn, generator)
    draws = Draws(*(getattr(draws, name)[ours] for name in Draws.__dataclass_fields__))
    box = torch.from_numpy(boxes(draws, height, width))
    top, left, tall, wide = box.unbind(1)
    mirrored = torch.from_numpy(np.where(draws.mirror, -1.0, 1.0))
    # the position in the image for each pixel, in [-1, 1]
    grid = torch.empty(count, height, width, 2)
    across, down = _middles(width), _middles(height)
    grid[..., 0] = ((2 * left + wide)[:, None] / width - 1 + (mirrored * wide / width)[:, None] * across)[
        :, None
    ]
    grid[..., 1] = ((2 * top + tall)[:, None] / height - 1 + (tall / height)[:, None] * down)[:, :, None]
    # a part is never larger than the image, so it is never shrunk and needs no smoothing
    found = F.grid_sample(
        images.permute(0, 3, 1, 2).float().contiguous(), grid, padding_mode="border", align_corners=False
    )
    found /= 255
    if channels == 3:
        flat = found.flatten(2)
        matrix, offset = colour_maps(draws, flat.mean(2).double().numpy())
        found = torch.baddbmm(
            torch.from_numpy(offset).float()[:, :, None], torch.from_numpy(matrix).float(), flat
        ).view_as(found)
        found.clamp_(0, 1)
    return found


def _middles(count: int) -> Tensor:
    """Return the centres of this many adjacent pixels in [-1, 1]."""
    return (2 * torch.arange(count, dtype=torch.float64) + 1) / count - 1


def crop_draws(
    size: tuple[int, int], drawn: int, ours: slice, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return (shifts down and right [2, n], whether to flip [n]) for images of H x W: :func:`crop_and_flip`.

    Random numbers are drawn for ``drawn`` images, and those of ``ours`` are returned.
    """
    margin = max(1, round(min(size) / 8))
    shifts = torch.randint(0, 2 * margin + 1, (2, drawn, 1), generator=generator)[:, ours, 0] - margin
    return shifts, torch.rand(drawn, 1, generator=generator)[ours, 0] < 0.5


def crop_and_flip(images: Tensor, drawn: int, ours: slice, generator: torch.Generator) -> Tensor:
    """Shift each image [H, W, C] by up to an eighth of its side, filling with zeros, and flip it at random.

    Random numbers are drawn for ``drawn`` images; ``images`` are those in ``ours``.
    """
    _, height, width, _ = images.shape
    shifts, flips = crop_draws((height, width), drawn, ours, generator)
    found = torch.zeros_like(images)
    # copy whole runs of pixels: four times as fast as one gather of all pixels
    each = zip(images, found, *shifts.tolist(), flips.tolist(), strict=True)
    for image, target, down, right, flip in each:
        part = image[max(down, 0) : height + min(down, 0), max(right, 0) : width + min(right, 0)]
        if flip:
            part, right = part.flip(1), -right
        target[max(-down, 0) : height - max(down, 0), max(-right, 0) : width - max(right, 0)] = part
    return found


def cropped_rows(
    size: tuple[int, int], numbers: Tensor, shifts: Tensor, flips: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the source rows of the pixels of :func:`crop_and_flip`, for a gather on any device.

    Args:
        size: (H, W).
        numbers: of the images, [n].
        shifts: from :func:`crop_draws`.
        flips: from :func:`crop_draws`.

    Returns:
        Row indices into the stacked pixels of all images, [n, H, W], and whether a pixel lies outside its
        image; the row index is arbitrary there.
    """
    height, width = size
    across = torch.arange(width, device=numbers.device)
    down = torch.arange(height, device=numbers.device) + shifts[0, :, None]
    right = torch.where(flips[:, None], width - 1 - across, across) + shifts[1, :, None]
    outside = ((down < 0) | (down >= height))[:, :, None] | ((right < 0) | (right >= width))[:, None, :]
    lines = numbers[:, None] * height + down.clamp(0, height - 1)
    return lines[:, :, None] * width + right.clamp(0, width - 1)[:, None, :], outside
