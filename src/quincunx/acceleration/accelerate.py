"""``qx.accelerate``: one method for all layers, or a search with a target."""

from __future__ import annotations

import dataclasses
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from quincunx.acceleration.gain import without_slower
from quincunx.acceleration.search import (
    search,
    shortfall,
)
from quincunx.acceleration.target import Target
from quincunx.acceleration.watching import search_bar
from quincunx.measure.tasks import Task, read_pair
from quincunx.methods.registry import candidates_named
from quincunx.surgery.eligible import Where
from quincunx.surgery.method import Accelerated, Journal, Method
from quincunx.surgery.replace import replace_layers as replace_by

__all__ = ["accelerate"]


def accelerate(
    model: nn.Module,
    method: Method | str | Sequence[str] = "auto",
    *,
    where: Where | None = None,
    example_input: Tensor | tuple[Any, ...] | None = None,
    calibration: Iterable[Any] | None = None,
    journal: Journal | None = None,
    speedup: float | None = None,
    latency_ms: float | None = None,
    macs: str | float | None = None,
    max_drop: float | None = None,
    scores: str | Path | None = None,
    time_budget: float | None = None,
    measure: bool = False,
    task: Task | None = None,
    progress: bool | None = None,
) -> Accelerated:
    """Return an accelerated copy of a network: one method in all its layers, or a search for a target.

    With a method and no target, every layer that the method supports is replaced; see
    :func:`quincunx.surgery.replace.replace_layers`. With a target, :func:`search` chooses a method, or none,
    for each layer by loss and measured time.

    Args:
        model: any network; it is not changed.
        method: such as ``qx.Espace()``; with a target also names ("auto", "spatialbottleneck",
            "espace", "lowrank").
        where: which layers may be replaced, by default all: a function of (name, module), or names, or
            pairs of names of convolutions that are replaced together.
        example_input: [N, C, H, W] or a tuple of arguments; gives the layers' order and sizes, and is the
            input that a search times. By default taken from ``calibration``.
        calibration: a DataLoader, a data set or a list of batches; it is read several times. A batch is
            a tensor, (input, target), several inputs with or without a target, or a dictionary with keys
            such as "pixel_values" and "labels". A search supports networks with one input only.
        journal: stores each layer when it is finished.
        speedup: seconds before over seconds after.
        latency_ms: milliseconds per call after.
        macs: MACs after, "50%" or a number for one image.
        max_drop: points of accuracy that may be lost, or units of the task's score; without another target,
            the search looks for the fastest such network.
        scores: file that stores a search's scores, so that another target costs no new forward pass.
        time_budget: seconds of scoring.
        measure: with one method for all layers, undo replacements that save no time in the network, which is
            timed on ``example_input``, a tensor; ``.skipped`` lists them. A search always measures.
        task: how the network's outputs are compared and scored, and the loss of impact masks, such as
            ``qx.tasks.segmentation()``, or ``qx.tasks.agreement()`` for outputs of any structure; by default
            classification, also of maps [N, classes, H, W].
        progress: whether a search shows on standard error what it does, the best so far and the time left; by
            default if that is a terminal.

    Returns:
        An :class:`Accelerated`; ``.search`` describes a search. A warning says if a target is not met: it
        is judged on the calibration data, before any fine-tuning.

    Raises:
        TypeError: not a module or a method; a name without a target; a wrapped, compiled, scripted or
            quantised network.
        ValueError: a target without calibration data, and anything that the method refuses.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(8, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 8, 3, padding=1),
        ...                     nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> images = [torch.randn(16, 8, 32, 32)]
        >>> accelerate(net, qx.SpatialBottleneck(), calibration=images).replaced["0"]["macs_after"]
        2359296
        >>> found = accelerate(net, "spatialbottleneck", calibration=images, macs="99%")
        >>> found.search["target"]
        {'macs': '99%'}
    """
    if task is not None and not isinstance(task, Task):
        raise TypeError(f"task={task!r}: expected a qx.Task, such as qx.tasks.segmentation()")
    once = isinstance(calibration, Iterator)  # which is refused below
    if task is not None and task.read is not read_pair and calibration is not None and not once:
        calibration = _Read(calibration, task)
    asked = {"speedup": speedup, "latency_ms": latency_ms, "macs": macs, "max_drop": max_drop}
    if all(value is None for value in asked.values()):
        if isinstance(method, (str, Sequence)):
            raise TypeError(
                f"method={method!r}: without a target expected a method such as qx.Espace(); a name needs "
                "speedup, latency_ms, macs or max_drop"
            )
        if measure and not isinstance(example_input, Tensor):
            got = type(example_input).__name__
            raise TypeError(f"example_input: measure=True times a tensor [N, C, H, W], got {got}")
        made = replace_by(
            model,
            method,
            where=where,
            example_input=example_input,
            calibration=calibration,
            journal=journal,
            loss=None if task is None else task.impact_function,
        )
        return (
            without_slower(model, made, example_input)
            if isinstance(example_input, Tensor) and measure
            else made
        )
    target = Target(**asked)  # type: ignore[arg-type]
    if calibration is None:
        raise ValueError("calibration=None: a search scores candidates on data; give input batches")
    if isinstance(example_input, tuple):
        raise TypeError("example_input: a search times one tensor [N, C, H, W], got a tuple")
    shown = sys.stderr.isatty() if progress is None else progress
    with search_bar(shown, time_budget) as tell:
        found = search(
            model,
            target,
            calibration,
            candidates=candidates_named(method) if isinstance(method, (str, Sequence)) else (method,),
            where=where,
            example_input=example_input,
            table=scores,
            time_budget=time_budget,
            journal=journal,
            tell=tell,
            task=task,
        )
    if not found.met:
        warnings.warn(f"accelerate: {shortfall(found.record)}", UserWarning, stacklevel=2)
    return dataclasses.replace(found.result, search=found.record)


@dataclasses.dataclass(frozen=True)
class _Read:
    """Calibration data whose batches the task reads, each time they are passed through."""

    batches: Iterable[Any]
    task: Task

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        for batch in self.batches:
            given, target = self.task.read(batch)
            yield (given,) if target is None else (given, target)
