"""Write the tables and pictures of README.md and docs from results/*.json.

python docs/tables.py            # write them
python docs/tables.py --check    # only compare; exit code 1 if a page differs
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

from quincunx.experiments.bottleneck_paper import by_name
from quincunx.experiments.espace_paper import espace_by_name
from quincunx.experiments.printed import ESPACE, Gain
from quincunx.methods.registry import ALIASES
from quincunx.report.results import (
    collect,
    label_of,
    result_lines,
    verdicts,
)
from quincunx.report.training import draw_pictures, draw_speedup_figure

ROOT = Path(__file__).resolve().parent.parent


def table(header: list[str], rows: list[list[str]]) -> str:
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, rule, *rows])


def read(*place: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(ROOT.joinpath("results", *place).read_text(encoding="utf-8"))
    return found


def demo() -> str:
    found = collect(ROOT / "results" / "digits")
    rows = result_lines(found)
    settings = list(rows[0].times)
    header = ["network", "test error", f"wrong of {rows[0].tested}", "M MACs", "MAC ratio"]
    header += [f"ms, {s}" for s in settings] + [f"speed-up, {s}" for s in settings]
    cells = [
        [
            row.label,
            f"{100 * row.error:.2f}%",
            f"{row.wrong:g}",
            f"{row.macs / 1e6:.2f}",
            f"{row.mac_ratio:.2f}",
            *(f"{1e3 * row.times[s][0]:.2f}" for s in settings),
            *(f"{row.speedups[s][0]:.2f}x" for s in settings),
        ]
        for row in rows
    ]
    return table(header, cells) + "\n\n" + "\n".join(f"- {said}" for said in verdicts(rows))


# the folder of what was measured on Intel's processors with AMX
AMX = "emerald-rapids"


def bench(suite: str, *folder: str) -> str:
    result = read(*folder, f"bench-{suite}.json")
    header = ["ours / the fastest dense", "threads", "cases", "MAC ratio", "speed-up (geo. mean)", "worst"]
    cells = [
        [
            f"{row['candidate']} / {row['kind'] or 'dense 3 x 3'}",
            str(row["threads"]),
            str(row["cases"]),
            f"{row['mac_ratio']:.2f}",
            f"{row['mean']:.2f}x",
            f"{row['worst']:.2f}x ({row['worst_case']})",
        ]
        for row in result["summary"]
        if "_over" not in row["candidate"]
    ]
    return table(header, cells)


def _over_dense(
    place: Sequence[str], header: Sequence[str], more: Callable[[dict[str, Any], dict[str, str]], list[str]]
) -> str:
    """Return whole networks of a result, each over the fastest dense candidate, and more of each row.

    Args:
        place: of the result.
        header: of the columns that ``more`` makes, of a row and its medians in milliseconds.
    """
    first = ["network / dense", "batch", "threads", "MAC ratio", "speed-up", "fastest dense"]
    cells = []
    for row in read(*place)["rows"]:
        found = next(iter(row["candidates"].values()))
        times = {key: f"{1e3 * timing['median_s']:.2f}" for key, timing in row["timings"].items()}
        speedup = f"{found['speedup']:.2f}x ({found['q1']:.2f} to {found['q3']:.2f})"
        numbers = [str(row["batch"]), str(row["threads"]), f"{found['mac_ratio']:.2f}", speedup]
        cells.append([row["case"], *numbers, row["best_dense"], *more(row, times)])
    return table([*first, *header], cells)


def low_networks(*folder: str) -> str:
    """Whole networks in bfloat16: each over the fastest dense candidate in bfloat16."""

    def more(row: dict[str, Any], times: dict[str, str]) -> list[str]:
        [name] = row["candidates"]
        return [times[key] for key in (name, row["best_dense"], "OpenVINO")]

    return _over_dense(
        (*folder, "bench-networks-bfloat16.json"), ["ms", "dense, ms", "OpenVINO float32, ms"], more
    )


def float_networks(*folder: str) -> str:
    """Whole networks in float32: each over the fastest dense candidate."""

    def more(row: dict[str, Any], times: dict[str, str]) -> list[str]:
        (name, _), *rest = row["candidates"].items()
        smaller = "".join(f"{entry['speedup']:.2f}x ({n.rpartition(' ')[2]})" for n, entry in rest)
        return [smaller, *(times[key] for key in (name, row["best_dense"], "ours, dense"))]

    header = ["the dense one on smaller images", "ms", "dense, ms", "our dense, ms"]
    return _over_dense((*folder, "bench-networks.json"), header, more)


def int8_networks(*folder: str) -> str:
    """Whole networks in eight bits: each over the fastest dense candidate in eight bits."""

    def more(row: dict[str, Any], times: dict[str, str]) -> list[str]:
        name = next(iter(row["candidates"]))
        return [times[k] for k in (name, row["best_dense"], "ours, dense int8", f"{name} in bfloat16")]

    header = ["ms", "dense, ms", "our dense, ms", "in bfloat16, ms"]
    return _over_dense((*folder, "bench-networks-int8.json"), header, more)


def plugins() -> str:
    """Programs in other engines: over the same program in torch, and over the dense network in the engine."""
    header = ["network", "batch", "threads", "MAC ratio", "torch (`qx.fuse`), ms"]
    for engine in ("ONNX Runtime", "OpenVINO"):
        header += [f"{engine}, ms", "of torch's time", "over its dense"]
    cells = []
    for case in read("plugins.json")["cases"]:
        cell = [case["name"], str(case["batch"]), str(case["threads"]), f"{case['mac_ratio']:.2f}"]
        cell.append(f"{1e3 * case['seconds']['qx.fuse'][0]:.2f}")
        for engine in ("onnxruntime", "openvino"):
            found = case[engine]
            cell.append(f"{1e3 * case['seconds'][engine][0]:.2f}")
            cell += [f"{found['time_over_fuse'][0]:.2f}", f"{found['speedup'][0]:.2f}x"]
        cells.append(cell)
    return table(header, cells)


def format_front() -> str:
    """Networks in each number format: what is wrong, and how long it takes."""
    rows = read("format-front.json")["rows"]
    header = ["network", "format", "M MACs", "test error", "ms", "speed-up"]
    cells = []
    for row in rows:
        error, seconds = f"{100 * row['error']:.2f}%", f"{1e3 * row['seconds'][0]:.2f}"
        cells.append([row["network"], row["format"], f"{row['macs'] / 1e6:.1f}", error, seconds])
        cells[-1].append(f"{row['speedup'][0]:.2f}x")
    return table(header, cells)


def fair_front(setting: str) -> str:
    """What else is as fast as a spatial bottleneck: what is wrong, of several seeds, and how fast it is."""
    found = read(f"fair-front-{setting}.json")
    dense = next(row for row in found["rows"] if row["network"] == "dense")
    cells = []
    for row in found["rows"]:
        errors = [100 * error for error in row["error"].values()]
        lost = [100 * (row["error"][seed] - dense["error"][seed]) for seed in row["error"]]
        cells.append(
            [
                row["network"],
                str(row["side"]),
                str(len(row["error"])),
                str(row["epochs"] + (dense["epochs"] if row["fitted"] else 0)),
                f"{row['macs'] / 1e6:.1f}",
                f"{dense['macs'] / row['macs']:.2f}",
                f"{row['speedup'][0]:.2f}x",
                f"{fmean(errors):.2f}%" + (f" ± {stdev(errors):.2f}" if len(errors) > 1 else ""),
                f"{fmean(lost):+.2f} ({min(lost):+.2f} to {max(lost):+.2f})",
            ]
        )
    header = ["network", "input", "seeds", "epochs", "M MACs", "MAC ratio", "speed-up", "test error"]
    figure = f"![points lost against measured speed-up](results/fair-front-{setting}.svg)"
    return f"{table([*header, 'lost, points'], cells)}\n\n{figure}"


def format_accuracy() -> str:
    """What formats cost in accuracy after quantisation alone."""
    header = ["network", "test images", "float32", "bfloat16", "int8", "layers in int8", "int8, all layers"]
    cells = []
    for row in read("format-accuracy.json")["rows"]:
        errors = [f"{100 * row[form]['error']:.1f}%" for form in ("float32", "bfloat16", "int8")]
        said = row["int8"]["int8"]
        whole = row.get("int8, all layers", {"error": row["int8"]["error"]} if not said["kept"] else None)
        every = "-" if whole is None else f"{100 * whole['error']:.1f}%"
        layers = f"{said['layers']} of {said['layers'] + len(said['kept'])}"
        cells.append([row["network"], str(row["images"]), *errors, layers, every])
    return table(header, cells)


def exports(*folder: str) -> str:
    """Our kernels in ONNX Runtime, over the dense network there and over OpenVINO's in bfloat16."""
    header = ["network", "format", "batch", "MAC ratio", "ms", "over the dense network in ONNX Runtime"]
    header += ["over the dense network in OpenVINO, bfloat16"]
    cells = []
    for row in read(*folder, "exports.json")["rows"]:
        if not row["plugin"]:
            continue
        ms = row["ms"]
        numbers = [str(row["batch"]), f"{row['mac_ratio']:.2f}", f"{ms['ours']:.2f}"]
        low = ms["OpenVINO bfloat16 of the dense network"] / ms["ours"]
        cells.append([row["network"], row["dtype"], *numbers, f"{row['speedup']:.2f}x", f"{low:.2f}x"])
    return table(header, cells)


