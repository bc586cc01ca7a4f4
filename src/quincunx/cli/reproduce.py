"""``quincunx reproduce``: the papers' experiments."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
import typer

import quincunx as qx
from quincunx.cli.compare import draw_compared, narrator
from quincunx.cli.options import (
    DataOptions,
    Device,
    Json,
    RecipeOptions,
    Threads,
    bad_input,
    check_device,
    check_folder,
    example,
    make_folder,
    running,
    use_threads,
    verb,
    with_training_normalisation,
)
from quincunx.cli.printing import (
    print_compared,
    print_comparison,
    print_plan,
    print_points,
    print_speeds,
    say,
    show,
)
from quincunx.experiments.bottleneck_paper import EXPERIMENTS
from quincunx.experiments.bottleneck_paper import by_name as experiment_by_name
from quincunx.experiments.compare import (
    compare_methods,
)
from quincunx.experiments.espace_paper import (
    ESPACE_EXPERIMENTS,
    draw_responses,
    espace_by_name,
    time_points,
)
from quincunx.experiments.reproduce import plan, reproduce
from quincunx.measure.engines import PEERS
from quincunx.measure.environment import environment
from quincunx.report.figures import check_can_draw
from quincunx.train import recipes
from quincunx.train.processes import joined
from quincunx.writing import write_json

__all__ = [
    "reproduce_command",
    "reproduce_espace",
]


@dataclass(frozen=True)
class PaperData(DataOptions):
    """The images of an experiment, by default the paper's."""

    data: Annotated[
        str | None,
        typer.Option(
            help="Data set: cifar10, cifar100, or a folder or archive with one folder per class; by default "
            "the paper's."
        ),
    ] = None  # type: ignore[assignment]


@dataclass(frozen=True)
class EspaceOptions:
    """What only the experiments of the ESPACE paper take."""

    section: ClassVar[str] = "ESPACE's experiments"

    weights: Annotated[
        Path | None, typer.Option(help="File of the trained network's weights, to measure errors too.")
    ] = None
    batch: Annotated[int, typer.Option(help="Batch size of the timed inputs.", min=1)] = 8
    rounds: Annotated[int, typer.Option(help="Number of timing rounds for each layer.", min=3)] = 11
    peers: Annotated[
        str,
        typer.Option(
            help=f"Engines timed on the dense network: some of {', '.join(PEERS)}, separated by commas."
        ),
    ] = "torch eager"


def reproduce_espace(
    name: str,
    images: PaperData,
    options: EspaceOptions,
    *,
    out: Path,
    epochs: int | None,
    threads: int | None,
    only_plan: bool,
    as_json: bool,
) -> None:
    """A figure or table of the ESPACE paper: speeds, and errors where the trained network is given."""
    with bad_input():
        use_threads(threads)
        experiment = espace_by_name(name)
        peers = [part.strip() for part in options.peers.split(",")]
        if options.weights is not None and images.data is None:
            raise ValueError(f"weights={str(options.weights)!r}: its errors need --data; speeds need neither")
        if unknown := [peer for peer in peers if peer not in PEERS]:
            raise ValueError(f"peers={unknown[0]!r}: expected some of {', '.join(PEERS)}")
        if only_plan:
            planned = experiment.planned()
            if as_json:
                show(planned)
            else:
                say(f"{name}: {experiment.title}")
                print_points(planned)
                for sentence in experiment.sentences:
                    say(sentence)
            return
        if images.data is not None and options.weights is None:
            experiment.check_single()
        check_can_draw()
        check_folder(out)
        settings = dict(experiment.settings)
        timing: dict[str, Any] = {"batch": options.batch, "rounds": options.rounds, "progress": not as_json}
        network = (
            None
            if options.weights is None
            else qx.networks.weights.load(experiment.network, options.weights, **settings)
        )
        shown = None if images.data is None else replace(images, size=experiment.side).read(quiet=as_json)
        # the folder is made after all that can be refused
        make_folder(out)
        if network is None or shown is None:
            torch.manual_seed(0)
            classes = 1000 if shown is None else len(shown.classes)
            model = qx.networks.build(experiment.network, classes, 3, **settings)
            with running():
                rows = time_points(
                    experiment,
                    model,
                    data=shown,
                    workers=images.workers,
                    peers=peers,
                    tell=narrator(as_json),
                    keep=out / "points",
                    **timing,
                )
                content = {
                    "schema": 1,
                    "kind": name,
                    "weights": "drawn at random, seed 0",
                    "data": None if shown is None else shown.describe(),
                    "rows": rows,
                    "environment": environment(),
                }
                write_json(out / f"{name}.json", content)
                if shown is not None:
                    (out / "response-speed.svg").write_bytes(draw_responses(rows, experiment.printed).content)
            as_rows, table = rows, partial(print_speeds, rows)
        else:
            tuned = experiment.recipe(epochs or 0)
            with running():
                compared = compare_methods(
                    network,
                    experiment.points,
                    with_training_normalisation(shown, options.weights),
                    out,
                    recipe=tuned,
                    tell=narrator(as_json),
                    layers=experiment.layers,
                    workers=images.workers,
                    **timing,
                )
                draw_compared(compared, out)
            as_rows, table = [row.to_dict() for row in compared], partial(print_compared, compared)
    if as_json:
        show({"experiment": name, "rows": as_rows})
        return
    say(f"{name}: {experiment.title}")
    table()
    for sentence in experiment.sentences:
        say(sentence)
    say(f"wrote {out}")


