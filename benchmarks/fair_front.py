"""The fair front: what else makes a classifier as fast as a spatial bottleneck, and what accuracy each costs.

    python benchmarks/fair_front.py                        # everything: days on two cores
    python benchmarks/fair_front.py sizes --data tiny      # one part: settings of equal time, by timing
    python benchmarks/fair_front.py train --data tiny --seeds 0
    python benchmarks/fair_front.py collect                # what is there, into results/fair-front-*.json
    python benchmarks/fair_front.py --width 32 --passes 0.6  # narrower, fewer epochs, own folders
    python benchmarks/fair_front.py --short --out /tmp/ff  # all of it on small digits, in under a minute

For each set (tiny-imagenet-50 and clothing-small-128, in ../shared/data or in --photographs): a resnet18,
and its spatial bottlenecks with 2/4 and 1/4 of the positions. At the measured time of each of the two: the
same resnet18 at a smaller input, a narrower one, and one of low rank. All are trained from scratch alike;
bottlenecks and low rank are also fitted to the trained network and trained further with it as teacher, as
is the network itself for as long ("dense, longer"), so that nobody wins by longer training alone. Three
seeds. A part that is finished is kept, and the same command goes on after an interruption, within a network
from its last checkpoint.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import quincunx as qx
from quincunx.acceleration.judge import inputs_of, renormalise, sample_batches
from quincunx.data import ImageData, load_data, part_with
from quincunx.fusion.fuse import fuse
from quincunx.measure.environment import environment
from quincunx.measure.latency import measure_models
from quincunx.measure.tasks import mcnemar
from quincunx.report.figures import Mark, Picture, draw_tradeoff
from quincunx.sampling import parse
from quincunx.train.evaluation import Scored, score_images
from quincunx.train.loop import RESULT, fit
from quincunx.train.recipes import Recipe, by_name, recipe_with
from quincunx.writing import write_json

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT.parent / "shared" / "data"
DENSITIES = ("2/4", "1/4")
# time over that of the bottleneck network which still counts as equal, so that doubt favours the others
LONGER = 1.05
# networks are timed and judged on the processor, wherever they were trained
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Setting:
    """A data set and how networks are trained on it.

    Attributes:
        name: of the setting.
        source: what :func:`quincunx.data.load_data` reads.
        side: of the images.
        dense: name of the network; "sb-" before it names that with spatial bottlenecks.
        width: its channels.
        recipe: of the training from scratch.
        tuned: epochs of what is fitted to a trained network, at ``rate``.
        rate: the learning rate of that.
        calibration: training images that they are fitted to.
        rounds: of timing.
        limit: the most training images that are used.
    """

    name: str
    source: str
    side: int
    dense: str
    width: int
    recipe: Recipe
    tuned: int
    rate: float
    calibration: int = 500
    rounds: int = 21
    limit: int | None = None

    @cached_property
    def data(self) -> ImageData:
        return self.at(self.side)

    def at(self, side: int) -> ImageData:
        """Return the images, scaled to a side."""
        if self.source == "digits":
            found = load_data("digits")
            few = part_with(found.train, torch.arange(self.limit or len(found.train)))
            return _scaled(replace(found, train=few), side)
        return load_data(self.source, size=side)

    def build(self, name: str = "", **settings: Any) -> nn.Module:
        settings = {"width": self.width, **settings}
        return qx.networks.build(name + self.dense, len(self.data.classes), self.data.in_channels, **settings)


def _scaled(data: ImageData, side: int) -> ImageData:
    """Return a set in memory with images of another size."""

    def part(split: Any) -> Any:
        pixels = split.images.permute(0, 3, 1, 2).float()
        small = nn.functional.interpolate(pixels, (side, side), mode="bilinear", antialias=True)
        return replace(split, images=small.round().clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous())

    return replace(data, train=part(data.train), test=part(data.test))


def settings_of(short: bool, folder: Path, width: int = 64, passes: float = 1.0) -> list[Setting]:
    """Return the settings; ``passes`` is a share of the epochs."""
    if short:
        few = Recipe(name="short", epochs=1, batch_size=64, lr=0.1)
        return [Setting("digits", "digits", 40, "resnet18", 8, few, 1, 0.01, 100, 3, 400)]

    def epochs(number: int) -> int:
        return max(1, round(passes * number))

    base = recipe_with(by_name("short"), precision="bfloat16")
    tiny, clothing = (str(folder / f"{name}.tar.gz") for name in ("tiny-imagenet-50", "clothing-small-128"))
    shorter = recipe_with(base, epochs=epochs(20))
    longer = recipe_with(base, epochs=epochs(30), batch_size=32, lr=0.05)
    return [
        Setting("tiny", tiny, 64, "resnet18", width, shorter, epochs(10), 0.02),
        Setting("clothing", clothing, 128, "resnet18", width, longer, epochs(15), 0.01),
    ]


# ---------------------------------------------------------------- equal time


def example(setting: Setting, side: int, batch: int) -> torch.Tensor:
    x = torch.rand(batch, setting.data.in_channels, side, side)
    return x.contiguous(memory_format=torch.channels_last)


def low_rank(setting: Setting, model: nn.Module, share: float, images: Any = None) -> nn.Module:
    """Return a network with all 3 x 3 convolutions but the first at a share of their full rank."""

    def where(_: str, module: nn.Module) -> bool:
        return isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3)

    shape = example(setting, setting.side, 1)
    found = qx.accelerate(model, qx.LowRank(rank=share), where=where, example_input=shape, calibration=images)
    return found.model


def ratio(one: nn.Module, other: nn.Module, x: torch.Tensor, y: torch.Tensor, rounds: int) -> float:
    """Return seconds of one network over another's, fused, each on its input, timed in turn."""
    forms = {"one": fuse(one.eval()), "other": fuse(other.eval())}
    timings = measure_models(forms, {"one": x, "other": y}, rounds=rounds)
    return timings["other"].speedup_over(timings["one"])[0]


