"""Images in the memory of the training device, where they are cropped, flipped and normalised.

A GPU trains a small network on more images per second than the CPU can prepare and send. So the bytes are
moved there once, and they are processed for many batches at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quincunx.data.augment import crop_draws, cropped_rows
from quincunx.data.epoch import scale_and_shift, shares
from quincunx.data.sets import ImageData, Part, Split

__all__ = ["Pass", "Resident", "can_reside"]

# bytes of normalised images computed at once
_AT_ONCE = 1 << 27


def can_reside(part: Part, augment: str) -> bool:
    """Return whether a part's images may be on a device: those in memory, with "cifar" or no augmentation."""
    return isinstance(part, Split) and augment in ("none", "cifar")


@dataclass(frozen=True)
class Pass:
    """One pass over this process's images.

    Attributes:
        order: numbers of the images in the order of use, [n].
        ends: where each batch ends in that order, after a leading 0.
        shifts: of each image, from :func:`quincunx.data.augment.crop_draws`; None without.
        flips: of each image, from the same function; None without.
    """

    order: Tensor
    ends: tuple[int, ...]
    shifts: Tensor | None = None
    flips: Tensor | None = None

    def to(self, device: torch.device) -> Pass:
        def moved(value: Tensor | None) -> Tensor | None:
            return None if value is None else value.to(device)

        return replace(self, order=self.order.to(device), shifts=moved(self.shifts), flips=moved(self.flips))


class Resident:
    """A part of a data set on a device, with the batches of :func:`quincunx.data.batches`.

    Random numbers are drawn on the CPU in the same order as there, so that a seed means the same order and
    the same crops wherever the images are.

    Args:
        split: the part, in memory.
        data: the data set of the part.
        device: its destination.
    """

    def __init__(self, split: Split, data: ImageData, device: torch.device) -> None:
        self.device = device
        self.images = split.images.contiguous().to(device)
        self.labels = split.labels.to(device)
        scale, shift = scale_and_shift(data.mean, data.std)
        self._scale, self._shift = scale.to(device), shift.to(device)

    def __len__(self) -> int:
        return int(self.labels.shape[0])

    @property
    def shape(self) -> tuple[int, int, int]:
        """Return (H, W, C) of an image."""
        _, height, width, channels = self.images.shape
        return int(height), int(width), int(channels)

    def at_once(self, batch_size: int) -> int:
        """Return the number of batches, at least one, whose images are computed at the same time."""
        height, width, channels = self.shape
        return max(1, _AT_ONCE // (4 * batch_size * height * width * channels))

    def drawn(
        self,
        batch_size: int,
        *,
        generator: torch.Generator | None = None,
        augment: str = "none",
        rank: int = 0,
        world: int = 1,
    ) -> Pass:
        """Draw the order and augmentation of a pass on the CPU, as :func:`quincunx.data.batches` does."""
        size = self.shape[:2]
        order, ends, shifts, flips = [], [0], [], []
        for whole, ours in shares(len(self), batch_size, rank, world, generator):
            order.append(whole[ours])
            ends.append(ends[-1] + len(order[-1]))
            if augment == "cifar" and generator is not None:
                moved, flipped = crop_draws(size, len(whole), ours, generator)
                shifts.append(moved)
                flips.append(flipped)
        if not shifts:
            return Pass(torch.cat(order), tuple(ends))
        return Pass(torch.cat(order), tuple(ends), torch.cat(shifts, 1), torch.cat(flips))

    def some(self, taken: Pass, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Return normalised images [n, H, W, C] and labels [n] of a range of a pass on the device."""
        numbers = taken.order[start:stop]
        outside = None
        if taken.shifts is None or taken.flips is None:
            pixels = self.images.index_select(0, numbers)
        else:
            shifts, flips = taken.shifts[:, start:stop], taken.flips[start:stop]
            rows, outside = cropped_rows(self.shape[:2], numbers, shifts, flips)
            pixels = self.images.flatten(0, 2).index_select(0, rows.flatten()).view(*rows.shape, -1)
        found = pixels.float().mul_(self._scale).add_(self._shift)
        if outside is not None:
            found.masked_fill_(outside[..., None], 0.0)
        return found, self.labels.index_select(0, numbers)

    def batches(self, taken: Pass) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of a pass on the device: [B, C, H, W] in channels_last, and labels [B]."""
        count, many = len(taken.ends) - 1, self.at_once(max(1, taken.ends[1]))
        for begin in range(0, count, many):
            end = min(count, begin + many)
            start = taken.ends[begin]
            images, labels = self.some(taken, start, taken.ends[end])
            for number in range(begin, end):
                ours = slice(taken.ends[number] - start, taken.ends[number + 1] - start)
                yield images[ours].permute(0, 3, 1, 2), labels[ours]
