"""Convolutions at some positions: the public functions, their checks, and the choice of back end."""

from __future__ import annotations

from quincunx.ops.functional import (
    fill_fitted,
    fill_nearest,
    fill_zero,
    filled_conv2d,
    sampled_conv2d,
    sampled_conv_transpose2d,
)
from quincunx.ops.lookup import decoded, lookup_conv2d
from quincunx.ops.select import Backend, backend, register, serving

__all__ = [
    "Backend",
    "backend",
    "decoded",
    "fill_fitted",
    "fill_nearest",
    "fill_zero",
    "filled_conv2d",
    "lookup_conv2d",
    "sampled_conv2d",
    "sampled_conv_transpose2d",
    "serving",
]

register()
