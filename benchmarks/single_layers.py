"""One layer by every method, fused, and the same layer dense, timed in turn on one thread.

Weights are random: times do not depend on them. Speed-ups are over the faster of two dense layers, torch's
(oneDNN, channels_last) and the one that ``qx.fuse`` makes.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import quincunx as qx
from quincunx.layers.binary import BinaryConv2d, BinaryLinear
from quincunx.layers.quantised import QuantConv2d, QuantLinear
from quincunx.layers.sampled import PerforatedConv2d
from quincunx.layers.separable import CPConv2d, EspaceConv2d, SeparableConv2d
from quincunx.measure.environment import environment
from quincunx.measure.latency import measure_models
from quincunx.methods.perforate import SAMPLINGS
from quincunx.ops import backend
from quincunx.writing import write_json

# name: input channels, output channels, kernel, side, groups
CONVOLUTIONS = {
    "AlexNet conv2": (96, 256, 5, 27, 2),
    "AlexNet conv3": (256, 384, 3, 13, 1),
    "AlexNet conv4": (384, 384, 3, 13, 2),
    "AlexNet conv5": (384, 256, 3, 13, 2),
    "3 x 3, 16 at 32 x 32": (16, 16, 3, 32, 1),
    "3 x 3, 64 at 56 x 56": (64, 64, 3, 56, 1),
    "3 x 3, 128 at 28 x 28": (128, 128, 3, 28, 1),
    "3 x 3, 256 at 14 x 14": (256, 256, 3, 14, 1),
    "3 x 3, 512 at 7 x 7": (512, 512, 3, 7, 1),
    "1 x 1, 256 at 14 x 14": (256, 256, 1, 14, 1),
    "1 x 1, 64 to 256 at 28 x 28": (64, 256, 1, 28, 1),
}
# name: inputs, outputs
LINEARS = {"AlexNet fc6": (9216, 4096), "AlexNet fc7": (4096, 4096)}
CODEBOOKS = ((4, 64), (6, 64), (6, 128), (8, 128))
# factors of saved multiply-adds for which CP ranks are chosen
CP_RATIOS = (8, 4, 2)
SHARES = (0.5, 0.25)
RATES = ((1 / 2, "1/2"), (1 / 4, "1/4"), (1 / 8, "1/8"))


def candidates(name: str) -> Iterator[tuple[str, str, nn.Module]]:
    """Yield (method, setting, layer) for every method that applies."""
    if name in LINEARS:
        sizes = LINEARS[name]
        yield "binaryconnect", "1 bit", BinaryLinear(*sizes)
        for width, words in CODEBOOKS:
            yield "qcnn", f"{width}/{words}", QuantLinear(*sizes, subspace=width, codewords=words)
        return
    inputs, outputs, kernel, _, groups = CONVOLUTIONS[name]
    shared: dict[str, Any] = {"padding": kernel // 2, "groups": groups}
    yield "binaryconnect", "1 bit", BinaryConv2d(inputs, outputs, kernel, **shared)
    for width, words in CODEBOOKS:
        layer = QuantConv2d(inputs, outputs, kernel, subspace=width, codewords=words, **shared)
        yield "qcnn", f"{width}/{words}", layer
    for sampling, text in SAMPLINGS:
        layer = PerforatedConv2d(inputs, outputs, kernel, sampling=sampling, fill="fitted", **shared)
        yield "perforate", text, layer
    if kernel == 1:
        return
    c, o = inputs // groups, outputs // groups
    for ratio in CP_RATIOS:
        rank = max(1, round(c * o * kernel**2 / (ratio * (c + o + 2 * kernel))))
        yield "cp", f"{ratio} x fewer", CPConv2d(inputs, outputs, kernel, rank=rank, **shared)
    full = kernel * min(c, o)
    for share in SHARES:
        layer = SeparableConv2d(inputs, outputs, kernel, rank=round(share * full), **shared)
        yield "lowrank", f"rank {share:g}", layer
    for rate, text in RATES:
        masks = (qx.Random(rate, seed=0), qx.Random(rate, seed=0))
        layer = EspaceConv2d(inputs, outputs, kernel, rank=full // 4, masks=masks, **shared)
        yield "espace", f"rank 0.25, rate {text}", layer


def case(name: str, batch: int, rounds: int) -> dict[str, Any]:
    """Return times of all candidates of one layer at one batch, and speed-ups over the faster dense one."""
    plain: nn.Module
    if name in LINEARS:
        plain, shape = nn.Linear(*LINEARS[name]), (batch, LINEARS[name][0])
    else:
        inputs, outputs, kernel, side, groups = CONVOLUTIONS[name]
        plain = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, groups=groups)
        shape = (batch, inputs, side, side)
    x: Tensor = torch.randn(shape)
    x = x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x
    dense = {
        "dense, torch": plain.eval().to(memory_format=torch.channels_last),
        "dense, fused": qx.fuse(nn.Sequential(plain).eval()),
    }
    whole = qx.cost(plain, x).macs
    found, networks = [], dict(dense)
    for method, setting, layer in candidates(name):
        label = f"{method}, {setting}"
        networks[label] = qx.fuse(nn.Sequential(layer).eval())
        found.append((method, setting, label, whole / qx.cost(layer.eval(), x).macs))
    timed = measure_models(networks, x, threads=1, rounds=rounds, round_seconds=0.02)
    best = min((timed[key] for key in dense), key=lambda timing: timing.median)
    rows = []
    for method, setting, label, ratio in found:
        middle, low, high = timed[label].speedup_over(best)
        rows.append(
            {"method": method, "setting": setting, "mac_ratio": ratio, "seconds": timed[label].median}
            | {"speedup": middle, "q1": low, "q3": high}
        )
    print(f"{name}, batch {batch}: {best.name} {1e3 * best.median:.3f} ms", flush=True)
    for row in rows:
        print(f"  {row['method']}, {row['setting']}: {row['speedup']:.2f}x of {row['mac_ratio']:.2f}")
    times = {key: timed[key].median for key in dense}
    return {"name": name, "batch": batch, "dense": times, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, help="a JSON file")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    cases = [case(name, batch, arguments.rounds) for name in CONVOLUTIONS for batch in (1, 8)]
    cases += [case(name, batch, arguments.rounds) for name in LINEARS for batch in (1, 32)]
    if arguments.out:
        written = {"schema": 1, "kind": "bench-methods", "backend": str(backend()), "cases": cases}
        write_json(arguments.out, {**written, "environment": environment()})


if __name__ == "__main__":
    main()
