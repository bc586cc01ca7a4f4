"""``quincunx compare``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from quincunx.acceleration.together import PATIENCE
from quincunx.cli.network import NetworkOptions
from quincunx.cli.options import (
    DataOptions,
    FineTuningOptions,
    FittingOptions,
    Json,
    Seed,
    Threads,
    TimingOptions,
    Unlabelled,
    bad_input,
    check_folder,
    example,
    format_named,
    make_folder,
    parse_patterns,
    running,
    use_threads,
    verb,
)
from quincunx.cli.printing import (
    print_compared,
    say,
    show,
)
from quincunx.cli.task import TaskOptions
from quincunx.experiments.compare import (
    SWEEPS,
    Compared,
    compare_methods,
    draw_comparison,
    points_named,
    points_suited,
)
from quincunx.measure.tasks.scale import ERROR, Scale
from quincunx.methods.registry import METHODS
from quincunx.progress import LOG, is_silenced
from quincunx.reading import read_json
from quincunx.report.figures import check_can_draw
from quincunx.train.processes import joined

__all__ = ["compare_command", "draw_compared", "narrator"]

# of a data set whose networks are judged by their first five answers, too
MANY_CLASSES = 100


@verb(
    "compare",
    epilog=example("quincunx compare runs/rrn20 --methods espace,lowrank --data cifar10"),
    short_help="Compare methods on one trained network.",
)
def compare_command(
    network: NetworkOptions,
    images: DataOptions,
    about: TaskOptions,
    fitting: FittingOptions,
    finetuning: FineTuningOptions,
    timing: TimingOptions,
    methods: Annotated[
        str | None,
        typer.Option(
            help=f"Some of {', '.join(SWEEPS)}, separated by commas; input is a smaller input, masks are "
            "ESPACE's three kinds. By default all but masks; input where the task classifies, spatialblock "
            "where the network has such blocks.",
            rich_help_panel="Method",
        ),
    ] = None,
    points: Annotated[
        str | None,
        typer.Option(
            help="Only settings whose folder's name matches one of these patterns, such as *-1of4*, "
            "separated by commas.",
            rich_help_panel="Method",
        ),
    ] = None,
    unlabelled: Unlabelled = False,
    seed: Seed = 0,
    threads: Threads = None,
    out: Annotated[Path, typer.Option(help="Folder for the results.", rich_help_panel="Output")] = Path(
        "compared"
    ),
    as_json: Json = False,
) -> None:
    """Accelerate one trained network by several methods, each at several settings, and compare them.

    All of them get the same data and the same fine-tuning. Each setting gets a folder with its JSON and its
    artifact; at the end all networks are timed in turn. Run the same command again to make what is missing
    and to time all networks again. Writes comparison.json and the figures drop-speed.svg, drop-macs.svg and
    drop-bytes.svg. A setting that its method refuses is left out and named, and the exit code is 1.

    On several processes or machines: torchrun --nproc-per-node 2 --max-restarts 3 -m quincunx compare ...;
    they share the test images and the batches of fine-tuning.
    """
    with bad_input(), joined(patience=PATIENCE) as ranks:
        with ranks.agreed():
            use_threads(threads)
            further, dtype, task = finetuning.chosen(unlabelled), format_named(timing.dtype), about.chosen()
            every = [*METHODS, *(["input"] if task.classifies else [])]
            chosen = points_named(parse_patterns(methods) or every, parse_patterns(points))
            check_can_draw()
            check_folder(out)
            found = network.load(seed)
            if methods is None:
                chosen = points_suited(chosen, found.model)
            read = about.read(task, images, seed=seed, unlabelled=unlabelled, quiet=as_json)
            data = found.suited(read, network.mean, network.std, task)
            make_folder(out)
        with running():
            rows = compare_methods(
                found.model,
                chosen,
                data,
                out,
                recipe=further,
                tell=narrator(as_json),
                layers=fitting.patterns,
                calibration=fitting.calibration,
                batch=timing.batch,
                rounds=timing.rounds,
                seed=seed,
                workers=images.workers,
                dtype=dtype,
                task=task,
                progress=not as_json,
                ranks=ranks,
            )
            top5 = task.classifies and len(data.classes) >= MANY_CLASSES
            if ranks.first:
                draw_compared(rows, out, top5=top5, scale=task.scale)
    refused = read_json(out / "comparison.json")["refused"]
    if as_json:
        show({"rows": [row.to_dict() for row in rows], "refused": refused, "out": str(out)})
    elif ranks.first:
        print_compared(rows, task.scale)
        for name, why in refused.items():
            say(f"Left out, {name}: {why}.")
        say(f"wrote {out}")
    if refused and ranks.first:
        raise typer.Exit(1)


def narrator(quiet: bool) -> Callable[[str], None]:
    console = Console(stderr=True, quiet=quiet or is_silenced())

    def tell(text: str) -> None:
        LOG.info("%s", text)
        console.print(text, markup=False, highlight=False)

    return tell


def draw_compared(rows: list[Compared], out: Path, *, top5: bool = False, scale: Scale = ERROR) -> None:
    for name, picture in draw_comparison(rows, top5=top5, scale=scale).items():
        (out / f"{name}.svg").write_bytes(picture.content)
