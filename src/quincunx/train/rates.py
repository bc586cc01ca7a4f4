"""Find a learning rate: short runs on one part of the training images, judged on another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from quincunx.data import ImageData, part_with
from quincunx.measure.tasks.task import Task
from quincunx.modules import copied, weight_of
from quincunx.networks.spec import spec_of
from quincunx.reading import read_json
from quincunx.train.loop import Diverged, fit, other_part, run_identity
from quincunx.train.recipes import Recipe
from quincunx.writing import write_json

__all__ = ["find_rate"]

# factors of the recipe's rate that are tried; steps of each run; images that judge it, as a share and at most
_FACTORS, _STEPS, _JUDGING = (0.1, 0.3, 1.0, 3.0), 60, (0.2, 1000)
# losses this share above the lowest count as equally good
_CLOSE = 0.1
# beyond a loss this share above the lowest no larger rate is tried
_HOPELESS = 1.0
# how often, and by which factor, one goes below the smallest rate while it is the one to take
_BELOW, _LESS = 3, 0.3


def find_rate(
    model: nn.Module,
    data: ImageData,
    recipe: Recipe,
    file: str | Path,
    *,
    seed: int = 0,
    factors: Sequence[float] = _FACTORS,
    steps: int = _STEPS,
    teacher: nn.Module | None = None,
    workers: int | None = None,
    task: Task | None = None,
) -> dict[str, Any]:
    """Return the rate to use of some multiples of a recipe's learning rate, with what was measured of each.

    A part of the training images is set aside and judges; no test image is used. From the same network, each
    rate trains for a few steps at its full height and as many as it falls in, as one short run of the recipe.
    Beyond a rate that diverges or doubles the loss no larger one is tried; where the smallest is the best,
    smaller ones are.
    The largest rate is taken whose loss on the images set aside is at most a tenth above the lowest: short
    runs favour small rates (Wu et al., arXiv:1803.02021), and so do images that the network was trained on
    once. A rate that diverges is left out.

    Args:
        model: to be trained later; it stays as it is.
        data: only its training images are used.
        recipe: of the training; its batch size, loss and optimiser are those of the short runs.
        file: of the result; an existing one of the same network, recipe and data is read instead.
        seed: of the parts, order and augmentation.
        factors: of the recipe's rate.
        steps: of each short run, at most what the images allow.
        teacher: as for :func:`quincunx.train.loop.fit`.
        workers: processes that decode streamed images.
        task: the loss and the score; by default classification.

    Returns:
        JSON-ready: "lr", the rate found; "rates", "losses" (None where it diverged); "trained" and "judged",
        numbers of images; "steps".

    Raises:
        ValueError: fewer than two training images, or every rate diverges.
    """
    file, count = Path(file), len(data.train)
    if count < 2:
        raise ValueError(f"data: {count} training images; a learning rate is found with at least 2")
    asked = {
        **run_identity(spec_of(model), recipe, data, seed, task),
        "weights": weight_of(model),
        "factors": list(factors),
        "steps": steps,
        "close": _CLOSE,
    }
    if file.exists():
        kept: dict[str, Any] = read_json(file)
        if other_part(kept.get("of", {}), asked) is None:
            return kept
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    judging = max(1, min(int(_JUDGING[0] * count), _JUDGING[1]))
    training = min(count - judging, steps * recipe.batch_size)
    parts = replace(
        data,
        train=part_with(data.train, order[judging : judging + training].sort().values),
        # as the test images are read: not augmented
        test=part_with(data.train, order[:judging].sort().values),
    )
    # a whole run in small: it falls once, so that a rate is not judged by its noise alone
    trial = replace(recipe, find_lr=False, epochs=2, milestones=(0.5,), gamma=0.1, every=0, warmup=0.0)

    def loss_at(rate: float) -> float | None:
        with TemporaryDirectory(prefix="quincunx-rate-") as folder:
            try:
                found = fit(
                    copied(model),
                    parts,
                    replace(trial, lr=rate),
                    folder,
                    seed=seed,
                    teacher=teacher,
                    workers=workers,
                    task=task,
                )
            except Diverged:
                return None
        loss = float(found["test_loss"])
        return loss if math.isfinite(loss) else None

    tried: dict[float, float | None] = {}
    for rate in sorted(recipe.lr * factor for factor in factors):
        tried[rate] = loss_at(rate)
        lowest = min((loss for loss in tried.values() if loss is not None), default=math.inf)
        loss = tried[rate]
        if loss is None or loss > lowest + _HOPELESS * abs(lowest):
            break
    for _ in range(_BELOW):
        if _taken(tried) not in (None, min(tried)):
            break
        tried[min(tried) * _LESS] = loss_at(min(tried) * _LESS)
    rates = sorted(tried)
    if (taken := _taken(tried)) is None:
        told = ", ".join(f"{rate:g}" for rate in rates)
        raise ValueError(f"lr={recipe.lr:g}: training diverges at {told}; give a smaller learning rate")
    result = {
        "lr": taken,
        "rates": rates,
        "losses": [tried[rate] for rate in rates],
        "trained": training,
        "judged": judging,
        "steps": 2 * math.ceil(training / recipe.batch_size),
        "of": asked,
    }
    write_json(file, result)
    return result


def _taken(tried: dict[float, float | None]) -> float | None:
    """Return the largest rate that is about as good as the best; None if all diverge."""
    finite = {rate: loss for rate, loss in tried.items() if loss is not None}
    lowest = min(finite.values(), default=0.0)
    return max((rate for rate, loss in finite.items() if loss <= lowest + _CLOSE * abs(lowest)), default=None)
