"""``quincunx evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from quincunx.acceleration.judge import sample_batches
from quincunx.cli.network import NetworkOptions
from quincunx.cli.options import (
    DataOptions,
    Json,
    Threads,
    artifact_in,
    bad_input,
    example,
    format_named,
    running,
    use_threads,
    verb,
)
from quincunx.cli.printing import (
    say,
    show,
)
from quincunx.cli.task import TaskOptions
from quincunx.fusion.calibrated import OBSERVERS
from quincunx.fusion.fuse import fuse
from quincunx.layers.eightbits import quantisation_of
from quincunx.measure.environment import environment
from quincunx.train.evaluation import evaluate

__all__ = ["evaluate_command"]


@verb(
    "evaluate",
    epilog=example("quincunx evaluate runs/rsbn20/model --data digits"),
    short_help="Test error, or another score, of a trained network.",
)
def evaluate_command(
    network: NetworkOptions,
    images: DataOptions,
    about: TaskOptions,
    original: Annotated[
        Path | None,
        typer.Option(
            help="Artifact of the network that --task agreement compares with.", rich_help_panel="Task"
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Evaluate the fused network in this number format, float32, bfloat16 or int8, not the "
            "network as it is; by default the artifact's own, if it has one.",
        ),
    ] = None,
    calibration: Annotated[
        int, typer.Option(help="With --dtype int8: number of training images that ranges come from.", min=16)
    ] = 128,
    observer: Annotated[
        str, typer.Option(help=f"With --dtype int8: where a map's range ends, {', '.join(OBSERVERS)}.")
    ] = "histogram",
    max_drop: Annotated[
        float,
        typer.Option(
            help="With --dtype int8: how many of 100 calibration images may get another answer before layers "
            "stay in float32; 100 keeps none."
        ),
    ] = 1.0,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Loss and top-1 error, or the task's score, of a network on the test part of a data set.

    The network is an artifact, a network's name with --weights, or what your own function makes (--model),
    with --weights or with its own. An artifact of your own network needs both, the folder and --model. An
    artifact in eight bits is evaluated as it was calibrated, unless --dtype says something else.
    """
    with bad_input():
        use_threads(threads)
        found, task = network.load_to_score(), about.chosen()
        if task.needs_original and original is None:
            raise ValueError(f"original: task {task.name!r} compares with a network; give its artifact")
        other = None if original is None else network.load_other(original)
        model = found.model
        record = quantisation_of(model)
        dtype = "int8" if dtype is None and record is not None else dtype
        low = dtype == "int8"
        read = about.read(task, images, test_alone=not low or record is not None, quiet=as_json)
        data = found.suited(read, network.mean, network.std, task)
        said: dict[str, Any] = {}
        if low:
            seen = None
            if record is None:
                seen = sample_batches(data, calibration, seed=0, task=task, workers=images.workers)
            model = low_model = fuse(
                model, torch.int8, calibration=seen, force=True, observer=observer, max_drop=max_drop
            )
            said = {"int8": {**low_model.meta["int8"], "rest": low_model.meta["dtype"]["rest"]}}
        elif dtype is not None:
            model = fuse(model, format_named(dtype) or torch.float32, force=True)
        with running():
            result = evaluate(model, data.test, data, workers=images.workers, task=task, original=other)
    place = None if found.start is None else str(artifact_in(found.start))
    form = "" if dtype is None else f", fused in {dtype}"
    if said and said["int8"]["kept"]:
        form += f" ({', '.join(said['int8']['kept'])} in {said['int8']['rest']})"
    if as_json:
        own: dict[str, Any] = {} if network.model is None else {"model": network.model}
        own |= {} if dtype is None else {"dtype": dtype, **said}
        own |= {} if task.classifies else {"task": task.to_dict()}
        scored = {"loss": result.loss, task.scale.key: result.score, "images": result.images}
        further = result.further if task.classifies else {"further": result.further}
        facts = {"artifact": place, **own, "data": data.name, **scored, **further}
        show({**facts, "environment": environment()})
        return
    scale, of = task.scale, "of" if task.classifies else "on"
    further = {} if task.classifies else result.further
    more = "".join(
        f", {task.further[name].scale.name} {task.further[name].scale.shown(value)}"
        for name, value in further.items()
    )
    say(
        f"{place or network.model or network.network} on {data.name}{form}: "
        f"test {scale.name} {scale.shown(result.score)} {of} "
        f"{result.images} images, loss {result.loss:.4f}{more}"
    )
