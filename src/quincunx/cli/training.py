"""Verbs that train: train, evaluate, demo, reproduce."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import quincunx as qx
from quincunx import recipes
from quincunx.artifact import spec_of
from quincunx.cli.accelerating import reproduce_espace
from quincunx.cli.common import (
    Data,
    Down,
    Json,
    NoExif,
    Sampling,
    Seed,
    Size,
    SkipBad,
    Stream,
    TestData,
    Threads,
    Width,
    Workers,
    app,
    artifact_in,
    as_trained,
    bad_input,
    check_device,
    check_folder,
    example,
    make_folder,
    read_data,
    running,
    settings_of,
    started,
    use_threads,
)
from quincunx.cli.trained import Input, Mean, Model, Std, Weights, judged_network
from quincunx.console import print_comparison, print_lines, print_plan, say, show
from quincunx.demo import run_demo
from quincunx.espace_experiments import ESPACE_EXPERIMENTS
from quincunx.evaluation import evaluate
from quincunx.experiments import EXPERIMENTS
from quincunx.experiments import by_name as experiment_by_name
from quincunx.figures import check_can_draw
from quincunx.files import file_name
from quincunx.latency import environment
from quincunx.peers import PEERS
from quincunx.ranks import joined
from quincunx.report import label_of, verdicts
from quincunx.reproduce import plan, reproduce
from quincunx.train import ARTIFACT, CHECKPOINT, Interrupted, RunFailed, fit

Epochs = Annotated[int | None, typer.Option(help="Passes over the training images.")]
BatchSize = Annotated[int | None, typer.Option(help="Images a step.")]
LearningRate = Annotated[float | None, typer.Option(help="Learning rate at the start.")]
Precision = Annotated[str | None, typer.Option(help="float32 (the default), or mixed: bfloat16 or float16.")]
Device = Annotated[str, typer.Option(help="cpu, or cuda.")]


@app.command(
    epilog=example("quincunx train --network rsbn20 --data digits --epochs 12 --out runs/first"),
    short_help="Train a network.",
)
def train(
    network: Annotated[str, typer.Option(help="Name, such as rrn20 or rsbn20.")] = "rsbn20",
    start: Annotated[
        Path | None,
        typer.Option(help="Train this artifact further, or published weights of --network, in a file."),
    ] = None,
    teacher: Annotated[
        Path | None,
        typer.Option(
            help="Artifact whose answers or maps are learned, with --distill or --distill-features."
        ),
    ] = None,
    data: Data = "digits",
    out: Annotated[
        Path | None, typer.Option(help="Folder of the run; runs/NETWORK and its settings by default.")
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(help=f"One of {', '.join(recipes.RECIPES)}; digits for the digits, else short."),
    ] = None,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    lr: LearningRate = None,
    every: Annotated[int | None, typer.Option(help="Steps after which the rate falls each time.")] = None,
    milestones: Annotated[
        str | None, typer.Option(help="Shares of the epochs after which the rate falls, such as 0.5,0.75.")
    ] = None,
    gamma: Annotated[float | None, typer.Option(help="What the rate is multiplied by there.")] = None,
    warmup: Annotated[float | None, typer.Option(help="Share of the epochs in which the rate rises.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Weight decay, on every parameter.")] = None,
    momentum: Annotated[float | None, typer.Option(help="Momentum of SGD.")] = None,
    nesterov: Annotated[bool | None, typer.Option("--nesterov/--plain", help="Form of the momentum.")] = None,
    distill: Annotated[float | None, typer.Option(help="Share of the loss that follows --teacher.")] = None,
    distill_features: Annotated[
        float | None,
        typer.Option(help="Weight of the distance to the last map of each resolution of --teacher."),
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="That softens the teacher's answers.")] = None,
    augment: Annotated[
        str | None,
        typer.Option(help="none, cifar (pad, crop, flip) or imagenet; by default as suits the data."),
    ] = None,
    precision: Precision = None,
    accumulate: Annotated[int | None, typer.Option(help="Parts in which a batch is computed.")] = None,
    channels_first: Annotated[bool, typer.Option("--channels-first", help="Lay maps out as NCHW.")] = False,
    sampling: Sampling = None,
    down: Down = None,
    width: Width = None,
    test_data: TestData = None,
    size: Size = None,
    skip_bad: SkipBad = False,
    no_exif: NoExif = False,
    stream: Stream = None,
    workers: Workers = None,
    seed: Seed = 0,
    threads: Threads = None,
    device: Device = "cpu",
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run's last checkpoint.")] = False,
    as_json: Json = False,
) -> None:
    """Train a network.

    Writes a checkpoint after each epoch, a log, the result (run.json) and the trained network (model).
    What --recipe names sets epochs, batch size, learning rate, weight decay and momentum; each can be
    set by itself as well.

    With --device cuda images in memory go to the GPU once and steps are replayed as a CUDA graph where they
    can be ("graph" in run.json); --precision bfloat16 takes the least time there.

    On several processes or machines: torchrun --nproc-per-node 2 --max-restarts 3 -m quincunx train ...;
    the batch size is that of all of them, and a run whose process died goes on from its last checkpoint.
    """
    with bad_input(), joined(check_device(device)) as ranks:
        use_threads(threads)
        chosen = recipes.recipe_with(
            recipes.by_name(recipe or ("digits" if data == "digits" else "short")),
            epochs=epochs,
            batch_size=batch_size,
            lr=lr,
            every=every,
            milestones=_parse_shares(milestones),
            gamma=gamma,
            warmup=warmup,
            weight_decay=weight_decay,
            momentum=momentum,
            nesterov=nesterov,
            distill=distill,
            temperature=temperature,
            distill_features=distill_features,
            augment=augment,
            precision=precision,
            accumulate=accumulate,
            channels_last=False if channels_first else None,
        )
        settings = settings_of(sampling, down, width)
        # what can be refused without the data is refused before a large data set is read
        before = None if start is None else started(network, start, settings)
        label = label_of(spec_of(qx.networks.build(network, **settings) if before is None else before))
        folder = out or Path("runs") / _run_name(network, label, settings, seed)
        resume = resume or ranks.world > 1
        if (folder / CHECKPOINT).exists() and not resume:
            raise ValueError(
                f"out={str(folder)!r}: holds a run already; --resume goes on with it, "
                "another --out starts anew"
            )
        check_folder(folder)
        images = read_data(
            data, test_data, size, skip_bad=skip_bad, stream=stream, no_exif=no_exif, quiet=as_json
        )
        torch.manual_seed(seed)
        if before is None:
            model = qx.networks.build(network, len(images.classes), images.in_channels, **settings)
        else:
            # a network goes on with the normalisation that it was trained with
            model, images = before, as_trained(images, start)
        guide = None if teacher is None else qx.load(teacher).to(device)
        make_folder(folder)
        with running():
            result = fit(
                model.to(device),
                images,
                chosen,
                folder,
                seed=seed,
                resume=resume,
                progress=not as_json,
                ranks=ranks,
                teacher=guide,
                workers=workers,
            )
    if not ranks.first:
        return
    if as_json:
        show(result)
        return
    say(
        f"{label_of(result['network'])} on {images.name}: test error {100 * result['test_error']:.2f}% "
        f"of {len(images.test)} images, {result['cost']['macs'] / 1e6:.2f} M MACs, "
        f"{result['seconds']:.0f} s of training; artifact in {folder / ARTIFACT}"
    )
    given = data if " " not in data else repr(data)
    say(
        f"next: quincunx accelerate {folder} --data {given} makes it faster; quincunx evaluate {folder} "
        f"--data {given} judges it again"
    )


def _parse_shares(text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise ValueError(f"milestones={text!r}: expected numbers with commas, such as 0.5,0.75") from None


def _run_name(network: str, label: str, settings: dict[str, Any], seed: int) -> str:
    """The network, and what was asked for beyond it, so that two runs do not meet in one folder."""
    name = file_name(label) if settings else network
    return f"{name}-seed{seed}" if seed else name


@app.command(
    "evaluate",
    epilog=example("quincunx evaluate runs/rsbn20/model --data digits"),
    short_help="Test error of a trained network.",
)
def evaluate_command(
    artifact: Annotated[
        Path | None,
        typer.Argument(
            help="Folder written by qx.save, or a run's folder; a network's name with --weights; or --model."
        ),
    ] = None,
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
    workers: Workers = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Loss and top-1 error of a network on the test part of a data set.

    The network is an artifact, a network's name with --weights, or what a function of yours makes (--model),
    with --weights or its own. An artifact of such a network needs both: the folder, and --model.
    """
    with bad_input():
        use_threads(threads)
        found = judged_network(artifact, weights, model, input_shape)
        images = found.suited(
            read_data(
                data,
                test_data,
                size,
                skip_bad=skip_bad,
                stream=stream,
                no_exif=no_exif,
                test_alone=True,
                quiet=as_json,
            ),
            mean,
            std,
        )
        with running():
            result = evaluate(found.model, images.test, images, workers=workers)
    place = None if found.start is None else str(artifact_in(found.start))
    if as_json:
        own = {} if model is None else {"model": model}
        facts = {"artifact": place, **own, "data": images.name, **vars(result)}
        show({**facts, "environment": environment()})
        return
    say(
        f"{place or model} on {images.name}: test error {100 * result.error:.2f}% of {result.images} images, "
        f"loss {result.loss:.4f}"
    )


