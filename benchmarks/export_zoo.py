"""Accelerate the networks of benchmarks/zoo.py and export each for ONNX Runtime, as plain operators and with
our kernels; record how far the answers are from the network's, and what was refused.

    python benchmarks/export_zoo.py                      # all, into results/export-zoo.json; hours on a core
    python benchmarks/export_zoo.py --only "timm/res*"   # some, into another file

Each network gets random weights, and each of five methods replaces a few of its layers. Maps have odd sizes
where the network takes them. Nothing is timed. Rows whose files answered right are kept in the result and not
computed again; ``--fresh`` forgets them. The exit code is 1 if a file answered wrongly or a call failed
without a sentence.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import quincunx as qx
import zoo
from quincunx.deployment.export import ExportFailed
from quincunx.measure.environment import environment
from quincunx.writing import write_json

METHODS: dict[str, Any] = {
    **zoo.METHODS,
    "fitted": qx.Perforate(),
    "mask": qx.Perforate(sampling=qx.Random(0.5, 1), fill="nearest"),
}
ODD = ((67, 75), (131, 97))
FORMS = {"plain": False, "kernels": True}
FAULTS = ("wrong", "error")


def odd_size(model: nn.Module) -> tuple[int, int] | None:
    """Return an odd height and width that a network takes, None if there is none."""
    for size in ODD:
        try:
            with torch.no_grad():
                model(zoo.images(size, 2))
        except Exception:  # noqa: BLE001 - the network's own error about a size
            continue
        return size
    return None


def accelerated(model: nn.Module, size: tuple[int, int]) -> tuple[nn.Module, dict[str, Any]]:
    """Return a copy in which each method replaced a few layers, and how many or why none."""
    calibration = zoo.few_images(size)
    zoo.METHODS.update(METHODS)
    _, chosen = zoo.methods_record(model, size)
    found: dict[str, Any] = {}
    for name, layers in chosen.items():
        if not layers:
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                made = qx.accelerate(model, METHODS[name], where=layers, calibration=calibration)
        except Exception as error:  # noqa: BLE001 - the row reports any exception
            found[name] = zoo.failed(error)
            continue
        model = made.model
        found[name] = len(made.replaced)
    return model, found


def exported(model: nn.Module, x: Tensor, plugin: bool, tolerance: float) -> dict[str, Any]:
    """Return what came of one export; the file is compared with the network in a process of its own."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            made = _exported(model, Path(folder) / "net.onnx", x, plugin, tolerance)
        except ExportFailed as error:
            text = str(error).replace(folder, "")
            kind = "wrong" if "answers differ" in text or "not finite" in text else "error"
            return {"answer": kind, "sentence": text}
        except Exception as error:  # noqa: BLE001 - as above
            return zoo.failed(error)
        found: dict[str, Any] = {
            "answer": "equal",
            "difference": zoo.shortened(max(made.difference.values())),
            "bytes": made.size,
        }
        if not made.dynamic_batch:
            found["batch"] = "fixed"
        if len(made.outputs) > 1:
            found["outputs"] = list(made.outputs)
    return {**found, "seconds": round(time.perf_counter() - began, 1)}


def _exported(model: nn.Module, path: Path, x: Tensor, plugin: bool, tolerance: float) -> qx.Exported:
    settings: dict[str, Any] = {"plugin": plugin, "tolerance": tolerance, "rounds": 0}
    try:
        return qx.export(model, path, x, **settings)
    except ValueError as error:
        if "dynamic_batch=False" not in str(error):
            raise
        return qx.export(model, path, x, dynamic_batch=False, **settings)


def examine(entry: zoo.Entry, done: Callable[[str, Any], None]) -> None:
    """Accelerate and export one network; ``done`` gets each part as soon as it is known."""
    torch.set_num_threads(1)
    try:
        model, _, sizes = zoo.prepared(entry)
    except Exception as error:  # noqa: BLE001 - not our error
        done("unusable", zoo.sentence(error))
        return
    done("params", sum(p.numel() for p in model.parameters()))
    size = odd_size(model) or sizes[0]
    done("size", list(size))
    # masks belong to the size that they were estimated on
    model, replaced = accelerated(model, size)
    done("accelerated", replaced)
    x = zoo.images(size, 2)
    with torch.no_grad():
        answer = model(x)
    if not all(t.isfinite().all() for t in zoo.tensors(answer)):
        done("unusable", "random weights give answers that are not finite")
        return
    # float32 rounding of the network itself says how equal two right answers can be
    rounding = zoo.own_rounding(model, x)
    done("own_rounding", zoo.shortened(rounding))
    tolerance = max(zoo.TOLERANCE, 4 * min(rounding, zoo.CHAOS))
    for name, plugin in FORMS.items():
        done(name, exported(model, x, plugin, tolerance))


