"""``quincunx evaluate``."""

from __future__ import annotations

from typing import Annotated

import torch
import typer

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
from quincunx.fusion.fuse import fuse
from quincunx.measure.environment import environment
from quincunx.train.evaluation import evaluate

__all__ = ["evaluate_command"]


@verb(
    "evaluate",
    epilog=example("quincunx evaluate runs/rsbn20/model --data digits"),
    short_help="Test error of a trained network.",
)
def evaluate_command(
    network: NetworkOptions,
    images: DataOptions,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Evaluate the fused network in this number format, such as bfloat16, instead of the network "
            "as it is.",
        ),
    ] = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Loss and top-1 error of a network on the test part of a data set.

    The network is an artifact, a network's name with --weights, or what your own function makes (--model),
    with --weights or with its own. An artifact of your own network needs both, the folder and --model.
    """
    with bad_input():
        use_threads(threads)
        found = network.load_to_score()
        data = found.suited(images.read(test_alone=True, quiet=as_json), network.mean, network.std)
        model = found.model
        if dtype is not None:
            model = fuse(model, format_named(dtype) or torch.float32, force=True)
        with running():
            result = evaluate(model, data.test, data, workers=images.workers)
    place = None if found.start is None else str(artifact_in(found.start))
    form = "" if dtype is None else f", fused in {dtype}"
    if as_json:
        own = {} if network.model is None else {"model": network.model}
        own |= {} if dtype is None else {"dtype": dtype}
        facts = {"artifact": place, **own, "data": data.name, **vars(result)}
        show({**facts, "environment": environment()})
        return
    say(
        f"{place or network.model} on {data.name}{form}: test error {100 * result.error:.2f}% of "
        f"{result.images} images, loss {result.loss:.4f}"
    )