@app.command(
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


@app.command(
    "reproduce",
    epilog=example("quincunx reproduce table1 --plan"),
    short_help="Run a table of the paper, or plan it.",
)
def reproduce_command(
    context: typer.Context,
    experiment: Annotated[
        str, typer.Argument(help=f"One of {', '.join((*EXPERIMENTS, *ESPACE_EXPERIMENTS))}.")
    ],
    weights: Annotated[
        Path | None, typer.Option(help="ESPACE: the trained network's weights, in a file.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="cifar10, cifar100, or images by class; by default the paper's."),
    ] = None,
    test_data: TestData = None,
    size: Size = None,
    stream: Stream = None,
    workers: Workers = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the results; results/EXPERIMENT by default.")
    ] = None,
    depths: Annotated[str | None, typer.Option(help="Only networks of these depths, such as 20,44.")] = None,
    seeds: Annotated[str, typer.Option(help="Seeds of each network's runs, with commas.")] = "0,1,2",
    recipe: Annotated[str | None, typer.Option(help="Instead of the paper's, such as short.")] = None,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    lr: LearningRate = None,
    precision: Precision = None,
    batch: Annotated[int, typer.Option(help="ESPACE: images of the timed inputs.", min=1)] = 8,
    rounds: Annotated[int, typer.Option(help="ESPACE: how often each layer is timed.", min=3)] = 11,
    peers: Annotated[
        str, typer.Option(help=f"ESPACE: engines that run the dense network beside, of {', '.join(PEERS)}.")
    ] = "torch eager",
    threads: Threads = None,
    device: Device = "cpu",
    only_plan: Annotated[
        bool, typer.Option("--plan", help="Only list the runs, with MACs, hours and the paper's values.")
    ] = False,
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
        _refuse_idle(context, experiment, weights is not None, data is not None, only_plan)
    if experiment in ESPACE_EXPERIMENTS:
        reproduce_espace(
            experiment,
            weights,
            data,
            test_data=test_data,
            stream=stream,
            workers=workers,
            out=out or Path("results") / experiment,
            epochs=epochs,
            batch=batch,
            rounds=rounds,
            peers=[name.strip() for name in peers.split(",")],
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
        trained = recipes.recipe_with(
            recipes.by_name(recipe or chosen.recipe),
            epochs=epochs,
            batch_size=batch_size,
            lr=lr,
            precision=precision,
        )
        runs, folder = _parse_numbers("seeds", seeds), out or Path("results") / chosen.name
        check_can_draw()
        if only_plan:
            known = data if data in ("cifar10", "cifar100") else None
            images = (
                None
                if data in (None, known)
                else read_data(str(data), test_data, size, stream=stream, quiet=as_json)
            )
            with running():
                planned = plan(chosen, trained, runs, folder, data=images, data_name=known)
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
        if data is None and chosen.data == "imagenet":
            raise ValueError("data: ImageNet has to be there already; give its folder with --data")
        check_folder(folder)
        images = read_data(data or chosen.data, test_data, size, stream=stream, quiet=as_json)
        make_folder(folder)
        with running():
            rows = reproduce(
                chosen,
                trained,
                runs,
                folder,
                images,
                progress=not as_json,
                ranks=ranks,
                device=device,
                workers=workers,
            )
    if not ranks.first:
        return
    if as_json:
        show({"experiment": chosen.name, "rows": [row.to_dict() for row in rows], "out": str(folder)})
        return
    say(
        f"{chosen.name}: {chosen.title}, on {images.name}, recipe {trained.name} with {trained.epochs} epochs"
    )
    print_comparison(rows)
    if chosen.note:
        say(chosen.note)
    say(f"wrote {folder} ({chosen.figure[0]}.svg and one JSON a run)")


# of reproduce: what only ESPACE's experiments take, with which input, and what only the tables take
_ESPACE_TIMES = ("out", "batch", "rounds", "threads")
_ESPACE_DATA = ("data", "test_data", "stream", "workers")
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
