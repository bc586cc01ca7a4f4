"""What a number format costs in accuracy: trained networks, unfused in float32 and fused in each format.

    python benchmarks/format_accuracy.py --folder data --nips17 nips17 --runs runs \\
        --out results/format-accuracy.json

The folder holds cifar10-png-small.tar.gz, clothing-small-128.tar.gz, imagenet-sample-256.tar.gz and, in
pretrained/, the weights of ResNet-20, ResNet-56 and SqueezeNet v1.1; nips17 is what
benchmarks/folders_by_class.py makes. A resnet18 is trained on the clothes, and each network gets a twin with
spatial bottlenecks, fine-tuned in float32; networks and rows lie in --runs afterwards and are not made
again. Each step is a command of ``quincunx`` in a process of its own, on one thread. Where int8 keeps layers
in real numbers, so that answers on the calibration images stay, the row has all layers in it as well.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quincunx.measure.environment import environment
from quincunx.writing import write_json

FORMATS = ("float32", "bfloat16", "int8")
ALL_LAYERS = "int8, all layers"
# images that ranges come from
CALIBRATION = 256
_CIFAR = ("--mean", "0.485,0.456,0.406", "--std", "0.229,0.224,0.225")
_BOTTLENECK = ("--method", "spatialbottleneck", "--sampling", "2/4", "--keep-slower", "--rounds", "3")


@dataclass(frozen=True)
class Network:
    """A network and the data that it is judged on.

    Attributes:
        name: in the result.
        start: arguments that name the network and its weights.
        data: arguments that name the images.
        tuning: of the fine-tuning of its spatial bottlenecks.
        training: of a network that is trained first; empty for published weights.
    """

    name: str
    start: tuple[str, ...]
    data: tuple[str, ...]
    tuning: tuple[str, ...]
    training: tuple[str, ...] = ()


def networks(folder: Path, nips17: Path, runs: Path) -> list[Network]:
    weights = folder / "pretrained"
    cifar = ("--data", str(folder / "cifar10-png-small.tar.gz"))
    clothes = ("--data", str(folder / "clothing-small-128.tar.gz"), "--size", "128")
    samples = ("--data", str(folder / "imagenet-sample-256.tar.gz"), "--test-data", str(nips17))
    distilled = ("--recipe", "short", "--distill", "0.9")
    return [
        *(
            Network(
                f"cifar-resnet{depth}",
                (f"cifar-resnet{depth}", "--weights", str(weights / file), *_CIFAR),
                cifar,
                ("--finetune-epochs", "10", "--lr", "0.01", *distilled),
            )
            for depth, file in ((20, "resnet20-12fca82f.th"), (56, "resnet56-4bfd9763.th"))
        ),
        Network(
            "squeezenet1_1",
            ("squeezenet1_1", "--weights", str(weights / "squeezenet_v1.1_imagenet.npz")),
            (*samples, "--size", "227"),
            ("--finetune-epochs", "4", "--recipe", "short", "--lr", "0.0001", "--distill", "1"),
        ),
        Network(
            "clothing resnet18",
            (str(runs / "clothing-resnet18"),),
            clothes,
            ("--finetune-epochs", "2", "--recipe", "short", "--lr", "0.01", "--precision", "bfloat16"),
            (
                *("--network", "resnet18", "--epochs", "5", "--batch-size", "32", "--lr", "0.05"),
                *("--recipe", "short", "--precision", "bfloat16", "--resume"),
            ),
        ),
    ]


def ran(verb: str, *arguments: str) -> dict[str, Any]:
    """Run a command of quincunx and return what it prints as JSON."""
    command = [sys.executable, "-m", "quincunx", verb, *arguments, "--threads", "1", "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def place(name: str, runs: Path) -> Path:
    """Return the file of a row."""
    return runs / f"{name.replace(' ', '-').replace('/', 'of')}.json"


def judged(name: str, arguments: tuple[str, ...], runs: Path) -> dict[str, Any]:
    """Return a row, errors and losses of a network as it is and in each format; what exists stays."""
    kept = place(name, runs)
    row: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {"network": name, "commits": []}

    def add(part: dict[str, Any]) -> None:
        commit = environment()["commit"]
        row["commits"] = [*row["commits"], *([] if commit in row["commits"] else [commit])]
        row.update(part)
        write_json(kept, row)

    if "error" not in row:
        plain = ran("evaluate", *arguments)
        add({key: plain[key] for key in ("data", "images", "error", "loss")})
    for form in FORMATS:
        if form not in row:
            found = ran("evaluate", *arguments, *_asked(form))
            add({form: {key: found[key] for key in ("error", "loss", "int8") if key in found}})
    if row["int8"]["int8"]["kept"] and ALL_LAYERS not in row:
        found = ran("evaluate", *arguments, *_asked("int8"), "--max-drop", "100")
        add({ALL_LAYERS: {key: found[key] for key in ("error", "loss", "int8")}})
    print(row, flush=True)
    return row


def _asked(form: str) -> tuple[str, ...]:
    return ("--dtype", form, *(("--calibration", str(CALIBRATION)) if form == "int8" else ()))


def rows_of(network: Network, runs: Path, anew: bool) -> list[dict[str, Any]]:
    """Return the rows of a network and of its twin with spatial bottlenecks; else those that exist."""
    names = network.name, f"{network.name}, bottlenecks 2/4"
    if not anew:
        found = [json.loads(place(name, runs).read_text()) for name in names if place(name, runs).exists()]
        return [row for row in found if row.keys() >= set(FORMATS)]
    if network.training and not (runs / "clothing-resnet18" / "run.json").exists():
        ran("train", *network.data, *network.training, "--seed", "0", "--out", network.start[0])
    rows = [judged(names[0], (*network.start, *network.data), runs)]
    twin = runs / f"{network.name.replace(' ', '-')}-sb"
    if not (twin / "accelerate.json").exists():
        settings = (*_BOTTLENECK, "--calibration", "300", *network.tuning, "--seed", "0")
        ran("accelerate", *network.start, *network.data, *settings, "--out", str(twin))
    return [*rows, judged(names[1], (str(twin), *network.data), runs)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--nips17", type=Path, required=True)
    parser.add_argument(
        "--runs", type=Path, required=True, help="folder of the networks that are trained here"
    )
    parser.add_argument(
        "--only", default="", help="networks with this in their name, besides rows that exist"
    )
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    given.runs.mkdir(parents=True, exist_ok=True)
    facts = environment()  # before hours pass
    rows = [
        row
        for network in networks(given.folder, given.nips17, given.runs)
        for row in rows_of(network, given.runs, given.only in network.name)
    ]
    write_json(given.out, {"schema": 1, "kind": "format-accuracy", "rows": rows, "environment": facts})


if __name__ == "__main__":
    main()
