"""One pass over a part of a data set, as batches of normalised images."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from quincunx.data.augment import crop_and_flip, photographs
from quincunx.data.items import Items, item_batches
from quincunx.data.sets import ImageData, Part, Split, Stream
from quincunx.data.stream import crops, default_workers

AUGMENTATIONS = ("none", "cifar", "imagenet", "patches")


def normalised(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Return byte images [N, H, W, C] as floats of mean 0 and deviation 1, in the same layout."""
    scale, shift = scale_and_shift(mean, std)
    return images.float().mul_(scale).add_(shift)


def scale_and_shift(mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """Return per channel the factor and offset that map byte values to mean 0 and deviation 1."""
    scale = torch.tensor([1 / (255 * s) for s in std])
    shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)])
    return scale, shift


def shares(
    count: int, batch_size: int, rank: int, world: int, generator: torch.Generator | None
) -> Iterator[tuple[Tensor, slice]]:
    """Yield the image numbers of each batch, and the slice of them for this process, in one epoch's order."""
    order = torch.randperm(count, generator=generator) if generator is not None else torch.arange(count)
    for start in range(0, count, batch_size):
        whole = order[start : start + batch_size]
        yield whole, slice(rank * len(whole) // world, (rank + 1) * len(whole) // world)


def batches(
    split: Part,
    data: ImageData,
    batch_size: int,
    *,
    generator: torch.Generator | None = None,
    augment: str = "none",
    channels_last: bool = True,
    rank: int = 0,
    world: int = 1,
    workers: int | None = None,
) -> Iterator[tuple[Tensor, Any]]:
    """Yield batches of normalised images [B, C, H, W] and labels [B], or the targets of items.

    Args:
        split: the images; ``data`` has their mean and deviation.
        data: the data set.
        batch_size: images per step, for all processes together.
        generator: draws the order and the augmentation; without one, images come in order and unaugmented.
        augment: "none"; "cifar": pad an eighth of the side (4 pixels of 32) on each side with the mean
            colour, crop at a random place, flip at random (He et al. 2016; Peng et al.,
            arXiv:1809.02601, section 4.1); "imagenet": a random part of the image at full size, flipped
            at random, its colours changed (:mod:`quincunx.data.augment` has the constants). For a
            streamed image it depends only on a number drawn once per epoch and on the image; "patches", of
            items: a random part of input and target, turned and mirrored, and noise drawn anew.
        channels_last: whether batches use the channels_last memory format.
        rank: this process.
        world: number of processes. All draw the same numbers; of each batch of b images
            a process takes those from rank b / world to (rank + 1) b / world, which may be none.
        workers: processes that decode streamed images, 0 for this one; by default one per core, at most
            eight. Images in memory need none, and of items this process reads them by default.

    Raises:
        ValueError: a value out of its range, a part without images; while reading, a streamed image that
            cannot be read (the message names it).
        WorkerFailed: while reading, a worker process died.

    Example:
        >>> split = Split(torch.zeros(5, 8, 8, 3, dtype=torch.uint8), torch.arange(5))
        >>> data = ImageData("black", split, split, ("a", "b"), (0.5,) * 3, (0.5,) * 3, "none")
        >>> [(tuple(images.shape), labels.tolist()) for images, labels in batches(split, data, 3)]
        [((3, 3, 8, 8), [0, 1, 2]), ((2, 3, 8, 8), [3, 4])]
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: expected at least 1")
    if not len(split):
        raise ValueError(f"{data.name}: no images to read, only the other part has some")
    if augment not in AUGMENTATIONS:
        raise ValueError(f"augment={augment!r}: expected one of {', '.join(AUGMENTATIONS)}")
    if not 0 <= rank < world:
        raise ValueError(f"rank={rank}, world={world}: expected a rank from 0 to world - 1")
    if workers is not None and workers < 0:
        raise ValueError(f"workers={workers}: expected at least 0")
    if isinstance(split, Items):
        found = _items(split, data, batch_size, generator, augment, rank, world, workers or 0)
        return ((_laid_out(images, channels_last), targets) for images, targets in found)
    if augment == "patches":
        raise ValueError("augment='patches': only images with targets, such as pairs, are cut into patches")
    count = default_workers() if workers is None else workers
    found = _epoch(split, data, batch_size, generator, augment, rank, world, count)
    return ((images if channels_last else images.contiguous(), labels) for images, labels in found)


def _laid_out(images: Tensor, channels_last: bool) -> Tensor:
    return images.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def _items(
    split: Items,
    data: ImageData,
    batch_size: int,
    generator: torch.Generator | None,
    augment: str,
    rank: int,
    world: int,
    workers: int,
) -> Iterator[tuple[Tensor, Any]]:
    order = [whole[ours].tolist() for whole, ours in shares(len(split), batch_size, rank, world, generator)]
    key = None
    if generator is not None and augment != "none":
        key = int(torch.randint(0, 2**62, (1,), generator=generator))
    for images, targets in item_batches(split, order, key, workers):
        yield normalised_items(images, data), targets


def normalised_items(images: Tensor, data: ImageData) -> Tensor:
    """Normalise floats [N, C, H, W] in [0, 1], in place unless they stay as they are."""
    plain = not any(data.mean) and all(value == 1 for value in data.std)
    return images if plain else _normalised_planes(images, data)


def _epoch(
    split: Split | Stream,
    data: ImageData,
    batch_size: int,
    generator: torch.Generator | None,
    augment: str,
    rank: int,
    world: int,
    workers: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches in channels_last."""
    taken = list(shares(len(split), batch_size, rank, world, generator))
    chosen = [whole[ours] for whole, ours in taken]
    if isinstance(split, Split):
        pixels = split.images
        read: Iterator[Tensor] = (pixels[some] for some in chosen)
    else:
        key = None
        if augment == "imagenet" and generator is not None:
            key = int(torch.randint(0, 2**62, (1,), generator=generator))
        read = crops(split, [some.tolist() for some in chosen], key, workers)
    for (whole, ours), some, images in zip(taken, chosen, read, strict=True):
        if augment == "imagenet" and generator is not None and isinstance(split, Split):
            found = photographs(images, len(whole), ours, generator)
            found = _normalised_planes(found, data).contiguous(memory_format=torch.channels_last)
        else:
            floats = normalised(images, data.mean, data.std)
            if augment == "cifar" and generator is not None:
                floats = crop_and_flip(floats, len(whole), ours, generator)
            found = floats.permute(0, 3, 1, 2)
        yield found, split.labels[some]


def _normalised_planes(images: Tensor, data: ImageData) -> Tensor:
    """Normalise floats [N, C, H, W] in [0, 1] in place."""
    shape = (1, -1, 1, 1)
    scale = torch.tensor([1 / s for s in data.std]).view(shape)
    shift = torch.tensor([-m / s for m, s in zip(data.mean, data.std, strict=True)]).view(shape)
    return images.mul_(scale).add_(shift)
