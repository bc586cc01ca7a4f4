"""Run a table of the paper, or estimate its cost, and compare our results with the paper's."""

from __future__ import annotations

import math
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from quincunx import networks
from quincunx.data import ImageData
from quincunx.experiments.bottleneck_paper import Experiment, TableEntry
from quincunx.measure.cost import cost
from quincunx.networks.spec import spec_of
from quincunx.reading import read_json
from quincunx.report.figures import (
    Picture,
    PlottedPoint,
    draw_learning_curves,
    draw_scatter,
)
from quincunx.report.results import label_of
from quincunx.report.training import curve_of
from quincunx.train.loop import fit, other_part, run_identity
from quincunx.train.processes import ALONE, Ranks
from quincunx.train.recipes import Recipe
from quincunx.writing import file_name, write_json

__all__ = ["AgainstPaper", "Planned", "compare", "figure_of", "plan", "reproduce"]

# training images, side and classes of the paper's data sets
_SHAPES = {
    "cifar10": (50_000, 32, 10),
    "cifar100": (50_000, 32, 100),
    "imagenet": (1_281_167, 224, 1000),
}
# enough work to time a step, and not too long to wait
_TIMED_MACS = 4e9


@dataclass(frozen=True)
class Planned:
    """One network's runs, planned.

    Attributes:
        label: of the network.
        macs: multiply-adds per image.
        epochs: of each run.
        seeds: number of runs.
        hours: estimate for all its runs on this machine, from the time of a few steps; None if not timed.
        done: number of runs that have a result already.
        paper_macs: as the paper prints them, in millions.
        paper_error: the paper's test error in percent on the same data set.
        paper_deviation: of the paper's error.
        paper_top5: the paper's top-5 error.
    """

    label: str
    macs: int
    epochs: int
    seeds: int
    hours: float | None
    done: int
    paper_macs: float | None = None
    paper_error: float | None = None
    paper_deviation: float | None = None
    paper_top5: float | None = None


@dataclass(frozen=True)
class AgainstPaper:
    """A row of the paper's table with our results.

    Attributes:
        label: of the network.
        macs: multiply-adds per image, in millions.
        paper_macs: the same as printed in the paper.
        errors: test errors in percent, one per seed.
        mean: of the errors.
        deviation: of the errors; None for fewer than two.
        p: Student's two-sided t-test against the row's baseline; None unless both have two seeds.
        paper_error: the paper's, in percent, on the same data set.
        baseline: the label of the row that it is tested against.
        paper_deviation: of the paper's error.
    """

    label: str
    macs: float
    paper_macs: float | None
    errors: tuple[float, ...]
    mean: float
    deviation: float | None
    p: float | None
    paper_error: float | None
    baseline: str | None
    paper_deviation: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-ready values."""
        return asdict(self)


def _built(entry: TableEntry, num_classes: int, in_channels: int = 3) -> nn.Module:
    return networks.build(entry.network, num_classes, in_channels, **dict(entry.settings))


def _label(entry: TableEntry) -> str:
    return label_of({"name": entry.network, "settings": dict(entry.settings)})


def _name(entry: TableEntry, seed: int) -> str:
    return f"{file_name(_label(entry))}-seed{seed}"


def plan(
    experiment: Experiment,
    recipe: Recipe,
    seeds: Sequence[int],
    out: str | Path,
    *,
    data: ImageData | None = None,
    data_name: str | None = None,
    timed: bool = True,
) -> list[Planned]:
    """Return the runs of an experiment, with MACs and an estimate of hours on this machine.

    Args:
        experiment: its rows.
        recipe: of all its runs.
        seeds: of each network's runs.
        out: folder of the results; runs with a result there count as done.
        data: the images; without them the numbers of ``data_name`` or the experiment's data set.
        data_name: "cifar10", "cifar100" or "imagenet".
        timed: whether to time a few steps of each network.
    """
    if data is not None:
        count, size, classes = len(data.train), data.size, len(data.classes)
        known = data.name
    else:
        known = data_name or experiment.data
        count, side, classes = _SHAPES[known]
        size = (side, side)
    planned = []
    for entry in experiment.entries:
        model = _built(entry, classes)
        macs = cost(model, torch.zeros(1, 3, *size)).macs
        done = sum((Path(out) / f"{_name(entry, seed)}.json").exists() for seed in seeds)
        hours = None
        if timed:
            each = _seconds_an_image(model, macs, size, recipe) * count * recipe.epochs / 3600
            hours = each * (len(seeds) - done)
        error, top5 = entry.printed(known), entry.printed_top5(known)
        planned.append(
            Planned(
                label_of(spec_of(model)),
                macs,
                recipe.epochs,
                len(seeds),
                hours,
                done,
                entry.paper_macs,
                None if error is None else error.mean,
                None if error is None else error.deviation,
                None if top5 is None else top5.mean,
            )
        )
    return planned


def _seconds_an_image(model: nn.Module, macs: int, size: tuple[int, int], recipe: Recipe) -> float:
    """Return training seconds per image, from the faster of two small steps after a first one."""
    batch = max(2, min(recipe.batch_size, int(_TIMED_MACS / macs)))
    images = torch.randn(batch, 3, *size).contiguous(memory_format=torch.channels_last)
    labels = torch.zeros(batch, dtype=torch.long)
    model.to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    dtype = getattr(torch, recipe.precision)
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            scores = model(images)
        F.cross_entropy(scores.float(), labels).backward()  # type: ignore[no-untyped-call]
        seconds.append(time.perf_counter() - began)
    return min(seconds[1:]) / batch


def reproduce(
    experiment: Experiment,
    recipe: Recipe,
    seeds: Sequence[int],
    out: str | Path,
    data: ImageData,
    *,
    progress: bool = False,
    ranks: Ranks = ALONE,
    device: str = "cpu",
    workers: int | None = None,
) -> list[AgainstPaper]:
    """Train every network of an experiment with every seed, one JSON file per run, and compare.

    The folder gets ``NETWORK-seedN.json`` per run, the runs' own folders below ``runs``, and the figure.
    A run with an existing JSON file is not repeated; an interrupted one continues from its checkpoint.

    Raises:
        ValueError: the folder has a run of that name with another recipe or other data (the
            message lists the difference), or the networks do not fit the data.
        RunFailed: a run could not continue.
    """
    out = Path(out)
    results: list[list[dict[str, Any]]] = [[] for _ in experiment.entries]
    for seed in seeds:
        for i, entry in enumerate(experiment.entries):
            run = partial(
                fit,
                progress=f"{_label(entry)}, seed {seed}" if progress else False,
                ranks=ranks,
                workers=workers,
            )
            results[i].append(_result(run, entry, seed, recipe, out, data, ranks.first, device))
    compared = compare(experiment, results)
    if ranks.first:
        picture = figure_of(experiment, results, compared)
        (out / f"{experiment.figure[0]}.svg").write_bytes(picture.content)
    return compared


def _result(
    run: Callable[..., dict[str, Any]],
    entry: TableEntry,
    seed: int,
    recipe: Recipe,
    out: Path,
    data: ImageData,
    writes: bool,
    device: str,
) -> dict[str, Any]:
    """Return one run's result: read it if it exists, else train."""
    torch.manual_seed(seed)
    model = _built(entry, len(data.classes), data.in_channels).to(device)
    name = _name(entry, seed)
    path = out / f"{name}.json"
    if path.exists():
        found: dict[str, Any] = read_json(path)
        other = other_part(found, run_identity(spec_of(model), recipe, data, seed))
        if other is not None:
            raise ValueError(f"{path}: a run of another {other}; another --out starts anew")
        return found
    result = run(model, data, recipe, out / "runs" / name, seed=seed, resume=True)
    if writes:
        write_json(path, result)
    return result


