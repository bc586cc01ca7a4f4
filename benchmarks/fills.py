"""What skipped positions cost a trained network, by fill: nothing is fine-tuned.

All 3 x 3 convolutions of stride 1 of a network are perforated at 3/4 and at 2/4 of their positions, filled
with zeros, with the nearest value, and with fitted combinations, with kernels as they were and refitted. Then
each convolution alone: the share of its responses' power that is lost on test images, by kind of layer.

python benchmarks/fills.py --weights resnet20.th --data cifar10-png-small.tar.gz --out results/fills.json
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import quincunx as qx
from quincunx.data import ImageData, batches, load_data
from quincunx.measure.environment import environment
from quincunx.methods.perforate import SAMPLINGS, Perforate
from quincunx.networks import weights
from quincunx.surgery.replace import prepare, temporarily_replaced
from quincunx.train.evaluation import evaluate
from quincunx.writing import write_json

# name of a row: settings
FILLS: dict[str, dict[str, Any]] = {
    "zero": {"fill": "zero"},
    "nearest": {"fill": "nearest"},
    "fitted, 3 x 3, fill alone": {"fill": "fitted", "reach": 1, "refits": 0},
    "fitted, 5 x 5, fill alone": {"fill": "fitted", "reach": 2, "refits": 0},
    "fitted, 3 x 3": {"fill": "fitted", "reach": 1},
    "fitted, 3 x 3, two turns": {"fill": "fitted", "reach": 1, "refits": 2},
}


def drawn(data: ImageData, images: int, seed: int, batch_size: int = 100) -> list[Tensor]:
    """Training images as they are, in batches."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for batch, _ in batches(data.train, data, batch_size, generator=generator, augment="none"):
        found.append(batch)
        if batch_size * len(found) >= images:
            break
    return found


