"""Some random images of a part, in batches that can be read again and again in bounded memory."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any, overload

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from quincunx.data import memory
from quincunx.data.epoch import normalised, normalised_items
from quincunx.data.items import Items, item_batches
from quincunx.data.sets import ImageData, Split, Stream
from quincunx.data.stream import crops, default_workers

__all__ = ["LIMIT", "Drawn", "draw", "most_kept"]

# megabytes of decoded images that one source keeps
LIMIT = "QUINCUNX_CALIBRATION_MB"
# of the free memory; layers' maps need the rest
_SHARE = 4

Pair = tuple[Tensor, Any]


def most_kept() -> int:
    """Return how many bytes of decoded images may be kept: what ``QUINCUNX_CALIBRATION_MB`` says, by default
    a quarter of the free memory, shared by the processes that torchrun started on this machine.

    Raises:
        ValueError: the variable is not a whole number of megabytes.

    Example:
        >>> most_kept() > 0
        True
    """
    given = os.environ.get(LIMIT)
    if given is None or not given.strip():
        return memory.available() // _SHARE // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if not given.strip().isdecimal():
        raise ValueError(f"{LIMIT}={given!r}: expected a whole number of megabytes, 0 to keep nothing")
    return int(given) << 20


def draw(
    data: ImageData,
    count: int,
    seed: int,
    batch_size: int,
    *,
    workers: int | None = None,
    most: int | None = None,
) -> Drawn:
    """Return ``count`` random training images, or all of fewer, not augmented.

    Args:
        data: the data set.
        count: of images.
        seed: the same seed draws the same images in the same order.
        batch_size: images of a batch.
        workers: processes that decode, as for :func:`quincunx.data.batches`.
        most: bytes of decoded images that are kept; by default :func:`most_kept`.

    Raises:
        ValueError: no training images, or a ``QUINCUNX_CALIBRATION_MB`` that is no number.
    """
    if not len(data.train):
        raise ValueError(f"{data.name}: no images to read, only the other part has some")
    numbers = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(seed))[:count]
    return Drawn(data, numbers, batch_size, workers, most)


class Drawn(Sequence[Pair]):
    """Batches (images [B, C, H, W] in channels_last, targets) of some training images; each pass reads anew.

    Images in files are decoded in worker processes at each pass, except the first so many that fit in
    ``most`` bytes, which are kept as bytes. So memory does not grow with the number of images, and the values
    do not depend on what is kept. Slices are such batches too, and share what is kept.

    Args:
        data: the data set.
        numbers: of its training images, in order, [N].
        batch_size: images of a batch; the last may have fewer.
        workers: processes that decode, as for :func:`quincunx.data.batches`.
        most: bytes of decoded images that are kept; by default :func:`most_kept`.

    Raises:
        ValueError: while reading, an image or item that cannot be read; the message names it.
        WorkerFailed: while reading, a worker process died.

    Example:
        >>> split = Split(torch.zeros(5, 8, 8, 3, dtype=torch.uint8), torch.arange(5))
        >>> data = ImageData("black", split, split, ("a", "b"), (0.5,) * 3, (0.5,) * 3, "none")
        >>> found = Drawn(data, torch.tensor([4, 0, 2]), 2)
        >>> [labels.tolist() for _, labels in found], [labels.tolist() for _, labels in found[1:]]
        ([[4, 0], [2]], [[2]])
    """

    def __init__(
        self,
        data: ImageData,
        numbers: Tensor,
        batch_size: int,
        workers: int | None = None,
        most: int | None = None,
    ) -> None:
        self.data, self.workers = data, workers
        self.order: tuple[Tensor, ...] = torch.split(numbers, batch_size) if len(numbers) else ()
        self.places: Sequence[int] = range(len(self.order))
        self._held = _Held(most_kept() if most is None else most)

    @property
    def images(self) -> int:
        """Return their number."""
        return sum(len(self.order[place]) for place in self.places)

    def __len__(self) -> int:
        return len(self.places)

    def __iter__(self) -> Iterator[Pair]:
        return (self._ready(place, raw) for place, raw in self._read(self.places, self.workers))

    @overload
    def __getitem__(self, index: int) -> Pair: ...

    @overload
    def __getitem__(self, index: slice) -> Drawn: ...

    def __getitem__(self, index: int | slice) -> Pair | Drawn:
        if isinstance(index, slice):
            part = Drawn.__new__(Drawn)
            part.__dict__.update(self.__dict__, places=self.places[index])
            return part
        # one batch is not worth starting processes
        return next(self._ready(place, raw) for place, raw in self._read([self.places[index]], 0))

    def _read(self, places: Sequence[int], workers: int | None) -> Iterator[tuple[int, Any]]:
        """Yield each batch's number and what is kept of it: bytes of images, or items ready for use."""
        split = self.data.train
        if isinstance(split, Split):
            # they are in memory already
            yield from ((place, split.images[self.order[place]]) for place in places)
            return
        missing = [place for place in places if place not in self._held.batches]
        order = [self.order[place].tolist() for place in missing]
        fresh: Iterator[Any] = iter(())
        if missing and isinstance(split, Stream):
            fresh = crops(split, order, None, default_workers() if workers is None else workers)
        elif missing and isinstance(split, Items):
            fresh = map(self._item, item_batches(split, order, None, workers or 0))
        awaited = set(missing)
        for place in places:
            if place not in awaited:
                yield place, self._held.batches[place]
                continue
            raw = next(fresh)
            self._held.keep(place, raw)
            yield place, raw

    def _item(self, read: Pair) -> Pair:
        images = normalised_items(read[0], self.data)
        return images.contiguous(memory_format=torch.channels_last), read[1]

    def _ready(self, place: int, raw: Any) -> Pair:
        data = self.data
        if isinstance(data.train, Items):
            images, targets = raw
            return images, targets
        found = normalised(raw, data.mean, data.std).permute(0, 3, 1, 2)
        return found, data.train.labels[self.order[place]]


class _Held:
    """Batches that are kept by number, the first ones that fit."""

    def __init__(self, most: int) -> None:
        self.most, self.held = most, 0
        self.batches: dict[int, Any] = {}

    def keep(self, place: int, raw: Any) -> None:
        size = sum(part.nbytes for part in pytree.tree_leaves(raw) if isinstance(part, Tensor))
        # another pass at the same time may have read it too
        if place not in self.batches and self.held + size <= self.most:
            self.batches[place] = raw
            self.held += size