def networks(*folder: str) -> str:
    result = read(*folder, "bench-networks.json")
    header = ["network", "batch", "threads", "MAC ratio", "speed-up over the dense one, fused"]
    header += ["the dense one on smaller images", "ms", "dense, ms"]
    first = result["rows"][0]
    others = [n for n in first["timings"] if n not in first["candidates"] and n != "ours, dense"]
    header += [f"{name}, ms" for name in others]
    cells = []
    for row in result["rows"]:
        (candidate, entry), *rest = row["candidates"].items()
        times: dict[str, Any] = {name: timing["median_s"] for name, timing in row["timings"].items()}
        dense = times["ours, dense"]
        smaller = [f"{dense / times[name]:.2f}x ({name.rpartition(' ')[2]})" for name, _ in rest]
        cells.append(
            [
                row["case"],
                str(row["batch"]),
                str(row["threads"]),
                f"{entry['mac_ratio']:.2f}",
                f"{dense / times[candidate]:.2f}x",
                smaller[0] if smaller else "",
                *(f"{1e3 * times[name]:.2f}" for name in (candidate, "ours, dense", *others)),
            ]
        )
    return table(header, cells)


def trained(name: str) -> str:
    """Return runs with several seeds; also draw the figure of error against time beside their JSON files."""
    folder = ROOT / "results" / name
    found = collect(folder)
    rows = result_lines(found)
    settings = list(rows[0].times)
    header = ["network", "test error", "seeds", "M MACs", "MAC ratio"]
    header += [f"ms, {s}" for s in settings] + [f"speed-up, {s}" for s in settings]
    cells = []
    for row in rows:
        spread = "" if row.deviation is None else f" ± {100 * row.deviation:.2f}"
        cells.append(
            [
                row.label,
                f"{100 * row.error:.2f}{spread}%",
                str(row.seeds),
                f"{row.macs / 1e6:.2f}",
                f"{row.mac_ratio:.2f}",
                *(f"{1e3 * row.times[s][0]:.2f}" for s in settings),
                *(f"{row.speedups[s][0]:.2f}x" for s in settings),
            ]
        )
    drawn = draw_pictures(found, rows)
    if "--check" not in sys.argv:
        (folder / "error-time.svg").write_bytes(drawn[-1].content)
    figure = f"![{drawn[-1].alternative}](results/{name}/error-time.svg)"
    return f"{table(header, cells)}\n\n{figure}"


