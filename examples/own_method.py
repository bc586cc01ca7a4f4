"""Your own method: 3 x 3 convolutions at random positions, in accelerate, compare and a search."""

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

import quincunx as qx
from quincunx.data import load_data
from quincunx.experiments.compare import compare_methods
from quincunx.layers.build import build_module
from quincunx.methods.points import Point
from quincunx.surgery import Context, Layer, Work, each
from quincunx.train.loop import fit
from quincunx.train.recipes import by_name, recipe_with


@dataclass(frozen=True)
class RandomPositions:
    """Each 3 x 3 convolution at a share of its positions; the others take the nearest computed value."""

    rate: float = 0.5
    name, targets = "random positions", (nn.Conv2d,)

    def refuse(self, layer: Layer, context: Context) -> str | None:
        return None if layer.module.kernel_size == (3, 3) else "not 3 x 3"

    def begin(self, layers: Sequence[Layer], context: Context) -> Work:
        return each(self.replace)

    def replace(self, layer: Layer) -> qx.Replacement:
        conv = layer.module
        names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
        spec = {"kind": "masked", "sampling": qx.Random(self.rate, seed=0).spec}
        spec |= {name: getattr(conv, name) for name in names} | {"bias": conv.bias is not None}
        module = build_module(spec)
        module.load_state_dict(conv.state_dict())
        return qx.Replacement(module, spec, {"rate": self.rate})


def main(epochs: int) -> None:
    torch.manual_seed(0)
    data = load_data("digits")
    model = qx.networks.build("cifar-resnet8", len(data.classes), data.in_channels)
    with tempfile.TemporaryDirectory() as folder:
        fit(model, data, recipe_with(by_name("digits"), epochs=epochs), f"{folder}/run")
        print(qx.accelerate(model, RandomPositions(0.5), example_input=torch.zeros(1, 1, 8, 8)).summary())
        points = [Point("random", f"rate {rate:g}", RandomPositions(rate)) for rate in (0.5, 0.25)]
        for row in compare_methods(model, points, data, f"{folder}/compared", calibration=60, rounds=3):
            print(f"{row.label}: {row.mac_ratio:.2f} times fewer MACs, {row.drop:+.1f} points of error")
    found = qx.accelerate(model, RandomPositions(0.5), calibration=[torch.randn(32, 1, 8, 8)], macs="80%")
    print("a search for 80% of the MACs took", *found.replaced)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
