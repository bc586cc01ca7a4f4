"""``quincunx demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quincunx.cli.options import (
    Json,
    Seed,
    Threads,
    bad_input,
    check_folder,
    example,
    running,
    use_threads,
    verb,
)
from quincunx.cli.printing import (
    print_lines,
    say,
    show,
)
from quincunx.experiments.demo import run_demo
from quincunx.report.results import verdicts
from quincunx.train.loop import (
    Interrupted,
    RunFailed,
)

__all__ = ["demo"]


@verb(
    "demo",
    epilog=example("quincunx demo --out results/demo"),
    short_help="Train three small networks and compare them.",
)
def demo(
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("results/demo"),
    epochs: Annotated[int, typer.Option(help="Passes over the training images.", min=1)] = 12,
    seed: Seed = 0,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Train a small ResNet and its spatial bottleneck twins on digits; compare error, MACs and time.

    Takes about two minutes on two cores. Replaces the results of an earlier demonstration in the
    folder and nothing else.
    """
    with bad_input():
        use_threads(threads)
        check_folder(out)
        with running():
            try:
                rows = run_demo(out, epochs=epochs, seed=seed, progress=not as_json)
            except Interrupted:
                raise RunFailed("stopped; the demonstration starts anew when it is called again") from None
    if as_json:
        show({"out": str(out), "verdicts": verdicts(rows), "rows": [vars(row) for row in rows]})
        return
    print_lines(rows)
    for sentence in verdicts(rows):
        say(sentence)
    say(f"wrote {out / 'report.html'} and the artifact {out / 'model'} (qx.load({str(out / 'model')!r}))")
