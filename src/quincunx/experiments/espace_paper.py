"""The ESPACE paper's figures and tables, timed here and, with data, judged here.

Lin et al., ESPACE (AAAI 2017). Single layers are also given to the paper's baselines,
low rank and CP at the ranks that it tried. Figures that it prints for unstated settings are
reported in sentences.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from quincunx.acceleration.identity import shared_fits, where_named
from quincunx.acceleration.journal import FolderJournal, check_run
from quincunx.acceleration.judge import response_errors, sample_batches
from quincunx.acceleration.timing import time_accelerated, time_layers
from quincunx.data import Drawn, ImageData, batches
from quincunx.experiments.printed import ESPACE, ESPACE_ORIGINALS, Gain
from quincunx.methods import CP, QCNN, BinaryConnect, Espace, LowRank
from quincunx.methods.points import Point
from quincunx.modules import set_module
from quincunx.networks.spec import spec_of
from quincunx.reading import read_json
from quincunx.report.figures import Mark, Picture, draw_tradeoff
from quincunx.surgery.calibration import Layer
from quincunx.surgery.method import Accelerated, Replacement
from quincunx.surgery.replace import replace_layers
from quincunx.train.recipes import Recipe, by_name, recipe_with
from quincunx.writing import write_json

__all__ = ["ESPACE_EXPERIMENTS", "EspaceExperiment", "draw_responses", "espace_by_name", "time_points"]

_JUDGED_AT_ONCE = 25
_RATES = ((1.0, "1"), (2 / 3, "2/3"), (0.5, "1/2"), (0.25, "1/4"), (0.2, "1/5"), (0.125, "1/8"))
_MASKS = {
    "random": "random masks",
    "uniform": "uniform masks",
    "uniform-eq8": "uniform masks, eq. 8",
    "impact": "impact masks",
}


@dataclass(frozen=True)
class EspaceExperiment:
    """A figure or table of the paper.

    Attributes:
        name: the figure's or table's name.
        title: what it shows.
        network: the network to accelerate.
        settings: of the network.
        side: of its images.
        layers: patterns of the layers to replace.
        points: settings, with the paper's figures if it has that setting.
        note: remarks of the paper besides its figures.
        elsewhere: figures of the paper that belong to none of the points.
        batch_size: of the paper's fine-tuning.
    """

    name: str
    title: str
    network: str
    settings: tuple[tuple[str, str], ...]
    side: int
    layers: tuple[str, ...]
    points: tuple[Point, ...]
    note: str = ""
    elsewhere: tuple[Gain, ...] = ()
    batch_size: int = 64

    @property
    def printed(self) -> tuple[tuple[str, float], ...]:
        """The paper's speed-ups for masks at a rate that it does not state."""
        return tuple((gain.method, gain.speedup) for gain in self.elsewhere if gain.method in _MASKS.values())

    @property
    def sentences(self) -> list[str]:
        """Return the paper's figures outside the points, one sentence per method, and the note."""
        gains: dict[str, list[Gain]] = {}
        for gain in self.elsewhere:
            stated = "" if gain.setting else ", at settings that it does not state"
            gains.setdefault(gain.method + stated, []).append(gain)
        sentences = [
            f"The paper prints for {name}: "
            + "; ".join(f"{gain}{f' ({gain.setting})' if gain.setting else ''}" for gain in some)
            + "."
            for name, some in gains.items()
        ]
        return [*sentences, *([self.note] if self.note else [])]

    def recipe(self, epochs: int) -> Recipe | None:
        """Return the paper's fine-tuning for a number of epochs, which it does not state; None for 0."""
        found = recipe_with(by_name("finetune"), epochs=epochs or None, batch_size=self.batch_size)
        return found if epochs else None

    def planned(self) -> dict[str, Any]:
        """Return its points, and the paper's figures for each and outside them, JSON-ready."""
        return {
            "experiment": self.name,
            "points": [point.name for point in self.points],
            "rows": [{"point": point.name, "paper": dict(point.paper)} for point in self.points],
            "paper": [asdict(gain) for gain in self.elsewhere],
        }

    def check_single(self) -> None:
        """Check that the experiment can be judged on data without a trained network.

        Raises:
            ValueError: it has more than one layer, so one layer's response error says too little.
        """
        if len(self.layers) != 1:
            raise ValueError(
                f"data: {self.name} replaces many layers; what it loses the error of the "
                "trained network (weights) tells, not a layer's response"
            )

    def without_data(self) -> EspaceExperiment:
        """Return a copy with masks that need no data: times depend only on the number of positions."""
        plain: dict[tuple[str, str], Point] = {}
        for point in self.points:
            method, key = point.method, (point.series, point.label)
            if isinstance(method, Espace):
                method, key = replace(method, mask="uniform", data=False), ("any masks", point.label)
            paper = point.paper or (plain[key].paper if key in plain else ())
            plain[key] = replace(point, series=key[0], method=method, paper=paper)
        return replace(self, points=tuple(plain.values()))


