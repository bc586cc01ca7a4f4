"""Compare methods, or settings of one, on one trained network: accuracy lost against the gain."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from itertools import compress
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import nn

from quincunx.acceleration.free import SmallerInput
from quincunx.acceleration.identity import trained_identity
from quincunx.acceleration.journal import check_run
from quincunx.acceleration.judge import sample_batches
from quincunx.acceleration.lowered import ready_for
from quincunx.acceleration.pipeline import accelerate_trained
from quincunx.acceleration.timing import time_together
from quincunx.data import ImageData
from quincunx.experiments.printed import ESPACE
from quincunx.measure.environment import environment
from quincunx.measure.tasks import Task, classification
from quincunx.measure.tasks.scale import ERROR, Scale, scale_in
from quincunx.methods import Espace
from quincunx.methods.espace import RATES
from quincunx.methods.points import Point
from quincunx.methods.registry import ALIASES, METHODS
from quincunx.methods.spatialblock import SpatialBlock
from quincunx.networks.artifact import load, save
from quincunx.networks.spec import spec_of
from quincunx.reading import read_json
from quincunx.report.figures import Mark, Picture, draw_tradeoff, on_front
from quincunx.surgery.blocks import find_blocks
from quincunx.train.evaluation import label_with
from quincunx.train.processes import ALONE, Ranks
from quincunx.train.recipes import Recipe
from quincunx.writing import write_json

__all__ = [
    "SWEEPS",
    "Compared",
    "Point",
    "compare_methods",
    "draw_comparison",
    "points_named",
    "points_suited",
    "with_fronts",
]


@dataclass(frozen=True)
class Compared:
    """The result of a point.

    Attributes:
        series: of the point.
        label: of the point.
        draw: of the point.
        drop: test error after minus before, in points; in another task the score lost, in its unit.
        top5_drop: the same for the top-5 error; None in another task.
        untuned_drop: the drop without fine-tuning, None if there was no fine-tuning.
        p: McNemar's p value for the difference in accuracy.
        tested: number of test images.
        seconds_before: of the original network, measured in turn with the other points.
        seconds_after: of the whole network, measured in turn with the other points.
        speedup: their ratio, the median of rounds.
        speedup_range: the middle half of the rounds' ratios.
        layers_speedup: of the replaced layers together, measured when the point was made.
        mac_ratio: MACs before over after.
        bytes: of the weights on disk.
        bytes_before: of the original's weights on disk.
        fronts: the trade-offs in which it is on the Pareto front: "speed", "MACs", "bytes". The original
            network is a point of each; draws of one setting count as one point, their mean.
        diverged: whether fine-tuning diverged; then this is the network from before it.
        paper: figures that the paper prints.
    """

    series: str
    label: str
    draw: str
    drop: float
    top5_drop: float | None
    untuned_drop: float | None
    p: float
    tested: int
    seconds_before: float
    seconds_after: float
    speedup: float
    speedup_range: tuple[float, float]
    layers_speedup: float
    mac_ratio: float
    bytes: int
    bytes_before: int
    diverged: bool
    paper: dict[str, float]
    fronts: tuple[str, ...] = ()

    @property
    def setting(self) -> str:
        """Return the label, and whether fine-tuning diverged."""
        return f"{self.label} (diverged)" if self.diverged else self.label

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-ready values."""
        return asdict(self)


# what accuracy is given up for -> in words, and the gain of a point
_GAINS: dict[str, tuple[str, Callable[[Compared], float]]] = {
    "speed": ("speed-up of the whole network, measured", lambda row: row.speedup),
    "MACs": ("MACs before / after", lambda row: row.mac_ratio),
    "bytes": ("bytes on disk before / after", lambda row: row.bytes_before / row.bytes),
}
# network, speed-up of all convolutions, points of top-5 error gained, at the rates 1/4 and 1/5
PRINTED = tuple(
    (network, gain.speedup, gain.drop or 0.0)
    for network, table in (("AlexNet", "espace-table2"), ("GoogLeNet", "espace-table3"))
    for gain in ESPACE[table]
    if gain.setting in ("rate 1/5", "rate 1/4")
)
_SEEDS = 3


def _masks() -> list[Point]:
    drawn = [
        Point(
            "espace, random",
            f"rate {text}",
            Espace(rank=0.5, rate=rate, mask="random", mask_seed=seed),
            draw=f"seed {seed}",
        )
        for rate, text in RATES
        for seed in range(_SEEDS)
    ]
    return [*Espace.sweep("impact"), *Espace.sweep("uniform"), *drawn]


# name -> the points of a method's curve; "masks" are ESPACE's three kinds, "input" smaller images
SWEEPS: dict[str, Callable[[], list[Point]]] = {
    **{name: method.sweep for name, method in METHODS.items()},
    "masks": _masks,
    "input": SmallerInput.sweep,
}


