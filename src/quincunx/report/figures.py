"""Figures as SVG with a text alternative. The same values give the same bytes."""

from __future__ import annotations

import base64
import importlib.util
import io
import math
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from statistics import fmean
from typing import TYPE_CHECKING, Any

from quincunx.measure.tasks.scale import ERROR, Scale
from quincunx.sampling import Sampling

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "Curve",
    "Mark",
    "Picture",
    "PlottedPoint",
    "draw_layer_times",
    "draw_learning_curves",
    "draw_map",
    "draw_sampling",
    "draw_scatter",
    "draw_speedups",
    "draw_tradeoff",
    "on_front",
]

# Okabe and Ito's palette, which colour-blind people can distinguish
_COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = "osD^vPX"
_LONGEST = 44
_FRONT = "Pareto front"


@dataclass(frozen=True)
class Picture:
    """A figure as a data URL, with its title and its text alternative."""

    title: str
    source: str
    alternative: str

    @property
    def content(self) -> bytes:
        """The SVG file."""
        return base64.b64decode(self.source.partition(",")[2])


@dataclass(frozen=True)
class Curve:
    """Test error in percent by epoch; ``floor`` is drawn instead of zero, which has no logarithm."""

    look: int
    label: str
    epochs: Sequence[int]
    errors: Sequence[float]
    floor: float


@dataclass(frozen=True)
class PlottedPoint:
    """A network at ``x`` with the middle half of its measurements (``low``, ``high``), error in percent.

    ``look`` is its number on the page, which fixes its colour and mark in every figure. ``errors`` are
    the least and the largest of several runs.
    """

    look: int
    label: str
    x: float
    error: float
    low: float
    high: float
    errors: tuple[float, float] | None = None


@dataclass(frozen=True)
class Mark:
    """One setting of a method: its gain on the x axis, and the points of error that it loses.

    Several marks of one series and label, such as draws of a random mask, are drawn as one point with a
    range. ``front`` means that no other setting is better in one and no worse in the other.
    """

    series: str
    label: str
    gain: float
    drop: float
    front: bool = False


@dataclass(frozen=True)
class Dot:
    """A candidate of a search: microseconds saved, loss, and whether it was chosen."""

    series: str
    saved: float
    loss: float
    chosen: bool


def check_can_draw() -> None:
    """Check for the packages that a report needs, before long work that would end in an error.

    Raises:
        ModuleNotFoundError: the ``report`` extra is not installed.
    """
    for name in ("matplotlib", "jinja2"):
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(
                f"the report needs {name}, which is not installed; pip install 'quincunx[report]'", name=name
            )


def _styled(draw: Callable[..., Picture]) -> Callable[..., Picture]:
    """Draw with fixed settings: ignore a user's matplotlibrc, and show "$" in a name as a dollar sign."""

    @wraps(draw)
    def wrapper(*args: Any) -> Picture:
        import matplotlib as mpl

        with mpl.rc_context(), warnings.catch_warnings():
            # a letter that the font lacks is drawn as a box
            warnings.filterwarnings("ignore", message="Glyph")
            mpl.rcdefaults()
            mpl.rcParams.update(
                {
                    "svg.hashsalt": "quincunx",
                    "svg.fonttype": "path",
                    "text.parse_math": False,
                    "font.size": 10,
                }
            )
            return draw(*args)

    return wrapper


def _picture(figure: Figure, title: str, alternative: str) -> Picture:
    buffer = io.BytesIO()
    # no date and fixed names, so the same results give the same file
    figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    # write each path on one line, however many points it has
    drawn = re.sub(rb' d="[^"]*"', lambda found: found[0].replace(b"\n", b""), buffer.getvalue())
    encoded = base64.b64encode(drawn).decode("ascii")
    return Picture(title, f"data:image/svg+xml;base64,{encoded}", alternative)


def _shorten(label: str) -> str:
    if len(label) > _LONGEST:
        # names of samplings differ at their ends
        label = f"{label[: _LONGEST - 13]}…{label[-12:]}"
    # matplotlib leaves names with a leading underscore out of the legend
    return label.lstrip("_") or "unnamed"


