"""Identify an acceleration by its inputs, so that an interrupted run continues with its own fits."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quincunx.acceleration.free import SmallerInput
from quincunx.acceleration.journal import FolderJournal
from quincunx.acceleration.target import Search
from quincunx.data import ImageData
from quincunx.measure.tasks import Task
from quincunx.measure.tasks.ready import is_usual
from quincunx.networks.spec import spec_of
from quincunx.surgery.method import (
    Method,
)

__all__ = ["shared_fits", "trained_identity", "where_named"]


def shared_fits(
    folder: Path,
    model: nn.Module,
    method: Method,
    data: ImageData | None,
    *,
    layers: Sequence[str] = (),
    calibration: int = 500,
    seed: int = 0,
    task: Task | None = None,
) -> FolderJournal:
    """Return the journal of finished layers in ``folder`` that all methods with the same fits share.

    ESPACE at other rates is an example. Arguments as in :func:`accelerate_trained`.
    """
    return fits_folder(
        folder, method, acceleration_identity(model, method, data, layers, calibration, seed, task)
    )


def fits_folder(
    folder: Path, method: Method | Search | SmallerInput, identity: dict[str, Any]
) -> FolderJournal:
    after = getattr(method, "after_fits", ())
    settings = {key: value for key, value in identity["method"].items() if key not in after}
    reduced = {**identity, "method": settings}
    digest = hashlib.sha256(json.dumps(reduced, sort_keys=True).encode()).hexdigest()
    return FolderJournal(folder / f"{method.name}-{digest[:12]}", reduced)


def acceleration_identity(
    model: nn.Module,
    method: Method | Search | SmallerInput,
    data: ImageData | None,
    layers: Sequence[str],
    calibration: int,
    seed: int,
    task: Task | None = None,
) -> dict[str, Any]:
    """Return everything that determines the finished layers of a run, JSON-ready.

    Not how long a search may take: each of its choices has its own layers, so it goes on with more time.
    """
    fields = dataclasses.fields(method)  # type: ignore[arg-type]
    settings = {f.name: repr(getattr(method, f.name)) for f in fields if f.name != "time_budget"}
    same = trained_identity(model, data, layers=layers, calibration=calibration, seed=seed, task=task)
    return {**same, "method": {"name": method.name, **settings}}


def trained_identity(
    model: nn.Module,
    data: ImageData | None,
    *,
    layers: Sequence[str] = (),
    calibration: int = 500,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    task: Task | None = None,
    **_: Any,
) -> dict[str, Any]:
    """Return everything besides method and recipe that determines the results of a run, JSON-ready.

    Other options of :func:`accelerate_trained` are accepted and ignored: they only affect times.
    """
    state = hashlib.sha256(b"".join(_bytes(t) for t in model.state_dict().values())).hexdigest()
    return {
        "network": spec_of(model),
        "weights": state,
        "data": None if data is None else data.describe(),
        "layers": list(layers),
        "calibration": calibration,
        "seed": seed,
        **({} if dtype is None else {"dtype": str(dtype).removeprefix("torch.")}),
        **({} if task is None or is_usual(task) else {"task": task.identity}),
    }


def _bytes(value: Tensor) -> bytes:
    return (
        bytes(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()) if value.dim() else b""
    )


def where_named(model: nn.Module, patterns: Sequence[str]) -> Callable[[str, nn.Module], bool]:
    """Return a filter for the layers that match the patterns; without patterns, for all layers.

    Raises:
        ValueError: a pattern matches no module.
    """
    names = [name for name, _ in model.named_modules()]
    for pattern in patterns:
        if not any(fnmatch(name, pattern) for name in names):
            some = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]
            raise ValueError(
                f"layers={pattern!r}: no layer has such a name; there are {', '.join(some[:10])}"
            )
    return lambda name, _: not patterns or any(fnmatch(name, pattern) for pattern in patterns)