def _single(rank: int, ranks: Sequence[int]) -> tuple[Point, ...]:
    """Return points for one layer: low rank, masks of every kind at every rate, then the baselines."""
    points = [Point("low rank", "rate 1", LowRank(rank=rank))]
    for mask, series in _MASKS.items():
        for rate, text in _RATES[1:]:
            points.append(Point(series, f"rate {text}", Espace(rank=rank, rate=rate, mask=mask)))
    points += [Point("LRD", f"rank {k}", LowRank(rank=k)) for k in ranks]
    points += [Point("CPD", f"rank {k}", CP(rank=k)) for k in ranks]
    return (*points, *BinaryConnect.sweep(), *QCNN.sweep())


def _whole(share: float) -> tuple[Point, ...]:
    """Return points for all layers, with the share of full rank that the paper prints for one layer."""
    return tuple(
        Point("impact masks", f"rate {text}", Espace(rank=share, rate=rate)) for rate, text in _RATES[1:]
    )


def _experiment(name: str, points: Sequence[Point], **fields: Any) -> EspaceExperiment:
    """Build an experiment with the paper's figures: at their points, or else in ``elsewhere``."""
    gains = {(gain.method, gain.setting): gain for gain in ESPACE[name] if gain.setting}
    places = [(point.series, point.label) for point in points]
    found = tuple(
        replace(point, paper=gains[place].fields) if place in gains else point
        for point, place in zip(points, places, strict=True)
    )
    rest = tuple(gain for gain in ESPACE[name] if (gain.method, gain.setting) not in places)
    return EspaceExperiment(name=name, points=found, elsewhere=rest, **fields)


def _network_judged(network: str) -> str:
    """Return a sentence on the errors of a whole network."""
    before = ESPACE_ORIGINALS[network]
    return (
        f"The paper's errors are top-5 in points above {before.top5_error:g}%; its times are of batches of "
        f"{before.batch} on its own processor, {1000 * before.cpu_seconds:,.0f} ms dense. It does not state "
        "the ranks of whole networks; `quincunx compare` runs the other methods on a trained network."
    )


_ALEXNET = {"network": "alexnet", "settings": (("form", "original"),), "side": 227, "batch_size": 100}
_GOOGLENET = {"network": "googlenet", "settings": (("form", "original"),), "side": 224, "batch_size": 32}
ESPACE_EXPERIMENTS = {
    found.name: found
    for found in (
        _experiment(
            "espace-figure3",
            _single(71, (16, 24, 32, 48, 64, 128)),
            title="AlexNet conv2 (5 x 5, two groups), K = 71",
            layers=("features.conv2",),
            note="The paper states no rate for its 4.72x and 6.11x of this layer.",
            **_ALEXNET,
        ),
        _experiment(
            "espace-figure4",
            _single(59, (1, 4, 8, 16, 32, 64)),
            title="GoogLeNet inception 3b (3 x 3), K = 59",
            layers=("inception3b.branch2.1.conv",),
            note="The paper states no rate for its 3.11x of this layer.",
            **_GOOGLENET,
        ),
        _experiment(
            "espace-table2",
            _whole(71 / 240),
            title="AlexNet, every convolution, ranks by the share of conv2's K = 71",
            layers=(),
            note=_network_judged("alexnet"),
            **_ALEXNET,
        ),
        _experiment(
            "espace-table3",
            _whole(59 / 384),
            title="GoogLeNet, every convolution larger than 1 x 1, ranks by the share of 3b's K = 59",
            layers=(),
            note=_network_judged("googlenet"),
            **_GOOGLENET,
        ),
    )
}


