"""One page that compares several accelerations, from their result files. Reads JSON only."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quincunx.measure.tasks.scale import Scale, scale_in
from quincunx.report.acceleration import read_acceleration
from quincunx.report.figures import Mark, Picture, check_can_draw, draw_tradeoff, on_front
from quincunx.report.page import render
from quincunx.report.results import label_of, speed_words
from quincunx.report.verdict import points_lost
from quincunx.writing import write_text

__all__ = ["Run", "compared_sentences", "read_runs", "write_comparison"]


@dataclass(frozen=True)
class Run:
    """One acceleration under a name that no other on the page has.

    Attributes:
        name: of the folder, with as many folders above it as tell it apart.
        result: the content of its ``accelerate.json``.
    """

    name: str
    result: dict[str, Any]

    @property
    def scale(self) -> Scale:
        """What the score is called and measured in."""
        return scale_in(self.result)

    @property
    def speed(self) -> float:
        """How many times as fast as before, the median of the rounds."""
        return float(self.result["whole"]["speedup"]["median"])

    @property
    def lost(self) -> float:
        """The score lost on the test images, in the scale's unit."""
        return points_lost(self.result)

    @property
    def mac_ratio(self) -> float:
        """Multiply-adds before over those after."""
        return float(self.result["cost"]["before"]["macs"] / self.result["cost"]["after"]["macs"])


def read_runs(folders: Sequence[str | Path]) -> list[Run]:
    """Read the accelerations of some folders, under names that tell them apart.

    Raises:
        FileNotFoundError: a folder without ``accelerate.json``.
        ValueError: fewer than two folders, a folder twice, a file that is not the result of an acceleration.
    """
    places = [Path(folder).resolve() for folder in folders]
    twice = [str(place) for place, count in Counter(places).items() if count > 1]
    if twice or len(places) < 2:
        what = f"{twice[0]} is named twice" if twice else "one folder alone"
        raise ValueError(f"folders: {what}; a comparison needs two different ones or more")
    return [Run(name, read_acceleration(place)) for name, place in zip(_names(places), places, strict=True)]


def _names(places: Sequence[Path]) -> list[str]:
    """Return the last part of each path, or as many as tell all apart."""
    for count in range(1, max(len(place.parts) for place in places) + 1):
        names = ["/".join(place.parts[-count:]) for place in places]
        if len(set(names)) == len(names):
            break
    return names


def _doubts(runs: Sequence[Run]) -> list[str]:
    """Return a sentence for each thing that makes the runs differ besides what was tried."""
    facts = {
        "networks before": [label_of(run.result["network"]) for run in runs],
        "data": [f"{run.result['data']['name']}, {run.result['data']['test']} test images" for run in runs],
        "scores": [run.scale.name for run in runs],
        "processors": [run.result["environment"]["cpu"] for run in runs],
        "threads": [str(run.result["whole"]["threads"]) for run in runs],
        "batch sizes": [str(run.result["batch"]) for run in runs],
        "commits": [str(run.result["environment"]["commit"]) for run in runs],
    }
    spoils = {
        "networks before": "neither speeds nor losses compare networks that began differently",
        "data": "losses on different images cannot be compared",
        "scores": "losses of different scores cannot be compared",
        "processors": "speed-ups hold for one processor",
        "threads": "speed-ups depend on the number of threads",
        "batch sizes": "speed-ups depend on the batch",
        "commits": "the code changed in between",
    }
    return [
        f"Different {what}: {'; '.join(dict.fromkeys(values))}; {spoils[what]}."
        for what, values in facts.items()
        if len(set(values)) > 1
    ]


def _comparable(runs: Sequence[Run]) -> bool:
    """Whether losses are on one scale and the same images."""
    return len({(run.scale, run.result["data"]["name"], run.result["data"]["test"]) for run in runs}) == 1


def compared_sentences(runs: Sequence[Run]) -> list[str]:
    """Return what is to be seen: the fastest, the one that loses least, who is on the front, and doubts."""
    fastest = max(runs, key=lambda run: run.speed)
    speed = fastest.result["whole"]["speedup"]
    sentences = [f"Fastest: {fastest.name}, {speed_words(speed['median'], speed['q1'], speed['q3'])}."]
    if _comparable(runs):
        least = min(runs, key=lambda run: run.lost)
        scale = least.scale
        lost = (
            f"{scale.amount(least.lost, 2)} of {scale.of_what()} lost" if least.lost > 0 else "nothing lost"
        )
        sentences.append(f"Least loss: {least.name}, {lost} at {least.speed:.2f}x.")
        front = [run.name for run, best in zip(runs, _front(runs), strict=True) if best]
        behind = [run.name for run in runs if run.name not in front]
        if behind:
            sentences.append(
                f"Behind the others on these test images: {', '.join(behind)}; another is as fast and loses "
                "no more, and is better in one of the two."
            )
    return sentences + _doubts(runs)


def _front(runs: Sequence[Run]) -> list[bool]:
    return on_front([(run.lost, run.speed) for run in runs])


def _drawn(runs: Sequence[Run]) -> Picture:
    points = [("before", 1.0, 0.0), *((run.name, run.speed, run.lost) for run in runs)]
    best = on_front([(drop, gain) for _, gain, drop in points])
    marks = [
        Mark(name, label_of(runs[0].result["network"]) if name == "before" else "after", gain, drop, front)
        for (name, gain, drop), front in zip(points, best, strict=True)
    ]
    scale = runs[0].scale
    return draw_tradeoff(marks, [], "speed-up", f"{scale.of_what()} lost ({scale.unit})")


def _layers(runs: Sequence[Run]) -> list[tuple[str, list[Mapping[str, Any] | None]]]:
    """Return each layer that a run replaced, with its row in every run or None."""
    rows = [{row["name"]: row for row in run.result["layers"]} for run in runs]
    names = dict.fromkeys(name for found in rows for name in found)
    return [(name, [found.get(name) for found in rows]) for name in names]


def write_comparison(folders: Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Write one self-contained page that compares several accelerations.

    Args:
        folders: each with the ``accelerate.json`` of a run, two or more.
        out: the page, or a folder for it; by default ``comparison.html`` in the nearest folder that holds
            all of them.

    Returns:
        The page's path.

    Raises:
        FileNotFoundError: a folder without a result.
        ValueError: as :func:`read_runs`.
        ModuleNotFoundError: the ``report`` extra is not installed.
    """
    check_can_draw()
    runs = read_runs(folders)
    page = Path(out) if out is not None else Path(os.path.commonpath([Path(f).resolve() for f in folders]))
    if page.is_dir():
        page = page / "comparison.html"
    same = _comparable(runs)
    score, unit = (runs[0].scale.name, f" ({runs[0].scale.unit})") if same else ("score", "")
    columns = [
        *("run", "network", "method", "speed-up", "ms before", "ms after", "MAC ratio"),
        *(f"{score} before", f"{score} after", f"lost{unit}", "MB on disk"),
        *["on the front"] * same,
    ]
    html = render(
        "compared.html.jinja",
        title=f"{len(runs)} accelerated networks compared",
        runs=runs,
        columns=columns,
        labels=[label_of(run.result["network"]) for run in runs],
        front=_front(runs) if same else [False] * len(runs),
        same=same,
        sentences=compared_sentences(runs),
        picture=_drawn(runs) if same else None,
        layers=_layers(runs),
    )
    write_text(page, html)
    return page
