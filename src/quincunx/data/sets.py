"""A data set: two parts, in memory or in files, and its facts."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quincunx.data.items import Items, Source

# of ImageNet's training images in [0, 1], the commonly used values
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Split:
    """Images in memory: bytes [N, H, W, C] and class numbers [N]."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return int(self.labels.shape[0])

    @property
    def size(self) -> tuple[int, int]:
        """Return (H, W) of every image."""
        return int(self.images.shape[1]), int(self.images.shape[2])

    @property
    def channels(self) -> int:
        return int(self.images.shape[3])


@dataclass(frozen=True, eq=False)
class Stream:
    """Photographs in files, decoded whenever they are needed.

    Attributes:
        files: their paths as bytes [N]; an array, since a list of a million names is slow to share
            with worker processes.
        labels: class numbers [N].
        side: of the square crops, in pixels.
        exif: whether the EXIF orientation is applied.
    """

    files: NDArray[np.bytes_]
    labels: Tensor
    side: int
    exif: bool = True

    def __len__(self) -> int:
        return int(self.labels.shape[0])

    @property
    def size(self) -> tuple[int, int]:
        """Return (H, W) of every crop."""
        return self.side, self.side

    @property
    def channels(self) -> int:
        return 3

    def path(self, index: int) -> str:
        """Return the path of image ``index``."""
        return os.fsdecode(bytes(self.files[index]))


Part = Split | Stream | Items


@dataclass(frozen=True, eq=False)
class _Some:
    """Some of the items of a source."""

    source: Source
    indices: Tensor

    def __len__(self) -> int:
        return len(self.indices)

    def batch(self, indices: Sequence[int], key: int | None) -> tuple[Tensor, Any]:
        return self.source.batch([int(self.indices[i]) for i in indices], key)


def part_with(part: Part, indices: Tensor) -> Part:
    """Return the images of a part with these numbers, in this order.

    Example:
        >>> part = Split(torch.zeros(5, 8, 8, 3, dtype=torch.uint8), torch.arange(5))
        >>> part_with(part, torch.tensor([3, 1])).labels.tolist()
        [3, 1]
    """
    if isinstance(part, Split):
        return Split(part.images[indices], part.labels[indices])
    if isinstance(part, Stream):
        return replace(part, files=part.files[indices.numpy()], labels=part.labels[indices])
    facts = {**part.facts, "some": len(indices)}
    return replace(part, source=_Some(part.source, indices), facts=facts)


@dataclass(frozen=True)
class ImageData:
    """A data set in two parts.

    Attributes:
        name: the source that it was loaded from.
        train: the training part.
        test: the test part; both parts are of one kind: in memory, streamed, or items with targets.
        classes: class names, by number.
        mean: per channel, of the training images in [0, 1]; for a streamed set ImageNet's usual values.
        std: as ``mean``, the standard deviation.
        augment: the suitable augmentation, named as for :func:`quincunx.data.batches`.
        notes: remarks for the user, such as a part that was held out.
        labelled: whether the labels are the images' own. If not, they are a network's predictions
            (:func:`quincunx.train.evaluation.label_with`), or none as long as there are no classes.
        exif: whether the EXIF orientation is applied.

    Raises:
        ValueError: a mean or deviation that does not fit images in [0, 1].
    """

    name: str
    train: Part
    test: Part
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: str
    notes: tuple[str, ...] = ()
    labelled: bool = True
    exif: bool = True

    def __post_init__(self) -> None:
        check_normalisation(self.mean, self.std)

    @property
    def in_channels(self) -> int:
        return self.train.channels

    @property
    def size(self) -> tuple[int, int]:
        """Return (H, W) of every image as it is evaluated."""
        return self.test.size

    def step_size(self, augment: str) -> tuple[int, int]:
        """Return (H, W) of the images of a training step."""
        patch = self.train.patch if isinstance(self.train, Items) and augment == "patches" else None
        return self.train.size if patch is None else (patch, patch)

    def describe(self) -> dict[str, object]:
        """Return JSON-ready facts that distinguish data sets."""
        facts: dict[str, object] = {
            "name": self.name,
            "train": len(self.train),
            "test": len(self.test),
            "size": list(self.size),
            "in_channels": self.in_channels,
            "classes": list(self.classes),
            "mean": [round(v, 6) for v in self.mean],
            "std": [round(v, 6) for v in self.std],
        }
        if not self.labelled:
            facts["labelled"] = False
        if not self.exif:
            facts["exif"] = False
        if isinstance(self.train, Items):
            facts["items"] = dict(self.train.facts)
        # crops of whole photographs differ from the same photographs cropped once
        return facts | ({"streamed": True} if isinstance(self.train, Stream) else {})


def check_normalisation(mean: Sequence[float], std: Sequence[float]) -> None:
    """Refuse a mean or deviation for images in [0, 255], or an impossible one.

    Raises:
        ValueError: not as many means as deviations, or values outside [0, 1].

    Example:
        >>> check_normalisation((123.7, 116.3, 103.5), (58.4, 57.1, 57.4))
        Traceback (most recent call last):
        ...
        ValueError: mean=(123.7, 116.3, 103.5): images are in [0, 1] here, and so is their mean; divide by 255
    """
    if len(mean) != len(std):
        raise ValueError(f"std={tuple(std)}: expected {len(mean)} numbers, as many as in mean")
    for name, values, least in (("mean", mean, 0.0), ("std", std, math.ulp(0.0))):
        if all(least <= value <= 1 for value in values):
            continue
        if all(0 <= value <= 255 for value in values) and max(values) > 1:
            what = "mean" if name == "mean" else "deviation"
            raise ValueError(
                f"{name}={tuple(values)}: images are in [0, 1] here, and so is their {what}; divide by 255"
            )
        low = "[" if name == "mean" else "("
        raise ValueError(f"{name}={tuple(values)}: expected numbers in {low}0, 1], as images have")


def statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation per channel of byte images, in [0, 1], from their histograms."""
    means, deviations = [], []
    levels = torch.arange(256, dtype=torch.float64) / 255
    for channel in range(images.shape[3]):
        share = torch.zeros(256, dtype=torch.float64)
        # a few at a time: counting needs wider numbers than bytes
        for start in range(0, images.shape[0], 4096):
            some = images[start : start + 4096, ..., channel]
            share += torch.bincount(some.flatten().int(), minlength=256)
        share /= share.sum()
        mean = float((share * levels).sum())
        means.append(mean)
        # leave a constant channel as it is instead of dividing by zero
        deviations.append(math.sqrt(float((share * (levels - mean) ** 2).sum())) or 1.0)
    return tuple(means), tuple(deviations)
