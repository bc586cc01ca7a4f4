"""Images per second from loading, beside the rate at which training rsbn20 consumes them, in turn.

python benchmarks/data_loading.py --out results/data-loading.json
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from quincunx import networks
from quincunx.data import ImageData, Part, Split, batches, load_data
from quincunx.measure.environment import environment
from quincunx.measure.latency import Timing, using_threads
from quincunx.ops import backend
from quincunx.writing import write_json

TARGET = 3.0


def in_memory(count: int, side: int) -> ImageData:
    """Return noise, which takes as long to load as pictures."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, side, side, 3), dtype=torch.uint8, generator=generator)
    split = Split(images, torch.randint(0, 10, (count,), generator=generator))
    return ImageData("noise", split, split, tuple("abcdefghij"), (0.5,) * 3, (0.25,) * 3, augment="cifar")


def write_photographs(root: Path, count: int) -> Path:
    """Write JPEG files of ImageNet's usual size, 500 x 375, with about as many bytes per file."""
    rng = np.random.default_rng(0)
    for index in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (47, 63, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC), dtype=np.int16)
        grain = rng.integers(-12, 13, (375, 500, 1), dtype=np.int16)
        folder = root / ("val" if index < 4 else "train") / f"n{index % 2:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8)).save(
            folder / f"{index}.JPEG", quality=90
        )
    return root


def endless(part: Part, data: ImageData, size: int, **options: Any) -> Iterator[int]:
    """Load forever; yield the number of images of each whole batch."""
    for seed in cycle(range(1000)):
        generator = torch.Generator().manual_seed(seed)
        for images, labels in batches(part, data, size, generator=generator, **options):
            if len(labels) == size:
                yield len(images)


def training(size: int, low: bool) -> Iterator[int]:
    """Train rsbn20 forever on one batch that is in memory."""
    torch.manual_seed(0)
    model = networks.build("rsbn20").train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, nesterov=True, weight_decay=1e-4)
    images = torch.randn(size, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (size,))
    while True:
        with torch.autocast("cpu", dtype=torch.bfloat16) if low else nullcontext():
            loss = F.cross_entropy(model(images).float(), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        yield size


def one_round(source: Iterator[int], threads: int, seconds: float) -> float:
    """Return seconds per image, measured over at least ``seconds``."""
    done = 0
    with using_threads(threads):
        began = time.perf_counter()
        while True:
            done += next(source)
            spent = time.perf_counter() - began
            if spent >= seconds:
                return spent / done


def interleaved(
    sources: dict[str, tuple[Iterator[int], int]], rounds: int, seconds: float
) -> dict[str, Timing]:
    found: dict[str, list[float]] = {name: [] for name in sources}
    for source, threads in sources.values():  # warm-up
        one_round(source, threads, seconds / 4)
    for _ in range(rounds):
        for name, (source, threads) in sources.items():
            found[name].append(one_round(source, threads, seconds))
    return {name: Timing(name, sources[name][1], tuple(values)) for name, values in found.items()}


def row(name: str, loader: Timing, consumer: Timing | None) -> dict[str, Any]:
    entry: dict[str, Any] = {"case": name, "images_per_second": 1 / loader.median, "loader": loader.to_dict()}
    if consumer is not None:
        middle, low, high = loader.speedup_over(consumer)
        entry |= {
            "consumer": consumer.to_dict(),
            "consumed_per_second": 1 / consumer.median,
            "ratio": middle,
            "q1": low,
            "q3": high,
        }
    return entry


def small_images(rounds: int, seconds: float, threads: int) -> list[dict[str, Any]]:
    data = in_memory(20_000, 32)
    rows = []
    for size in (64, 128):
        consumers = {
            f"rsbn20 {kind}": (training(size, kind == "bfloat16"), threads)
            for kind in ("float32", "bfloat16")
        }
        loaders = {
            kind: (endless(data.train, data, size, augment=kind), 1) for kind in ("none", "cifar", "imagenet")
        }
        found = interleaved({**loaders, **consumers}, rounds, seconds)
        rows += [
            row(f"{kind}, batch {size}, 1 thread / {name}, {threads} threads", found[kind], found[name])
            for kind in loaders
            for name in consumers
        ]
    return rows


def photographs(root: Path, rounds: int, seconds: float, workers: int) -> list[dict[str, Any]]:
    data = load_data(root, stream=True)
    sources = {
        f"{kind}, {data.size[0]} x {data.size[1]}, {workers} workers": (
            endless(data.train, data, 32, augment=kind, workers=workers),
            1,
        )
        for kind in ("none", "imagenet")
    }
    # one after the other: workers prefetch while another source is timed
    return [
        row(f"streamed, {name}", interleaved({name: source}, rounds, seconds)[name], None)
        for name, source in sources.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=1.0, help="a round of one candidate")
    parser.add_argument("--threads", type=int, default=2, help="of the network")
    parser.add_argument("--workers", type=int, default=2, help="processes that decode photographs")
    parser.add_argument(
        "--photographs", type=Path, help="a folder of them by class; synthetic ones otherwise"
    )
    parser.add_argument("--out", type=Path, default=Path("results/loader.json"))
    options = parser.parse_args()
    where_made = environment()
    rows = small_images(options.rounds, options.seconds, options.threads)
    with tempfile.TemporaryDirectory() as folder:
        root = options.photographs or write_photographs(Path(folder), 400)
        # if a round is too short, prefetched images count
        rows += photographs(root, options.rounds, max(3.0, options.seconds), options.workers)
    for entry in rows:
        said = f"{entry['case']}: {entry['images_per_second']:.0f} images/s"
        if "ratio" in entry:
            said += (
                f", {entry['ratio']:.1f}x of {entry['consumed_per_second']:.0f} "
                f"[{entry['q1']:.1f}, {entry['q3']:.1f}]"
            )
        print(said)
    worst = min(entry["ratio"] for entry in rows if "ratio" in entry and entry["case"].startswith("cifar"))
    print(f"least ratio with the CIFAR augmentation: {worst:.1f}x (target {TARGET:g}x)")
    write_json(
        options.out,
        {
            "schema": 1,
            "kind": "loader",
            "backend": str(backend()),
            "rows": rows,
            "least_ratio": worst,
            "target": TARGET,
            "environment": where_made,
        },
    )


if __name__ == "__main__":
    main()