def espace(name: str) -> str:
    """Return the paper's timed layers and networks, with its printed figures for known settings."""
    rows = read(name, f"{name}.json")["rows"]
    experiment = espace_by_name(name)
    points = (*experiment.points, *experiment.without_data().points)
    paper = {(point.series, point.label): dict(point.paper) for point in points}
    peers = list(rows[0]["layers"]["peers"])
    judged = rows[0]["response_error"] is not None
    header = ["method", "setting", *(["response error"] if judged else []), "MAC ratio", "speed-up"]
    header += [f"over {peer}" for peer in peers]
    parts = [part for part in ("layers", "network") if part in rows[0]]
    if len(parts) > 1:
        header += ["network: MAC ratio", "speed-up", *(f"over {peer}" for peer in peers)]
    header += ["the paper's"]
    cells = [
        [
            row["series"],
            row["label"],
            *([f"{100 * row['response_error']:.1f}%"] if judged else []),
            *(
                text
                for part in (row[part] for part in parts)
                for text in (
                    f"{part['mac_ratio']:.2f}",
                    *(f"{value:.2f}x" for value in (part["speedup"], *part["peers"].values())),
                )
            ),
            paper_gain(paper.get((row["series"], row["label"]), {})),
        ]
        for row in rows
    ]
    figure = f"\n\n![response error against measured speed-up](results/{name}/response-speed.svg)"
    return table(header, cells) + (figure if judged else "")


def paper_gain(printed: dict[str, float]) -> str:
    """Return a printed speed-up and its loss."""
    return str(Gain("", "", printed["speedup"], printed.get("drop"))) if printed else ""


def printed_espace(name: str) -> str:
    """Return the ESPACE paper's printed figures of a figure or table."""
    cells = [
        [gain.method, gain.setting or "not stated", f"{gain.speedup:g}x", *points_of(gain)]
        for gain in ESPACE[name]
    ]
    return table(["method", "setting", "speed-up", "points of top-5 error"], cells)


def points_of(gain: Gain) -> list[str]:
    return ["" if gain.drop is None else f"{gain.drop:.2f}"]


def printed_table(name: str) -> str:
    """Return the spatial bottleneck paper's printed figures of a table."""
    experiment = by_name(name)
    sets = ("cifar10", "cifar100") if experiment.data == "cifar10" else (experiment.data,)
    names = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "imagenet": "ImageNet"}
    top5 = experiment.data == "imagenet"
    cells = [
        [
            label_of({"name": entry.network, "settings": dict(entry.settings)}),
            *("" if (found := entry.printed(data)) is None else str(found) for data in sets),
            *([str(entry.printed_top5(experiment.data))] if top5 else []),
            "" if entry.paper_macs is None else f"{entry.paper_macs:g}",
        ]
        for entry in experiment.entries
        if any(entry.printed(data) for data in sets)
    ]
    errors = [f"{names[data]}, error in %" for data in sets]
    return table(["network", *errors, *(["top-5"] if top5 else []), "M MACs"], cells)


def compared(name: str, figure: str = "drop-speed") -> str:
    """Return methods on one trained network; several draws of a setting are one row, with their range."""
    result = read(name, "comparison.json")
    top5 = figure.startswith("top5")
    tuned = result["recipe"] is not None
    header = ["method", "setting", "accuracy lost, points", *(["top-5 accuracy lost"] if top5 else [])]
    header += [*(["before fine-tuning"] if tuned else []), "p", "network", "MAC ratio"]
    bytes_differ = len({row["bytes"] for row in result["rows"]}) > 1
    several = len({row["series"].split(",")[0] for row in result["rows"]}) > 1
    header += [*(["KB"] if bytes_differ else []), *(["on the front of"] if several else [])]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in result["rows"]:
        groups.setdefault((row["series"], row["label"]), []).append(row)
    cells = [
        [
            series,
            f"{label}, diverged" if any(row.get("diverged") for row in rows) else label,
            span(rows, "drop"),
            *([span(rows, "top5_drop")] if top5 else []),
            *([span(rows, "untuned_drop")] if tuned else []),
            "< 1e-6" if (p := max(row["p"] for row in rows)) < 1e-6 else f"{p:.2g}",
            f"{fmean(row['speedup'] for row in rows):.2f}x",
            f"{fmean(row['mac_ratio'] for row in rows):.2f}",
            *(
                [f"{rows[0]['bytes'] / 1e3:.0f} of {rows[0]['bytes_before'] / 1e3:.0f}"]
                if bytes_differ
                else []
            ),
            *([", ".join(rows[0]["fronts"])] if several else []),
        ]
        for (series, label), rows in groups.items()
    ]
    picture = f"![accuracy lost against measured speed-up](results/{name}/{figure}.svg)"
    return f"{table(header, cells)}\n\n{picture}"


