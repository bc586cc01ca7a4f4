"""Time networks against each other and write the result files that a report reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quincunx import networks
from quincunx.fusion.fuse import fuse
from quincunx.measure.environment import environment
from quincunx.measure.latency import Timing, measure_models
from quincunx.progress import progress_bar
from quincunx.report.results import collect, label_of
from quincunx.writing import write_json

__all__ = ["time_networks", "time_runs"]

_ROUNDS, _ROUNDS_AT_ONCE = 15, 3


def time_runs(
    folder: str | Path, batches: Sequence[int], baseline: str | None = None, *, progress: bool = False
) -> list[Path]:
    """Time the networks of the results below a folder, and write a latency file per batch size there.

    Times do not depend on weights, so the networks are built again from their specs.

    Args:
        folder: with results of :func:`quincunx.train.loop.fit`.
        batches: images per call.
        baseline: label of a network; by default the one with the most MACs.
        progress: show a bar.

    Returns:
        The files.

    Raises:
        FileNotFoundError: no results in the folder.
        ValueError: results that cannot be read, a baseline that is not among them, a user's own
            network.
    """
    found = collect(folder)
    models: dict[str, nn.Module] = {}
    for network in found.networks:
        spec = network.spec
        if spec["kind"] != "network":
            raise ValueError(f"{folder}: {label_of(spec)} is no network of this package; time it by qx.fuse")
        built = networks.build(spec["name"], spec["num_classes"], spec["in_channels"], **spec["settings"])
        models[label_of(spec)] = built
    first = label_of(max(found.networks, key=lambda n: n.runs[0]["cost"]["macs"]).spec)
    chosen = baseline or first
    if chosen not in models:
        raise ValueError(f"baseline={baseline!r}: expected one of {', '.join(models)}")
    run = found.runs[0]
    shape = (run["network"]["in_channels"], *run["data"]["size"])
    written = []
    for batch in batches:
        path = Path(folder) / f"latency-batch{batch}.json"
        write_json(path, time_networks(models, chosen, batch, shape, progress=progress))
        written.append(path)
    return written


def time_networks(
    models: Mapping[str, nn.Module],
    baseline: str,
    batch: int,
    shape: Sequence[int],
    *,
    progress: bool = False,
) -> dict[str, Any]:
    """Return the content of a latency result file: networks against each other, all by ``qx.fuse``.

    Args:
        models: label -> network.
        baseline: the label of the network over which speed-ups are computed.
        batch: images per call.
        shape: (C, H, W) of an image.
        progress: show a bar.
    """
    example = torch.randn(batch, *shape)
    example = example.contiguous(memory_format=torch.channels_last)
    # all networks get the same treatment for inference, including the ordinary one
    fused = {label: fuse(model.eval(), check=example[:1]) for label, model in models.items()}
    timings = _in_parts(fused, example, f"timing at batch {batch}", progress)
    rows = {}
    for name, timing in timings.items():
        ratio, low, high = timing.speedup_over(timings[baseline])
        rows[name] = {**timing.to_dict(), "speedup": {"median": ratio, "q1": low, "q3": high}}
    return {
        "schema": 1,
        "kind": "latency",
        "setting": f"batch {batch}",
        "how": f"inference by qx.fuse, channels_last, {torch.get_num_threads()} threads, medians",
        "rounds": _ROUNDS,
        "baseline": baseline,
        "rows": rows,
        "environment": environment(),
    }


def _in_parts(
    models: Mapping[str, nn.Module], example: Tensor, title: str, progress: bool
) -> dict[str, Timing]:
    """Run a few rounds at a time, so that the bar moves; drawing a bar within a round would be timed too."""
    timings: dict[str, Timing] = {}
    with progress_bar(progress) as bar:
        task = bar.add_task(title, total=_ROUNDS, state="rounds")
        for _ in range(_ROUNDS // _ROUNDS_AT_ONCE):
            for name, part in measure_models(models, example, rounds=_ROUNDS_AT_ONCE).items():
                before = timings[name].seconds if name in timings else ()
                timings[name] = replace(part, seconds=before + part.seconds)
            bar.update(task, advance=_ROUNDS_AT_ONCE)
    return timings
