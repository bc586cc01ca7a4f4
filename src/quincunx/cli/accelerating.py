"""Verbs that make a trained network faster: accelerate, compare; and what the ESPACE paper shows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

import quincunx as qx
from quincunx import recipes
from quincunx.acceleration import accelerate_trained, plan_for_target
from quincunx.acceleration_report import usage, write_acceleration_report
from quincunx.artifact import read_json, write_json
from quincunx.choice import Search, Target
from quincunx.cli.common import (
    Data,
    Json,
    NoExif,
    Seed,
    Size,
    SkipBad,
    Stream,
    TestData,
    Threads,
    Unlabelled,
    Workers,
    app,
    as_trained,
    bad_input,
    check_folder,
    example,
    make_folder,
    read_data,
    running,
    use_threads,
)
from quincunx.cli.trained import Input, Mean, Model, Std, Weights, trained
from quincunx.comparison import SWEEPS, Compared, compare_methods, comparison_pictures, points_named
from quincunx.console import (
    print_acceleration,
    print_compared,
    print_points,
    print_search,
    print_speeds,
    say,
    show,
    warn,
)
from quincunx.espace_experiments import espace_by_name, response_picture, time_points
from quincunx.figures import check_can_draw
from quincunx.latency import environment
from quincunx.methods.fitting.settings import LayerRanks
from quincunx.methods.registry import ALIASES, METHODS, candidates_named, method_named, with_candidates
from quincunx.peers import PEERS
from quincunx.sampling import parse
from quincunx.surgery import Method
from quincunx.train import Interrupted, RunFailed

Settings = dict[str, Any]

Network = Annotated[
    str | None, typer.Argument(help="Artifact or run, or a network's name with --weights; or --model.")
]
Layers = Annotated[
    str | None, typer.Option(help="Only layers of these names, with commas; * stands for anything.")
]
Calibration = Annotated[int, typer.Option(help="Training images to fit on.", min=1)]
FinetuneEpochs = Annotated[int, typer.Option(help="Epochs of fine-tuning; 0 for none.", min=0)]
FinetuneRecipe = Annotated[str, typer.Option(help="Of fine-tuning.")]
FinetuneRate = Annotated[float | None, typer.Option(help="Learning rate of fine-tuning.")]
FinetunePrecision = Annotated[
    str | None, typer.Option(help="Of fine-tuning: float32 (the default), bfloat16 or float16.")
]
Distill = Annotated[float | None, typer.Option(help="Share of the loss that follows the original network.")]
DistillFeatures = Annotated[
    float | None,
    typer.Option(help="Weight of the distance to the original network's last map of each resolution."),
]
Batch = Annotated[int, typer.Option(help="Images of the timed inputs.", min=1)]
Rounds = Annotated[int, typer.Option(help="How often each layer is timed.", min=3)]

# points of accuracy that the search without a method or a target may lose
_LITTLE = 1.0
# of a data set whose networks are judged by their first five answers, too
_MANY_CLASSES = 100


def _method(name: str, settings: Settings) -> Method:
    """A method with the settings that were given.

    Raises:
        ValueError: an unknown method, or a setting that it has not or refuses.
    """
    kind: Any = method_named(_noted(name))
    given = {key: value for key, value in settings.items() if value is not None}
    known = {field.name for field in fields(kind)}
    for key, value in given.items():
        if key not in known:
            raise ValueError(f"{_OPTIONS.get(key, key)}={value!r}: {kind.name} has no such setting")
    method: Method = kind(**given)
    return method


def _noted(name: str) -> str:
    """A method's name; of one that it had before the newer one is told."""
    if name in ALIASES:
        typer.echo(f"note: the method {name} is called {ALIASES[name]} now", err=True)
    return name


_OPTIONS = {"budget": "rank_budget"}


