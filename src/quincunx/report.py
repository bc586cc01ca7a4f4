"""From result files to tables, figures and one self-contained page. Reads JSON only."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quincunx.artifact import read_json, write_atomically
from quincunx.sampling import CHESSBOARD, QUARTER, THREE_QUARTERS, Sampling, parse

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Line", "collect", "label_of", "lines", "write_report"]

_TEMPLATE = Path(__file__).with_name("report.html.jinja")
_SHORT: dict[Sampling, str] = {QUARTER: "1/4", CHESSBOARD: "2/4", THREE_QUARTERS: "3/4"}
# Okabe and Ito's palette, told apart also by people who are colour-blind
_COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = "osD^vPX"


def label_of(network: dict[str, Any]) -> str:
    """A short name for a network's spec, such as "rsbn20 2/4"."""
    settings = dict(network.get("settings", {}))
    parts = [str(network["name"])]
    if network["name"].startswith(("rsbn", "csbn")) or "sampling" in settings:
        sampling = parse(settings.pop("sampling", CHESSBOARD))
        parts.append(_SHORT.get(sampling, repr(sampling)))
    if settings.get("down", "stride") != "stride":
        parts.append(str(settings["down"]))
    return " ".join(parts)


@dataclass(frozen=True)
class Results:
    """Training runs and timings found below a folder."""

    runs: tuple[dict[str, Any], ...]
    timings: tuple[dict[str, Any], ...]


def collect(folder: str | Path) -> Results:
    """Every result file below a folder.

    Raises:
        FileNotFoundError: no such folder, or no result in it.
        ValueError: a file that is not JSON.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    found: dict[str, list[dict[str, Any]]] = {"train": [], "latency": []}
    for path in sorted(folder.rglob("*.json")):
        content = read_json(path)
        if isinstance(content, dict) and content.get("schema") == 1 and content.get("kind") in found:
            found[content["kind"]].append(content)
    if not found["train"]:
        raise FileNotFoundError(f"{folder}: no results of a training run (run.json) below it")
    # the same run may lie there twice, as a run folder and as a copy
    unique = {_key(run): run for run in found["train"]}
    runs = sorted(unique.values(), key=lambda run: (-run["cost"]["macs"], label_of(run["network"])))
    return Results(tuple(runs), tuple(found["latency"]))


def _key(run: dict[str, Any]) -> str:
    return f"{label_of(run['network'])}|{run['seed']}|{run['data']['name']}|{run['recipe']}|{run['network']}"


@dataclass(frozen=True)
class Line:
    """One row of the table: a network beside the baseline, the run with the most MACs."""

    label: str
    macs: int
    params: int
    error: float
    wrong: int
    tested: int
    mac_ratio: float
    times: dict[str, tuple[float, float, float]]
    speedups: dict[str, tuple[float, float, float]]

    def efficiency(self, setting: str) -> float:
        """Speed-up over MAC ratio: 1 where time falls as MACs fall."""
        return self.speedups[setting][0] / self.mac_ratio


def lines(results: Results) -> list[Line]:
    """The table's rows, the baseline first."""
    baseline = results.runs[0]
    rows = []
    for run in results.runs:
        label = label_of(run["network"])
        times, speedups = {}, {}
        for timing in results.timings:
            entry = timing["rows"].get(label)
            if entry is not None:
                times[timing["setting"]] = (entry["median_s"], entry["q1_s"], entry["q3_s"])
                ratio = entry["speedup"]
                speedups[timing["setting"]] = (ratio["median"], ratio["q1"], ratio["q3"])
        tested = run["data"]["test"]
        rows.append(
            Line(
                label,
                run["cost"]["macs"],
                run["cost"]["params"],
                run["test_error"],
                round(run["test_error"] * tested),
                tested,
                baseline["cost"]["macs"] / run["cost"]["macs"],
                times,
                speedups,
            )
        )
    return rows


def verdicts(rows: list[Line]) -> list[str]:
    """A sentence for each network but the baseline: what was gained and what was lost."""
    base, said = rows[0], []
    for row in rows[1:]:
        more = row.wrong - base.wrong
        wrong = "as many" if more == 0 else f"{abs(more)} {'more' if more > 0 else 'fewer'}"
        parts = [
            f"{row.label}: {row.mac_ratio:.2f}x fewer MACs than {base.label}, {wrong} wrong answers "
            f"of {row.tested}"
        ]
        for setting, (ratio, low, high) in row.speedups.items():
            change = f"{ratio:.2f}x {'faster' if ratio >= 1 else 'as fast, so slower,'}"
            parts.append(
                f"{setting}: {change} (middle half of the rounds {low:.2f} to {high:.2f}), "
                f"{row.efficiency(setting):.0%} of what the MACs promise"
            )
        said.append("; ".join(parts) + ".")
    return said


# ---------------------------------------------------------------- figures


@dataclass(frozen=True)
class Picture:
    """A figure as SVG, with a text that says what it shows."""

    title: str
    source: str
    alternative: str