def espace_by_name(name: str) -> EspaceExperiment:
    """Return a figure or table by its name.

    Raises:
        ValueError: an unknown name; the nearest one is listed first.

    Example:
        >>> espace_by_name("espace-figure3").points[0].series
        'low rank'
    """
    if name not in ESPACE_EXPERIMENTS:
        nearest = difflib.get_close_matches(name, ESPACE_EXPERIMENTS, n=4, cutoff=0.0)
        raise ValueError(f"experiment={name!r}: unknown; nearest first: {', '.join(nearest)}")
    return ESPACE_EXPERIMENTS[name]


def time_points(
    experiment: EspaceExperiment,
    model: nn.Module,
    *,
    batch: int,
    rounds: int,
    data: ImageData | None = None,
    calibration: int = 500,
    seed: int = 0,
    workers: int | None = None,
    peers: Sequence[str] = ("torch eager",),
    tell: Callable[[str], None] = lambda _: None,
    progress: bool = False,
    keep: Path | None = None,
) -> list[dict[str, Any]]:
    """Measure the experiment's speeds on this machine; return one JSON-ready row per point.

    Each row has the point's "series" and "label", the ratio of MACs and the measured speed-up of the
    replaced layers and, if there is more than one, of the whole network, over the dense ones by ``qx.fuse``
    and by "peers", other engines, and the printed figures in "paper". With ``data``, it has the
    "response_error" of the single layer on the test images, after fitting to ``calibration`` training images;
    without data, kinds of masks are timed once, since their times are equal. First every point is fitted and
    judged, then all are timed. The folder ``keep`` stores fits, which are not repeated; each call times
    again.

    Raises:
        ValueError: data for an experiment of more than one layer, whose loss a single response error does not
            show; points of another run in the folder.
    """
    if data is not None:
        experiment.check_single()
    else:
        experiment = experiment.without_data()
    with ExitStack() as stack:
        folder = keep or Path(stack.enter_context(TemporaryDirectory()))
        identity = {
            "experiment": experiment.name,
            "network": spec_of(model),
            "data": None if data is None else data.describe(),
            "calibration": calibration,
            "seed": seed,
        }
        check_run(folder, identity, "fitted points")
        fitted = _Fitted(experiment, model.eval(), data, calibration, seed, workers, folder)
        for point in experiment.points:
            if not fitted.has(point):
                tell(point.name)
                fitted.make(point)
        timing: dict[str, Any] = {"peers": peers, "batch": batch, "rounds": rounds, "progress": progress}
        return [_row(point, fitted, timing) for point in experiment.points]