@app.command(
    "accelerate",
    epilog=example("quincunx accelerate runs/rrn20 --data cifar10 --rate 0.5 --out fast"),
    short_help="Make a trained network faster.",
)
def accelerate_command(
    network: Network = None,
    model: Model = None,
    weights: Weights = None,
    input_shape: Input = None,
    mean: Mean = None,
    std: Std = None,
    data: Data = "digits",
    test_data: TestData = None,
    size: Size = None,
    skip_bad: SkipBad = False,
    no_exif: NoExif = False,
    stream: Stream = None,
    unlabelled: Unlabelled = False,
    workers: Workers = None,
    method: Annotated[
        str | None,
        typer.Option(
            help=f"One of {', '.join(METHODS)}, in every layer. With a target auto (the default) or some of "
            f"{', '.join(with_candidates())} with commas. Without this, a target or a method's settings: a "
            f"search for the fastest network that loses at most {_LITTLE:g} point (--max-drop {_LITTLE:g})."
        ),
    ] = None,
    speedup: Annotated[float | None, typer.Option(help="Target: times as fast, measured here.")] = None,
    latency_ms: Annotated[float | None, typer.Option(help="Target: milliseconds of one batch.")] = None,
    macs: Annotated[str | None, typer.Option(help="Target: MACs, as 50% or a number for one image.")] = None,
    max_drop: Annotated[
        float | None,
        typer.Option(
            help="Target: points of accuracy that may be lost, at the end on the test images; with another "
            "one it ends fine-tuning."
        ),
    ] = None,
    time_budget: Annotated[
        str | None, typer.Option(help="Time for scoring candidates, as 30m, 90s or 1h.")
    ] = None,
    scores: Annotated[
        Path | None, typer.Option(help="Scores of an earlier search to go on with: its scores.json.")
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Only search, and predict what would be replaced, gained and, with --max-drop, lost.",
        ),
    ] = False,
    keep_slower: Annotated[
        bool,
        typer.Option(
            "--keep-slower", help="Keep replacements by which the network gains no time; else put them back."
        ),
    ] = False,
    sampling: Annotated[
        str | None, typer.Option(help="sb: computed positions, 1/4, 2/4 (the default), 3/4 or others.")
    ] = None,
    rank: Annotated[
        str | None,
        typer.Option(
            help="Of each layer: a number, a share such as 0.5, or full; or of some, as conv2=71,conv*=0.3."
        ),
    ] = None,
    rank_budget: Annotated[
        float | None, typer.Option(help="Choose ranks: share of the MACs all layers together may cost.")
    ] = None,
    rate: Annotated[
        str | None, typer.Option(help="Share of computed positions, one number or two with a comma.")
    ] = None,
    mask: Annotated[
        str | None, typer.Option(help="Which positions: impact, uniform, uniform-eq8 or random.")
    ] = None,
    subspace: Annotated[int | None, typer.Option(help="qcnn: channels a codeword stands for.")] = None,
    codewords: Annotated[int | None, typer.Option(help="qcnn: of each codebook.")] = None,
    layers: Layers = None,
    calibration: Calibration = 500,
    finetune_epochs: FinetuneEpochs = 0,
    recipe: FinetuneRecipe = "finetune",
    lr: FinetuneRate = None,
    precision: FinetunePrecision = None,
    distill: Distill = None,
    distill_features: DistillFeatures = None,
    batch: Batch = 8,
    rounds: Rounds = 11,
    out: Annotated[Path, typer.Option(help="Folder of the result.")] = Path("fast"),
    seed: Seed = 0,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Replace the convolutions of a trained network by faster ones and say what it gains and costs.

    Layers are fitted one by one to training images, in the order of the network; batch norm is estimated
    anew, then the network may be fine-tuned; of its epochs the one of least test error is kept, or none if
    all are worse. With a target (--speedup, --latency-ms, --macs or --max-drop) each layer gets the method,
    or none, that a search chooses by the loss and the time it measures. The target is judged at the end, by
    the test images and the time of the finished network; if it is missed the best network is kept and the
    exit code is 1. A layer that gains no time stays as it was. Writes the artifact (model), the result
    (accelerate.json) and report.html. The same command again goes on after an interruption: finished layers
    are not fitted again.
    """
    with bad_input():
        use_threads(threads)
        if rank is not None and rank_budget is not None:
            raise ValueError("rank_budget: chooses the ranks by itself; leave --rank out")
        settings = {
            "rank": _rank(rank),
            "budget": rank_budget,
            "rate": _rate(rate),
            "mask": mask,
            "subspace": subspace,
            "codewords": codewords,
            "sampling": None if sampling is None else parse(sampling),
        }
        asked = {"speedup": speedup, "latency_ms": latency_ms, "macs": macs, "max_drop": max_drop}
        chosen: Method | Search
        bare = method is None and all(value is None for value in settings.values())
        by_default = bare and all(value is None for value in asked.values())
        if by_default:
            asked["max_drop"] = _LITTLE
        if any(value is not None for value in asked.values()):
            if keep_slower:
                raise ValueError("keep_slower: a search never takes what gains no time; leave it out")
            chosen = _search(method, asked, settings, time_budget, scores)
        else:
            for name, given in (
                ("time_budget", time_budget),
                ("scores", scores),
                ("dry_run", dry_run or None),
            ):
                if given is not None:
                    raise ValueError(f"{name}: needs a target, such as --speedup 2")
            # methods that draw nothing have no seed
            chosen = _method(method or "espace", {**settings, "seed": seed or None})
        further = _finetuning(
            recipe, finetune_epochs, unlabelled, lr=lr, precision=precision, distill=distill,
            distill_features=distill_features,
        )  # fmt: skip
        check_can_draw()
        check_folder(out)
        found = trained(network, weights, model, input_shape, seed)
        images = found.suited(
            read_data(
                data,
                test_data,
                size,
                skip_bad=skip_bad,
                stream=stream,
                unlabelled=unlabelled,
                no_exif=no_exif,
                quiet=as_json,
            ),
            mean,
            std,
        )
        make_folder(out)
        if dry_run and isinstance(chosen, Search):
            with running(), _going_on(out):
                plan = plan_for_target(
                    found.model, chosen, images, out, layers=_patterns(layers), calibration=calibration,
                    batch=batch, seed=seed, progress=not as_json, tell=warn,
                )  # fmt: skip
            if as_json:
                show(plan)
            else:
                print_search(plan)
            raise typer.Exit(0 if plan["met"] else 1)
        with running(), _going_on(out):
            result = accelerate_trained(
                found.model,
                chosen,
                images,
                out,
                layers=_patterns(layers),
                calibration=calibration,
                recipe=further,
                batch=batch,
                rounds=rounds,
                seed=seed,
                workers=workers,
                progress=not as_json,
                keep_slower=keep_slower,
                tell=warn,
            )
            page = write_acceleration_report(out)
    if as_json:
        show(result)
    else:
        print_acceleration(result)
        say(f"wrote {page} and the artifact {out / 'model'}; to use it:")
        for line in usage(result, out):
            say(f"  {line}")
    # nobody asked for what the search without a method or target looks for
    if result["verdict"] is not None and not result["verdict"]["met"] and not by_default:
        raise typer.Exit(1)


@contextmanager
def _going_on(out: Path) -> Iterator[None]:
    """Within: a stop by the user ends with what to do next."""
    try:
        yield
    except (KeyboardInterrupt, Interrupted) as error:
        # that of fine-tuning says how many epochs are done
        tuned = (
            f"{str(error).partition(',')[0]} of fine-tuning" if isinstance(error, Interrupted) else "stopped"
        )
        raise RunFailed(
            f"{tuned}; the same command goes on from here: what is finished is kept in {out}"
        ) from None


def _search(
    methods: str | None,
    asked: Settings,
    settings: Settings,
    time_budget: str | None,
    scores: Path | None,
) -> Search:
    """A search for a target.

    Raises:
        ValueError: a setting that the search chooses by itself, a target or method that there is not.
    """
    for key, value in settings.items():
        if value is not None:
            raise ValueError(f"{_OPTIONS.get(key, key)}: a search for a target chooses it; leave it out")
    names = tuple(name.strip() for name in (methods or "auto").split(","))
    candidates_named([_noted(name) for name in names])
    if scores is not None and not scores.is_file():
        raise ValueError(f"scores={str(scores)!r}: no such file")
    return Search(Target(**asked), names, None if time_budget is None else _duration(time_budget), scores)


def _duration(text: str) -> float:
    """Seconds of a text such as 30m."""
    unit = {"s": 1, "m": 60, "h": 3600}.get(text[-1:], 0)
    try:
        seconds = float(text[:-1]) * unit
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise ValueError(f"time_budget={text!r}: expected a time such as 30m, 90s or 1h")
    return seconds


def _finetuning(
    name: str, epochs: int, unlabelled: bool = False, *, distill: float | None = None, **changes: Any
) -> recipes.Recipe | None:
    """A named recipe for so many epochs; None for none.

    Raises:
        ValueError: labels that there are not have a share in the loss; what a recipe refuses.
    """
    if unlabelled:
        if distill is not None and distill < 1:
            raise ValueError(f"distill={distill:g}: without labels the original network is all there is: 1")
        distill = 1.0
    return (
        recipes.recipe_with(recipes.by_name(name), epochs=epochs, distill=distill, **changes)
        if epochs
        else None
    )


def _patterns(text: str | None) -> list[str]:
    return [] if text is None else [part.strip() for part in text.split(",")]


def _rank(text: str | None) -> LayerRanks | None:
    """One for all layers, or NAME=RANK,... for some."""
    if text is None:
        return None
    parts = [part.strip().rpartition("=") for part in text.split(",")]
    named = [name for name, _, _ in parts]
    if len(parts) == 1 and not named[0]:
        return _one_rank(text)
    if not all(named) or len(set(named)) < len(named):
        raise ValueError(f"rank={text!r}: expected one, or NAME=RANK for each of several layers, with commas")
    return {name: _one_rank(value) for name, _, value in parts}


def _one_rank(text: str) -> int | float | str:
    if text == "full":
        return text
    try:
        return int(text) if text.isdigit() else float(text)
    except ValueError:
        raise ValueError(f"rank={text!r}: expected a number, a share in (0, 1] or full") from None


def _rate(text: str | None) -> float | tuple[float, ...] | None:
    if text is None:
        return None
    try:
        rates = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"rate={text!r}: expected one number or two with a comma, such as 0.25") from None
    return rates[0] if len(rates) == 1 else rates


@app.command(
    "compare",
    epilog=example("quincunx compare runs/rrn20 --methods espace,lowrank --data cifar10"),
    short_help="Several methods on one trained network.",
)
def compare_command(
    network: Network = None,
    model: Model = None,
    weights: Weights = None,
    input_shape: Input = None,
    mean: Mean = None,
    std: Std = None,
    methods: Annotated[str, typer.Option(help=f"Of {', '.join(SWEEPS)}, with commas.")] = ",".join(METHODS),
    points: Annotated[
        str | None,
        typer.Option(help="Only settings whose folder has such a name, as *-1of4*, with commas."),
    ] = None,
    data: Data = "digits",
    test_data: TestData = None,
    size: Size = None,
    skip_bad: SkipBad = False,
    no_exif: NoExif = False,
    stream: Stream = None,
    unlabelled: Unlabelled = False,
    workers: Workers = None,
    layers: Layers = None,
    calibration: Calibration = 500,
    finetune_epochs: FinetuneEpochs = 0,
    recipe: FinetuneRecipe = "finetune",
    lr: FinetuneRate = None,
    precision: FinetunePrecision = None,
    distill: Distill = None,
    distill_features: DistillFeatures = None,
    batch: Batch = 8,
    rounds: Rounds = 11,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("compared"),
    seed: Seed = 0,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Accelerate one trained network by several methods, each at several settings, and set them side by side.

    All have the same data and the same fine-tuning. Each setting leaves a folder with its JSON and artifact;
    at the end the whole networks are timed in turn with each other. The same command again makes only
    what is missing, and times all of them anew. Writes comparison.json and
    the figures drop-speed.svg, drop-macs.svg and drop-bytes.svg. A setting that its method refuses is left
    out and named, and the exit code is 1.
    """
    with bad_input():
        use_threads(threads)
        chosen = points_named(_patterns(methods), _patterns(points))
        further = _finetuning(
            recipe, finetune_epochs, unlabelled, lr=lr, precision=precision, distill=distill,
            distill_features=distill_features,
        )  # fmt: skip
        check_can_draw()
        check_folder(out)
        found = trained(network, weights, model, input_shape, seed)
        images = found.suited(
            read_data(
                data,
                test_data,
                size,
                skip_bad=skip_bad,
                stream=stream,
                unlabelled=unlabelled,
                no_exif=no_exif,
                quiet=as_json,
            ),
            mean,
            std,
        )
        make_folder(out)
        with running():
            rows = compare_methods(
                found.model,
                chosen,
                images,
                out,
                recipe=further,
                tell=_telling(as_json),
                layers=_patterns(layers),
                calibration=calibration,
                batch=batch,
                rounds=rounds,
                seed=seed,
                workers=workers,
                progress=not as_json,
            )
            _draw(rows, out, top5=len(images.classes) >= _MANY_CLASSES)
    refused = read_json(out / "comparison.json")["refused"]
    if as_json:
        show({"rows": [row.to_dict() for row in rows], "refused": refused, "out": str(out)})
    else:
        print_compared(rows)
        for name, why in refused.items():
            say(f"Left out, {name}: {why}.")
        say(f"wrote {out}")
    if refused:
        raise typer.Exit(1)


