"""Convolutions at some positions: the public functions, their checks, and which back end serves."""

from __future__ import annotations

from quincunx.ops import contract, reference
from quincunx.ops.functional import fill_nearest, sampled_conv2d, sampled_conv_transpose2d

__all__ = ["fill_nearest", "sampled_conv2d", "sampled_conv_transpose2d"]

for _name in contract.OPERATORS:
    contract.implement(_name, getattr(reference, _name), "CompositeExplicitAutograd")