def compare(experiment: Experiment, results: Sequence[Sequence[dict[str, Any]]]) -> list[AgainstPaper]:
    """Return the table: the runs of each row, as in ``run.json``, beside the paper's figures."""
    labels = [label_of(runs[0]["network"]) for runs in results]
    errors = [tuple(100 * run["test_error"] for run in runs) for runs in results]
    rows = []
    for entry, label, runs, found in zip(experiment.entries, labels, results, errors, strict=True):
        versus, printed = entry.versus, entry.printed(runs[0]["data"]["name"])
        rows.append(
            AgainstPaper(
                label,
                runs[0]["cost"]["macs"] / 1e6,
                entry.paper_macs,
                found,
                statistics.fmean(found),
                statistics.stdev(found) if len(found) > 1 else None,
                None if versus is None else _p_value(errors[versus], found),
                None if printed is None else printed.mean,
                None if versus is None else labels[versus],
                None if printed is None else printed.deviation,
            )
        )
    return rows


def _p_value(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Return the p value of Student's t-test for equal means, two-sided, as in the paper."""
    from scipy.stats import ttest_ind

    if min(len(one), len(other)) < 2:
        return None
    with warnings.catch_warnings():
        # equal errors for all seeds have no variance, hence no p value
        warnings.simplefilter("ignore", RuntimeWarning)
        p = float(ttest_ind(one, other).pvalue)
    return p if math.isfinite(p) else None


def figure_of(
    experiment: Experiment, results: Sequence[Sequence[dict[str, Any]]], rows: Sequence[AgainstPaper]
) -> Picture:
    """Draw the figure of an experiment: error against MACs, or by epoch."""
    if experiment.figure[1] == "epochs":
        return draw_learning_curves(
            [curve_of(i, row.label, runs) for i, (row, runs) in enumerate(zip(rows, results, strict=True))]
        )
    points = [
        PlottedPoint(i, row.label, row.macs, row.mean, row.macs, row.macs, (min(row.errors), max(row.errors)))
        for i, row in enumerate(rows)
    ]
    return draw_scatter(points, "million MACs an image", f"Error against MACs: {experiment.title}", "M")
