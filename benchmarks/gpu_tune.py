"""Finds the tiles of the GPU kernels on this card: python benchmarks/gpu_tune.py --out tiles.json

The table that the package ships is made of such files; ``src/quincunx/ops/triton/tuned.json`` has one part for each
architecture.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

from quincunx.tuning import SHAPES, cases, tune


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--batches", default="1,64,256")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--train", action="store_true", help="gradients of weights, too")
    parser.add_argument("--shapes", default=",".join(f"{c}x{s}" for c, s in SHAPES))
    parser.add_argument("--jobs", type=int)
    given = parser.parse_args()
    shapes = [(int(c), int(s)) for c, s in (shape.split("x") for shape in given.shapes.split(","))]
    batches = [int(b) for b in given.batches.split(",")]
    began = time.perf_counter()
    wanted = list(cases(shapes, batches, given.dtype, given.train))
    device = torch.device("cuda", torch.cuda.current_device())
    found = tune(wanted, device, jobs=given.jobs)
    given.out.write_text(json.dumps(found, indent=1))
    for row in found["rows"]:
        tried = row["tried"]
        if tried:
            best, worst = tried[0], tried[-1]
            tiles = "x".join(str(best[k]) for k in ("rows", "columns", "depth"))
            print(
                f"{row['case']:75s} {tiles:12s} w{best['warps']} s{best['stages']} "
                f"{1e6 * best['seconds']:8.1f} us of {len(tried)}, worst {1e6 * worst['seconds']:8.1f}, "
                f"{len(row['failed'])} failed"
            )
        else:
            print(row["case"], "nothing ran:", row["failed"][:1])
    print(f"{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
