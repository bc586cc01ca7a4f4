"""Look-ups of product-quantised layers against torch's dense ones, turn by turn, on one thread.

The clock is the process's CPU time, so that what else runs on a shared machine counts less.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quincunx.artifact import write_json
from quincunx.latency import Timing, environment
from quincunx.ops import backend
from quincunx.quantised import QuantConv2d, QuantLinear

SETTINGS = ((4, 64), (6, 64), (6, 128), (8, 128))
# name: input channels, output channels, kernel, side, groups, batch
CONVS = {
    "AlexNet conv2": (96, 256, 5, 27, 2, 1),
    "AlexNet conv3": (256, 384, 3, 13, 1, 1),
    "AlexNet conv4": (384, 384, 3, 13, 2, 1),
    "AlexNet conv5": (384, 256, 3, 13, 2, 1),
    "3 x 3, 64 at 56": (64, 64, 3, 56, 1, 1),
    "3 x 3, 128 at 28": (128, 128, 3, 28, 1, 1),
    "3 x 3, 256 at 14": (256, 256, 3, 14, 1, 1),
    "3 x 3, 512 at 7": (512, 512, 3, 7, 1, 1),
    "3 x 3, 512 at 7, 8 images": (512, 512, 3, 7, 1, 8),
    "1 x 1, 256 at 14": (256, 256, 1, 14, 1, 1),
    "1 x 1, 64 to 256 at 28": (64, 256, 1, 28, 1, 1),
}
# name: inputs, outputs, batch
LINEARS = {
    "AlexNet fc6": (9216, 4096, 1),
    "AlexNet fc7": (4096, 4096, 1),
    "AlexNet fc7, 32 images": (4096, 4096, 32),
}


def layers(name: str) -> tuple[torch.Tensor, dict[str, nn.Module]]:
    """The input and the candidates, the dense layer first."""
    made: dict[str, nn.Module] = {}
    if name in CONVS:
        c, o, k, side, groups, batch = CONVS[name]
        x = torch.randn(batch, c, side, side).contiguous(memory_format=torch.channels_last)
        made["dense"] = nn.Conv2d(c, o, k, padding=k // 2, groups=groups).to(
            memory_format=torch.channels_last
        )
        for width, words in SETTINGS:
            made[f"{width}/{words}"] = QuantConv2d(
                c, o, k, subspace=width, codewords=words, padding=k // 2, groups=groups
            )
    else:
        c, o, batch = LINEARS[name]
        x = torch.randn(batch, c)
        made["dense"] = nn.Linear(c, o)
        for width, words in SETTINGS:
            made[f"{width}/{words}"] = QuantLinear(c, o, subspace=width, codewords=words)
    return x, made


def seconds(run: Callable[[], object], calls: int) -> float:
    start = time.process_time()
    for _ in range(calls):
        run()
    return (time.process_time() - start) / calls


def compare(name: str, rounds: int) -> dict[str, Any]:
    """Each candidate's time, and how much faster than the dense layer it is."""
    x, made = layers(name)
    taken: dict[str, list[float]] = {key: [] for key in made}
    calls = {}
    for key, module in made.items():
        module(x)
        calls[key] = max(1, int(0.02 / seconds(lambda module=module: module(x), 2)))
    for _ in range(rounds):
        for key, module in made.items():
            taken[key].append(seconds(lambda module=module: module(x), calls[key]))
    times = {key: Timing(key, 1, tuple(values)) for key, values in taken.items()}
    speedups = {key: times[key].speedup_over(times["dense"]) for key in made if key != "dense"}
    shown = [f"{key}: {low:.2f} {mid:.2f} {high:.2f}" for key, (mid, low, high) in speedups.items()]
    print(f"{name:26s} dense {times['dense'].median * 1e3:7.2f} ms | " + " | ".join(shown), flush=True)
    return {
        "name": name,
        "times": [timing.to_dict() for timing in times.values()],
        "speedup": {
            key: {"median": mid, "q1": low, "q3": high} for key, (mid, low, high) in speedups.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, help="a JSON file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(backend())
    with torch.inference_mode():
        found = [compare(name, arguments.rounds) for name in (*CONVS, *LINEARS)]
    if arguments.out:
        clock = "CPU time of the process, on a machine shared with other work"
        write_json(arguments.out, {"environment": environment(), "clock": clock, "rows": found})


if __name__ == "__main__":
    main()