def points_named(methods: Iterable[str], patterns: Sequence[str] = ()) -> list[Point]:
    """Return the settings of some methods of ``SWEEPS``; with patterns, those whose folder matches one.

    Raises:
        ValueError: an unknown method, a pattern that matches nothing.

    Example:
        >>> [point.name for point in points_named(["masks"], ["*-impact-*1of4", "*-1of4-seed-2"])]
        ['espace, impact, rate 1/4', 'espace, random, rate 1/4, seed 2']
    """
    points: list[Point] = []
    for name in methods:
        known = ALIASES.get(name, name)
        if known not in SWEEPS:
            raise ValueError(f"methods={name!r}: expected some of {', '.join(SWEEPS)}")
        points += SWEEPS[known]()
    for pattern in patterns:
        if not any(fnmatchcase(point.folder, pattern) for point in points):
            listed = ", ".join(point.folder for point in points)
            raise ValueError(f"points={pattern!r}: matches none of {listed}")
    return [p for p in points if not patterns or any(fnmatchcase(p.folder, one) for one in patterns)]


def points_suited(points: Iterable[Point], model: nn.Module) -> list[Point]:
    """Return the settings whose method has something to replace: blocks of ConvNeXt are rare.

    Example:
        >>> points_suited(points_named(["spatialblock"]), nn.Conv2d(3, 8, 3))
        []
    """
    blocks = bool(find_blocks(model)[0])
    return [point for point in points if blocks or not isinstance(point.method, SpatialBlock)]


def compare_methods(
    model: nn.Module,
    points: Iterable[Point],
    data: ImageData,
    out: str | Path,
    *,
    recipe: Recipe | None = None,
    tell: Callable[[str], None] = lambda _: None,
    ranks: Ranks = ALONE,
    **options: Any,
) -> list[Compared]:
    """Accelerate one network with every point, one folder and one JSON file each, and compare them.

    All points use the same data and fine-tuning, and points that fit layers in the same way share the fits.
    A point with an existing result is not made again. A point whose fine-tuning diverges keeps the network
    from before it and is marked. A point that its method refuses is left out; "refused" in
    ``comparison.json`` says why. At the end the whole networks are timed in turn with each other; the same
    call times them again.

    Args:
        model: a trained network with a spec.
        points: the settings; their series, labels and draws together must differ.
        data: as in :func:`quincunx.acceleration.pipeline.accelerate_trained`.
        out: folder; each point gets a folder of its name in it.
        recipe: of fine-tuning; None for no fine-tuning.
        tell: called with each point's name before it is made.
        ranks: this process's place among several, as in
            :func:`quincunx.acceleration.pipeline.accelerate_trained`; the first one tells and writes.
        options: as in :func:`quincunx.acceleration.pipeline.accelerate_trained`.

    Raises:
        ValueError: two points of one name; every point is refused; the folder holds points of another
            network, data or fine-tuning (the message lists the difference).
        RunFailed: fine-tuning could not continue for another reason than divergence.
    """
    # once for all points
    task: Task = options.get("task") or classification()
    data = label_with(model, data, options.get("workers"), task, ranks)
    out, found = Path(out), []
    refused: dict[str, str] = {}
    how = None if recipe is None else recipe.to_dict()
    identity = {**trained_identity(model, data, **options), "recipe": how}
    ranks.from_first(lambda: check_run(out, identity, "points"))
    original = model
    if options.get("dtype") == torch.int8 and ranks.first:
        count, seed = options.get("calibration", 500), options.get("seed", 0)
        images = sample_batches(data, count, seed, task=task, workers=options.get("workers"))
        original = ready_for(model, torch.int8, images, task)
    before = ranks.from_first(lambda: save(original, out / "original") / "weights.safetensors")
    names: set[str] = set()
    for point in points:
        if point.folder in names:
            raise ValueError(f"points: two are called {point.name}")
        names.add(point.folder)
        if ranks.first:
            tell(point.name)
        folder = out / point.folder
        try:
            result = ranks.from_first(partial(_existing, folder / "accelerate.json"))
            result = result or accelerate_trained(
                model,
                point.method,
                data,
                folder,
                recipe=recipe,
                fits=out / "fits",
                keep_diverged=True,
                # take the last epoch for all: a comparison must not choose by the test images
                keep_best=False,
                ranks=ranks,
                **options,
            )
        except ValueError as error:
            # do not lose hours of other points because of one that fails
            refused[point.name] = str(error)
            if ranks.first:
                tell(f"refused: {error}")
            continue
        found.append((point, folder, result))
    if not found:
        raise ValueError("; ".join(dict.fromkeys(refused.values())) or "points: there are none")
    return ranks.from_first(
        lambda: _timed_rows(original, model, data, out, found, refused, before.stat().st_size, options)
    )


def _existing(place: Path) -> dict[str, Any] | None:
    """Return the result of a point that was made before, or None."""
    return read_json(place) if place.exists() else None