def stride_one(name: str, module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.stride == (1, 1) and module.kernel_size == (3, 3)


def network_rows(model: nn.Module, data: ImageData, images: list[Tensor]) -> Iterator[dict[str, Any]]:
    """All layers of stride 1 at once."""
    dense = evaluate(model, data.test, data)
    x = images[0][:1]
    macs = qx.cost(model, x).macs
    yield {"sampling": "1", "fill": "dense", "wrong": dense.error, "loss": dense.loss, "images": dense.images}
    for sampling, text in SAMPLINGS[:2]:
        for name, settings in FILLS.items():
            began = time.perf_counter()
            found = qx.accelerate(
                model, Perforate(sampling, **settings), where=stride_one, calibration=images
            )
            seconds = time.perf_counter() - began
            score = evaluate(found.model, data.test, data)
            yield {
                "sampling": text,
                "fill": name,
                "layers": len(found.replaced),
                "wrong": score.error,
                "loss": score.loss,
                "images": score.images,
                "mac_ratio": macs / qx.cost(found.model, x).macs,
                "fit_seconds": seconds,
                "response_errors": {
                    layer: {key: record[key] for key in ("response_error", "nearest_error", "stages")}
                    for layer, record in found.replaced.items()
                    if "response_error" in record
                },
            }


# name of a row: fill and mask of ESPACE at half of the rank and half of the positions
MASKS = {
    "impact, nearest (the paper's)": ("nearest", "impact"),
    "impact, fitted": ("fitted", "impact"),
    "residual, nearest": ("nearest", "residual"),
    "residual, fitted": ("fitted", "residual"),
    "uniform, nearest": ("nearest", "uniform"),
    "uniform, fitted": ("fitted", "uniform"),
    "lattice, fitted": ("fitted", "lattice"),
}
# half of the multiply-adds by low rank of two thirds, then masks on both halves or on the second alone
RATES: tuple[tuple[str, Any], ...] = (("rate 3/4", 0.75), ("rates 1 and 1/2", (1.0, 0.5)))


def mask_methods() -> dict[str, Any]:
    """Low rank and masks at about half of the multiply-adds."""
    found: dict[str, Any] = {"low rank alone, ranks by layer": qx.LowRank(budget=0.5)}
    for name, (fill, mask) in MASKS.items():
        found[f"rank 1/2, rate 1/2: {name}"] = qx.Espace(rank=0.5, rate=0.5, mask=mask, fill=fill)
    for mask in ("lattice", "residual"):
        for text, rate in RATES:
            settings: dict[str, Any] = {"rate": rate, "mask": mask, "fill": "fitted"}
            found[f"rank 1/3, {text}: {mask}, fitted"] = qx.Espace(rank=1 / 3, **settings)
            found[f"ranks by layer, {text}: {mask}, fitted"] = qx.Espace(budget=2 / 3, **settings)
    return found


def mask_rows(model: nn.Module, data: ImageData, images: list[Tensor]) -> Iterator[dict[str, Any]]:
    """All layers of stride 1 with low rank, and then with masks."""
    x = images[0][:1]
    macs = qx.cost(model, x).macs
    for name, method in mask_methods().items():
        found = qx.accelerate(model, method, where=stride_one, calibration=images)
        score = evaluate(found.model, data.test, data)
        yield {
            "method": name,
            "layers": len(found.replaced),
            "wrong": score.error,
            "loss": score.loss,
            "images": score.images,
            "mac_ratio": macs / qx.cost(found.model, x).macs,
        }


@torch.no_grad()
def lost(layer: nn.Module, dense: nn.Module, inputs: list[Tensor]) -> float:
    """E|r - y|^2 / E|r - mean r|^2 of a layer's answers y where the dense one gives r."""
    squares, power = 0.0, 0.0
    answers = [dense(x).double() for x in inputs]
    mean = torch.cat([r.mean((0, 2, 3))[None] for r in answers]).mean(0).view(1, -1, 1, 1)
    for x, r in zip(inputs, answers, strict=True):
        squares += float((layer(x).double() - r).square().sum())
        power += float((r - mean).square().sum())
    return squares / power


def layer_rows(
    model: nn.Module, data: ImageData, images: list[Tensor], seen: int
) -> Iterator[dict[str, Any]]:
    """Each convolution alone, fitted on training images and judged on test images."""
    size = len(images[0])
    test = [x for x, _ in islice(batches(data.test, data, size), max(1, seen // size))]
    context, layers, _ = prepare(model, Perforate(), calibration=images)
    for depth, layer in enumerate(layers):
        conv = layer.module
        inputs = _inputs(model, layer.name, test)
        row: dict[str, Any] = {
            "layer": layer.name,
            "depth": depth,
            "kernel": list(conv.kernel_size),
            "stride": list(conv.stride),
            "groups": conv.groups,
            "channels": [conv.in_channels, conv.out_channels],
            "size": list(layer.grid),
        }
        for sampling, text in SAMPLINGS:
            for name in ("nearest", "fitted"):
                method = Perforate(sampling, fill=name)
                if (reason := method.refuse(layer, context)) is not None:
                    row[f"{name} {text}"] = reason
                    continue
                with temporarily_replaced(context, method, [layer]) as done:
                    row[f"{name} {text}"] = lost(done[layer.name].module, conv, inputs)
        yield row


def _inputs(model: nn.Module, name: str, images: list[Tensor]) -> list[Tensor]:
    found: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, given: found.append(given[0]))
    with torch.no_grad():
        for batch in images:
            model(batch)
    handle.remove()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--network", default="cifar-resnet20")
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--size", type=int, help="pixels of the images' sides, where they differ")
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--images", type=int, default=500, help="calibration images")
    parser.add_argument("--layers", type=int, default=200, help="images for each layer alone")
    parser.add_argument("--parts", default="networks,masks,layers", help="which of these to measure")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    model = weights.load(options.network, options.weights).eval()
    mean, std = weights.normalisation(options.weights)
    parts = options.parts.split(",")
    # layers alone are judged on their responses: images need no classes
    found = load_data(options.data, size=options.size, labelled=parts != ["layers"])
    data = replace(found, mean=mean, std=std)
    images = drawn(data, options.images, options.seed, options.batch)
    result: dict[str, Any] = {
        "schema": 1,
        "kind": "fills",
        "environment": environment(),
        "network": options.network,
        "calibration": options.batch * len(images),
        "layers_fitted_on": min(options.layers, options.batch * len(images)),
        "size": list(images[0].shape[2:]),
        "rows": [],
        "masks": [],
        "layers": [],
    }
    if "networks" in parts:
        for row in network_rows(model, data, images):
            result["rows"].append(row)
            print(f"{row['sampling']:4} {row['fill']:28} {row['wrong']:7.1%} wrong", flush=True)
            write_json(options.out, result)
    if "masks" in parts:
        for row in mask_rows(model, data, images):
            result["masks"].append(row)
            print(f"{row['method']:44} {row['wrong']:7.1%} wrong", flush=True)
            write_json(options.out, result)
    if "layers" in parts:
        for row in layer_rows(model, data, images[: max(1, options.layers // options.batch)], options.layers):
            result["layers"].append(row)
            print(row["layer"], row["nearest 2/4"], row["fitted 2/4"], flush=True)
            write_json(options.out, result)


if __name__ == "__main__":
    main()