# networks of the comparisons: the folders with their points, what is counted as lost
CHOSEN = {
    "ResNet-20, 32 x 32, one epoch of fine-tuning": (("compared-cifar-resnet20",), "drop"),
    "ResNet-56, 32 x 32, one epoch of fine-tuning": (("compared-cifar-resnet56",), "drop"),
    "resnet18, 128 x 128, two epochs": (
        ("compared-clothing-resnet18", "compared-clothing-resnet18-sb"),
        "drop",
    ),
    "SqueezeNet, 227 x 227, four epochs, top-5": (("compared-squeezenet",), "top5_drop"),
}


def choose_methods() -> str:
    """The fastest and the smallest of all settings within a loss, for each network of the comparisons."""
    cells = []
    for name, (folders, lost) in CHOSEN.items():
        rows = [row for folder in folders for row in read(folder, "comparison.json")["rows"]]
        for allowed in (1, 5):
            within = [row for row in rows if row[lost] <= allowed]
            fastest = max(within, key=lambda row: row["speedup"], default=None)
            smallest = min(within, key=lambda row: row["bytes"], default=None)
            faster = fastest is not None and fastest["speedup"] > 1
            small = smallest is not None and smallest["bytes"] < smallest["bytes_before"]
            cells.append(
                [
                    name,
                    str(allowed),
                    *((f"{fastest['speedup']:.2f}x", *told(fastest, lost)) if faster else ("none", "", "")),
                    *(
                        (f"{smallest['bytes_before'] / smallest['bytes']:.1f}x", *told(smallest, lost))
                        if small
                        else ("none", "", "")
                    ),
                ]
            )
    header = ["network", "points allowed", "fastest", "by", "points lost", "smallest", "by", "points lost"]
    return table(header, cells)


def told(row: dict[str, Any], lost: str) -> tuple[str, str]:
    return f"{row['series'].partition(',')[0]}, {row['label']}", f"{row[lost]:+.2f}"


def choose_formats() -> str:
    """Blocks in other number formats, dense and at some positions, over the dense one in float32."""
    dense = ("torch eager", "OpenVINO")
    shown = {
        "dense, bfloat16": (
            "torch eager bfloat16",
            "torch.compile bfloat16",
            "OpenVINO bfloat16",
            "OpenVINO bfloat16, NHWC bfloat16 maps",
            "rRB",
        ),
        "dense, int8 (OpenVINO)": ("OpenVINO int8",),
        "2/4, float32": ("rSB 2/4 in float32",),
        "2/4, bfloat16": ("rSB 2/4",),
        "1/4, bfloat16": ("rSB 1/4",),
    }
    cells = []
    for row in read("bench-blocks-bfloat16.json")["rows"]:
        if row["threads"] == 1 and row["case"].startswith("rRB"):
            times = {name: timing["median_s"] for name, timing in row["timings"].items()}
            base = min(times[name] for name in dense)
            best = [min(times[name] for name in names) for names in shown.values()]
            block = row["case"].replace("rRB ", "")
            cells.append([block, str(row["batch"]), f"{1e3 * base:.2f}", *(f"{base / s:.2f}x" for s in best)])
    return table(["block", "batch", "dense, float32, ms", *shown], cells)


def choose_smaller() -> str:
    """Networks with bottlenecks against the dense network on smaller images with as many MACs."""
    groups: dict[str, list[tuple[float, float]]] = {}
    for row in read("bench-networks.json")["rows"]:
        (candidate, _), *rest = row["candidates"].items()
        times = {name: timing["median_s"] for name, timing in row["timings"].items()}
        for name, _ in rest:
            side = "224 x 224" if row["case"].startswith("sb-resnet") else "32 x 32"
            gains = (times["ours, dense"] / times[candidate], times["ours, dense"] / times[name])
            groups.setdefault(side, []).append(gains)
    cells = []
    for side, gains in groups.items():
        own, other = zip(*gains, strict=True)
        wins = sum(a > b for a, b in gains)
        spans = [f"{median(v):.2f}x ({min(v):.2f} to {max(v):.2f})" for v in (own, other)]
        cells.append([side, str(len(gains)), *spans, f"{wins} of {len(gains)}"])
    header = ["images", "cases", "bottlenecks over dense", "smaller images over dense"]
    return table([*header, "bottlenecks faster"], cells)


def layers(method: str, result: str = "bench-methods.json") -> str:
    """Return one method on single layers: speed-ups over the fastest dense layer, and MAC ratios."""
    cases = []
    for case in read(result)["cases"]:
        # results use the method names of their time
        rows = [row for row in case["rows"] if ALIASES.get(row["method"], row["method"]) == method]
        own = {row["setting"]: row for row in rows}
        if own:
            cases.append((case, own))
    settings = list(dict.fromkeys(setting for _, own in cases for setting in own))
    cells = [
        [
            case["name"],
            str(case["batch"]),
            f"{1e3 * min(case['dense'].values()):.2f}",
            *(
                f"{own[key]['speedup']:.2f}x of {own[key]['mac_ratio']:.2f}" if key in own else ""
                for key in settings
            ),
        ]
        for case, own in cases
    ]
    return table(["layer", "batch", "dense, ms", *settings], cells)


def fills() -> str:
    """One network with all layers of stride 1 perforated: wrong answers by fill."""
    result = read("fills.json")
    rows = {(row["sampling"], row["fill"]): row for row in result["rows"]}
    names = list(dict.fromkeys(fill for sampling, fill in rows if sampling != "1"))
    header = ["fill"]
    samplings = list(dict.fromkeys(sampling for sampling, _ in rows if sampling != "1"))
    for sampling in samplings:
        header += [f"wrong at {sampling}", "MAC ratio"]
    cells = [["none (dense)", *[f"{rows['1', 'dense']['wrong']:.1%}", "1.00"] * len(samplings)]]
    for name in names:
        own = [rows.get((sampling, name)) for sampling in samplings]
        pairs = (
            ("", "") if row is None else (f"{row['wrong']:.1%}", f"{row['mac_ratio']:.2f}") for row in own
        )
        cells.append([name, *(text for pair in pairs for text in pair)])
    return table(header, cells)


