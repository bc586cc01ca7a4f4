"""Images of one channel from images of three."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from quincunx.data.items import Items, Pictures
from quincunx.data.sets import ImageData, Split, statistics

__all__ = ["grey_hint", "greyed"]

# of red, green and blue, of 65536 (ITU-R BT.601), as Pillow has them
_WEIGHTS = (19595, 38470, 7471)
# pixels that are weighted at a time
_AT_ONCE = 1 << 20


def greyed(data: ImageData) -> ImageData:
    r"""Return a data set whose images have one channel, as networks for grey images take them.

    .. math:: y = 0.299 R + 0.587 G + 0.114 B,

    rounded to a byte; of pairs inputs and targets, of masks the inputs. Mean and deviation are those of the
    grey training images. Images of one channel stay.

    Raises:
        ValueError: streamed images, a data set of the user's own, images of other than one or three channels.

    Source: the weights are those of ITU-R BT.601.

    Example:
        >>> from quincunx.data import Split
        >>> part = Split(torch.full((1, 4, 4, 3), 200, dtype=torch.uint8), torch.zeros(1))
        >>> data = ImageData("flat", part, part, ("a",), (0.5,) * 3, (1.0,) * 3, "none")
        >>> greyed(data).train.images.shape, int(greyed(data).train.images.max())
        (torch.Size([1, 4, 4, 1]), 200)
    """
    if data.in_channels == 1:
        return data
    if data.in_channels != 3:
        raise ValueError(f"grey: the images of {data.name} have {data.in_channels} channels, expected 1 or 3")

    def part(given: Any) -> Any:
        if isinstance(given, Split):
            return replace(given, images=_luma(given.images))
        if isinstance(given, Items) and isinstance(given.source, Pictures):
            source = given.source
            targets = source.targets if source.masks or source.targets is None else _luma(source.targets)
            source = replace(source, inputs=_luma(source.inputs), targets=targets)
            return replace(given, source=source, channels=1, facts={**given.facts, "grey": True})
        if isinstance(given, Items):
            raise ValueError(f"grey: {data.name} says itself how many channels its inputs have")
        raise ValueError(f"grey: {data.name} is streamed; --in-memory, or a --size, keeps images in memory")

    train, test = part(data.train), part(data.test)
    plain = not any(data.mean) and set(data.std) == {1.0}
    images = train.images if isinstance(train, Split) else train.source.inputs
    mean, std = ((0.0,), (1.0,)) if plain else statistics(images)
    return replace(data, train=train, test=test, mean=mean, std=std)


def grey_hint(taken: int, data: ImageData) -> str:
    """Return what to do where a network for grey images gets others; nothing if it does not."""
    return "; --grey makes images of one channel of them" if (taken, data.in_channels) == (1, 3) else ""


def _luma(images: Tensor) -> Tensor:
    """Return bytes [N, H, W, 1] of bytes [N, H, W, 3]."""
    weights = torch.tensor(_WEIGHTS, dtype=torch.int32)
    made = torch.empty_like(images[..., :1])
    some = max(1, _AT_ONCE // max(1, images[0].numel() if len(images) else 1))
    for start in range(0, len(images), some):
        weighted = (images[start : start + some].int() * weights).sum(3, keepdim=True)
        made[start : start + some] = (weighted + 0x8000) >> 16
    return made
