"""The geometry of a sliding window: kernel, stride, padding and dilation, and the forms users may pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

__all__ = [
    "Geometry",
    "Padding",
    "expand_padding",
    "two_integers",
]

Padding = int | Sequence[int] | str


def two_integers(name: str, value: int | Sequence[int], least: int) -> tuple[int, int]:
    """Return ``value`` as (vertical, horizontal), each at least ``least``."""
    both = _integers(value, "an integer or a pair of integers", name)
    if not isinstance(value, Sequence):
        both *= 2
    if len(both) != 2:
        raise ValueError(f"{name}={value!r}: expected an integer or a pair of integers")
    if both[0] < least or both[1] < least:
        raise ValueError(f"{name}={value!r}: expected at least {least}")
    return both[0], both[1]


def _integers(value: object, expected: str, name: str) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else (value,)
    if not all(isinstance(v, (int, torch.SymInt)) and not isinstance(v, bool) for v in values):
        raise TypeError(f"{name}={value!r}: expected {expected}")
    return values


def expand_padding(
    value: Padding, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> tuple[int, int, int, int]:
    """Return ``padding`` as (top, bottom, left, right); for "same" the odd one is below and right."""
    if isinstance(value, str):
        if value == "valid":
            return 0, 0, 0, 0
        if value != "same":
            raise ValueError(f"padding={value!r}: expected 'same', 'valid' or integers")
        if tuple(stride) != (1, 1):
            raise ValueError(f"padding='same' needs stride 1, got stride={tuple(stride)}")
        v, h = (dilation[i] * (kernel[i] - 1) for i in (0, 1))
        return v // 2, v - v // 2, h // 2, h - h // 2
    values = _integers(value, "integers, 'same' or 'valid'", "padding")
    if len(values) == 4:
        top, bottom, left, right = values
        if min(values) < 0:
            raise ValueError(f"padding={values}: expected at least 0")
        return top, bottom, left, right
    v, h = two_integers("padding", value, 0)
    return v, v, h, h


@dataclass(frozen=True)
class Geometry:
    """The geometry of a convolution's kernel: all settings of a Conv2d except its channels.

    ``padding`` is (top, bottom, left, right). The grid of the output is
    H' = floor((H + top + bottom - dilation (k - 1) - 1) / stride) + 1, likewise W'.
    """

    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)

    @classmethod
    def make(
        cls, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
    ) -> Geometry:
        """Build it from plain sequences, as operators receive them."""
        top, bottom, left, right = padding
        return cls(
            (kernel[0], kernel[1]),
            (stride[0], stride[1]),
            (top, bottom, left, right),
            (dilation[0], dilation[1]),
        )

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Return the output's grid (H', W') for an H x W input; not positive if the kernel does not fit."""
        top, bottom, left, right = self.padding
        rows = (height + top + bottom - self.dilation[0] * (self.kernel[0] - 1) - 1) // self.stride[0] + 1
        cols = (width + left + right - self.dilation[1] * (self.kernel[1] - 1) - 1) // self.stride[1] + 1
        return rows, cols

    def as_large(self, height: int, width: int) -> Geometry:
        """Return it with TensorFlow's padding "SAME": H' = ceil(H / stride), the odd zero below and right."""
        padding = []
        for axis, length in enumerate((height, width)):
            stride, reach = self.stride[axis], self.dilation[axis] * (self.kernel[axis] - 1) + 1
            total = max((-(-length // stride) - 1) * stride + reach - length, 0)
            padding += [total // 2, total - total // 2]
        return replace(self, padding=(padding[0], padding[1], padding[2], padding[3]))

    def rounded_up(self, height: int, width: int) -> Geometry:
        """Return it with the padding below and right, possibly negative, of a pooling in ceil mode.

        H' = ceil((H + top + bottom - dilation (k - 1) - 1) / stride) + 1, less one if the last window
        would start beyond the map.
        """
        behind = []
        for axis, length in enumerate((height, width)):
            before, after = self.padding[2 * axis : 2 * axis + 2]
            reach, stride = self.dilation[axis] * (self.kernel[axis] - 1) + 1, self.stride[axis]
            count = -((reach - length - before - after) // stride) + 1
            if (count - 1) * stride >= length + before:
                count -= 1
            behind.append((count - 1) * stride + reach - length - before)
        return replace(self, padding=(self.padding[0], behind[0], self.padding[2], behind[1]))
