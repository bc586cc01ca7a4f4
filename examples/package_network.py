"""A network from the package: trained on digits, accelerated with ESPACE, fine-tuned, judged and timed.

python examples/package_network.py        # about a minute; an optional number sets the epochs
"""

import sys
import tempfile
from dataclasses import replace

import torch

import quincunx as qx
from quincunx.acceleration.pipeline import accelerate_trained
from quincunx.data import load_data
from quincunx.report.acceleration import acceleration_sentences
from quincunx.train.loop import fit
from quincunx.train.recipes import by_name, recipe_with


def main(epochs: int) -> None:
    torch.manual_seed(0)
    data = load_data("digits")
    model = qx.networks.build("cifar-resnet8", len(data.classes), data.in_channels)
    recipe = recipe_with(by_name("digits"), epochs=epochs)
    with tempfile.TemporaryDirectory() as folder:
        fit(model, data, recipe, f"{folder}/run")

        # the same as `quincunx accelerate`: fit layer by layer on training images, re-estimate batch norm,
        # then fine-tune with the original network as teacher
        result = accelerate_trained(
            model,
            qx.Espace(rank=0.5, rate=0.5),
            data,
            f"{folder}/fast",
            calibration=200,
            recipe=replace(recipe, name="short fine-tuning", lr=recipe.lr / 10, distill=0.5),
            rounds=5,
        )
        for row in result["layers"]:
            ratio, speedup = row["macs_before"] / row["macs_after"], row["speedup"]["median"]
            print(f"{row['name']}: {ratio:.1f} times fewer MACs, {speedup:.1f} times as fast")
        for sentence in acceleration_sentences(result):
            print(sentence)

        # a network from the package is saved with its name, so loading needs nothing else
        fast = qx.fuse(qx.load(f"{folder}/fast/model"))
        print("loaded and fused:", tuple(fast(torch.zeros(8, 1, 32, 32)).shape))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 6)
