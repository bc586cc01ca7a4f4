"""The demonstration: a small ResNet and its spatial bottleneck twins on digits, compared."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from quincunx import networks
from quincunx.data import load_data
from quincunx.experiments.timings import time_networks
from quincunx.networks.artifact import save
from quincunx.networks.spec import spec_of
from quincunx.reading import read_json
from quincunx.report.figures import check_can_draw
from quincunx.report.results import (
    Line,
    collect,
    label_of,
    result_lines,
)
from quincunx.report.training import write_report
from quincunx.train import recipes
from quincunx.train.loop import CHECKPOINT, fit
from quincunx.train.recipes import recipe_with
from quincunx.writing import file_name, write_json

__all__ = ["run_demo"]

_NETWORKS: tuple[tuple[str, dict[str, str]], ...] = (
    ("rrn14", {}),
    ("rsbn14", {"sampling": "2/4"}),
    ("rsbn14", {"sampling": "1/4"}),
)
_BATCHES = (1, 64)


def run_demo(
    out: str | Path, *, epochs: int | None = None, seed: int = 0, progress: bool = False
) -> list[Line]:
    """Train three networks on digits, time them against each other and write the report.

    The folder gets a result file for each network and batch size, ``report.html``, the artifact
    ``model`` (the network with the 2/4 sampling) and, in ``training``, a folder for each run. Results of an
    earlier demonstration are replaced; nothing else in the folder is touched.

    Args:
        out: the folder.
        epochs: passes over the training images; by default the recipe's.
        seed: of initial weights, order and augmentation.
        progress: show a bar.

    Returns:
        The report's rows, the ordinary network first.

    Raises:
        ValueError: the folder holds something else under one of the demonstration's names, or cannot
            be created.
        OSError: a file cannot be written.
        ModuleNotFoundError: an extra is not installed.
        RunFailed: training could not continue.
    """
    check_can_draw()
    out = Path(out)
    chosen = recipe_with(recipes.digits(), epochs=epochs)
    images = load_data("digits")
    models: dict[str, nn.Module] = {}
    for name, settings in _NETWORKS:
        torch.manual_seed(seed)
        model = networks.build(name, len(images.classes), images.in_channels, **settings)
        models[label_of(spec_of(model))] = model
    _make_room(out, list(models))
    for label, model in models.items():
        folder = out / "training" / file_name(label)
        result = fit(model, images, chosen, folder, seed=seed, progress=label if progress else False)
        write_json(out / f"{file_name(label)}.json", result)
    baseline, chessboard = list(models)[:2]
    save(models[chessboard], out / "model", info={"made_by": "demo", "data": images.describe()})
    example = (images.in_channels, *images.size)
    for batch in _BATCHES:
        write_json(
            out / f"latency-batch{batch}.json",
            time_networks(models, baseline, batch, example, progress=progress),
        )
    write_report(out)
    return result_lines(collect(out))


def _make_room(out: Path, labels: list[str]) -> None:
    """Remove an earlier demonstration's files; refuse first if other files are in the way."""
    files = {out / f"{file_name(label)}.json": "train" for label in labels}
    files |= {out / f"latency-batch{batch}.json": "latency" for batch in _BATCHES}
    for path, kind in files.items():
        with _refusing(path):
            if path.exists() and read_json(path)["kind"] != kind:
                raise ValueError
    page, model = out / "report.html", out / "model"
    with _refusing(page):
        if page.exists() and "<title>quincunx" not in page.read_text(encoding="utf-8"):
            raise ValueError
    with _refusing(model):
        if model.exists() and read_json(model / "spec.json")["info"]["made_by"] != "demo":
            raise ValueError
    runs = [out / "training" / file_name(label) for label in labels]
    for run in runs:
        with _refusing(run):
            foreign = run.exists() and any(run.iterdir()) and not (run / CHECKPOINT).is_file()
            if foreign or run.parent.is_file():
                raise ValueError
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"out={str(out)!r}: cannot be made ({error.strerror})") from error
    for path in (*files, page):
        path.unlink(missing_ok=True)
    for folder in (model, *runs):
        if folder.exists():
            shutil.rmtree(folder)


@contextmanager
def _refusing(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(
            f"{path}: not written by an earlier demonstration, so not replaced; choose another --out"
        ) from None