@verb(
    "reproduce",
    epilog=example("quincunx reproduce table1 --plan"),
    short_help="Run a table or figure of the papers, or plan it.",
)
def reproduce_command(
    context: typer.Context,
    experiment: Annotated[
        str, typer.Argument(help=f"One of {', '.join((*EXPERIMENTS, *ESPACE_EXPERIMENTS))}.")
    ],
    images: PaperData,
    training: RecipeOptions,
    espace: EspaceOptions,
    recipe: Annotated[
        str | None,
        typer.Option(help="Recipe to use instead of the paper's, such as short.", rich_help_panel="Training"),
    ] = None,
    depths: Annotated[str | None, typer.Option(help="Only networks of these depths, such as 20,44.")] = None,
    seeds: Annotated[
        str, typer.Option(help="Seeds of the runs of each network, separated by commas.")
    ] = "0,1,2",
    threads: Threads = None,
    device: Device = "cpu",
    only_plan: Annotated[
        bool, typer.Option("--plan", help="Only list the runs, with MACs, hours and the paper's values.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the results; results/EXPERIMENT by default.", rich_help_panel="Output"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Train every network of a table of the paper and print the table with ours beside the paper's.

    Tables 1 and 3 are on CIFAR-10 (--data cifar100 for the other), table 2 and the down-sampling study on
    CIFAR-100, table 4 on ImageNet (--data FOLDER). figure4 and figure5 are drawn from tables 1 and 4;
    figure3 shows the samplings that table 2 compares. --plan sets the paper's values beside MACs and hours.
    Each run leaves one JSON file; the same command again makes only what is missing. Runs under torchrun as
    train does.

    ESPACE's figures and tables are timed on this machine; with --weights and --data of the trained network
    their errors are measured too, after --epochs of the paper's fine-tuning. With --data alone the figures,
    of one layer each, show the error of its response, with weights drawn at random. An option that would
    do nothing is refused.
    """
    with bad_input():
        _refuse_idle(context, experiment, espace.weights is not None, images.data is not None, only_plan)
    if experiment in ESPACE_EXPERIMENTS:
        reproduce_espace(
            experiment,
            images,
            espace,
            out=out or Path("results") / experiment,
            epochs=training.epochs,
            threads=threads,
            only_plan=only_plan,
            as_json=as_json,
        )
        return
    with bad_input(), joined(check_device(device)) as ranks:
        use_threads(threads)
        chosen = experiment_by_name(experiment).at_depths(
            _parse_numbers("depths", depths) if depths else None
        )
        trained = recipes.recipe_with(recipes.by_name(recipe or chosen.recipe), **vars(training))
        runs, folder = _parse_numbers("seeds", seeds), out or Path("results") / chosen.name
        check_can_draw()
        if only_plan:
            known = images.data if images.data in ("cifar10", "cifar100") else None
            data = None if images.data in (None, known) else images.read(quiet=as_json)
            with running():
                planned = plan(chosen, trained, runs, folder, data=data, data_name=known)
            if as_json:
                show(
                    {
                        "experiment": chosen.name,
                        "recipe": vars(trained),
                        "rows": [vars(row) for row in planned],
                    }
                )
            else:
                say(f"{chosen.name}: {chosen.title}; recipe {trained.name}, {trained.epochs} epochs")
                print_plan(planned)
                if chosen.note:
                    say(chosen.note)
            return
        if images.data is None and chosen.data == "imagenet":
            raise ValueError("data: ImageNet has to be there already; give its folder with --data")
        check_folder(folder)
        data = replace(images, data=images.data or chosen.data).read(quiet=as_json)
        make_folder(folder)
        with running():
            rows = reproduce(
                chosen,
                trained,
                runs,
                folder,
                data,
                progress=not as_json,
                ranks=ranks,
                device=device,
                workers=images.workers,
            )
    if not ranks.first:
        return
    if as_json:
        show({"experiment": chosen.name, "rows": [row.to_dict() for row in rows], "out": str(folder)})
        return
    say(f"{chosen.name}: {chosen.title}, on {data.name}, recipe {trained.name} with {trained.epochs} epochs")
    print_comparison(rows)
    if chosen.note:
        say(chosen.note)
    say(f"wrote {folder} ({chosen.figure[0]}.svg and one JSON a run)")
    say(f"Times of these networks here: quincunx report {folder} --time 1,8")


# of reproduce: what only ESPACE's experiments take, with which input, and what only the tables take
_ESPACE_TIMES = ("out", "batch", "rounds", "threads")


_ESPACE_DATA = ("data", "test_data", "skip_bad", "no_exif", "grey", "stream", "workers")


_ESPACE_TAKES = ("weights", "epochs", "peers", *_ESPACE_TIMES, *_ESPACE_DATA)


_ONLY_ESPACE = ("weights", "batch", "rounds", "peers")


_ALWAYS = ("experiment", "only_plan", "as_json")


def _refuse_idle(context: typer.Context, experiment: str, weights: bool, data: bool, only_plan: bool) -> None:
    """Options that were given and would do nothing.

    Raises:
        ValueError: there is one.
    """
    of, takes = experiment, tuple[str, ...]()
    if experiment in ESPACE_EXPERIMENTS:
        if only_plan:
            of = f"{experiment} with --plan"
        elif weights:
            # without data it is refused with what it is for
            takes, of = ("weights", "epochs", *_ESPACE_TIMES, *_ESPACE_DATA), f"{experiment} with --weights"
        elif data:
            takes, of = ("peers", *_ESPACE_TIMES, *_ESPACE_DATA), f"{experiment} without --weights"
        else:
            takes, of = ("peers", "data", *_ESPACE_TIMES), f"{experiment} without --weights and --data"
    else:
        idle = (*_ONLY_ESPACE, *(("workers", "device") if only_plan else ()))
        takes = tuple(name for name in context.params if name not in idle)
        of += " with --plan" if only_plan else ""
    for name in context.params:
        source = context.get_parameter_source(name)
        given = source is not None and source.name == "COMMANDLINE"
        if given and name not in (*takes, *_ALWAYS):
            if experiment in ESPACE_EXPERIMENTS and name not in _ESPACE_TAKES:
                of = experiment  # with whatever else
            raise ValueError(f"{name}: --{name.replace('_', '-')} does nothing for {of}; leave it out")


def _parse_numbers(name: str, text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() for part in parts) or len(set(parts)) < len(parts):
        raise ValueError(f"{name}={text!r}: expected different numbers with commas, such as 0,1,2")
    return [int(part) for part in parts]
