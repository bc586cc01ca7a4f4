"""A network as it is judged, timed and kept in a number format: in eight bits it needs ranges first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from quincunx.fusion.calibrate import calibrate
from quincunx.layers.eightbits import note_quantisation, quantisation_of, round_weights
from quincunx.measure.tasks import Task
from quincunx.modules import copied

__all__ = ["ready_for", "rounded_as_trained", "to_train_rounded"]

# of 100 calibration images, how many may get another answer before layers stay in float32; for other
# outputs than classes the relative error in percent
_CHANGED, _AWAY = 1.0, 5.0


def ready_for(
    model: nn.Module, dtype: torch.dtype | None, images: Sequence[tuple[Tensor, Any]], task: Task
) -> nn.Module:
    """Return a network that can be fused in a format: for int8 a calibrated copy, else the network itself.

    Args:
        model: the network; a calibrated one keeps its ranges, and its weights are rounded.
        dtype: the format; None for float32.
        images: calibration images and targets.
        task: of the network.
    """
    if dtype != torch.int8:
        return model
    if quantisation_of(model) is not None:
        return rounded_as_trained(model)
    most = _CHANGED if task.classifies else _AWAY
    return calibrate(model, images, max_drop=most)


def to_train_rounded(model: nn.Module, images: Sequence[tuple[Tensor, Any]]) -> None:
    """Let a network be trained as it will compute in eight bits, in all its layers but the ends.

    Args:
        model: gets a record, and keeps its weights.
        images: calibration images and targets.
    """
    record = quantisation_of(calibrate(model, images, max_drop=100))
    assert record is not None  # noqa: S101  # calibrated networks have one
    note_quantisation(model, record)


def rounded_as_trained(model: nn.Module) -> nn.Module:
    """Return a copy of a calibrated network with rounded weights."""
    record, made = quantisation_of(model), copied(model)
    if record is not None:
        round_weights(made, record.layers)
        note_quantisation(made, record)
    return made