# ---------------------------------------------------------------- all of them


def faults(row: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with a row, one sentence per fault; a refusal is not a fault."""
    found = [f"{row['name']}: {row['stopped']}"] if "stopped" in row else []
    for name in FORMS:
        record = row.get(name, {})
        if record.get("answer") in FAULTS:
            found.append(f"{row['name']}: {name}: {record['answer']}: {record.get('sentence')}")
    return found


def is_right(row: Mapping[str, Any]) -> bool:
    """Return whether a row need not be computed again."""
    return "unusable" in row or all(row.get(name, {}).get("answer") == "equal" for name in FORMS)


def line_of(row: Mapping[str, Any]) -> str:
    """Return a row as text for people."""
    if "unusable" in row:
        return f"{row['name']}: left out: {row['unusable']}"
    text = f"{row['name']} {row.get('size')} {row.get('accelerated')}:"
    for name in FORMS:
        record = row.get(name, {})
        text += (
            f"  {name} {record.get('answer', '?')} {record.get('difference') or record.get('sentence', '')}"
        )
    return text + (f"  {row['stopped']}" if "stopped" in row else "")


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    """Return how many rows have each answer, by form."""
    return {
        name: dict(Counter(row[name]["answer"] for row in rows if name in row).most_common())
        for name in FORMS
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="*", help="names of library/architecture, such as 'timm/res*'")
    parser.add_argument("--jobs", type=int, default=1, help="networks at a time, one thread each")
    parser.add_argument("--limit", type=float, default=240, help="processor seconds a network may take")
    parser.add_argument("--out", type=Path, help="default: results/export-zoo.json, of some a temporary one")
    parser.add_argument("--fresh", action="store_true", help="forget earlier rows")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    entries, missing = zoo.catalogue(given.only)
    if missing:
        print(f"{', '.join(missing)}: not installed, its networks are left out")
    folder = zoo.ROOT / "results" if given.only == "*" else Path(tempfile.gettempdir())
    out = given.out or folder / "export-zoo.json"
    rows: dict[str, dict[str, Any]] = {}
    if out.is_file() and not given.fresh:
        earlier = json.loads(out.read_text(encoding="utf-8"))["rows"]
        rows = {row["name"]: row for row in earlier if is_right(row)}
    # the quickest first, so that an interrupted run has seen most kinds of networks
    costs, commit = known_costs(), environment()["commit"]
    left = sorted((e for e in entries if e.name not in rows), key=lambda e: costs.get(e.name, math.inf))
    for number, row in enumerate(zoo.rows_of(left, jobs=given.jobs, limit=given.limit, examiner=examine), 1):
        # a result that was continued has rows of several commits
        rows[row["name"]] = {**row, "commit": commit}
        print(f"[{number}/{len(left)}] {line_of(row)}", flush=True)
        write(out, [rows[entry.name] for entry in entries if entry.name in rows], len(entries))
    found = [fault for row in rows.values() for fault in faults(row)]
    print(summary(list(rows.values())), *found, sep="\n")
    return int(bool(found))


def known_costs() -> dict[str, float]:
    """Return how long each network took in the zoo's own run, in seconds."""
    found = json.loads((zoo.ROOT / "results" / "zoo.json").read_text(encoding="utf-8"))
    return {row["name"]: row.get("seconds", math.inf) for row in found["rows"]}


def write(out: Path, rows: Sequence[Mapping[str, Any]], networks: int) -> None:
    """Write what is known so far."""
    head = {
        "schema": 1,
        "kind": "export-zoo",
        "how": "random weights, a few layers replaced by each method, ONNX Runtime, batches of 1, 2 and 7",
        "tolerance": zoo.TOLERANCE,
        "methods": {name: repr(method) for name, method in METHODS.items()},
        "networks": networks,
        "environment": {**environment(), **zoo.versions_of()},
        "summary": summary(rows),
    }
    write_json(out, {**head, "rows": list(rows)})


if __name__ == "__main__":
    sys.exit(main())
