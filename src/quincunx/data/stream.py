"""Decode and augment photographs in worker processes, in the order in which they are needed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from quincunx.data.augment import draws_of_image, photograph
from quincunx.data.images import ImageEntry, Pixels, centre, decoded
from quincunx.data.sets import Stream
from quincunx.data.workers import WorkerFailed, read_batches
from quincunx.reading import Unreadable

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["WorkerFailed", "crops", "default_workers", "readable"]

# at test the shorter side has 256 pixels for a crop of 224
_MARGIN = 256 / 224


def default_workers() -> int:
    """Return one per core that this process may use, at most eight."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, cores)


def readable(image: Image) -> Pixels:
    """Return nothing: it only matters that the image was decoded."""
    return np.empty(0, dtype=np.uint8)


class _Photographs(Dataset[Tensor]):
    """A worker's data: crops of a stream's images as bytes."""

    def __init__(self, split: Stream, key: int | None) -> None:
        self.split, self.key = split, key

    def __getitems__(self, indices: list[int]) -> Tensor | str:
        """Return bytes [B, side, side, 3], or a sentence that names an unreadable image."""
        side = self.split.side
        found = np.empty((len(indices), side, side, 3), dtype=np.uint8)
        for place, index in enumerate(indices):
            pixels = self._crop(index)
            if isinstance(pixels, str):
                return pixels
            found[place] = pixels
        return torch.from_numpy(found)

    def _crop(self, index: int) -> Pixels | str:
        path, side, exif = self.split.path(index), self.split.side, self.split.exif
        if self.key is None:
            return decoded(
                ImageEntry(path, "", None, path),
                lambda image: centre(image, round(side * _MARGIN), side),
                exif,
            )
        draws = draws_of_image(self.key, index)
        return decoded(ImageEntry(path, "", None, path), lambda image: photograph(image, side, draws), exif)


def crops(split: Stream, order: Sequence[list[int]], key: int | None, workers: int) -> Iterator[Tensor]:
    """Yield byte images [B, side, side, 3] for each list of image numbers.

    Args:
        split: the images.
        order: the image numbers of each batch; a list may be empty.
        key: of the epoch; with the image's number it determines the augmentation. None for the
            central crop of the image whose shorter side is 256 / 224 of the crop's.
        workers: processes; 0 decodes in this one.

    Raises:
        Unreadable: an image that cannot be read; the message names it.
        WorkerFailed: a worker died, which is noticed within seconds, or failed.
    """
    for found in read_batches(_Photographs(split, key), order, workers, "decodes images"):
        if isinstance(found, str):
            raise Unreadable(f"{found}; --skip-bad reads all images once and goes on without such")
        yield found