# most of the responses' power that a layer may lose: up to 8% in all of ResNet-20's cost it 0.7 points
HARMLESS = 0.08


def fills_by_kind() -> str:
    """What perforation loses of a layer's responses, by network, kernel, stride and map."""
    kinds: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    counts = {}
    for name in ("fills.json", "fills-squeezenet.json"):
        result = read(name)
        counts[result["network"]] = len(result["layers"])
        for row in result["layers"]:
            kernel, size = (" x ".join(map(str, row[key])) for key in ("kernel", "size"))
            depthwise = row["groups"] > 1 and row["groups"] == row["channels"][0]
            kind = (result["network"], kernel + ", depthwise" * depthwise, str(row["stride"][0]), size)
            kinds.setdefault(kind, []).append(row)
    rates = ("3/4", "2/4", "1/4")
    settings = [f"{fill} {text}" for text in rates for fill in ("nearest", "fitted")]

    def values(rows: list[dict[str, Any]], setting: str) -> list[float]:
        return [row[setting] for row in rows if isinstance(row.get(setting), float)]

    def span_of(found: list[float], form: str) -> str:
        low, high = (format(value, form) for value in (min(found), max(found)))
        return low if low == high else f"{low} to {high}"

    def lost(rows: list[dict[str, Any]], setting: str) -> str:
        found = values(rows, setting)
        return span_of(found, ".1%") if found else "stays"

    def harmless(rows: list[dict[str, Any]], text: str) -> int:
        return sum(value <= HARMLESS for value in values(rows, f"fitted {text}"))

    cells = [
        [
            *kind,
            span_of([max(row["channels"]) for row in rows], "d"),
            f"{span_of([row['depth'] + 1 for row in rows], 'd')} of {counts[kind[0]]}",
            *(lost(rows, setting) for setting in settings),
            ", ".join(f"{harmless(rows, text)} of {len(rows)} at {text}" for text in rates),
        ]
        for kind, rows in kinds.items()
    ]
    header = ["network", "kernel", "stride", "map", "channels", "depth", *settings, "harmless layers"]
    return table(header, cells)


def span(rows: list[dict[str, Any]], key: str) -> str:
    """Return a value, or the mean of several draws with the lowest and the highest."""
    values = [row[key] for row in rows]
    if len(values) == 1:
        return f"{values[0]:+.2f}"
    return f"{fmean(values):+.2f} ({min(values):+.2f} to {max(values):+.2f})"


def reached(result: dict[str, Any]) -> list[str]:
    """Return a search's speed-up as asked for, predicted and measured, and the ratio of MACs."""
    cost, speed, last = result["cost"], result["whole"]["speedup"], result["search"]["attempts"][-1]
    return [
        f"{result['search']['target']['speedup']:g}x",
        f"{last['before'] / last['predicted']:.2f}x",
        f"{speed['median']:.2f}x ({speed['q1']:.2f} to {speed['q3']:.2f})",
        f"{cost['before']['macs'] / cost['after']['macs']:.2f}",
    ]


def targets(*names: str) -> str:
    """Return searches for a speed-up: asked, predicted and measured, and the error at each stage."""
    header = ["network", "asked", "predicted", "measured", "MAC ratio", "error before", "replaced"]
    header += ["batch norm anew", "fine-tuned", "epochs", "p", "search, min"]
    cells = []
    for name in names:
        result = read(name, "accelerate.json")
        # a run that was timed again reuses its scores
        first = (
            read(name, "first-run.json") if (ROOT / "results" / name / "first-run.json").exists() else result
        )
        stages = result["stages"]
        errors = [f"{100 * stage['error']:.2f}%" for stage in stages]
        cells.append(
            [
                name,
                *reached(result),
                *errors,
                str(result["recipe"]["epochs"]),
                f"{stages[-1]['p']:.2g}",
                f"{first['search']['seconds']['scoring'] / 60:.1f}",
            ]
        )
    return table(header, cells)


def of_all_candidates(*names: str) -> str:
    """Return searches among all candidates: what was asked and measured, errors, and what was chosen."""
    header = ["network", "asked", "predicted", "measured", "MAC ratio", "error before", "replaced"]
    header += ["fine-tuned", "points lost", "of the first five", "p", "epochs", "layers", "scoring, min"]
    cells = []
    for name in names:
        result = read(name, "accelerate.json")
        search = result["search"]
        stages = {stage["name"]: stage for stage in result["stages"]}
        before, replaced, tuned = (stages[key] for key in ("before", "after replacing", "after fine-tuning"))
        layers = {row["layers"][0] for row in search["candidates"] if len(row["layers"]) == 1}
        cells.append(
            [
                name,
                *reached(result),
                *(f"{100 * stage['error']:.2f}%" for stage in (before, replaced, tuned)),
                f"{100 * (tuned['error'] - before['error']):+.2f}",
                f"{100 * (tuned['top5_error'] - before['top5_error']):+.2f}" if "top5_error" in tuned else "",
                f"{tuned['p']:.2g}",
                str(result["recipe"]["epochs"]),
                f"{search['attempts'][-1]['layers']} of {len(layers)}",
                f"{search['seconds']['scoring'] / 60:.1f}",
            ]
        )
    return table(header, cells)


