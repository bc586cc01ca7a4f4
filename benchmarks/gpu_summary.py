"""Summarise the results of gpu_check.sh in a few thousand characters, with the card and versions used.

python benchmarks/gpu_summary.py results/gpu
python benchmarks/gpu_summary.py --machine
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SUITES = ("blocks", "networks", "training", "ops")
# targets in bfloat16 from 64 images on: suite and candidate, start of a case's name
TARGETS = {
    ("blocks", "rRB"): {"": 0.9},
    ("blocks", "rSB 2/4"): {"rRB 64 ": 1.35, "rRB 128": 1.8, "rRB 256": 1.8, "rRB 512": 1.8},
    ("blocks", "rSB 1/4"): {"rRB 64 ": 1.5, "rRB 128": 2.7, "rRB 256": 3.4, "rRB 512": 2.7},
    ("blocks", "rSB 1/4 / cuDNN, stride 2"): {"": 1.0},
    ("training", "rSB 2/4"): {"rRB": 1.6},
    ("training", "sb-resnet18"): {"": 1.3},
    ("ops", "dense"): {"": 0.9},
    ("ops", "random 0.5"): {"128 ": 1.6, "256 ": 1.6, "512 ": 1.6},
    ("ops", "random 0.25"): {"128 ": 2.8, "256 ": 2.8, "512 ": 2.8},
}
# of the single convolutions
SHOWN = ("dense", "random 0.25", "random 0.5")
SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "tf32"}


def target(suite: str, name: str, row: dict[str, Any]) -> float | None:
    """Return the target of a candidate in a case."""
    if row["dtype"] != "bfloat16" or row["batch"] < 64:
        return None
    found = TARGETS.get((suite, name), {})
    return next((value for start, value in found.items() if row["case"].startswith(start)), None)


def cell(suite: str, name: str, label: str, ratio: float, share: float | None, row: dict[str, Any]) -> str:
    """ "name ratio (share of the roofline)", with "<target" where it falls short."""
    wanted = target(suite, name, row)
    missed = f"<{wanted:g}" if wanted is not None and ratio < wanted else ""
    return f"{label} {ratio:.2f}{missed}" + ("" if share is None else f" ({share:.0%})")


def bench_lines(result: dict[str, Any]) -> Iterator[str]:
    """Yield a line per case: the fastest dense candidate, and the speed-ups of the others over it."""
    suite = result["suite"]
    failed: dict[tuple[str, str], list[str]] = {}
    missing = len(result["left_out"])
    yield f"-- {suite}: {len(result['rows'])} cases, {result['seconds']:.0f} s, {missing} left out"
    for row in result["rows"]:
        best = row["best_dense"]
        where = f"{row['case']} b{row['batch']} {SHORT[row['dtype']]}"
        for name, why in row["failed"].items():
            failed.setdefault((name, why), []).append(where)
        if best is None:
            yield f"{where}: nothing dense ran"
            continue
        cells = []
        for name, entry in row["candidates"].items():
            if suite == "ops" and name not in SHOWN:
                continue
            label = f"{name} (MACs {entry['mac_ratio']:.2f})" if suite == "networks" else name
            cells.append(cell(suite, name, label, entry["speedup"], entry.get("roofline_share"), row))
            for key in entry:
                if key.startswith("speedup_over cu"):
                    other = key.removeprefix("speedup_over ")
                    cells.append(cell(suite, f"{name} / {other}", "/ stride 2", entry[key], None, row))
        own = row["timings"].get("ours, dense")
        if own is not None and best != "ours, dense":
            cells.insert(0, f"ours, dense {row['timings'][best]['median_s'] / own['median_s']:.2f}")
        share = row["roofline"].get(best, {}).get("share")
        time = f"{1e6 * row['timings'][best]['median_s']:.1f} us" + ("" if share is None else f" {share:.0%}")
        yield f"{where}: {best} {time} | " + " | ".join(cells)
    clocks = [clock for row in result["rows"] for clock in row["sm_clock_mhz"]]
    if clocks:
        yield f"SM clock {min(clocks)} to {max(clocks)} MHz"
    for (name, why), places in failed.items():
        yield f"FAILED {name} in {len(places)} cases ({places[0]}): {why}"[:300]


def ceiling_line(result: dict[str, Any]) -> str:
    most = result["ceilings"]
    rates = ", ".join(f"{SHORT[name]} {rate / 1e12:.0f}" for name, rate in most["rates"].items())
    return f"copy {most['bandwidth'] / 1e12:.2f} TB/s; products, TFLOP/s: {rates}"


def summary(folder: Path) -> Iterator[str]:
    path = folder / "correct.json"
    if path.exists():
        sys.path.insert(0, str(Path(__file__).parent))
        import gpu_correct

        result = json.loads(path.read_text())
        found = gpu_correct.failures(result)
        yield from gpu_correct.table(result)
        yield f"{len(found)} failed, {len(result['left_out'])} jobs left out, {result['seconds']:.0f} s"
        yield from (line[:200] for line in found[:15])
        if len(found) > 15:
            yield f"... and {len(found) - 15} more in correct.json"
    told = False
    for suite in SUITES:
        path = folder / f"bench-{suite}-cuda.json"
        if not path.exists():
            continue
        result = json.loads(path.read_text())
        if not told:
            yield f"{result['environment']['device']}; {ceiling_line(result)}"
            yield "speed-up over the fastest dense one, <target where short of it, (share of the roofline)"
            told = True
        yield from bench_lines(result)


def machine() -> Iterator[str]:
    import torch

    from quincunx.measure.latency_cuda import environment_cuda
    from quincunx.ops import backend

    if not torch.cuda.is_available():
        raise SystemExit("torch finds no GPU that it can use here")
    for key, value in environment_cuda().items():
        yield f"{key}: {value}"
    try:
        yield f"back end: {backend('cuda')}"  # type: ignore[call-arg, unused-ignore]
    except TypeError:
        yield "back end: this version has none for GPUs"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?", default=Path("results/gpu"))
    parser.add_argument("--machine", action="store_true", help="card and versions instead")
    args = parser.parse_args()
    for line in machine() if args.machine else summary(args.folder):
        print(line)


if __name__ == "__main__":
    main()
