"""Read the results of a folder: check runs and timings, group them by network, and describe them."""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quincunx.measure.tasks.scale import ERROR, Scale, scale_in
from quincunx.networks.spec import name_of
from quincunx.reading import read_json
from quincunx.sampling import CHESSBOARD, QUARTER, THREE_QUARTERS, Cosets, Random, Sampling, Uniform, parse

__all__ = ["Line", "Network", "Results", "collect", "label_of", "result_lines", "speed_words", "verdicts"]

_SHORT: dict[Sampling, str] = {QUARTER: "1/4", CHESSBOARD: "2/4", THREE_QUARTERS: "3/4"}


def sampling_of(network: dict[str, Any]) -> Sampling | None:
    if network.get("kind") == "factory":
        return None
    if network["name"].startswith(("rsbn", "csbn")) or "sampling" in network["settings"]:
        return parse(network["settings"].get("sampling", CHESSBOARD))
    return None


def label_of(network: dict[str, Any]) -> str:
    """Return a short name for a network's spec.

    Example:
        >>> label_of({"name": "rsbn20", "settings": {"sampling": "1/4", "width": 8}})
        'rsbn20 1/4, width 8'
    """
    sampling, name = sampling_of(network), name_of(network)
    if network.get("kind") == "factory":
        return name
    name = name if sampling is None else f"{name} {sampling_name(sampling)}"
    rest = {k: v for k, v in network["settings"].items() if k != "sampling"}
    down = rest.pop("down", "stride")
    return ", ".join([name, *([down] if down != "stride" else []), *(f"{k} {v}" for k, v in rest.items())])


def sampling_name(sampling: Sampling) -> str:
    """Return the text that a person types for a sampling, if there is one."""
    if sampling in _SHORT:
        return _SHORT[sampling]
    if isinstance(sampling, Cosets):
        return f"cosets:{sampling.period}:{';'.join(f'{a},{b}' for a, b in sampling.offsets)}"
    if isinstance(sampling, Random):
        return f"random:{sampling.rate:g}:{sampling.seed}"
    if isinstance(sampling, Uniform):
        return f"uniform:{sampling.rate:g}{'' if sampling.rule == 'even' else f':{sampling.rule}'}"
    return repr(sampling)


@dataclass(frozen=True)
class Network:
    """The runs of one network, which differ only in the seed, under a unique name."""

    label: str
    runs: tuple[dict[str, Any], ...]

    @property
    def spec(self) -> dict[str, Any]:
        spec: dict[str, Any] = self.runs[0]["network"]
        return spec


@dataclass(frozen=True)
class Results:
    """The networks found below a folder, the baseline first, and their timings."""

    networks: tuple[Network, ...]
    timings: tuple[dict[str, Any], ...]

    @property
    def runs(self) -> list[dict[str, Any]]:
        return [run for network in self.networks for run in network.runs]


def collect(*folders: str | Path) -> Results:
    """Read every result file below a folder, or below several.

    Runs that differ only in the seed become one network. The baseline is the network that the
    timings name, else the one with the most MACs.

    Raises:
        FileNotFoundError: no such folder, or no result of a training run in it.
        ValueError: a file that is not JSON or is incomplete; runs on different data.
    """
    places = [Path(folder) for folder in folders]
    for place in places:
        if not place.is_dir():
            raise FileNotFoundError(f"{place}: {'not a folder' if place.exists() else 'no such folder'}")
    folder = ", ".join(map(str, places))
    runs: dict[str, dict[str, Any]] = {}
    timings: list[dict[str, Any]] = []
    # a folder may be named twice, or lie in another
    for path in sorted({path for place in places for path in place.rglob("*.json")}):
        content = read_json(path)
        if not isinstance(content, dict) or content.get("schema") != 1:
            continue
        if content.get("kind") == "train":
            _check(path, content, _check_run)
            # the same run may be present twice, as a run folder and as a copy
            key = json.dumps([_group(content), content["seed"]])
            if key not in runs or runs[key]["environment"]["time"] <= content["environment"]["time"]:
                runs[key] = content
        elif content.get("kind") == "latency":
            _check(path, content, _check_timing)
            timings.append(content)
    if not runs:
        raise FileNotFoundError(f"{folder}: no results of a training run (run.json) below it")
    sets = {json.dumps(run["data"], sort_keys=True): run["data"]["name"] for run in runs.values()}
    tasks = {json.dumps(run.get("task"), sort_keys=True) for run in runs.values()}
    if len(tasks) > 1:
        raise ValueError(f"{folder}: runs of different tasks, whose scores cannot be compared")
    if len(sets) > 1:
        raise ValueError(
            f"{folder}: runs on different data ({', '.join(sorted(sets.values()))}); networks are compared "
            "on one data set, so give a folder that holds the runs of one"
        )
    return Results(_networks(list(runs.values()), timings), tuple(_distinct_settings(timings)))