def with_drop(*names: str) -> str:
    """Return searches for a speed-up within a loss, one command each, and their results."""
    header = ["network", "asked", "points allowed", "measured", "MAC ratio", "error before", "replaced"]
    header += ["fine-tuned", "points lost", "p", "epochs", "scoring, min"]
    cells = []
    for name in names:
        result = read(name, "accelerate.json")
        stages, (_, _, measured, ratio) = result["stages"], reached(result)
        asked = {part["what"]: part for part in result["verdict"]["parts"]}
        cells.append(
            [
                name,
                f"{asked['speedup']['asked']:g}x",
                f"{asked['max_drop']['asked']:g}",
                measured,
                ratio,
                *(f"{100 * stages[i]['error']:.2f}%" for i in (0, 1, -1)),
                f"{asked['max_drop']['found']:+.2f}",
                f"{stages[-1]['p']:.2g}",
                f"{len(read(name, 'run.json')['history'])} of {result['recipe']['epochs']}",
                f"{result['search']['seconds']['scoring'] / 60:.1f}",
            ]
        )
    return table(header, cells)


def zoo() -> str:
    """Return other libraries' networks: whether the fused copy is equal, its speed, and layers taken."""
    result = read("zoo.json")
    header = ["networks", "number", "fused: equal", "refused", "wrong or failed"]
    header += [
        "convolutions in programs",
        "fused over eager (median)",
        "least",
        "SpatialBottleneck takes",
        "LowRank",
        "Espace",
    ]
    header += ["artifact equal"]
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in result["rows"]:
        if "unusable" not in row:
            groups.setdefault(row["name"].partition("/")[0], []).append(row)
    cells = []
    for library, rows in groups.items():
        answers = Counter(row.get("fuse", {}).get("answer", "stopped") for row in rows)
        convs = [row["convs"] for row in rows if "convs" in row]
        speed = {row["name"].partition("/")[2]: row["time"]["speedup"] for row in rows if "time" in row}
        slowest = min(speed, key=lambda name: speed[name]) if speed else None
        cells.append(
            [
                library,
                str(len(rows)),
                str(answers["equal"]),
                str(answers["refused"]),
                str(len(rows) - answers["equal"] - answers["refused"]),
                f"{sum(c['programs'] for c in convs)} of {sum(c['all'] for c in convs)}",
                f"{median(speed.values()):.2f}x" if speed else "",
                f"{speed[slowest]:.2f}x ({slowest})" if slowest else "",
                *(of_all([row["methods"][method] for row in rows if "methods" in row]) for method in METHODS),
                of_artifacts([row["accelerated"] for row in rows if "accelerated" in row]),
            ]
        )
    return f"{table(header, cells)}\n\n{left_by_reason(result['rows'])}"


# ---------------------------------------------------------------- a GPU


def gpu_machine() -> str:
    """Return the card and the versions, with its rates in a copy and in a matrix product."""
    result = read("bench-blocks-cuda.json")
    where, most = result["environment"], result["ceilings"]
    rates = {"bfloat16": "bfloat16", "float16": "float16", "float32": "tf32"}
    clocks = [clock for row in result["rows"] for clock in row["sm_clock_mhz"]]
    cudnn = where["cudnn"]
    cells = {
        "card": f"{where['device']}, {where['multiprocessors']} multiprocessors, "
        f"{where['memory_bytes'] / 2**30:.0f} GiB, {where['l2_bytes'] / 2**20:.0f} MiB of second-level cache",
        "driver, CUDA, cuDNN": f"{where['driver_version']}, {where['cuda']}, "
        f"{cudnn // 10000}.{cudnn // 100 % 100}.{cudnn % 100}",
        "torch, Triton": f"{where['torch']}, {where['triton']}",
        "clock while timing": f"{min(clocks)} to {max(clocks)} MHz of {where['clocks_max_sm']}",
        "a large copy": f"{most['bandwidth'] / 1e12:.2f} TB/s",
        "a large matrix product": ", ".join(
            f"{label} {most['rates'][name] / 1e12:.0f} TFLOP/s" for name, label in rates.items()
        ),
        "command": f"`{where['command'].partition(' --out')[0]}`, commit {where['commit']}",
    }
    return table(["what", "value"], [list(cell) for cell in cells.items()]).replace("---:", "---")


# the GPU blocks to draw, with their MAC ratios
GPU_DRAWN = ("rSB 2/4", "rSB 1/4")


def gpu_blocks() -> str:
    """Return each block on the card: dense, ours, and QUARTER with ordinary operators."""
    result = read("bench-blocks-cuda.json")
    header = ["block", "batch", "fastest dense, us", "of roofline", "rRB by `qx.fuse`"]
    for name in GPU_DRAWN:
        header += [f"{name}: MAC ratio", "speed-up", "of roofline"]
    header += ["stride 2 and back by cuDNN", "rSB 1/4 over that"]
    cells = []
    for row in result["rows"]:
        best, own = row["best_dense"], row["candidates"]
        quarter, plain = own["rSB 1/4"], own["cuDNN, stride 2"]
        cells.append(
            [
                row["case"].replace("rRB ", ""),
                str(row["batch"]),
                f"{1e6 * row['timings'][best]['median_s']:.1f}",
                f"{row['roofline'][best]['share']:.0%}",
                f"{own['rRB']['speedup']:.2f}x",
                *(
                    text
                    for entry in (own[name] for name in GPU_DRAWN)
                    for text in (
                        f"{entry['mac_ratio']:.2f}",
                        f"{entry['speedup']:.2f}x",
                        f"{entry['roofline_share']:.0%}",
                    )
                ),
                f"{plain['speedup']:.2f}x",
                f"{quarter['speedup_over cuDNN, stride 2']:.2f}x",
            ]
        )
    if "--check" not in sys.argv:
        shown = [
            {**row, "candidates": {name: row["candidates"][name] for name in GPU_DRAWN}}
            for row in result["rows"]
        ]
        (ROOT / "results" / "bench-blocks-cuda.svg").write_bytes(
            draw_speedup_figure({**result, "rows": shown})
        )
    return f"{table(header, cells)}\n\n![speed-up against MAC ratio](results/bench-blocks-cuda.svg)"


