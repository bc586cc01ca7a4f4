"""Train denoisers of Gaussian noise on photographs and compare them: PSNR against measured milliseconds.

    python benchmarks/denoising.py all                        # everything that is missing of what follows
    python benchmarks/denoising.py widths                     # networks as fast as the bottlenecks, by timing
    python benchmarks/denoising.py train --seeds 0,1,2        # what is missing, one network after the other
    python benchmarks/denoising.py collect                    # all that is there, into results/denoising.json

DnCNN of 17 layers of 64 channels (dense), with spatial bottlenecks of 2/4 and 1/4 of the positions, trained
from scratch and fitted from the trained dense network; and for each of the two densities a narrower and a
shallower dense DnCNN that takes as long. Widths that were found stay. Each part is kept as soon as it is
finished, and the same command, such as "all", goes on where it was stopped. ``--width`` and ``--depth``
make all of them smaller, for a machine with little time; such networks have a folder and a result of their
own. The data are the photographs of ../shared/data/clothing-small-128.tar.gz, or those that
QUINCUNX_PHOTOGRAPHS names: one random patch of each training photograph a pass, noise drawn anew; whole
validation photographs with fixed noise.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import quincunx as qx
from quincunx.acceleration.judge import inputs_of, renormalise, sample_batches
from quincunx.data import ImageData, degraded, load_data
from quincunx.fusion.fuse import fuse
from quincunx.measure.environment import environment
from quincunx.measure.latency import measure_models
from quincunx.sampling import parse
from quincunx.train.evaluation import Scored, score_images
from quincunx.train.loop import RESULT, fit
from quincunx.train.recipes import Recipe, by_name, recipe_with
from quincunx.writing import write_json

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT.parent / "shared" / "data" / "clothing-small-128.tar.gz"
SIGMA, PATCH, SIDE = 25.0, 40, 128
DENSITIES = ("2/4", "1/4")
# timed on one photograph of this side, and in pairs, so that a drift of the machine's speed cancels
TIMED, ROUNDS = 128, 21
CALIBRATION = 100
# where networks are trained; they are timed and judged on the processor
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# of networks that are fitted to a trained one
LR_TUNED = 3e-4


def data_set(limit: int | None = None) -> ImageData:
    """Return the photographs with noise, at most ``limit`` of each part."""
    loaded = load_data(os.environ.get("QUINCUNX_PHOTOGRAPHS", DATA), size=SIDE, labelled=False)
    if limit is not None:
        parts = [
            replace(part, images=part.images[:limit], labels=part.labels[:limit])
            for part in (loaded.train, loaded.test)
        ]
        loaded = replace(loaded, train=parts[0], test=parts[1])
    return degraded(loaded, noise=SIGMA, patch=PATCH)


def recipe_of(epochs: int) -> Recipe:
    return recipe_with(by_name("denoising"), epochs=epochs)


def dense(width: int, depth: int) -> nn.Module:
    return qx.networks.build(f"dncnn{depth}", width=width)


def sampled(density: str, width: int, depth: int) -> nn.Module:
    return qx.networks.build(f"sb-dncnn{depth}", sampling=density, width=width)


def networks(widths: dict[str, Any]) -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    """Yield name and builder of each network that is trained from scratch."""
    width, depth = int(widths["width"]), int(widths["depth"])
    yield "dense", partial(dense, width, depth)
    for density in DENSITIES:
        yield f"bottleneck {density}", partial(sampled, density, width, depth)
        yield f"narrow {density}", partial(dense, widths[density]["width"], depth)
        yield f"shallow {density}", partial(dense, width, widths[density]["depth"])


# ---------------------------------------------------------------- equal time


def ratio(one: nn.Module, other: nn.Module) -> float:
    """Return seconds of one network over another's, fused, timed in turn: the median of rounds."""
    x = torch.rand(1, 3, TIMED, TIMED).contiguous(memory_format=torch.channels_last)
    forms = {"one": fuse(one.eval()), "other": fuse(other.eval())}
    timings = measure_models(forms, x, rounds=ROUNDS)
    return timings["other"].speedup_over(timings["one"])[0]


