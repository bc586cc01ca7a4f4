"""The preprocessing of a network's training, as a function."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor

__all__ = ["Preprocessing"]


@dataclass(frozen=True)
class Preprocessing:
    r"""Normalises pixels for a network.

    .. math:: x_c = (p_c / 255 - \mu_c) / \sigma_c

    Attributes:
        mean: of each channel, in [0, 1].
        std: of each channel, in [0, 1].
        size: (H, W) of its training images; other sizes are not resized here.

    Example:
        >>> see = Preprocessing((0.5,), (0.25,), (2, 2))
        >>> see(torch.full((1, 1, 2, 2), 255, dtype=torch.uint8)).unique()
        tensor([2.])
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: tuple[int, int] | None = None

    def __call__(self, images: Tensor) -> Tensor:
        """Return images [N, C, H, W] or [C, H, W], bytes or numbers in [0, 1], normalised.

        Raises:
            TypeError: not a tensor.
            ValueError: another number of channels.
        """
        if not isinstance(images, Tensor):
            raise TypeError(f"images: expected a tensor [N, C, H, W], got {type(images).__name__}")
        if images.dim() not in (3, 4) or images.shape[-3] != len(self.mean):
            raise ValueError(
                f"images: expected {len(self.mean)} channels, [N, C, H, W], got shape {tuple(images.shape)}"
            )
        x = images / 255 if images.dtype == torch.uint8 else images
        mean, std = (x.new_tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        return (x - mean) / std

    @classmethod
    def of(cls, info: Any) -> Preprocessing | None:
        """Read it from an artifact's record of its training ("data": "mean", "std"), or return None."""
        data = info.get("data") if isinstance(info, dict) else None
        if not isinstance(data, dict):
            return None
        mean, std, size = (data.get(key) for key in ("mean", "std", "size"))
        if not (_numbers(mean) and _numbers(std) and len(mean) == len(std) and min(std) > 0):
            return None
        sides = (int(size[0]), int(size[1])) if _numbers(size) and len(size) == 2 else None
        return cls(tuple(mean), tuple(std), sides)


def _numbers(values: Any) -> TypeGuard[list[float]]:
    return (
        isinstance(values, list)
        and len(values) > 0
        and all(isinstance(v, (int, float)) and math.isfinite(v) for v in values)
    )
