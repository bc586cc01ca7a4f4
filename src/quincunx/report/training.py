"""Turn result files into a table, sentences and one self-contained page. Reads JSON only."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quincunx.measure.tasks.scale import ERROR, scale_in
from quincunx.report.figures import (
    Curve,
    Picture,
    PlottedPoint,
    check_can_draw,
    draw_learning_curves,
    draw_sampling,
    draw_scatter,
    draw_speedups,
)
from quincunx.report.page import render
from quincunx.report.results import (
    Line,
    Results,
    collect,
    result_lines,
    sampling_name,
    sampling_of,
    verdicts,
)
from quincunx.writing import write_text

__all__ = [
    "curve_of",
    "draw_pictures",
    "draw_speedup_figure",
    "write_report",
]


# ---------------------------------------------------------------- reading


# ---------------------------------------------------------------- the table


# ---------------------------------------------------------------- the page


def curve_of(look: int, label: str, runs: Sequence[dict[str, Any]]) -> Curve:
    """Return test error, or another score, by epoch; of several seeds the mean over those with the epoch."""
    scale = scale_in(runs[0])
    found: dict[int, list[float]] = {}
    for run in runs:
        for entry in run["history"]:
            found.setdefault(entry["epoch"], []).append(scale.factor * entry[f"test_{scale.key}"])
    # half an image
    floor = 50 / runs[0]["data"]["test"] if scale == ERROR else -math.inf
    return Curve(
        look, label, sorted(found), [statistics.fmean(found[epoch]) for epoch in sorted(found)], floor
    )


def draw_pictures(results: Results, rows: list[Line]) -> list[Picture]:
    """Draw learning curves, and error against MACs and against each measured time."""
    curves = [curve_of(i, network.label, network.runs) for i, network in enumerate(results.networks)]
    macs = [
        PlottedPoint(
            i, row.label, row.macs / 1e6, row.scale.factor * row.error, row.macs / 1e6, row.macs / 1e6
        )
        for i, row in enumerate(rows)
    ]
    scale = rows[0].scale
    word = "Error" if scale == ERROR else scale.name
    draw_pictures = [
        draw_learning_curves(curves, scale),
        draw_scatter(macs, "million MACs an image", f"{word} against MACs", "M", scale),
    ]
    for setting in (timing["setting"] for timing in results.timings):
        times = []
        for i, row in enumerate(rows):
            if setting in row.times:
                median, low, high = (1e3 * seconds for seconds in row.times[setting])
                times.append(PlottedPoint(i, row.label, median, scale.factor * row.error, low, high))
        if times:
            title = f"{word} against measured time, {setting}"
            xlabel = f"ms, median and quartiles ({setting})"
            draw_pictures.append(draw_scatter(times, xlabel, title, "ms", scale))
    return draw_pictures


def write_report(folder: str | Path | Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Write ``report.html`` for the results below a folder, or some: one self-contained file.

    Args:
        folder: the folder of the result files, or several whose runs are compared on one page.
        out: the page, or a folder for it; by default ``report.html`` in ``folder``, or of several
            ``comparison.html`` in the nearest folder that holds all of them.

    Returns:
        The page's path.

    Raises:
        FileNotFoundError: no results in the folder.
        ValueError: a file that is not JSON or is incomplete; runs on different data.
        ModuleNotFoundError: the ``report`` extra is not installed.
    """
    check_can_draw()
    folders = [Path(folder)] if isinstance(folder, str | Path) else [Path(one) for one in folder]
    results = collect(*folders)
    page = Path(out) if out is not None else Path(os.path.commonpath([one.absolute() for one in folders]))
    if len(folders) == 1 and out is None:
        page = folders[0]
    if page.is_dir() or out is None:
        page = page / ("report.html" if len(folders) == 1 else "comparison.html")
    rows = result_lines(results)
    samplings = {s: sampling_name(s) for n in results.networks if (s := sampling_of(n.spec)) is not None}
    others = len(rows) - 1
    named = f"{rows[0].label} and {others} other network{'s' * (others > 1)}" if others else rows[0].label
    html = render(
        "training.html.jinja",
        title=f"{named} on {results.networks[0].runs[0]['data']['name']}",
        rows=rows,
        settings=[timing["setting"] for timing in results.timings],
        verdicts=verdicts(rows),
        pictures=draw_pictures(results, rows),
        samplings=[draw_sampling(sampling, name) for sampling, name in samplings.items()],
        run=results.networks[0].runs[0],
        seeds=sorted({run["seed"] for run in results.runs}),
        epochs=sorted({run["recipe"]["epochs"] for run in results.runs}),
        timings=results.timings,
        standard_error=(
            math.sqrt(rows[0].error * (1 - rows[0].error) / rows[0].tested)
            if rows[0].scale == ERROR
            else None
        ),
    )
    write_text(page, html)
    return page


def draw_speedup_figure(result: dict[str, Any]) -> bytes:
    """Draw a benchmark's result file as an SVG of speed-up against MAC ratio."""
    points = [
        (f"{name}, {_told_apart(row)}", entry["mac_ratio"], entry["speedup"])
        for row in result["rows"]
        for name, entry in row["candidates"].items()
    ]
    where = result["environment"]
    title = f"Speed-up over the best dense, {result['suite']}, {where.get('device', where['cpu'])}"
    return draw_speedups(points, title).content


def _told_apart(row: dict[str, Any]) -> str:
    """Return what distinguishes a benchmark's rows of one case."""
    if "dtype" in row:
        return f"{row['dtype']}, batch {row['batch']}"
    return f"{row['threads']} thread{'s' * (row['threads'] > 1)}"