def _look(i: int) -> tuple[str, str]:
    """Return colour and marker of the i-th network; they repeat after 49 pairs."""
    n = len(_COLOURS)
    return _COLOURS[i % n], _MARKERS[(i + i // n) % n]


def _axes(labels: Sequence[str]) -> tuple[Figure, Any, int]:
    """Return a figure with room below for a legend, which then hides nothing."""
    from matplotlib.figure import Figure

    longest = max(len(label) for label in labels)
    columns = max(1, min(len(labels), 3, 52 // (longest + 6)))
    height = 3.3 + 0.2 * math.ceil(len(labels) / columns)
    figure = Figure(figsize=(5.0, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    return figure, axes, columns


def _log_labels(axes: Any, subs: tuple[int, ...]) -> None:
    """Label powers of ten times ``subs`` with plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.yaxis.set_major_locator(LogLocator(subs=subs))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _legend(figure: Figure, columns: int) -> None:
    figure.legend(loc="outside lower center", ncols=columns, frameon=False, handletextpad=0.4)


@_styled
def draw_learning_curves(curves: Sequence[Curve], scale: Scale = ERROR) -> Picture:
    """Draw test error by epoch on a logarithmic axis, or another score on a linear one."""
    from matplotlib.ticker import MaxNLocator

    labels = [_shorten(curve.label) for curve in curves]
    figure, axes, columns = _axes(labels)
    for curve, label in zip(curves, labels, strict=True):
        colour, marker = _look(curve.look)
        axes.plot(
            curve.epochs,
            [max(error, curve.floor) for error in curve.errors],
            label=label,
            color=colour,
            marker=marker,
            markersize=4,
            # a mark per epoch for a few dozen epochs, fewer for hundreds
            markevery=max(1, len(curve.epochs) // 25),
            linewidth=1.3,
        )
    logarithmic = scale == ERROR
    axes.set(xlabel="epoch", ylabel=_score_label(scale), yscale="log" if logarithmic else "linear")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if logarithmic:
        _log_labels(axes, (1, 2, 5))
    _legend(figure, columns)
    ends = "; ".join(
        f"{c.label} ends at {scale.shown(c.errors[-1] / scale.factor)}" for c in curves if c.errors
    )
    how = ", logarithmic scale" if logarithmic else ""
    return _picture(figure, "Learning curves", f"Test {scale.name} by epoch{how}. {ends}.")


def _score_label(scale: Scale) -> str:
    unit = "%" if scale.unit == "points" else scale.unit
    return f"test {scale.name} ({unit})" if unit else f"test {scale.name}"


@_styled
def draw_scatter(
    points: Sequence[PlottedPoint], xlabel: str, title: str, unit: str, scale: Scale = ERROR
) -> Picture:
    """Draw test error against a cost, both axes starting at zero; of another score only the cost's axis."""
    labels = [_shorten(point.label) for point in points]
    figure, axes, columns = _axes(labels)
    for point, label in zip(points, labels, strict=True):
        colour, marker = _look(point.look)
        axes.hlines(point.error, point.low, point.high, color=colour, linewidth=1.4)
        axes.vlines(point.x, *(point.errors or (point.error, point.error)), color=colour, linewidth=1.4)
        axes.scatter(point.x, point.error, s=55, label=label, color=colour, marker=marker, zorder=3)
    axes.set(xlabel=xlabel, ylabel=_score_label(scale))
    axes.set_xlim(0, 1.1 * max(max(p.x, p.high) for p in points))
    if scale == ERROR:
        top = max(1.25 * max(p.error for p in points), 0.1)
        # leave room for a mark on the axis
        axes.set_ylim(-0.03 * top, top)
    _legend(figure, columns)
    described = "; ".join(
        f"{p.label}: {scale.shown(p.error / scale.factor)} at {p.x:.3g} {unit}" for p in points
    )
    return _picture(figure, title, f"{title}. {described}.")


@_styled
def draw_speedups(points: Sequence[tuple[str, float, float]], title: str) -> Picture:
    """Draw measured speed-up against MAC ratio, one mark per case; on the line time falls as MACs fall."""
    names = list(dict.fromkeys(name for name, _, _ in points))
    figure, axes, columns = _axes([_shorten(name) for name in names])
    top = 1.1 * max(max(ratio, speedup) for _, ratio, speedup in points)
    axes.plot(
        [0, top], [0, top], color="#888888", linewidth=1, linestyle="--", label="time falls as MACs fall"
    )
    described = []
    for i, name in enumerate(names):
        colour, marker = _look(i)
        found = [(ratio, speedup) for other, ratio, speedup in points if other == name]
        axes.scatter(
            *zip(*found, strict=True), s=22, alpha=0.75, color=colour, marker=marker, label=_shorten(name)
        )
        low, high = min(s for _, s in found), max(s for _, s in found)
        described.append(f"{name}: {low:.2f}x to {high:.2f}x")
    axes.set(xlabel="MACs of the dense network / ours", ylabel="speed-up over the best dense", xlim=(0, top))
    axes.set_ylim(0, top)
    _legend(figure, columns)
    return _picture(figure, title, f"{title}. {'; '.join(described)}.")


@_styled
def draw_sampling(sampling: Sampling, name: str) -> Picture:
    """Draw the computed positions, on a grid of at least two periods."""
    from matplotlib.figure import Figure

    side = max(8, 2 * getattr(sampling, "period", 0))
    height, width = getattr(sampling, "size", (side, side))
    figure = Figure(figsize=(1.9, 1.9), layout="constrained")
    axes = figure.subplots()
    mask = sampling.mask(height, width)
    axes.imshow(~mask.numpy(), cmap="gray", vmin=-0.35, vmax=1)
    axes.set_xticks([x - 0.5 for x in range(1, width)], labels=[])
    axes.set_yticks([y - 0.5 for y in range(1, height)], labels=[])
    axes.tick_params(length=0)
    axes.grid(color="#bbbbbb", linewidth=0.6)
    return _picture(
        figure,
        name,
        f"Sampling {name} on {height} x {width} positions: dark ones are computed, "
        f"{int(mask.sum())} of {mask.numel()}; the first row has columns "
        f"{', '.join(str(int(c)) for c in mask[0].nonzero().flatten()) or 'none'}.",
    )


@_styled
def draw_layer_times(rows: Sequence[tuple[str, float, float]], title: str) -> Picture:
    """Draw milliseconds of each layer before and after, as pairs of bars, the first layer on top."""
    figure, axes, columns = _axes(["before", "after"])
    figure.set_size_inches(5.0, 1.2 + 0.36 * len(rows))
    for shift, look, which, label in ((-0.19, 0, 1, "before"), (0.19, 1, 2, "after")):
        axes.barh(
            [i + shift for i in range(len(rows))],
            [row[which] for row in rows],
            height=0.36,
            color="#9a9a9a" if look == 0 else _COLOURS[look],
            label=label,
        )
    axes.set_yticks(range(len(rows)), [_shorten(row[0]) for row in rows])
    axes.invert_yaxis()
    axes.set(xlabel="ms")
    axes.grid(axis="y", visible=False)
    _legend(figure, columns)
    described = "; ".join(f"{name}: {before:.3g} to {after:.3g} ms" for name, before, after in rows)
    return _picture(figure, title, f"{title}. {described}.")


@_styled
def draw_map(values: Sequence[Sequence[float]], computed: Sequence[Sequence[bool]], title: str) -> Picture:
    """Draw the impact of each position, brighter for higher values, with dots on computed positions."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.9, 1.9), layout="constrained")
    axes = figure.subplots()
    axes.imshow(values, cmap="viridis", aspect="equal")
    places = [(r, c) for r, row in enumerate(computed) for c, there in enumerate(row) if there]
    side = max(len(computed), len(computed[0]))
    axes.scatter(
        [c for _, c in places], [r for r, _ in places], s=(70 / side) ** 2 / 4, color="white", linewidths=0
    )
    axes.set_axis_off()
    whole = len(computed) * len(computed[0])
    grid = f"{len(computed)} x {len(computed[0])}"
    text = f"Impact of each of {grid} positions; {len(places)} of {whole} are computed."
    return _picture(figure, title, f"{title}. {text}")


@_styled
def draw_tradeoff(
    marks: Sequence[Mark],
    printed: Sequence[Mark],
    xlabel: str,
    ylabel: str = "accuracy lost (points)",
    lines: Sequence[tuple[str, float]] = (),
) -> Picture:
    """Draw points of accuracy lost against the gain, one line per series; hollow marks are a paper's own.

    A wide grey line joins the points on the front.
    Vertical ``lines`` are gains whose loss on this axis the paper does not print.
    """
    series = list(dict.fromkeys(mark.series for mark in (*marks, *printed)))
    front = list(dict.fromkeys(f"{m.series}, {m.label}" for m in marks if m.front))
    ahead: list[tuple[float, float]] = []
    figure, axes, columns = _axes([_shorten(name) for name in series] + [_FRONT] * bool(front))
    for i, name in enumerate(series):
        colour, marker = _look(i)
        own: dict[str, list[Mark]] = {}
        for mark in marks:
            if mark.series == name:
                own.setdefault(mark.label, []).append(mark)
        points = sorted(
            (fmean(m.gain for m in some), fmean(m.drop for m in some), [m.drop for m in some], some[0].front)
            for some in own.values()
        )
        ahead += [(gain, drop) for gain, drop, _, best in points if best]
        if points:
            gains, drops, each, _ = zip(*points, strict=True)
            axes.plot(gains, drops, color=colour, marker=marker, markersize=5, label=_shorten(name))
            for gain, some in zip(gains, each, strict=True):
                axes.plot([gain, gain], [min(some), max(some)], color=colour, linewidth=1)
        theirs = [(mark.gain, mark.drop) for mark in printed if mark.series == name]
        if theirs:
            axes.scatter(
                *zip(*theirs, strict=True),
                s=45,
                facecolors="none",
                edgecolors=colour,
                marker=marker,
                label=None if points else _shorten(name),
            )
    if front:
        axes.plot(*zip(*sorted(ahead), strict=True), color="#bbbbbb", linewidth=7, zorder=0, label=_FRONT)
    axes.axhline(0, color="#888888", linewidth=1, linestyle="--")
    for label, gain in lines:
        axes.axvline(gain, color="#888888", linewidth=1, linestyle=":")
        axes.annotate(
            f"the paper, {label}",
            (gain, 0.98),
            xycoords=("data", "axes fraction"),
            xytext=(-3, 0),
            textcoords="offset points",
            rotation=90,
            ha="right",
            va="top",
            fontsize="small",
            color="#666666",
        )
    axes.set(xlabel=xlabel, ylabel=ylabel)
    _legend(figure, columns)
    described = "; ".join(f"{m.series}, {m.label}: {m.drop:+.2f} points at {m.gain:.2f}" for m in marks)
    note = " Hollow marks are printed in the paper." if printed else ""
    if front:
        note += f" On the {_FRONT}: {'; '.join(front)}."
    if lines:
        told = ", ".join(f"{gain:g} ({label})" for label, gain in lines)
        note += f" Dotted lines are speed-ups that the paper prints: {told}."
    return _picture(figure, f"{ylabel.capitalize()} against {xlabel}", f"{described}.{note}")


def on_front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Return which (drop, speed-up) are on the Pareto front: no other is as good in both and better in one.

    Example:
        >>> on_front([(0.0, 1.5), (1.0, 2.0), (1.0, 1.2)])
        [True, True, False]
    """
    return [
        not any(d <= drop and s >= speed and (d, s) != (drop, speed) for d, s in points)
        for drop, speed in points
    ]


@_styled
def draw_candidate_scores(dots: Sequence[Dot]) -> Picture:
    """Draw each candidate's loss against the time it saves; filled marks were chosen."""
    series = list(dict.fromkeys(dot.series for dot in dots))
    figure, axes, columns = _axes([_shorten(name) for name in series])
    # zero cannot be shown on a logarithmic axis
    floor = max(min((d.loss for d in dots if d.loss > 0), default=1e-6), 1e-6)
    for i, name in enumerate(series):
        colour, marker = _look(i)
        for chosen in (False, True):
            own = [dot for dot in dots if dot.series == name and dot.chosen is chosen]
            face = colour if chosen else "none"
            axes.scatter(
                [dot.saved for dot in own],
                [max(dot.loss, floor) for dot in own],
                s=30,
                edgecolors=colour,
                facecolors=face,
                marker=marker,
                label=_shorten(name) if chosen else None,
            )
    axes.set(xlabel="microseconds saved in the network", ylabel="loss (divergence) alone", yscale="log")
    _log_labels(axes, (1,))
    _legend(figure, columns)
    taken = sum(dot.chosen for dot in dots)
    text = f"{len(dots)} candidates, {taken} of them chosen (filled)."
    return _picture(figure, "What each candidate costs and saves", f"Loss against time saved. {text}")
