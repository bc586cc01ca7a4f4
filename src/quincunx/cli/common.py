"""What the verbs share: options, checks of what a person passed, and how a failure ends."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import nn

import quincunx as qx
from quincunx.artifact import read_spec
from quincunx.console import complain
from quincunx.data import ImageData, load_data
from quincunx.train import ARTIFACT, RunFailed

app = typer.Typer(
    name="quincunx",
    help="Faster convolutional networks: convolutions computed at only some spatial positions.",
    # the mark keeps click from filling the lines up
    epilog="\b\nStart with:\n  quincunx demo\n  quincunx train --help",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
Seed = Annotated[int, typer.Option(help="Fixes initial weights, data order and augmentation.", min=0)]
Threads = Annotated[
    int | None, typer.Option(help="Threads to compute with; torch decides by default.", min=1)
]
Data = Annotated[
    str, typer.Option(help="digits, cifar10, cifar100, or a folder or archive of images by class.")
]
Stream = Annotated[
    bool | None,
    typer.Option("--stream/--in-memory", help="Decode images when needed, or at once."),
]
Workers = Annotated[int | None, typer.Option(help="Processes that decode streamed images.", min=0)]
Size = Annotated[int | None, typer.Option(help="Resize the shorter side to this and crop the centre.", min=1)]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Leave unreadable images out instead of stopping.")]
NoExif = Annotated[
    bool, typer.Option("--no-exif", help="Take photographs as stored, not turned as EXIF says they lie.")
]
TestData = Annotated[
    Path | None, typer.Option("--test-data", help="Folder or archive of the test part, if not in --data.")
]
Unlabelled = Annotated[
    bool,
    typer.Option("--unlabelled", help="Images without classes: the network's own answers stand for labels."),
]
Sampling = Annotated[
    str | None,
    typer.Option(
        help="Computed positions: 1/4, 2/4, 3/4, cosets:K:a,b;a,b, random:RATE:SEED or uniform:RATE[:eq8]; "
        "2/4 by default in rsbn and csbn networks."
    ),
]
Down = Annotated[str | None, typer.Option(help="How to sample down: stride (the default) or avgpool.")]
Width = Annotated[int | None, typer.Option(help="Channels of the first stage; 16 by default.")]


def example(text: str) -> str:
    return f"\b\nExample:\n  {text}"


@contextmanager
def bad_input() -> Iterator[None]:
    """Within: what the user passed is being checked; a refusal ends with one sentence and code 2."""
    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        complain(error)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        complain("stopped")
        raise typer.Exit(1) from None


@contextmanager
def running() -> Iterator[None]:
    """Within: the work itself; a failure that is not a defect ends with one sentence and code 1."""
    try:
        yield
    except (RunFailed, OSError) as error:
        complain(error)
        raise typer.Exit(1) from None
    except RuntimeError as error:
        if "allocate memory" not in str(error):
            raise
        wanted = re.search(r"\d+ bytes", str(error))
        complain(f"not enough memory for {wanted[0] if wanted else 'this'}")
        raise typer.Exit(1) from None


def check_folder(folder: Path) -> None:
    """Refuse, before long work, a folder that cannot be made or written.

    Raises:
        ValueError: it or a part of its path is a file, or may not be written.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise ValueError(f"out={str(folder)!r}: {there} is not a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"out={str(folder)!r}: {there} may not be written")


def make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"out={str(folder)!r}: cannot be made ({error.strerror})") from error


def parse_input(text: str) -> tuple[int, ...]:
    """The shape that NxCxHxW says.

    Raises:
        ValueError: another form.
    """
    try:
        shape = tuple(int(part) for part in text.lower().split("x"))
    except ValueError:
        shape = ()
    if len(shape) != 4 or min(shape) < 1:
        raise ValueError(f"input={text!r}: expected NxCxHxW, such as 1x3x32x32")
    return shape


def settings_of(sampling: str | None, down: str | None, width: int | None) -> dict[str, Any]:
    given = {"sampling": sampling, "down": down, "width": width}
    return {k: v for k, v in given.items() if v is not None}


def read_data(
    data: str,
    test_data: Path | None,
    size: int | None,
    *,
    skip_bad: bool = False,
    stream: bool | None = None,
    unlabelled: bool = False,
    no_exif: bool = False,
    test_alone: bool = False,
    quiet: bool = False,
) -> ImageData:
    """The data set, with a sign of life while it is read; its notes go to standard error."""
    console = Console(stderr=True, quiet=quiet)
    with console.status(f"reading {data}") as status:

        def downloading(done: int, whole: int | None) -> None:
            of = "" if whole is None else f" of {whole / 1e6:.0f}"
            status.update(f"downloading {data}: {done / 1e6:.0f}{of} MB")

        loaded = load_data(
            data,
            test_source=test_data,
            size=size,
            skip_bad=skip_bad,
            stream=stream,
            labelled=not unlabelled,
            exif=not no_exif,
            test_alone=test_alone,
            progress=downloading,
        )
    for note in loaded.notes:
        Console(stderr=True).print(f"note: {note}", markup=False, highlight=False)
    return loaded


def started(network: str, start: Path, settings: dict[str, Any]) -> nn.Module:
    """The network of an artifact, or of published weights in a file."""
    if start.is_dir():
        if settings:
            raise ValueError(f"start={str(start)!r}: the artifact says its own {', '.join(settings)}")
        return qx.load(artifact_in(start))
    return qx.networks.weights.load(network, start, **settings)


def artifact_in(folder: Path) -> Path:
    """The artifact of a run, where a run's folder was given."""
    return folder / ARTIFACT if (folder / ARTIFACT).is_dir() else folder


def as_trained(images: ImageData, start: Path | None) -> ImageData:
    """The images with the mean and deviation of those that an artifact was trained on, if it has any."""
    if start is None:
        return images
    if not start.is_dir():
        mean, std = qx.networks.weights.normalisation(start)
        return replace(images, mean=mean, std=std)
    trained_on = read_spec(artifact_in(start)).get("info", {}).get("data", {})
    if trained_on.get("classes", list(images.classes)) != list(images.classes):
        raise ValueError(f"data={images.name!r}: its classes are not those that {start} was trained on")
    if "mean" not in trained_on:
        return images
    if len(trained_on["mean"]) != images.in_channels:
        raise ValueError(
            f"data={images.name!r}: images of {images.in_channels} channels, but the network takes "
            f"{len(trained_on['mean'])}"
        )
    return replace(images, mean=tuple(trained_on["mean"]), std=tuple(trained_on["std"]))


def check_device(device: str) -> str:
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device={device!r}: expected cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device='cuda': torch finds no GPU that it can use here")
    return device


def use_threads(threads: int | None) -> None:
    if threads is not None:
        torch.set_num_threads(threads)
