"""``quincunx train``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import quincunx as qx
from quincunx.cli.options import (
    BuildOptions,
    DataOptions,
    Device,
    Json,
    RecipeOptions,
    Seed,
    Threads,
    bad_input,
    build_from,
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
    say,
    show,
)
from quincunx.cli.task import TaskOptions
from quincunx.networks.spec import spec_of
from quincunx.report.results import label_of
from quincunx.train import recipes
from quincunx.train.loop import (
    ARTIFACT,
    CHECKPOINT,
    fit,
)
from quincunx.train.processes import joined
from quincunx.train.rates import find_rate
from quincunx.writing import file_name


@dataclass(frozen=True)
class TrainingOptions(RecipeOptions):
    """A recipe, and what it says otherwise."""

    recipe: Annotated[
        str | None,
        typer.Option(help=f"Recipe: one of {', '.join(recipes.RECIPES)}; digits for the digits, else short."),
    ] = None
    every: Annotated[
        int | None, typer.Option(help="Multiply the learning rate by --gamma every EVERY steps.")
    ] = None
    milestones: Annotated[
        str | None,
        typer.Option(
            help="Multiply the learning rate by --gamma at these shares of the epochs, such as 0.5,0.75."
        ),
    ] = None
    gamma: Annotated[
        float | None, typer.Option(help="Factor applied to the learning rate at each milestone.")
    ] = None
    warmup: Annotated[
        float | None, typer.Option(help="Share of the epochs in which the learning rate rises linearly.")
    ] = None
    weight_decay: Annotated[float | None, typer.Option(help="Weight decay, applied to every parameter.")] = (
        None
    )
    optimizer: Annotated[str | None, typer.Option(help="sgd (the default), or adam.")] = None
    momentum: Annotated[float | None, typer.Option(help="Momentum of SGD.")] = None
    nesterov: Annotated[
        bool | None, typer.Option("--nesterov/--plain", help="Nesterov momentum, or plain momentum.")
    ] = None
    augment: Annotated[
        str | None,
        typer.Option(
            help="Augmentation: none, cifar (pad, crop, flip), imagenet, or for images with targets "
            "patches; by "
            "default as suits the data."
        ),
    ] = None
    accumulate: Annotated[
        int | None, typer.Option(help="Split each batch into this many parts and add up their gradients.")
    ] = None
    channels_first: Annotated[
        bool, typer.Option("--channels-first", help="Use the NCHW memory layout instead of NHWC.")
    ] = False
    distill: Annotated[
        float | None,
        typer.Option(help="Share of the loss, in [0, 1], that compares the outputs with --teacher's."),
    ] = None
    distill_features: Annotated[
        float | None,
        typer.Option(
            help="Weight of the squared distance to --teacher's last feature map of each resolution."
        ),
    ] = None
    temperature: Annotated[
        float | None, typer.Option(help="Temperature of the softmax in the distillation loss.")
    ] = None

    def chosen(self, data: str) -> recipes.Recipe:
        """The recipe for a data set, changed where options say so.

        Raises:
            ValueError: there is no such recipe, or it refuses a value.
        """
        changes = {**vars(self), "milestones": _parse_shares(self.milestones)}
        name = changes.pop("recipe") or ("digits" if data == "digits" else "short")
        first = changes.pop("channels_first")
        found = None if self.lr is None else False
        last = False if first else None
        return recipes.recipe_with(recipes.by_name(name), channels_last=last, find_lr=found, **changes)


@verb(
    "train",
    epilog=example("quincunx train --network rsbn20 --data digits --epochs 12 --out runs/first"),
    short_help="Train a network.",
)
def train_command(
    images: DataOptions,
    about: TaskOptions,
    built: BuildOptions,
    training: TrainingOptions,
    network: Annotated[
        str, typer.Option(help="Name of the network, such as rrn20 or rsbn20.", rich_help_panel="Network")
    ] = "rsbn20",
    start: Annotated[
        Path | None,
        typer.Option(
            help="Start from this artifact, or from a file of published weights of --network.",
            rich_help_panel="Network",
        ),
    ] = None,
    teacher: Annotated[
        Path | None,
        typer.Option(
            help="Artifact to distil from, with --distill or --distill-features.", rich_help_panel="Training"
        ),
    ] = None,
    seed: Seed = 0,
    threads: Threads = None,
    device: Device = "cpu",
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in --out from its last checkpoint.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the run; by default runs/NETWORK, with the settings in its name.",
            rich_help_panel="Output",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Train a network.

    Writes a checkpoint after each epoch, a log, the result (run.json) and the trained network (model). The
    recipe sets epochs, batch size, learning rate, weight decay, momentum and augmentation; each can also be
    set by its own option.

    With --device cuda, images that are in memory are copied to the GPU once, and training steps are replayed
    as a CUDA graph where that is possible ("graph" in run.json); --precision bfloat16 is the fastest there.

    With --compile the first step of each batch size takes up to minutes; a long run makes up for it.

    On several processes or machines: torchrun --nproc-per-node 2 --max-restarts 3 -m quincunx train ...;
    --batch-size is then that of all processes together, and a run whose process died continues from its last
    checkpoint.
    """
    with bad_input(), joined(check_device(device)) as ranks:
        use_threads(threads)
        chosen, settings, task = training.chosen(images.data), built.settings, about.chosen()
        # what can be refused without the data is refused before a large data set is read
        before = None if start is None else build_from(network, start, settings)
        label = label_of(spec_of(qx.networks.build(network, **settings) if before is None else before))
        folder = out or Path("runs") / _run_name(network, label, settings, seed)
        resume = resume or ranks.world > 1
        if (folder / CHECKPOINT).exists() and not resume:
            raise ValueError(
                f"out={str(folder)!r}: holds a run already; --resume goes on with it, "
                "another --out starts anew"
            )
        check_folder(folder)
        data = about.read(task, images, seed=seed, quiet=as_json)
        torch.manual_seed(seed)
        if before is None:
            model = qx.networks.build(network, len(data.classes) or None, data.in_channels, **settings)
        else:
            # a network goes on with the normalisation that it was trained with
            model, data = before, with_training_normalisation(data, start)
        guide = None if teacher is None else qx.load(teacher).to(device)
        make_folder(folder)
        if chosen.find_lr and ranks.world > 1:
            raise ValueError(f"recipe={chosen.name!r}: finds its rate in one process; give --lr with several")
        with running():
            model.to(device)
            if chosen.find_lr:
                rate = find_rate(
                    model,
                    data,
                    chosen,
                    folder / "rate.json",
                    seed=seed,
                    teacher=guide,
                    workers=images.workers,
                    task=task,
                )
                chosen = recipes.recipe_with(chosen, lr=rate["lr"], find_lr=False)
            result = fit(
                model.to(device),
                data,
                chosen,
                folder,
                seed=seed,
                resume=resume,
                progress=not as_json,
                ranks=ranks,
                teacher=guide,
                workers=images.workers,
                task=task,
            )
    if not ranks.first:
        return
    if as_json:
        show(result)
        return
    scale = task.scale
    of = "of" if task.classifies else "on"
    say(
        f"{label_of(result['network'])} on {data.name}: test {scale.name} "
        f"{scale.shown(result[f'test_{scale.key}'])} {of} {len(data.test)} images, "
        f"{result['cost']['macs'] / 1e6:.2f} M MACs, "
        f"{result['seconds']:.0f} s of training{' compiled' * chosen.compile}; "
        f"artifact in {folder / ARTIFACT}"
    )
    given = images.data if " " not in images.data else repr(images.data)
    more = about.given()
    say(
        f"next: quincunx accelerate {folder} --data {given}{more} makes it faster; quincunx evaluate "
        f"{folder} "
        f"--data {given}{more} judges it again"
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
