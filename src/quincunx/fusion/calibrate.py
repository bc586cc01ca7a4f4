"""A network that knows its form in eight bits: an ordinary one, to be saved, trained or fused."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from quincunx.fusion.calibrated import any_record, calibrate_network, quantise_network, read_images
from quincunx.fusion.formats import type_beside_int8
from quincunx.fusion.fuse import _fuse_joined, fuse
from quincunx.fusion.fused import Fused
from quincunx.fusion.program import Program
from quincunx.fusion.steps import Follower, Step
from quincunx.layers.eightbits import Quantisation, note_quantisation, quantisation_of

__all__ = ["calibrate", "fuse_to_time", "steps_of"]


def calibrate(
    model: nn.Module,
    calibration: Any,
    *,
    observer: str = "histogram",
    max_drop: float = 1.0,
    keep_ends: bool | None = None,
) -> nn.Module:
    r"""Return a copy of a network that knows how it computes in eight bits.

    The copy is an ordinary network, in float32. Weights of the convolutions that will compute in eight bits
    are rounded: to q s with q in int8, s = max \|w\| / 127 for each output channel. Then
    ``qx.fuse(copy, torch.int8)`` needs no images and gives what :func:`quincunx.fuse` gives with them.
    ``qx.save`` stores rounded weights as int8, a quarter of the bytes, with the maps' scales and zero points
    and what corrects biases; the network that ``qx.load`` returns gives the same bits.

    A copy that :func:`quincunx.train.loop.fit` trains computes in each step as it will in eight bits
    (:func:`quincunx.train.rounded.computing_rounded`, for loops of your own).

    Args:
        model: a network that :func:`quincunx.fuse` can fuse, of one argument, on the CPU; it stays as it is.
        calibration: at least 16 images like those that the network is for, as a tensor or as batches, each a
            tensor or a tuple that begins with one (the rest is not read).
        observer: where a map's range ends: "minmax", "percentile" or "histogram"; see :func:`quincunx.fuse`.
        max_drop: how many of 100 images may get another answer before layers stay in real numbers.
        keep_ends: whether the first convolution and the last layer stay in real numbers; None: where answers
            would else be half as far off again, or more than ``max_drop`` of 100 would change for them.

    Raises:
        TypeError: not a module, or one that cannot be fused.
        ValueError: ``calibration`` that is missing, too small or not finite; a network on another device than
            the CPU or of several arguments.

    Example:
        >>> import tempfile
        >>> from quincunx import networks
        >>> images = torch.rand(16, 3, 16, 16)
        >>> small = calibrate(networks.build("rrn8").eval(), images, max_drop=100)
        >>> folder = qx.save(small, tempfile.mkdtemp() + "/small")
        >>> loaded = [qx.fuse(m, torch.int8, force=True)(images) for m in (small, qx.load(folder))]
        >>> torch.equal(*loaded)
        True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    device = next((p.device.type for p in model.parameters()), "cpu")
    if device != "cpu":
        raise ValueError(f"model: expected one on the CPU, got one on {device}")
    images = read_images(calibration)
    result, record = calibrate_network(model, _fuse_joined, images, observer, max_drop, keep_ends)
    note_quantisation(result, record)
    return result


def fuse_to_time(
    model: nn.Module, dtype: torch.dtype | None = None, *, check: Any = None, keep_ends: bool = False
) -> Fused:
    """Return a network fused in a format, faster or not, to be timed.

    In eight bits, a network that was not calibrated gets arbitrary ranges: times do not depend on them,
    answers do. All its layers are in eight bits then.

    Args:
        model: any network that :func:`quincunx.fuse` can fuse.
        dtype: the format; None for the network's own.
        check: an example on which the copy, in eight bits the one in float32, is compared with the network.
        keep_ends: whether the first convolution and the last layer stay in real numbers.

    Raises:
        TypeError, ValueError: as :func:`quincunx.fuse`.
    """
    if dtype != torch.int8 or quantisation_of(model) is not None:
        return fuse(model, dtype, check=check, force=True)
    if check is not None:
        fuse(model, check=check)
    fused = _fuse_joined(model)
    with torch.no_grad():
        return quantise_network(fused, any_record(fused, keep_ends), type_beside_int8())


def steps_of(model: nn.Module, record: Quantisation) -> list[Step | Follower]:
    """Return the steps that a calibrated network consists of when it is fused, in order.

    Raises:
        ValueError: the record is of another network.
    """
    fused = quantise_network(_fuse_joined(model), record)
    return [step for module in fused.modules() if isinstance(module, Program) for step in module.steps]