# targets of blocks in bfloat16: name, channels, batches, candidate, its ratio's name, least value
GPU_TARGETS: tuple[tuple[str, str, tuple[int, ...], str, str, float], ...] = (
    ("dense block by `qx.fuse`, over cuDNN's", "", (64, 256), "rRB", "speedup", 0.9),
    ("rSB 2/4, 64 x 56^2", "64", (64, 256), "rSB 2/4", "speedup", 1.35),
    ("rSB 2/4, 128 x 28^2", "128", (64, 256), "rSB 2/4", "speedup", 1.8),
    ("rSB 2/4, 256 x 14^2", "256", (64, 256), "rSB 2/4", "speedup", 1.8),
    ("rSB 2/4, 512 x 7^2", "512", (64, 256), "rSB 2/4", "speedup", 1.8),
    ("rSB 1/4, 64 x 56^2", "64", (64, 256), "rSB 1/4", "speedup", 1.5),
    ("rSB 1/4, 128 x 28^2", "128", (64, 256), "rSB 1/4", "speedup", 2.7),
    ("rSB 1/4, 256 x 14^2", "256", (64, 256), "rSB 1/4", "speedup", 3.4),
    ("rSB 1/4, 512 x 7^2", "512", (64, 256), "rSB 1/4", "speedup", 2.7),
    ("rSB 1/4, over stride 2 and back", "", (64, 256), "rSB 1/4", "speedup_over cuDNN, stride 2", 1.0),
    ("rSB 2/4, one image", "", (1,), "rSB 2/4", "speedup", 1.0),
    ("rSB 1/4, one image", "", (1,), "rSB 1/4", "speedup", 1.0),
)
GPU_RATE = 20_000


def gpu_targets() -> str:
    """Return the GPU targets beside the measurements, including missed ones."""
    rows = read("bench-blocks-cuda.json")["rows"]
    cells = []
    for what, channels, batches, name, key, least in GPU_TARGETS:
        values = [
            row["candidates"][name][key]
            for row in rows
            if row["batch"] in batches and channels in ("", row["case"].split()[1])
        ]
        met = sum(value >= least for value in values)
        verdict = "yes" if met == len(values) else "no" if not met else f"in {met} of {len(values)}"
        told = f"{min(values):.2f}x to {max(values):.2f}x"
        cells.append([what, f"{least:g}x", told, verdict])
    alone = read("gpu-training.json")["alone"]
    rate = alone["images_per_second"]
    reached = "yes" if rate >= GPU_RATE else "no"
    cells.append([f"training of {alone['label']}, images a second", f"{GPU_RATE:,}", f"{rate:,.0f}", reached])
    return table(["what", "wanted, at least", "measured", "reached"], cells)


def gpu_correct() -> str:
    """Return checks by part and type, and the greatest error in units of its tolerance."""
    result = read("gpu-correct.json")
    groups: dict[tuple[str, str], list[list[Any]]] = {}
    for job in result["jobs"]:
        groups.setdefault((job["part"], job["precision"]), []).extend(job["checks"])
    types = ("float32", "tf32", "float16", "bfloat16")
    order = list(dict.fromkeys(part for part, _ in groups))
    cells = [
        [
            part,
            precision,
            str(len(checks)),
            str(sum(not ok for _, _, ok, _ in checks)),
            f"{max(error for _, error, _, _ in checks if error is not None):.2g}",
        ]
        for (part, precision), checks in sorted(
            groups.items(), key=lambda found: (order.index(found[0][0]), types.index(found[0][1]))
        )
    ]
    return table(["what", "type", "checks", "failed", "greatest error / allowed"], cells)


METHODS = {"sb": "SpatialBottleneck", "lowrank": "LowRank", "espace": "Espace"}


def of_all(records: list[dict[str, Any]]) -> str:
    """Return how many layers a method takes, of all convolutions that it was asked about."""
    found = [record for record in records if "takes" in record]
    taken = sum(record["takes"] for record in found)
    return f"{taken} of {taken + sum(sum(record['leaves'].values()) for record in found)}"


def of_artifacts(records: list[dict[str, Any]]) -> str:
    """Return how many accelerated networks give equal outputs after saving and loading."""
    found = [record["artifact"]["answer"] for record in records if "artifact" in record]
    return f"{found.count('equal')} of {len(found)}"


def left_by_reason(rows: list[dict[str, Any]]) -> str:
    """Return why layers are skipped, by method, and why networks are refused: the most frequent reasons."""
    said = []
    for method, label in METHODS.items():
        reasons: Counter[str] = Counter()
        for row in rows:
            reasons.update(row.get("methods", {}).get(method, {}).get("leaves", {}))
        said.append(f"- {label} leaves: " + "; ".join(f"{n} {text}" for text, n in reasons.most_common(6)))
    refused = [row for row in rows if row.get("fuse", {}).get("answer") == "refused"]
    if refused:
        names = ", ".join(row["name"].partition("/")[2] for row in refused)
        said.append(f"- not fused: {names}")
    return "\n".join(said)