def nearest(candidates: list[int], build: Callable[[int], nn.Module], reference: nn.Module) -> dict[str, Any]:
    """Return the largest candidate that takes no longer than a network, and its share of that time."""
    low, high, known = 0, len(candidates) - 1, {}
    while low < high:
        middle = (low + high + 1) // 2
        known[candidates[middle]] = ratio(build(candidates[middle]), reference)
        low, high = (middle, high) if known[candidates[middle]] <= 1 else (low, middle - 1)
    value = candidates[low]
    return {"value": value, "time": known.get(value) or ratio(build(value), reference), "tried": known}


def find_widths(out: Path, own: int, depth: int) -> None:
    """Find the width and the depth whose dense network takes as long as each bottleneck network."""
    found: dict[str, Any] = {"width": own, "depth": depth, "input": [1, 3, TIMED, TIMED]}
    found["environment"] = environment()
    # vectors of the kernels have up to 16 channels
    step = 4 if own > 16 else 1
    for density in DENSITIES:
        reference = sampled(density, own, depth)
        narrow = nearest(list(range(step, own + 1, step)), lambda width: dense(width, depth), reference)
        shallow = nearest(list(range(3, depth + 1)), partial(dense, own), reference)
        found[density] = {"width": narrow["value"], "depth": shallow["value"], "timings": [narrow, shallow]}
        print(density, found[density], flush=True)
    write_json(out / "widths.json", found)


# ---------------------------------------------------------------- training


def trained(
    name: str, build: Callable[[], nn.Module], seed: int, out: Path, data: ImageData, epochs: int
) -> Path:
    """Train a network, or go on with it; return the folder of its run."""
    folder = out / f"{name.replace('/', 'of').replace(' ', '-')}-seed{seed}"
    if not (folder / RESULT).exists():
        torch.manual_seed(seed)
        print(f"training {name}, seed {seed}", flush=True)
        task = qx.tasks.image_to_image()
        fit(build().to(DEVICE), data, recipe_of(epochs), folder, seed=seed, resume=True, task=task)
    return folder


def fitted(density: str, seed: int, before: Path, out: Path, data: ImageData, epochs: int) -> Path:
    """Fit a bottleneck network to a trained one, train it further with its teacher, return its folder."""
    folder = out / f"fitted-{density.replace('/', 'of')}-seed{seed}"
    if (folder / RESULT).exists():
        return folder
    print(f"fitting {density}, seed {seed}", flush=True)
    task, teacher = qx.tasks.image_to_image(), qx.load(before / "model")
    images = sample_batches(data, CALIBRATION, seed, task=task)
    middle = [
        name for name, m in teacher.named_modules() if isinstance(m, nn.Conv2d) and name.startswith("blocks")
    ]
    method = qx.SpatialBottleneck(sampling=parse(density))
    found = qx.accelerate(
        teacher, method, where=lambda name, _: name in middle, calibration=images, task=task
    )
    renormalise(found.model, images, inputs_of(images), task)
    judged = score_images(found.model, data.test, data, task=task)
    write_json(folder / "fitted.json", {"psnr": float(judged.scores.mean()), "replaced": len(found.replaced)})
    recipe = recipe_with(recipe_of(epochs), distill=0.5, lr=LR_TUNED)
    fit(
        found.model.to(DEVICE), data, recipe, folder, seed=seed, resume=True, task=task,
        teacher=teacher.to(DEVICE),
    )  # fmt: skip
    return folder


def train_all(
    out: Path, seeds: list[int], epochs: int, tuned: int, only: list[str], limit: int | None
) -> None:
    data, widths = data_set(limit), json.loads((out / "widths.json").read_text())

    def wanted(name: str) -> bool:
        return not only or any(part in name for part in only)

    for seed in seeds:
        whole = out / f"dense-seed{seed}"
        for name, build in networks(widths):
            if wanted(name):
                trained(name, build, seed, out, data, epochs)
            density = name.rpartition(" ")[2]
            if name.startswith("bottleneck") and wanted(f"fitted {density}") and (whole / RESULT).exists():
                fitted(density, seed, whole, out, data, tuned)


# ---------------------------------------------------------------- the result