def _timed_rows(
    original: nn.Module,
    model: nn.Module,
    data: ImageData,
    out: Path,
    found: Sequence[tuple[Point, Path, dict[str, Any]]],
    refused: Mapping[str, str],
    before: int,
    options: Mapping[str, Any],
) -> list[Compared]:
    """Time the networks of all points in turn, and write the comparison."""
    own = spec_of(model)["kind"] == "factory"
    factory = partial(copy.deepcopy, model) if own else None
    sizes = {folder.name: tuple(result["input"]) for _, folder, result in found if result.get("input")}
    timing = {key: value for key, value in options.items() if key in ("batch", "rounds", "progress", "dtype")}
    times = time_together(
        original,
        {folder.name: partial(load, folder / "model", factory=factory) for _, folder, _ in found},
        (data.in_channels, *data.size),
        sizes=sizes,
        **timing,
    )
    rows = with_fronts(
        [_row(point, folder, result, before, times[folder.name]) for point, folder, result in found]
    )
    shared: tuple[str, ...] = ("network", "data", "calibration", "seed", "recipe", "batch", "how")
    shared += ("task",) if "task" in found[0][2] else ()
    content = {
        "schema": 2,
        "kind": "comparison",
        **{key: found[0][2][key] for key in shared},
        "before": found[0][2]["stages"][0],
        "rounds": next(iter(times.values()))["rounds"],
        "rows": [r.to_dict() for r in rows],
        "refused": refused,
        "environment": environment(),
    }
    write_json(out / "comparison.json", content)
    return rows


def _drop(result: dict[str, Any], stage: int) -> float:
    scale = scale_in(result)
    after, first = (float(result["stages"][i][scale.key]) for i in (stage, 0))
    return scale.lost(first, after)


def _top5_drop(result: dict[str, Any]) -> float | None:
    if "task" in result:
        return None
    after, first = (float(result["stages"][i]["top5_error"]) for i in (-1, 0))
    return 100 * (after - first)


def _row(point: Point, folder: Path, result: dict[str, Any], before: int, times: dict[str, Any]) -> Compared:
    layers, cost, last = result["layers"], result["cost"], result["stages"][-1]
    dense, fast = (sum(row[f"seconds_{key}"] for row in layers) for key in ("before", "after"))
    # behind fine-tuning a stage in another number format may stand
    untuned = -3 if last["name"].startswith("in ") else -2
    return Compared(
        point.series,
        point.label,
        point.draw,
        _drop(result, -1),
        _top5_drop(result),
        None if result["recipe"] is None else _drop(result, untuned),
        last["p"],
        result["data"]["test"],
        times["seconds_before"],
        times["seconds_after"],
        times["speedup"]["median"],
        (times["speedup"]["q1"], times["speedup"]["q3"]),
        dense / fast if fast else 1.0,
        cost["before"]["macs"] / cost["after"]["macs"],
        (folder / "model" / "weights.safetensors").stat().st_size,
        before,
        result.get("diverged") is not None,
        dict(point.paper),
    )


def with_fronts(rows: Sequence[Compared]) -> list[Compared]:
    """Return the rows, each with the trade-offs in which it is on the front; see :class:`Compared`."""
    settings: dict[tuple[str, str], list[Compared]] = {}
    for row in rows:
        settings.setdefault((row.series, row.label), []).append(row)
    fronts: dict[tuple[str, str], list[str]] = {key: [] for key in settings}
    for what, (_, gain) in _GAINS.items():
        means = [(fmean(r.drop for r in some), fmean(gain(r) for r in some)) for some in settings.values()]
        # the unchanged network: no loss, no gain
        _, *best = on_front([(0.0, 1.0), *means])
        for key in compress(settings, best):
            fronts[key].append(what)
    return [replace(row, fronts=tuple(fronts[row.series, row.label])) for row in rows]


def draw_comparison(
    rows: Sequence[Compared], *, top5: bool = False, scale: Scale = ERROR
) -> dict[str, Picture]:
    """Draw accuracy lost against measured speed-up, fewer MACs, and bytes on disk, one line per series.

    With ``top5`` the speed-up is also drawn against the top-5 error. Hollow points are printed in the
    ESPACE paper: for its own networks, which are named, where it does not have ours.
    """
    printed = [
        Mark(f"{network}'s convolutions, top-5 (the paper)", "", gain, drop)
        for network, gain, drop in PRINTED
    ]
    same = [
        Mark(row.series, row.label, row.paper["speedup"], row.paper["drop"])
        for row in rows
        if {"speedup", "drop"} <= set(row.paper)
    ]
    found = {
        f"drop-{what.lower()}": draw_tradeoff(
            [Mark(row.series, row.setting, gain(row), row.drop, what in row.fronts) for row in rows],
            (same or (printed if scale == ERROR else [])) if what == "speed" and not top5 else [],
            label,
            f"{scale.of_what()} lost ({scale.unit})",
        )
        for what, (label, gain) in _GAINS.items()
    }
    if top5:
        label, gain = _GAINS["speed"]
        marks = [Mark(row.series, row.setting, gain(row), row.top5_drop or 0.0) for row in rows]
        found["top5-drop-speed"] = draw_tradeoff(
            marks, same or printed, label, "top-5 accuracy lost (points)"
        )
    return found
