"""Test error against time of networks in each number format: which of format and method gives what.

    python benchmarks/format_front.py --data train --test-data test --out results/format-front.json \\
        dense=runs/resnet20 "bottleneck 2/4"=runs/resnet20-sb

Each network is an artifact or a run, fused in float32, in bfloat16 and, calibrated on 256 training images, in
int8; all of them are timed in turn in one process, on one thread, and judged on all test images. Beside the
result stands the figure, of the same name.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch

from quincunx.acceleration.judge import sample_batches
from quincunx.cli.network import load_trained
from quincunx.data import load_data
from quincunx.fusion.fuse import fuse
from quincunx.measure.cost import cost
from quincunx.measure.environment import environment
from quincunx.measure.latency import measure
from quincunx.report.figures import PlottedPoint, draw_scatter
from quincunx.train.evaluation import evaluate
from quincunx.writing import write_json

FORMATS = (torch.float32, torch.bfloat16, torch.int8)
CALIBRATION = 256


def measured(
    networks: dict[str, Path], data: Path, test_data: Path | None, batch: int, rounds: int
) -> list[Any]:
    """Return a row for each network and format; speed-ups are over the first one in float32."""
    rows: dict[str, dict[str, Any]] = {}
    runs = {}
    read = load_data(data, test_source=test_data)
    for name, folder in networks.items():
        found = load_trained(str(folder), None, None, None)
        images = found.suited(read)
        x = torch.randn(batch, images.in_channels, *images.size)
        macs = cost(found.model, x[:1]).macs
        for dtype in FORMATS:
            label = f"{name}, {str(dtype).removeprefix('torch.')}"
            eight = dtype == torch.int8
            seen = [part for part, _ in sample_batches(images, CALIBRATION, seed=0)] if eight else None
            fused = fuse(found.model, dtype, calibration=seen, force=True)
            judged = evaluate(fused, images.test, images)
            rows[label] = {"network": name, "format": label.rpartition(" ")[2], "macs": macs}
            rows[label] |= {"error": judged.score, "loss": judged.loss, "images": judged.images}
            if eight:
                rows[label]["int8"] = fused.meta["int8"]
            runs[label] = partial(fused, x)
    with torch.inference_mode():
        times = measure(runs, threads=1, rounds=rounds)
    first = next(iter(times.values()))
    for label, timing in times.items():
        rows[label] |= {
            "seconds": [timing.median, *timing.quartiles],
            "speedup": list(timing.speedup_over(first)),
        }
        print(f"{label}: {100 * rows[label]['error']:.2f}% wrong, {1e3 * timing.median:.3f} ms", flush=True)
    return list(rows.values())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("networks", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--test-data", type=Path)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    pairs = [text.partition("=") for text in given.networks]
    if bad := [text for text, (_, sign, _) in zip(given.networks, pairs, strict=True) if not sign]:
        parser.error(f"{bad[0]!r}: expected NAME=FOLDER")
    networks = {name: Path(folder) for name, _, folder in pairs}
    rows = measured(networks, given.data, given.test_data, given.batch, given.rounds)
    write_json(
        given.out,
        {
            "schema": 1,
            "kind": "format-front",
            "data": (given.test_data or given.data).name,
            "batch": given.batch,
            "threads": 1,
            "rows": rows,
            "environment": environment(),
        },
    )
    points = [
        PlottedPoint(
            look, f"{row['network']}, {row['format']}", *(1e3 * row["seconds"][0], 100 * row["error"]),
            *(1e3 * seconds for seconds in row["seconds"][1:]),
        )
        for look, row in enumerate(rows)
    ]  # fmt: skip
    title = "Test error against time in each number format"
    picture = draw_scatter(points, f"ms for {given.batch} images", title, "ms")
    given.out.with_suffix(".svg").write_bytes(picture.content)


if __name__ == "__main__":
    main()