def badges() -> str:
    """The badges that docs/badges.py made, each from a run."""
    place = ROOT / "results" / "badges" / "badges.json"
    found = json.loads(place.read_text(encoding="utf-8"))
    shown = [
        f"![{name}: {found[name]['text']}](results/badges/{name}.svg)"
        for name in ("types", "coverage")
        if name in found
    ]
    return " ".join(shown)


MADE = {
    "badges": badges,
    "demo": demo,
    "choose-methods": choose_methods,
    "choose-formats": choose_formats,
    "choose-smaller": choose_smaller,
    "blocks": lambda: bench("blocks"),
    "perforate-speed": lambda: layers("perforate", "bench-methods-zen5.json"),
    "blocks-bfloat16": lambda: bench("blocks-bfloat16"),
    "networks-bfloat16": low_networks,
    "blocks-int8": lambda: bench("blocks-int8"),
    "networks-int8": int8_networks,
    "amx-blocks-bfloat16": lambda: bench("blocks-bfloat16", AMX),
    "amx-networks-bfloat16": lambda: low_networks(AMX),
    "amx-blocks-int8": lambda: bench("blocks-int8", AMX),
    "amx-networks-int8": lambda: int8_networks(AMX),
    "amx-blocks": lambda: bench("blocks", AMX),
    "amx-networks": lambda: float_networks(AMX),
    "amx-espace": lambda: layers("espace", f"{AMX}/bench-methods.json"),
    "amx-exports": lambda: exports(AMX),
    "amx-training": lambda: bench("training", AMX),
    "plugins": plugins,
    "format-front": format_front,
    "equal-time-tiny": lambda: fair_front("tiny-width32-passes0.5"),
    "equal-time-clothing": lambda: fair_front("clothing-width32-passes0.6"),
    "format-accuracy": format_accuracy,
    "ops": lambda: bench("ops"),
    "training": lambda: bench("training"),
    "networks": networks,
    "zoo": zoo,
    "gpu-machine": gpu_machine,
    "gpu-blocks": gpu_blocks,
    "gpu-targets": gpu_targets,
    "gpu-correct": gpu_correct,
    "cifar10-jpeg": lambda: trained("cifar10-jpeg"),
    "clothing-small-128": lambda: trained("clothing-small-128"),
    "tiny-imagenet-50": lambda: trained("tiny-imagenet-50"),
    "targets": lambda: targets("resnet56-2x", "resnet56-1.5x", "clothing-resnet18-2x"),
    "of-all-candidates": lambda: of_all_candidates("resnet56-2x-all", "squeezenet-1.3x"),
    "with-drop": lambda: with_drop("resnet20-published-1.5x", "resnet20-jpeg-1.5x"),
    "masks-cifar-resnet20": lambda: compared("masks-cifar-resnet20"),
    "masks-cifar-resnet56": lambda: compared("masks-cifar-resnet56"),
    "masks-jpeg-cifar-resnet20": lambda: compared("masks-jpeg-cifar-resnet20"),
    "masks-jpeg-cifar-resnet56": lambda: compared("masks-jpeg-cifar-resnet56"),
    "masks-clothing-resnet18": lambda: compared("masks-clothing-resnet18"),
    "masks-squeezenet-tuned": lambda: compared("masks-squeezenet-tuned", "top5-drop-speed"),
    "masks-squeezenet": lambda: compared("masks-squeezenet", "top5-drop-speed"),
    "fills": fills,
    "fills-layers": fills_by_kind,
    "compared-cifar-resnet20": lambda: compared("compared-cifar-resnet20"),
    "compared-cifar-resnet56": lambda: compared("compared-cifar-resnet56"),
    "compared-clothing-resnet18": lambda: compared("compared-clothing-resnet18"),
    "compared-clothing-resnet18-fitted": lambda: compared("compared-clothing-resnet18-fitted"),
    "compared-clothing-resnet18-sb": lambda: compared("compared-clothing-resnet18-sb"),
    "compared-squeezenet": lambda: compared("compared-squeezenet", "top5-drop-speed"),
    **{
        f"layers-{method}": partial(layers, method)
        for method in ("binaryconnect", "cp", "espace", "lowrank", "qcnn")
    },
    **{
        f"printed-{name}": partial(printed_table, name)
        for name in ("table1", "table2", "table3", "table4", "downsampling")
    },
    **{f"printed-{name}": partial(printed_espace, name) for name in ESPACE},
    "espace-figure3": lambda: espace("espace-figure3"),
    "espace-figure4": lambda: espace("espace-figure4"),
    "espace-table2": lambda: espace("espace-table2"),
    "espace-table3": lambda: espace("espace-table3"),
}


def main() -> int:
    stale = []
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        text = fresh = path.read_text(encoding="utf-8")
        up = "../" * (len(path.relative_to(ROOT).parts) - 1)
        for name in re.findall(r"<!-- ([\w.-]+) -->", text):
            made = MADE[name]().replace("](results/", f"]({up}results/")
            block = f"<!-- {name} -->\n{made}\n<!-- /{name} -->"
            fresh = re.sub(
                rf"<!-- {name} -->.*?<!-- /{name} -->", lambda _, b=block: b, fresh, flags=re.DOTALL
            )
        if fresh != text:
            stale.append(path.relative_to(ROOT))
            if "--check" not in sys.argv:
                path.write_text(fresh, encoding="utf-8")
    if "--check" in sys.argv:
        for place in stale:
            print(f"{place}: a table is not what results/*.json say; run python docs/tables.py")
        return int(bool(stale))
    return 0


if __name__ == "__main__":
    sys.exit(main())