def _telling(quiet: bool) -> Callable[[str], None]:
    console = Console(stderr=True, quiet=quiet)
    return lambda text: console.print(text, markup=False, highlight=False)


def _draw(rows: list[Compared], out: Path, *, top5: bool = False) -> None:
    for name, picture in comparison_pictures(rows, top5=top5).items():
        (out / f"{name}.svg").write_bytes(picture.content)


def reproduce_espace(
    name: str,
    weights: Path | None,
    data: str | None,
    *,
    test_data: Path | None,
    stream: bool | None,
    workers: int | None,
    out: Path,
    epochs: int | None,
    batch: int,
    rounds: int,
    peers: list[str],
    threads: int | None,
    only_plan: bool,
    as_json: bool,
) -> None:
    """A figure or table of the ESPACE paper: speeds, and errors where the trained network is given."""
    with bad_input():
        use_threads(threads)
        experiment = espace_by_name(name)
        if weights is not None and data is None:
            raise ValueError(f"weights={str(weights)!r}: its errors need --data; speeds need neither")
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
        if data is not None and weights is None:
            experiment.check_single()
        check_can_draw()
        check_folder(out)
        settings = dict(experiment.settings)
        timing: Settings = {"batch": batch, "rounds": rounds, "progress": not as_json}
        network = (
            None if weights is None else qx.networks.weights.load(experiment.network, weights, **settings)
        )
        images = (
            None
            if data is None
            else read_data(data, test_data, experiment.side, stream=stream, quiet=as_json)
        )
        # the folder is made after all that can be refused
        make_folder(out)
        if network is None or images is None:
            torch.manual_seed(0)
            classes = 1000 if images is None else len(images.classes)
            model = qx.networks.build(experiment.network, classes, 3, **settings)
            with running():
                rows = time_points(
                    experiment,
                    model,
                    data=images,
                    workers=workers,
                    peers=peers,
                    tell=_telling(as_json),
                    keep=out / "points",
                    **timing,
                )
                content = {
                    "schema": 1,
                    "kind": name,
                    "weights": "drawn at random, seed 0",
                    "data": None if images is None else images.describe(),
                    "rows": rows,
                    "environment": environment(),
                }
                write_json(out / f"{name}.json", content)
                if images is not None:
                    (out / "response-speed.svg").write_bytes(
                        response_picture(rows, experiment.printed).content
                    )
            as_rows, table = rows, partial(print_speeds, rows)
        else:
            tuned = experiment.recipe(epochs or 0)
            with running():
                compared = compare_methods(
                    network,
                    experiment.points,
                    as_trained(images, weights),
                    out,
                    recipe=tuned,
                    tell=_telling(as_json),
                    layers=experiment.layers,
                    workers=workers,
                    **timing,
                )
                _draw(compared, out)
            as_rows, table = [row.to_dict() for row in compared], partial(print_compared, compared)
    if as_json:
        show({"experiment": name, "rows": as_rows})
        return
    say(f"{name}: {experiment.title}")
    table()
    for sentence in experiment.sentences:
        say(sentence)
    say(f"wrote {out}")
