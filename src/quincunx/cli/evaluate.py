"""``quincunx evaluate``."""

from __future__ import annotations

from quincunx.cli.network import NetworkOptions
from quincunx.cli.options import (
    DataOptions,
    Json,
    Threads,
    artifact_in,
    bad_input,
    example,
    running,
    use_threads,
    verb,
)
from quincunx.cli.printing import (
    say,
    show,
)
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
        with running():
            result = evaluate(found.model, data.test, data, workers=images.workers)
    place = None if found.start is None else str(artifact_in(found.start))
    if as_json:
        own = {} if network.model is None else {"model": network.model}
        facts = {"artifact": place, **own, "data": data.name, **vars(result)}
        show({**facts, "environment": environment()})
        return
    say(
        f"{place or network.model} on {data.name}: test error {100 * result.error:.2f}% of {result.images} "
        f"images, loss {result.loss:.4f}"
    )