class _Fitted:
    """The points of an experiment in a folder: the fitted layers of each, and their error."""

    def __init__(
        self,
        experiment: EspaceExperiment,
        model: nn.Module,
        data: ImageData | None,
        calibration: int,
        seed: int,
        workers: int | None,
        folder: Path,
    ) -> None:
        self.experiment, self.model, self.data, self.folder = experiment, model, data, folder
        self.calibration, self.seed, self.workers = calibration, seed, workers
        self.one = torch.zeros(1, spec_of(model)["in_channels"], experiment.side, experiment.side)

    @cached_property
    def images(self) -> Drawn | None:
        return (
            None
            if self.data is None
            else sample_batches(self.data, self.calibration, self.seed, workers=self.workers)
        )

    @cached_property
    def judged_on(self) -> list[Tensor]:
        if self.data is None:
            return []
        return [x for x, _ in batches(self.data.test, self.data, _JUDGED_AT_ONCE, workers=self.workers)]

    def has(self, point: Point) -> bool:
        return self._noted(point).exists()

    def make(self, point: Point) -> None:
        layers, model = self.experiment.layers, self.model
        found = replace_layers(
            model,
            point.method,
            where=where_named(model, layers),
            example_input=self.one,
            calibration=self.images,
            journal=shared_fits(
                self.folder / "fits",
                model,
                point.method,
                self.data,
                layers=layers,
                calibration=self.calibration,
                seed=self.seed,
            ),
        )
        names = list(found.replaced)
        if not names:
            raise ValueError(f"{point.name}: {'; '.join(found.skipped.values())}")
        notes: Any = found.model.quincunx_replaced
        journal = self._journal(point)
        for name, record in found.replaced.items():
            made = Replacement(found.model.get_submodule(name), notes[name], record)
            journal.keep(self._layer(name), made)
        errors = response_errors(model, found.model, names, self.judged_on) if self.judged_on else {}
        # written last, so that it vouches for a whole point
        write_json(self._noted(point), {"layers": names, "response_error": errors.get(names[0])})

    def read(self, point: Point) -> tuple[Accelerated, float | None]:
        """Return the network with the point's layers, and their response error."""
        noted, journal = read_json(self._noted(point)), self._journal(point)
        network, records = copy.deepcopy(self.model), {}
        for name in noted["layers"]:
            made = journal.recall(self._layer(name))
            if made is None:
                raise ValueError(f"{self._noted(point).parent}: the layer {name} is not there")
            network = set_module(network, name, made.module.eval())
            records[name] = made.record
        return Accelerated(network, records, {}), noted["response_error"]

    def _noted(self, point: Point) -> Path:
        return self.folder / point.folder / "fitted.json"

    def _journal(self, point: Point) -> FolderJournal:
        return FolderJournal(self.folder / point.folder, {"point": point.name, "method": repr(point.method)})

    def _layer(self, name: str) -> Layer:
        return Layer(name, (name,), self.model.get_submodule(name))


def _row(point: Point, fitted: _Fitted, timing: dict[str, Any]) -> dict[str, Any]:
    found, error = fitted.read(point)
    time = time_accelerated if len(found.replaced) > 1 else _time_alone
    speeds = speeds_of(time(fitted.model, found, fitted.one, **timing))
    return {
        "series": point.series,
        "label": point.label,
        "paper": dict(point.paper),
        "response_error": error,
        **speeds,
    }


def draw_responses(rows: Sequence[dict[str, Any]], printed: Sequence[tuple[str, float]] = ()) -> Picture:
    """Draw response error against the layer's measured speed-up, one line per method.

    The paper's speed-ups are vertical lines: its figures show the whole network's error.
    """
    lines = [(row["label"], row["paper"]["speedup"]) for row in rows if row["paper"]]
    return draw_tradeoff(
        [
            Mark(row["series"], row["label"], row["layers"]["speedup"], 100 * row["response_error"])
            for row in rows
        ],
        [],
        "speed-up of the layer, measured",
        "response error on test images (%)",
        [*lines, *printed],
    )


def _time_alone(model: nn.Module, found: Accelerated, one: Tensor, **timing: Any) -> dict[str, Any]:
    return {"layers": time_layers(model, found, one, **timing), "batch": timing["batch"]}


def speeds_of(result: dict[str, Any]) -> dict[str, Any]:
    """Return ratios of MACs and times for the replaced layers together and, if timed, for the network."""
    layers: Sequence[dict[str, Any]] = result["layers"]
    macs, seconds = (
        [sum(row[f"{what}{key}"] for row in layers) for key in ("before", "after")]
        for what in ("macs_", "seconds_")
    )
    by_layers = {
        name: sum(row["peers"][name]["seconds"] for row in layers) / seconds[1]
        for name in layers[0].get("peers", {})
    }
    found = {
        "layers": {"mac_ratio": macs[0] / macs[1], "speedup": seconds[0] / seconds[1], "peers": by_layers},
        "threads": layers[0]["threads"],
        "batch": result["batch"],
    }
    if len(layers) == 1:
        found["layers"]["speedup_range"] = [layers[0]["speedup"][key] for key in ("q1", "q3")]
    if "whole" in result:
        whole = result["whole"]
        found["network"] = {
            "mac_ratio": result["cost"]["before"]["macs"] / result["cost"]["after"]["macs"],
            "speedup": whole["speedup"]["median"],
            "peers": {name: peer["speedup"]["median"] for name, peer in whole.get("peers", {}).items()},
        }
    return found
