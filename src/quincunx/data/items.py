"""Inputs with targets of any kind: pairs of images, images with masks, images degraded on the fly, data sets
of the user's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from quincunx.data.workers import read_batches
from quincunx.reading import Unreadable

__all__ = ["Items", "Own", "Pictures", "item_batches"]


class Source(Protocol):
    """What gives the items of a part."""

    def __len__(self) -> int: ...

    def batch(self, indices: Sequence[int], key: int | None) -> tuple[Tensor, Any]:
        """Return inputs [B, C, H, W] and targets of some items; ``key`` and an item's number decide all that
        is drawn for it, None for an evaluation."""


@dataclass(frozen=True, eq=False)
class Items:
    """A part whose items have targets of any structure.

    Attributes:
        source: gives them in batches.
        size: (H, W) of an input as it is evaluated.
        channels: of an input.
        facts: JSON-ready, what distinguishes it from other items.
        patch: side of the parts that training sees; None for whole inputs.
    """

    source: Source
    size: tuple[int, int]
    channels: int
    facts: dict[str, Any] = field(default_factory=dict)
    patch: int | None = None

    def __len__(self) -> int:
        return len(self.source)


@dataclass(frozen=True, eq=False)
class Pictures:
    """Images in memory with their targets: other images, masks, or the images themselves before noise.

    In training a random part is cut out of input and target at the same place, turned by a multiple of 90
    degrees and mirrored, and noise is drawn anew. In an evaluation the noise of an image depends only on
    ``seed`` and its number.

    Attributes:
        inputs: bytes [N, H, W, C].
        targets: bytes [N, H, W, D]; or with ``masks`` class numbers [N, H, W]; None for the inputs.
        noise: standard deviation of the Gaussian noise that is added to inputs, in levels of 255; the result
            is not cut off.
        masks: whether targets are class numbers.
        patch: side of the parts in training.
        seed: of the noise.
    """

    inputs: Tensor
    targets: Tensor | None = None
    noise: float = 0.0
    masks: bool = False
    patch: int | None = None
    seed: int = 0

    def __len__(self) -> int:
        return int(self.inputs.shape[0])

    def batch(self, indices: Sequence[int], key: int | None) -> tuple[Tensor, Any]:
        """Return inputs [B, C, H, W] in [0, 1], and targets [B, D, H, W] in [0, 1] or [B, H, W]."""
        pairs = [self._item(index, key) for index in indices]
        inputs = torch.stack([x for x, _ in pairs]).permute(0, 3, 1, 2)
        targets = torch.stack([y for _, y in pairs])
        return inputs, targets.long() if self.masks else targets.permute(0, 3, 1, 2)

    def _item(self, index: int, key: int | None) -> tuple[Tensor, Tensor]:
        draws = np.random.default_rng((self.seed, index) if key is None else (key, index))
        image = self.inputs[index]
        target = image if self.targets is None else self.targets[index]
        if key is not None:
            image, target = self._part((image, target), draws)
        given = image.float() / 255
        if self.noise:
            drawn = draws.standard_normal(tuple(given.shape), dtype=np.float32)
            given = given + torch.from_numpy(drawn) * (self.noise / 255)
        return given, target if self.masks else target.float() / 255

    def _part(self, images: tuple[Tensor, Tensor], draws: np.random.Generator) -> tuple[Tensor, Tensor]:
        height, width = images[0].shape[:2]
        side = self.patch or min(height, width)
        # quarter turns need a square
        top, left = (int(draws.integers(0, length - side + 1)) for length in (height, width))
        turns, mirrored = int(draws.integers(0, 4)), bool(draws.integers(0, 2))
        first, second = (
            torch.rot90(image[top : top + side, left : left + side], turns, (0, 1)) for image in images
        )
        return (first.flip(1), second.flip(1)) if mirrored else (first, second)


@dataclass(frozen=True, eq=False)
class Own:
    """A data set of the user's own, with a length and numbered items.

    While an item is read in training, torch's global generator is seeded by the pass and the item's number,
    so that what the data set draws from it is the same in each run; in an evaluation by the number alone.

    Attributes:
        items: the data set.
        read: a batch of collated items -> (input, target).
        name: in messages.
    """

    items: Dataset[Any]
    read: Callable[[Any], tuple[Any, Any]]
    name: str

    def __len__(self) -> int:
        return len(self.items)  # type: ignore[arg-type]

    def batch(self, indices: Sequence[int], key: int | None) -> tuple[Tensor, Any]:
        """Return inputs [B, C, H, W], float32 if they are float64, and targets as they are read.

        Raises:
            ValueError: an item cannot be read, items cannot be joined, or inputs are no images.
        """
        found, index = [], -1
        try:
            with torch.random.fork_rng(devices=[]):
                for index in indices:
                    torch.manual_seed(((key or 0) * 1_000_003 + index) % 2**63)
                    found.append(self.items[index])
        except Exception as error:
            raise ValueError(f"{self.name}: item {index} raises {_words(error)}") from error
        some = ", ".join(map(str, indices[:3]))
        try:
            inputs, targets = self.read(default_collate(found))
        except Exception as error:
            raise ValueError(f"{self.name}: the items {some} cannot be joined: {_words(error)}") from error
        if not isinstance(inputs, Tensor) or inputs.dim() != 4 or not inputs.is_floating_point():
            got = (
                f"{inputs.dtype} {list(inputs.shape)}"
                if isinstance(inputs, Tensor)
                else type(inputs).__name__
            )
            raise ValueError(
                f"{self.name}: the inputs of the items {some} are {got}, expected floats [N, C, H, W] as the "
                "network takes them"
            )
        # as NumPy makes them by default
        return inputs.float() if inputs.dtype == torch.float64 else inputs, targets


def _words(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return ": ".join([type(error).__name__, *lines[:1]])


class _Batches(Dataset[Any]):
    """A worker's data: whole batches, or a sentence in place of one that cannot be read."""

    def __init__(self, source: Source, key: int | None) -> None:
        self.source, self.key = source, key

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Any] | str:
        try:
            if indices:
                return self.source.batch(indices, self.key)
            # this process's share of a batch may be none
            inputs, targets = self.source.batch([0], self.key)
        except ValueError as error:
            return str(error)
        return inputs[:0], _first_none(targets)


def _first_none(targets: Any) -> Any:
    if isinstance(targets, Tensor):
        return targets[:0]
    if isinstance(targets, dict):
        return {name: _first_none(part) for name, part in targets.items()}
    return type(targets)(map(_first_none, targets)) if isinstance(targets, (tuple, list)) else targets


def item_batches(
    part: Items, order: Sequence[list[int]], key: int | None, workers: int
) -> Iterator[tuple[Tensor, Any]]:
    """Yield (inputs [B, C, H, W], targets) for each list of item numbers.

    Args:
        part: the items.
        order: the numbers of each batch; a list may be empty.
        key: of the pass, None for an evaluation.
        workers: processes that read items; 0 reads in this one.

    Raises:
        Unreadable: an item that cannot be read.
        WorkerFailed: a worker died or failed.

    Example:
        >>> images = torch.zeros(2, 8, 8, 3, dtype=torch.uint8)
        >>> part = Items(Pictures(images, noise=25), (8, 8), 3)
        >>> [x.shape for x, _ in item_batches(part, [[0, 1]], None, 0)]
        [torch.Size([2, 3, 8, 8])]
    """
    for found in read_batches(_Batches(part.source, key), order, workers, "reads items"):
        if isinstance(found, str):
            raise Unreadable(found)
        yield found
