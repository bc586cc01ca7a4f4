"""How much faster a number format is on this machine."""

from __future__ import annotations

from functools import partial
from statistics import median

import torch

from quincunx.fusion.calibrated import weights_of
from quincunx.fusion.decisions import decision
from quincunx.fusion.faster import speed_ratio
from quincunx.fusion.int8 import Int8Program, in_eight_bits
from quincunx.fusion.program import Program
from quincunx.fusion.steps import Step
from quincunx.ops.geometry import Geometry
from quincunx.ops.int8 import Grid
from quincunx.ops.select import backend
from quincunx.sampling import CHESSBOARD

__all__ = ["gain_of", "type_beside_int8"]

# channels and side of the maps that are measured: a middle layer of a residual network
_CHANNELS, _SIDE = 64, 28


def gain_of(dtype: torch.dtype, device: str) -> float:
    """How many times as fast convolutions are in a format as in float32, measured once for a machine.

    The convolutions are a dense one and a spatial bottleneck's pair, 3 x 3, of 64 channels on 28 x 28, with
    float32 maps before and behind.
    """
    return decision(
        ("format", str(dtype), device, torch.get_num_threads()),
        lambda: _measured(dtype, torch.device(device)),
    )


def type_beside_int8() -> torch.dtype:
    """Return the type of layers that are kept out of eight bits: bfloat16 where kernels are faster in it."""
    faster = backend().name == "native" and gain_of(torch.bfloat16, "cpu") > 1
    return torch.bfloat16 if faster else torch.float32


def _measured(dtype: torch.dtype, device: torch.device) -> float:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(_CHANNELS, _CHANNELS, 3, 3, generator=generator).to(device) / 24
    x = torch.randn(1, _CHANNELS, _SIDE, _SIDE, generator=generator).to(device)
    window, spec = Geometry((3, 3), padding=(1, 1, 1, 1)), CHESSBOARD.spec
    steps = [
        Step("dense", "x", weight, None, window, 1, activation=1, out="a"),
        Step("sampled", "a", weight, None, window, 1, spec, activation=1, out="b"),
        Step("transposed", "b", weight, None, window, 1, spec, like="a", out="y"),
    ]
    plain = Program(steps, ["x"], ["y"])
    if dtype == torch.int8:
        eight = [in_eight_bits(step, *weights_of(step), None) for step in steps]
        lower: Program = Int8Program(eight, ["x"], ["y"], dict.fromkeys("xaby", Grid(0.05, 128)))
    else:
        lower = Program(steps, ["x"], ["y"], dtype=dtype)
    with torch.no_grad():
        # a process that has just begun, or a machine that is busy for a moment, must not decide
        return median(speed_ratio(partial(lower, x), partial(plain, x)) for _ in range(3))
