"""What a number format costs in accuracy: published networks, unfused in float32 and fused in each format.

    python benchmarks/format_accuracy.py --folder data --nips17 nips17 --out results/format-accuracy.json

The folder holds cifar10-png-small.tar.gz and, in pretrained/, the weights of ResNet-20, ResNet-56 and
SqueezeNet v1.1; nips17 is what benchmarks/folders_by_class.py makes. Each network is evaluated by
``quincunx evaluate`` in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from quincunx.measure.environment import environment
from quincunx.writing import write_json

_CIFAR = ("--mean", "0.485,0.456,0.406", "--std", "0.229,0.224,0.225")
FORMATS = ("float32", "bfloat16", "int8")


def evaluated(arguments: list[str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "quincunx", "evaluate", *arguments, "--threads", "1", "--json"]
    found: dict[str, Any] = json.loads(
        subprocess.run(command, capture_output=True, text=True, check=True).stdout
    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--nips17", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    weights = given.folder / "pretrained"
    cifar = ["--data", str(given.folder / "cifar10-png-small.tar.gz"), *_CIFAR]
    networks = {
        "cifar-resnet20": [str(weights / "resnet20-12fca82f.th"), *cifar],
        "cifar-resnet56": [str(weights / "resnet56-4bfd9763.th"), *cifar],
        "squeezenet1_1": [
            str(weights / "squeezenet_v1.1_imagenet.npz"),
            *("--size", "227", "--data", str(given.folder / "imagenet-sample-256.tar.gz")),
            *("--test-data", str(given.nips17)),
        ],
    }
    rows = []
    for name, (path, *data) in networks.items():
        arguments = [name, "--weights", path, *data]
        plain = evaluated(arguments)
        row = {"network": name, "data": plain["data"], "images": plain["images"], "error": plain["error"]}
        row["loss"] = plain["loss"]
        for form in FORMATS:
            found = evaluated([*arguments, "--dtype", form])
            row[form] = {"error": found["error"], "loss": found["loss"]}
            if "int8" in found:
                row[form]["int8"] = found["int8"]
        rows.append(row)
        print(row)
    write_json(
        given.out, {"schema": 1, "kind": "format-accuracy", "rows": rows, "environment": environment()}
    )


if __name__ == "__main__":
    main()