def collect(out: Path, place: Path, limit: int | None) -> None:
    """Judge all trained networks in float32 on the same noise, time them in turn, and write the result."""
    data, task = data_set(limit), qx.tasks.image_to_image()
    runs = sorted(path.parent for path in out.glob("*/run.json"))
    names = sorted({run.name.rpartition("-seed")[0] for run in runs})
    scores: dict[str, dict[int, Scored]] = {name: {} for name in names}
    first: dict[str, nn.Module] = {}
    epochs: dict[str, int] = {}
    for run in runs:
        name, _, seed = run.name.rpartition("-seed")
        model = qx.load(run / "model")
        first.setdefault(name, model)
        epochs[name] = len(json.loads((run / RESULT).read_text())["history"])
        scores[name][int(seed)] = score_images(model, data.test, data, task=task)
    x = torch.rand(1, 3, TIMED, TIMED).contiguous(memory_format=torch.channels_last)
    forms = {name: fuse(model.eval(), check=x) for name, model in first.items()}
    timings = measure_models(forms, x, rounds=ROUNDS)
    rows = []
    for name in names:
        values = {seed: float(found.scores.mean()) for seed, found in sorted(scores[name].items())}
        row: dict[str, Any] = {
            "network": name,
            "macs": qx.cost(first[name], torch.zeros(1, 3, TIMED, TIMED)).macs,
            "params": sum(p.numel() for p in first[name].parameters()),
            "epochs": epochs[name],
            "psnr": values,
            "mean": sum(values.values()) / len(values),
            "ssim": {
                seed: task.further["ssim"].total(found.sums["ssim"], len(found.scores))
                for seed, found in sorted(scores[name].items())
                if "ssim" in task.further
            },
            "timing": timings[name].to_dict(),
        }
        before = out / f"{name}-seed{min(values)}" / "fitted.json"
        if before.exists():
            row["before_training"] = json.loads(before.read_text())["psnr"]
        if "dense" in timings:
            row["speedup"] = timings[name].speedup_over(timings["dense"])
            seed = min(values)
            if name != "dense" and seed in scores["dense"]:
                row["against_dense"] = qx.tasks.compare_paired(
                    scores["dense"][seed].scores, scores[name][seed].scores
                )
        rows.append(row)
    widths = json.loads((out / "widths.json").read_text())
    noisy = score_images(nn.Identity(), data.test, data, task=task)
    write_json(
        place,
        {
            "schema": 1,
            "kind": "denoising",
            "data": data.describe(),
            "sigma": SIGMA,
            "patch": PATCH,
            "recipe": recipe_of(max(epochs.values(), default=1)).to_dict(),
            "noisy": float(noisy.scores.mean()),
            "timed": {"input": [1, 3, TIMED, TIMED], "how": "qx.fuse, float32, channels_last, in turn"},
            "width": widths["width"],
            "depth": widths["depth"],
            "equal_time": {density: widths[density] for density in DENSITIES},
            "rows": rows,
            "environment": environment(),
        },
    )
    for row in rows:
        print(
            f"{row['network']:24} {row['mean']:.3f} dB {1e3 * row['timing']['median_s']:8.2f} ms", flush=True
        )
    print(f"wrote {place}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=("all", "widths", "train", "collect"))
    parser.add_argument("--out", type=Path, help="folder of the runs; by default in runs")
    parser.add_argument("--width", type=int, default=64, help="channels of the dense network")
    parser.add_argument("--depth", type=int, default=17, help="its convolutions")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--epochs", type=int, default=50, help="passes of a network from scratch")
    parser.add_argument("--tuned", type=int, default=10, help="passes of a fitted network")
    parser.add_argument("--only", default="", help="parts of networks' names, with commas")
    parser.add_argument("--results", type=Path, help="folder of the result; by default results")
    parser.add_argument("--limit", type=int, help="at most so many photographs of each part")
    given = parser.parse_args()
    whole = (given.depth, given.width) == (17, 64)
    name = "denoising" if whole else f"denoising-{given.depth}x{given.width}"
    out: Path = given.out or Path("runs") / name
    out.mkdir(parents=True, exist_ok=True)
    if given.part in ("all", "train"):
        data_set(given.limit)  # photographs that are not there end the work before it begins
    # other widths are other networks: those that were trained keep theirs
    if given.part == "widths" or (given.part == "all" and not (out / "widths.json").exists()):
        find_widths(out, given.width, given.depth)
    if given.part in ("all", "train"):
        only = [part for part in given.only.split(",") if part]
        seeds = [int(seed) for seed in given.seeds.split(",")]
        train_all(out, seeds, given.epochs, given.tuned, only, given.limit)
    if given.part in ("all", "collect"):
        collect(out, (given.results or ROOT / "results") / f"{name}.json", given.limit)


if __name__ == "__main__":
    main()
