"""What the ESPACE paper's figures and tables hold, timed here and, with data, judged here.

Lin et al., ESPACE (AAAI 2017). Speed-ups and errors that the paper prints and that were not at hand are
left out. The layers alone are also given to the methods that the paper compares with.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from quincunx.acceleration import (
    response_errors,
    sample,
    shared_fits,
    time_accelerated,
    time_layers,
    where_named,
)
from quincunx.artifact import read_json, spec_of, write_json
from quincunx.comparison import SWEEPS, Point
from quincunx.data import ImageData, batches
from quincunx.figures import Mark, Picture, tradeoff
from quincunx.journal import FolderJournal, check_run
from quincunx.methods import Espace, LowRank
from quincunx.streams import Layer
from quincunx.surgery import Accelerated, Replacement, accelerate, put

__all__ = ["ESPACE_EXPERIMENTS", "EspaceExperiment", "espace_by_name", "response_picture", "time_points"]

_JUDGED_AT_ONCE = 25
_RATES = ((1.0, "1"), (2 / 3, "2/3"), (0.5, "1/2"), (0.25, "1/4"), (0.2, "1/5"), (0.125, "1/8"))
_OTHERS = ("lrd", "cpd", "binaryconnect", "qcnn")


@dataclass(frozen=True)
class EspaceExperiment:
    """A figure or table of the paper.

    Attributes:
        name, title: what it is called, and what it shows.
        network, settings: what is accelerated, and the side of its images.
        layers: patterns of the layers that are replaced.
        points: settings, with the paper's figures where known.
        printed: speed-ups of the paper that belong to none of the points, by what they are of.
        note: what the paper says beyond them.
    """

    name: str
    title: str
    network: str
    settings: tuple[tuple[str, str], ...]
    side: int
    layers: tuple[str, ...]
    points: tuple[Point, ...]
    note: str = ""
    printed: tuple[tuple[str, float], ...] = ()

    def without_data(self) -> EspaceExperiment:
        """With masks that need none: times depend on how many positions are computed, not on which."""
        plain: dict[tuple[str, str], Point] = {}
        for point in self.points:
            method, key = point.method, (point.series, point.label)
            if isinstance(method, Espace):
                method, key = replace(method, mask="uniform", data=False), ("any masks", point.label)
            paper = point.paper or (plain[key].paper if key in plain else ())
            plain[key] = replace(point, series=key[0], method=method, paper=paper)
        return replace(self, points=tuple(plain.values()))


def _single(rank: int, printed: dict[str, float]) -> tuple[Point, ...]:
    """One layer: low rank alone, masks of every kind at every rate, then the methods compared with."""
    points = [Point("low rank", "rate 1", LowRank(rank=rank))]
    for mask in ("random", "uniform", "impact"):
        for rate, text in _RATES[1:]:
            paper = (("speedup", printed[text]),) if text in printed and mask == "impact" else ()
            method = Espace(rank=rank, rate=rate, mask=mask)
            points.append(Point(f"{mask} masks", f"rate {text}", method, paper))
    return (*points, *(point for name in _OTHERS for point in SWEEPS[name]()))


def _whole(share: float, printed: dict[str, tuple[float, float]]) -> tuple[Point, ...]:
    """Every layer with the share of its full rank that the paper's printed rank is of its layer's."""
    points = []
    for rate, text in _RATES[2:5]:
        paper = tuple(zip(("speedup", "drop"), printed[text], strict=True)) if text in printed else ()
        points.append(Point("impact masks", f"rate {text}", Espace(rank=share, rate=rate), paper))
    return tuple(points)


_ORIGINAL = (("form", "original"),)
ESPACE_EXPERIMENTS = {
    found.name: found
    for found in (
        EspaceExperiment(
            "espace-figure3",
            "AlexNet conv2 (5 x 5, two groups), K = 71",
            "alexnet",
            _ORIGINAL,
            227,
            ("features.conv2",),
            _single(71, {"1/4": 4.72, "1/5": 6.11}),
        ),
        EspaceExperiment(
            "espace-figure4",
            "GoogLeNet inception 3b (3 x 3), K = 59",
            "googlenet",
            _ORIGINAL,
            224,
            ("inception3b.branch2.1.conv",),
            _single(59, {}),
            "the paper prints a speed-up of 3.11x for this layer; its rate was not at hand",
            (("rate not at hand", 3.11),),
        ),
        EspaceExperiment(
            "espace-table2",
            "AlexNet, every convolution, ranks by the share of conv2's K = 71",
            "alexnet",
            _ORIGINAL,
            227,
            (),
            _whole(71 / 240, {"1/5": (5.48, 0.97)}),
            "errors are top-5 in the paper; it also prints 4.15x for 0.01 points, whose rate was not at hand",
        ),
        EspaceExperiment(
            "espace-table3",
            "GoogLeNet, every convolution larger than 1 x 1, ranks by the share of 3b's K = 59",
            "googlenet",
            _ORIGINAL,
            224,
            (),
            _whole(59 / 384, {"1/5": (4.12, 0.68)}),
            "errors are top-5 in the paper; it also prints 3.76x for 0.04 points, whose rate was not at hand",
        ),
    )
}


def espace_by_name(name: str) -> EspaceExperiment:
    """A figure or table by its name.

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
    """The experiment's speeds on this machine; one JSON-ready row a point.

    Each row has the point's "series" and "label", the ratio of MACs and the measured speed-up of the
    replaced layers and, if there is more than one, of the whole network, over the dense ones by ``qx.fuse``
    and by "peers", other engines, and "paper" with what is printed for it. With ``data``, "response_error"
    of the one layer on its test images, after fitting to ``calibration`` training images; without, kinds of
    masks are timed once, since their times are the same. First every point is fitted and judged, then all
    are timed. In the folder ``keep`` what is fitted stays, and is not fitted again; each call times anew.

    Raises:
        ValueError: data for an experiment of more than one layer, whose errors a response does not tell;
            points of another run in the folder.
    """
    if data is not None and len(experiment.layers) != 1:
        raise ValueError(
            f"data: {experiment.name} replaces many layers; what it loses the error of the "
            "trained network (weights) tells, not a layer's response"
        )
    if data is None:
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
    """The points of an experiment in a folder: of each the layers that its method made, and their error."""

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
    def images(self) -> list[tuple[Tensor, Tensor]] | None:
        return None if self.data is None else sample(self.data, self.calibration, self.seed)

    @cached_property
    def judged_on(self) -> list[Tensor]:
        if self.data is None:
            return []
        return [x for x, _ in batches(self.data.test, self.data, _JUDGED_AT_ONCE, workers=self.workers)]

    def has(self, point: Point) -> bool:
        return self._noted(point).exists()

    def make(self, point: Point) -> None:
        layers, model = self.experiment.layers, self.model
        found = accelerate(
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
        # last, so that it stands for a whole point
        write_json(self._noted(point), {"layers": names, "response_error": errors.get(names[0])})

    def read(self, point: Point) -> tuple[Accelerated, float | None]:
        """The network with the point's layers, and their response error."""
        noted, journal = read_json(self._noted(point)), self._journal(point)
        network, records = copy.deepcopy(self.model), {}
        for name in noted["layers"]:
            made = journal.recall(self._layer(name))
            if made is None:
                raise ValueError(f"{self._noted(point).parent}: the layer {name} is not there")
            network = put(network, name, made.module.eval())
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


def response_picture(rows: Sequence[dict[str, Any]], printed: Sequence[tuple[str, float]] = ()) -> Picture:
    """Response error against the layer's measured speed-up, a line a method.

    The paper's speed-ups are upright lines: its figures have the whole network's error.
    """
    lines = [(row["label"], row["paper"]["speedup"]) for row in rows if row["paper"]]
    return tradeoff(
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
    """Ratios of MACs and times, of the replaced layers together and, where timed, of the network."""
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