def _check(path: Path, content: dict[str, Any], reads: Callable[[dict[str, Any]], None]) -> None:
    try:
        reads(content)
    except KeyError as error:
        raise ValueError(f"{path}: not a whole result, {str(error)[:200]} is missing") from None
    except (AttributeError, LookupError, ArithmeticError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a whole result ({' '.join(str(error).split())[:200]})") from None


_ENVIRONMENT = ("time", "command", "commit", "cpu", "cores", "capability", "threads", "quincunx", "torch")


def _numbers(*values: Any, least: float = 0.0) -> None:
    for value in values:
        if not isinstance(value, (int, float)) or not least <= value < math.inf or value == -math.inf:
            raise ValueError(f"{value!r} where a number from {least:g} up belongs")


def _check_run(run: dict[str, Any]) -> None:
    """Read every field that the page uses, so that an error can name the file."""
    label_of(run["network"])
    _numbers(run["cost"]["macs"], run["cost"]["params"], run["data"]["test"], least=1)
    key = f"test_{scale_in(run).key}"
    least = 0.0 if scale_in(run) == ERROR else -math.inf
    _numbers(run["seed"], run["data"]["train"], *run["data"]["size"])
    _numbers(run[key], *(entry[key] for entry in run["history"]), least=least)
    _numbers(*(entry["epoch"] for entry in run["history"]))
    if not isinstance(run["data"]["name"], str) or not run["history"] or (not least and run[key] > 1):
        raise ValueError("no name of the data, no epoch, or an error above 1")
    for part, keys in (
        (run["data"], ("classes",)),
        (run["recipe"], ("epochs", "lr", "batch_size", "weight_decay")),
        (run["environment"], (*_ENVIRONMENT, "python")),
    ):
        for key in keys:
            part[key]


def _check_timing(timing: dict[str, Any]) -> None:
    for key in ("how", "rounds", "baseline"):
        timing[key]
    timing["environment"]["threads"]
    if not isinstance(timing["setting"], str):
        raise ValueError("setting is not a text")
    for row in timing["rows"].values():
        _numbers(row["median_s"], row["q1_s"], row["q3_s"])
        _numbers(*(row["speedup"][key] for key in ("median", "q1", "q3")))


def _group(run: dict[str, Any]) -> str:
    return json.dumps([run["network"], run["recipe"], run["data"]], sort_keys=True)


def _networks(runs: list[dict[str, Any]], timings: list[dict[str, Any]]) -> tuple[Network, ...]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for run in sorted(runs, key=lambda run: int(run["seed"])):
        groups.setdefault(_group(run), []).append(run)
    named = _distinct([(label_of(g[0]["network"]), _recipe_of(g[0])) for g in groups.values()])
    baselines = {timing["baseline"] for timing in timings}
    if len(baselines) > 1:
        raise ValueError(f"timings against different baselines: {', '.join(sorted(baselines))}")
    networks = [Network(label, tuple(group)) for label, group in zip(named, groups.values(), strict=True)]
    return tuple(
        sorted(
            networks,
            key=lambda n: (label_of(n.spec) not in baselines, -n.runs[0]["cost"]["macs"], n.label),
        )
    )


def _recipe_of(run: dict[str, Any]) -> str:
    recipe = run["recipe"]
    return f"{recipe['epochs']} epochs at {recipe['lr']:g}, batch {recipe['batch_size']}"


def _distinct(named: Sequence[tuple[str, str]]) -> list[str]:
    """Make names unique: add what distinguishes them, or else a number."""
    count = Counter(name for name, _ in named)
    longer = [name if count[name] == 1 else f"{name}, {more}" for name, more in named]
    seen: Counter[str] = Counter()
    result = []
    for name in longer:
        seen[name] += 1
        result.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return result


def _distinct_settings(timings: list[dict[str, Any]]) -> list[dict[str, Any]]:
    ordered = sorted(timings, key=lambda timing: _natural(timing["setting"]))
    names = _distinct([(t["setting"], f"{t['environment'].get('threads')} threads") for t in ordered])
    return [{**timing, "setting": name} for timing, name in zip(ordered, names, strict=True)]


def _natural(text: str) -> list[tuple[int, str]]:
    """Return a sort key that puts "batch 8" before "batch 64"."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in text.split()]


@dataclass(frozen=True)
class Line:
    """One row of the table.

    Attributes:
        label: the network.
        macs: multiply-adds for one image.
        params: number of parameters.
        error: share of wrong predictions in [0, 1], the mean over ``seeds`` runs; in another task the score.
        deviation: of the error between seeds; None for a single run.
        wrong: number of wrong predictions, the mean over seeds; None in another task.
        tested: number of test images.
        mac_ratio: the baseline's MACs over this network's.
        times: setting -> (median, first, third quartile) in seconds.
        speedups: setting -> the same for the baseline's time over this network's, round by round.
    """

    label: str
    macs: int
    params: int
    error: float
    deviation: float | None
    seeds: int
    wrong: float | None
    tested: int
    mac_ratio: float
    times: dict[str, tuple[float, float, float]]
    speedups: dict[str, tuple[float, float, float]]
    scale: Scale = ERROR

    def efficiency(self, setting: str) -> float:
        """Return the speed-up over the MAC ratio: 1 if time falls as MACs fall."""
        return self.speedups[setting][0] / self.mac_ratio


def result_lines(results: Results) -> list[Line]:
    """Return the table's rows, the baseline first."""
    base = results.networks[0].runs[0]["cost"]["macs"]
    rows = []
    for network in results.networks:
        run = network.runs[0]
        times, speedups = {}, {}
        for timing in results.timings:
            entry = timing["rows"].get(label_of(network.spec))
            if entry is not None:
                times[timing["setting"]] = (entry["median_s"], entry["q1_s"], entry["q3_s"])
                ratio = entry["speedup"]
                speedups[timing["setting"]] = (ratio["median"], ratio["q1"], ratio["q3"])
        scale = scale_in(run)
        errors = [r[f"test_{scale.key}"] for r in network.runs]
        tested = run["data"]["test"]
        rows.append(
            Line(
                label=network.label,
                macs=run["cost"]["macs"],
                params=run["cost"]["params"],
                error=statistics.fmean(errors),
                deviation=statistics.stdev(errors) if len(errors) > 1 else None,
                seeds=len(errors),
                wrong=statistics.fmean(round(e * tested) for e in errors) if scale == ERROR else None,
                scale=scale,
                tested=tested,
                mac_ratio=base / run["cost"]["macs"],
                times=times,
                speedups=speedups,
            )
        )
    return rows


def speed_words(median: float, low: float, high: float) -> str:
    """Describe a speed-up; it counts as one only if the middle half of its rounds agrees.

    Example:
        >>> speed_words(1.724, 1.69, 1.75)
        '1.72x faster (middle half of the rounds 1.69 to 1.75)'
        >>> speed_words(0.43, 0.40, 0.50)
        '2.33x slower (middle half of the rounds 2.00 to 2.50)'
        >>> speed_words(0.99, 0.94, 1.34)
        'as fast (0.99x, middle half of the rounds 0.94 to 1.34)'
    """
    slower = median < 1
    ratio, first, third = (1 / median, 1 / high, 1 / low) if slower and low > 0 else (median, low, high)
    if round(low, 2) <= 1 <= round(high, 2) or f"{ratio:.2f}" == "1.00":
        return f"as fast ({median:.2f}x, middle half of the rounds {low:.2f} to {high:.2f})"
    change = "slower" if slower else "faster"
    return f"{ratio:.2f}x {change} (middle half of the rounds {first:.2f} to {third:.2f})"


def _mac_words(ratio: float, baseline: str) -> str:
    if f"{ratio:.2f}" == "1.00":
        return f"as many MACs as {baseline}"
    return f"{ratio:.2f}x fewer MACs than {baseline}" if ratio > 1 else f"{1 / ratio:.2f}x its MACs"


def _difference(row: Line, base: Line) -> str:
    """Describe how much better or worse a network's answers are than the baseline's."""
    if row.wrong is None or base.wrong is None:
        lost, scale = row.scale.lost(base.error, row.error), row.scale
        shown = scale.shown(row.error)
        return f"{scale.name} {shown}, {scale.amount(abs(lost), 2)} {'worse' if lost > 0 else 'better'}"
    more = row.wrong - base.wrong
    much = f"{abs(more):.3g} {'more' if more > 0 else 'fewer'}" if more else "as many"
    answers = "answer" if abs(more) == 1 else "answers"
    return f"{much} wrong {answers} of {row.tested}"


def verdicts(rows: list[Line]) -> list[str]:
    """Return a sentence on gains and losses for each network except the baseline."""
    base, sentences = rows[0], []
    for row in rows[1:]:
        mean = " (means over seeds)" if max(row.seeds, base.seeds) > 1 else ""
        parts = [f"{_mac_words(row.mac_ratio, base.label)}, {_difference(row, base)}{mean}"]
        parts += [f"{setting}: {speed_words(*speedup)}" for setting, speedup in row.speedups.items()]
        sentences.append(f"{row.label}: {'; '.join(parts)}.")
    return sentences
