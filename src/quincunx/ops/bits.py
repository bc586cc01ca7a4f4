"""Pack signs into bits: eight weights in a byte."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["pack_signs", "row_bytes", "unpack_signs"]


def row_bytes(count: int) -> int:
    """Return the number of bytes for the signs of ``count`` weights of one output."""
    return math.ceil(count / 8)


def pack_signs(weight: Tensor) -> Tensor:
    """Return one bit per weight, 1 for 0 or more: uint8 [O, bytes] of a weight [O, ...].

    Weight i of an output, counted row-major, is bit i % 8 of byte i // 8; unused bits are 0.

    Raises:
        ValueError: a weight that is not finite, which has no sign.

    Example:
        >>> pack_signs(torch.tensor([[1.0, -1.0, 0.0]]))
        tensor([[5]], dtype=torch.uint8)
    """
    if not bool(weight.isfinite().all()):
        raise ValueError("weight: holds values that are not finite, and those have no sign")
    flat = (weight >= 0).flatten(1)
    padded = F.pad(flat, (0, 8 * row_bytes(flat.shape[1]) - flat.shape[1]))
    powers = 2 ** torch.arange(8, device=weight.device)
    bytes_of = (padded.view(len(padded), -1, 8) * powers).sum(2)
    return bytes_of.to(torch.uint8)


def unpack_signs(bits: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return the weight [O, *shape] of +1 and -1 from its bits.

    Example:
        >>> unpack_signs(torch.tensor([[5]], dtype=torch.uint8), (3,), torch.float32)
        tensor([[ 1., -1.,  1.]])
    """
    single = bits[:, :, None] >> torch.arange(8, device=bits.device, dtype=torch.uint8) & 1
    kept = single.flatten(1)[:, : math.prod(shape)]
    return (2 * kept.to(dtype) - 1).reshape(len(bits), *shape)
