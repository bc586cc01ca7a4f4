"""Exported networks in each format, as plain operators and with our kernels, beside the dense network there.

Each row is one call of ``qx.export``: the file is loaded in a process of its own, compared with the network
and timed beside the dense network, in turn. A row says how fast it is, how large the MAC ratio is, which
other candidates on this machine are faster, and how far its answers are from the network's. Our kernels also
compute in bfloat16 and int8 there; ranges come from random images, since times do not depend on them.

    OMP_NUM_THREADS=1 python benchmarks/exports.py --threads 1 --out results/exports.json   # about 20 minutes
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import quincunx as qx
from quincunx.deployment.export import ExportFailed
from quincunx.deployment.formats import FORMATS
from quincunx.measure.environment import environment
from quincunx.writing import write_json


def made_by(method: Any) -> Callable[[], nn.Module]:
    """A resnet20 with every layer replaced, weights at random: times do not depend on them."""

    def make() -> nn.Module:
        torch.manual_seed(0)
        images = torch.randn(32, 3, 32, 32)
        model = qx.networks.build("cifar-resnet20").eval()
        return qx.accelerate(model, method, calibration=[images], example_input=images[:2]).model

    return make


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "rsbn20": (lambda: qx.networks.build("rsbn20"), 32),
    "rsbn110": (lambda: qx.networks.build("rsbn110"), 32),
    "sb-resnet18": (lambda: qx.networks.build("sb-resnet18"), 224),
    "espace-resnet20": (made_by(qx.Espace(rate=0.5)), 32),
    "perforated-resnet20": (made_by(qx.Perforate()), 32),
}
# plain operators are float32
_KINDS = ((False, None), (True, None), (True, torch.bfloat16), (True, torch.int8))
FORMS = [(name, plugin, dtype) for name in FORMATS for plugin, dtype in _KINDS]


def row(
    name: str,
    model: nn.Module,
    size: int,
    form: tuple[str, bool, torch.dtype | None],
    batch: int,
    threads: int,
) -> dict[str, Any]:
    kind, plugin, dtype = form
    x = torch.randn(batch, 3, size, size)
    number = str(dtype or torch.float32).removeprefix("torch.")
    found: dict[str, Any] = {"network": name, "format": kind, "plugin": plugin, "dtype": number}
    found |= {"batch": batch, "threads": threads}
    # every layer in eight bits
    small = (
        qx.calibrate(model, torch.randn(16, 3, size, size), max_drop=100) if dtype == torch.int8 else model
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"net{FORMATS[kind].suffix}"
        try:
            # the difference in int8 is that from the fused network
            made = qx.export(
                small, path, x, plugin=plugin, dtype=dtype, force=True, threads=threads, rounds=21
            )
        except (ExportFailed, ValueError, TypeError) as error:
            return {**found, "refused": str(error).replace(folder, "")}
    return {
        **found,
        "speedup": made.speedup,
        "mac_ratio": made.macs["dense"] / made.macs["ours"],
        "ms": made.times,
        "faster": made.faster,
        "difference": max(made.difference.values()),
        "bytes": made.size,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("results/exports.json"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="", help="networks with this in their name")
    parser.add_argument("--formats", default=",".join(FORMATS), help="with commas; aoti compiles for minutes")
    arguments = parser.parse_args()
    kinds = arguments.formats.split(",")
    rows = []
    for name, (make, size) in NETWORKS.items():
        if arguments.only not in name:
            continue
        model = make().eval()
        for form in FORMS:
            for batch in (1, 8) if form[0] in kinds else ():
                rows.append(row(name, model, size, form, batch, arguments.threads))
                print({key: value for key, value in rows[-1].items() if key != "ms"}, flush=True)
                write_json(arguments.out, {"environment": environment(), "rows": rows})


if __name__ == "__main__":
    main()