def largest(candidates: Sequence[Any], slower: Callable[[Any], float]) -> dict[str, Any]:
    """Find the largest candidate that takes at most ``LONGER`` as long, by halves; the first if none does.

    Args:
        candidates: in the order of their times.
        slower: seconds over those that are allowed.
    """
    low, high, known = 0, len(candidates) - 1, {}
    while low < high:
        middle = (low + high + 1) // 2
        known[str(candidates[middle])] = slower(candidates[middle])
        low, high = (middle, high) if known[str(candidates[middle])] <= LONGER else (low, middle - 1)
    value = candidates[low]
    if str(value) not in known:
        known[str(value)] = slower(value)
    return {"value": value, "time": known[str(value)], "tried": known}


def find_sizes(setting: Setting, out: Path, batch: int) -> dict[str, Any]:
    """Find, for each bottleneck network, the side, width and rank that take as long; kept in sizes.json."""
    place = out / "sizes.json"
    if place.exists():
        found: dict[str, Any] = json.loads(place.read_text())
        if found["batch"] != batch:
            raise SystemExit(f"{place}: sizes for batch {found['batch']}, not {batch}; give another --out")
        return found
    found = {"batch": batch, "threads": torch.get_num_threads(), "environment": environment()}
    whole = example(setting, setting.side, batch)
    # vectors of the kernels have up to 16 channels
    step = 4 if setting.width > 16 else 1
    for density in DENSITIES:
        torch.manual_seed(0)
        allowed = setting.build("sb-", sampling=parse(density))

        def slower(made: nn.Module, side: int = setting.side, allowed: nn.Module = allowed) -> float:
            return ratio(made, allowed, example(setting, side, batch), whole, setting.rounds)

        found[density] = {
            "side": largest(
                range(setting.side // 2, setting.side + 1, 4),
                lambda side, slower=slower: slower(setting.build(), side),
            ),
            "width": largest(
                range(step, setting.width + 1, step),
                lambda width, slower=slower: slower(setting.build(width=width)),
            ),
            "rank": largest(
                [number / 32 for number in range(2, 32)],
                lambda share, slower=slower: slower(low_rank(setting, setting.build(), share)),
            ),
        }
        told = {key: (one["value"], round(one["time"], 3)) for key, one in found[density].items()}
        print(f"{setting.name}, {density}: {told}", flush=True)
    write_json(place, found)
    return found


# ---------------------------------------------------------------- training


@dataclass(frozen=True)
class Rival:
    """A network of the front.

    Attributes:
        name: such as "narrow 2/4".
        side: of its images.
        build: makes it with fresh weights; None for one that is made of a trained network.
        fit: makes it of the trained network and calibration images; None for one from scratch.
    """

    name: str
    side: int
    build: Callable[[], nn.Module] | None = None
    fit: Callable[[nn.Module, Any], nn.Module] | None = None

    @property
    def folder(self) -> str:
        return self.name.replace(",", "").replace("/", "of").replace(" ", "-")


def rivals(setting: Setting, sizes: dict[str, Any]) -> Iterator[Rival]:
    """Yield the trained network first, on which others depend."""
    yield Rival("dense", setting.side, setting.build)
    yield Rival("dense, longer", setting.side, fit=lambda model, _: model)
    for density in DENSITIES:
        sampling = parse(density)
        own = {key: sizes[density][key]["value"] for key in ("side", "width", "rank")}
        yield Rival(f"bottleneck {density}", setting.side, partial(setting.build, "sb-", sampling=sampling))
        yield Rival(f"smaller {density}", own["side"], setting.build)
        yield Rival(f"narrow {density}", setting.side, partial(setting.build, width=own["width"]))
        yield Rival(f"bottleneck fitted {density}", setting.side, fit=partial(bottlenecks, sampling=sampling))
        yield Rival(
            f"low rank {density}", setting.side,
            fit=lambda model, images, share=own["rank"]: low_rank(setting, model, share, images),
        )  # fmt: skip


def bottlenecks(model: nn.Module, images: Any, sampling: Any) -> nn.Module:
    method = qx.SpatialBottleneck(sampling, singles=False)
    return qx.accelerate(model, method, calibration=images).model


def train(setting: Setting, rival: Rival, seed: int, out: Path) -> None:
    """Train a network, or go on with it; nothing if it is finished."""
    folder = out / f"{rival.folder}-seed{seed}"
    if (folder / RESULT).exists():
        return
    print(f"{setting.name}: {rival.name}, seed {seed}", flush=True)
    data = setting.data if rival.side == setting.side else setting.at(rival.side)
    torch.manual_seed(seed)
    if rival.build is not None:
        fit(rival.build().to(DEVICE), data, setting.recipe, folder, seed=seed, resume=True)
        return
    teacher = qx.load(out / f"dense-seed{seed}" / "model")
    images = sample_batches(data, setting.calibration, seed)
    assert rival.fit is not None  # noqa: S101  # one of the two is there
    made = rival.fit(qx.load(out / f"dense-seed{seed}" / "model"), images).eval()
    if rival.name != "dense, longer":
        renormalise(made, images, inputs_of(images))
    recipe = recipe_with(setting.recipe, epochs=setting.tuned, lr=setting.rate, distill=0.5)
    # the network before is made again in the same way after an interruption; its checkpoint replaces it
    fit(made.to(DEVICE), data, recipe, folder, seed=seed, resume=True, teacher=teacher.to(DEVICE))


# ---------------------------------------------------------------- the result


def collect(setting: Setting, sizes: dict[str, Any], out: Path, place: Path) -> None:
    """Judge all trained networks in float32, time them in turn, and write the result."""
    forms: dict[str, nn.Module] = {}
    inputs: dict[str, torch.Tensor] = {}
    scores: dict[str, dict[int, Scored]] = {}
    rows: list[dict[str, Any]] = []
    for rival in rivals(setting, sizes):
        runs = sorted(out.glob(f"{rival.folder}-seed[0-9]*/{RESULT}"))
        if not runs:
            continue
        data = setting.data if rival.side == setting.side else setting.at(rival.side)
        scores[rival.name] = {}
        for run in runs:
            model = qx.load(run.parent / "model")
            scores[rival.name][int(run.parent.name.rpartition("-seed")[2])] = score_images(
                model, data.test, data
            )
        inputs[rival.name] = example(setting, rival.side, sizes["batch"])
        forms[rival.name] = fuse(model.eval(), check=inputs[rival.name])
        cost = qx.cost(model, inputs[rival.name][:1])
        seen = {seed: float(one.scores.mean()) for seed, one in sorted(scores[rival.name].items())}
        history = json.loads(runs[0].read_text())["history"]
        rows.append(
            {
                "network": rival.name,
                "side": rival.side,
                "macs": cost.macs,
                "params": cost.params,
                "epochs": len(history),
                "fitted": rival.build is None,
                "error": seen,
                "mean": sum(seen.values()) / len(seen),
            }
        )
    if "dense" not in scores:
        raise SystemExit(f"{out}: no trained network yet; run the part train first")
    timings = measure_models(forms, inputs, rounds=setting.rounds)
    for row in rows:
        name = row["network"]
        row["timing"] = timings[name].to_dict()
        row["speedup"] = timings[name].speedup_over(timings["dense"])
        both = sorted(scores[name].keys() & scores["dense"].keys())
        row["against_dense"] = {
            seed: mcnemar(scores["dense"][seed].scores == 0, scores[name][seed].scores == 0) for seed in both
        }
    write_json(
        place,
        {
            "schema": 1,
            "kind": "fair-front",
            "data": setting.data.describe(),
            "network": setting.dense,
            "width": setting.width,
            "recipe": setting.recipe.to_dict(),
            "tuned": {"epochs": setting.tuned, "lr": setting.rate, "distill": 0.5},
            "batch": sizes["batch"],
            "timed": "qx.fuse, float32, channels_last, in turn",
            "equal_time": {density: sizes[density] for density in DENSITIES},
            "rows": rows,
            "environment": environment(),
        },
    )
    place.with_suffix(".svg").write_bytes(drawn(rows).content)
    for row in rows:
        ms, speedup = 1e3 * row["timing"]["median_s"], row["speedup"][0]
        print(f"{row['network']:24} {100 * row['mean']:6.2f}% wrong {ms:8.2f} ms {speedup:5.2f}x", flush=True)
    print(f"wrote {place}", flush=True)


def drawn(rows: list[dict[str, Any]]) -> Picture:
    """Return the figure: points lost to the dense network of the same seed, against speed."""
    dense = next(row["error"] for row in rows if row["network"] == "dense")
    marks = []
    for row in rows:
        family, _, density = row["network"].rpartition(" ")
        own = (family, density) if density in DENSITIES else (row["network"], "")
        both = sorted(row["error"].keys() & dense.keys())
        marks += [Mark(*own, row["speedup"][0], 100 * (row["error"][seed] - dense[seed])) for seed in both]
    return draw_tradeoff(marks, [], "measured speed-up of the whole network")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", nargs="?", choices=("all", "sizes", "train", "collect"), default="all")
    parser.add_argument("--data", default="", help="one set alone: tiny or clothing")
    parser.add_argument("--out", type=Path, default=Path("runs") / "fair-front", help="folder of the runs")
    parser.add_argument("--photographs", type=Path, default=FOLDER, help="folder of the two archives")
    parser.add_argument("--results", type=Path, help="folder of the result; by default results")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--only", default="", help="parts of networks' names, with commas; and dense")
    parser.add_argument("--batch", type=int, default=8, help="images of the timed inputs")
    parser.add_argument("--threads", type=int, help="of training and timing")
    parser.add_argument("--width", type=int, default=64, help="channels of the network")
    parser.add_argument("--passes", type=float, default=1.0, help="share of the epochs, such as 0.5")
    parser.add_argument("--short", action="store_true", help="small digits and narrow networks")
    given = parser.parse_args()
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    found = {
        setting.name: setting
        for setting in settings_of(given.short, given.photographs, given.width, given.passes)
    }
    if given.data and given.data not in found:
        parser.error(f"--data {given.data}: expected one of {', '.join(found)}")
    for setting in [found[given.data]] if given.data else found.values():
        label = setting.name
        if not given.short and (given.width, given.passes) != (64, 1.0):
            label += f"-width{given.width}-passes{given.passes:g}"
        out = given.out / label
        out.mkdir(parents=True, exist_ok=True)
        sizes = find_sizes(setting, out, given.batch)
        if given.part in ("all", "train"):
            # whole seeds first: one seed of everything is a result already
            for seed in map(int, given.seeds.split(",")):
                for rival in rivals(setting, sizes):
                    wanted = not given.only or any(part in rival.name for part in given.only.split(","))
                    if wanted or rival.name == "dense":
                        train(setting, rival, seed, out)
        if given.part in ("all", "collect"):
            collect(setting, sizes, out, (given.results or ROOT / "results") / f"fair-front-{label}.json")


if __name__ == "__main__":
    main()