def _picture(figure: Figure, title: str, alternative: str) -> Picture:
    import matplotlib as mpl

    buffer = io.BytesIO()
    # without a date and with fixed names the same results give the same file
    with mpl.rc_context({"svg.hashsalt": "quincunx", "svg.fonttype": "path"}):
        figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    encoded = base64.b64encode(buffer.getvalue()).decode("ascii")
    return Picture(title, f"data:image/svg+xml;base64,{encoded}", alternative)


def _axes(width: float = 6.0, height: float = 3.6) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    return figure, axes


def _learning_curves(results: Results) -> Picture:
    figure, axes = _axes()
    for i, run in enumerate(results.runs):
        history = run["history"]
        axes.plot(
            [entry["epoch"] for entry in history],
            [100 * entry["test_error"] for entry in history],
            label=label_of(run["network"]),
            color=_COLOURS[i % len(_COLOURS)],
            marker=_MARKERS[i % len(_MARKERS)],
            markersize=4,
        )
    axes.set(xlabel="epoch", ylabel="test error (%)", yscale="log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.legend(frameon=False)
    ends = "; ".join(f"{label_of(r['network'])} ends at {100 * r['test_error']:.2f}%" for r in results.runs)
    return _picture(figure, "Learning curves", f"Test error by epoch, logarithmic scale. {ends}.")


def _scatter(rows: list[Line], xs: list[float], xlabel: str, title: str, unit: str) -> Picture:
    figure, axes = _axes()
    for i, (row, x) in enumerate(zip(rows, xs, strict=True)):
        axes.scatter(
            x,
            100 * row.error,
            color=_COLOURS[i % len(_COLOURS)],
            marker=_MARKERS[i % len(_MARKERS)],
            s=55,
            label=row.label,
            zorder=3,
        )
    axes.set(xlabel=xlabel, ylabel="test error (%)")
    axes.set_xlim(0, max(xs) * 1.1)
    axes.set_ylim(0, max(max(100 * row.error for row in rows) * 1.25, 0.1))
    axes.legend(frameon=False)
    said = "; ".join(
        f"{row.label}: {100 * row.error:.2f}% at {x:.3g} {unit}" for row, x in zip(rows, xs, strict=True)
    )
    return _picture(figure, title, f"{title}. {said}.")


def _sampling_picture(sampling: Sampling, size: int = 8) -> Picture:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.9, 1.9), layout="constrained")
    axes = figure.subplots()
    grid = getattr(sampling, "size", (size, size))
    mask = sampling.mask(*grid)
    axes.imshow(~mask.numpy(), cmap="gray", vmin=-0.35, vmax=1)
    axes.set_xticks([x - 0.5 for x in range(1, grid[1])], labels=[])
    axes.set_yticks([y - 0.5 for y in range(1, grid[0])], labels=[])
    axes.tick_params(length=0)
    axes.grid(color="#bbbbbb", linewidth=0.6)
    name = _SHORT.get(sampling, repr(sampling))
    count = int(mask.sum())
    return _picture(
        figure,
        f"{name}",
        f"Sampling {name} on {grid[0]} x {grid[1]} positions: dark ones are computed, "
        f"{count} of {mask.numel()}; the first row has columns "
        f"{', '.join(str(int(c)) for c in mask[0].nonzero().flatten()) or 'none'}.",
    )


def write_report(folder: str | Path, out: str | Path | None = None) -> Path:
    """Write ``report.html`` for the results below a folder: one file that needs no other.

    Args:
        folder: where the result files are.
        out: the page; by default ``report.html`` in the folder.

    Returns:
        The page's path.

    Raises:
        FileNotFoundError: no results there.
        ValueError: a file that is not JSON.
    """
    from jinja2 import Environment, StrictUndefined

    folder = Path(folder)
    page = Path(out) if out is not None else folder / "report.html"
    results = collect(folder)
    rows = lines(results)
    pictures = [
        _learning_curves(results),
        _scatter(rows, [row.macs / 1e6 for row in rows], "million MACs an image", "Error against MACs", "M"),
    ]
    settings = [timing["setting"] for timing in results.timings]
    for setting in settings:
        if all(setting in row.times for row in rows):
            xs = [1e3 * row.times[setting][0] for row in rows]
            title = f"Error against measured time, {setting}"
            pictures.append(_scatter(rows, xs, f"ms, median ({setting})", title, "ms"))
    samplings: dict[Sampling, None] = {}
    for run in results.runs:
        if run["network"]["name"].startswith(("rsbn", "csbn")):
            samplings[parse(run["network"]["settings"].get("sampling", CHESSBOARD))] = None
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    html = environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        rows=rows,
        settings=settings,
        verdicts=verdicts(rows),
        pictures=pictures,
        samplings=[_sampling_picture(s) for s in samplings],
        runs=results.runs,
        timings=results.timings,
    )
    write_atomically(page, lambda path: _write(path, html))
    return page


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
