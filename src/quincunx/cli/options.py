"""What the verbs share: groups of options, checks of what a person passed, and how a failure ends."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar, get_type_hints

import torch
import typer
from rich.console import Console
from torch import nn
from typer.core import TyperCommand

import quincunx as qx
from quincunx.cli.completion import complete_values
from quincunx.cli.printing import complain, note
from quincunx.data import ImageData, greyed, load_data
from quincunx.data.grey import grey_hint
from quincunx.measure.environment import environment
from quincunx.measure.version import version_line
from quincunx.networks.spec import read_spec
from quincunx.progress import LOG, is_silenced, logged_to, silenced
from quincunx.train import recipes
from quincunx.train.loop import ARTIFACT, RunFailed
from quincunx.train.processes import to_be_told

F = TypeVar("F", bound=Callable[..., None])

app = typer.Typer(
    name="quincunx",
    help="Faster convolutional networks: convolutions computed at only some spatial positions.",
    # the mark keeps click from filling the lines up
    epilog="\b\nStart with:\n  quincunx demo\n  quincunx train --help",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


# options of one verb or of several that belong to no group
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON document instead of text.", rich_help_panel="Output")
]
Quiet = Annotated[
    bool,
    typer.Option(
        "--quiet",
        "-q",
        help="No progress and no notes: results, warnings and errors alone.",
        rich_help_panel="Output",
    ),
]
Log = Annotated[
    Path | None,
    typer.Option(
        "--log",
        metavar="FILE",
        help="Append to this file, with times, what is said and how far long work is.",
        rich_help_panel="Output",
    ),
]
Seed = Annotated[int, typer.Option(help="Seed of initial weights, data order and augmentation.", min=0)]
Threads = Annotated[int | None, typer.Option(help="Number of threads; by default torch decides.", min=1)]
Unlabelled = Annotated[
    bool,
    typer.Option(
        "--unlabelled",
        help="The images have no classes: the original network's own outputs are the labels.",
        rich_help_panel="Data",
    ),
]
Device = Annotated[str, typer.Option(help="Where to compute: cpu or cuda.")]


@dataclass(frozen=True)
class DataOptions:
    """Which images, and how they are read."""

    section: ClassVar[str] = "Data"

    data: Annotated[
        str,
        typer.Option(
            help="Data set: digits, cifar10, cifar100, or a folder or archive with one folder per class."
        ),
    ] = "digits"
    test_data: Annotated[
        Path | None,
        typer.Option("--test-data", help="Folder or archive of the test images, if they are not in --data."),
    ] = None
    size: Annotated[
        int | None,
        typer.Option(
            help="Resize the shorter side of each image to SIZE pixels, then crop the centre.", min=1
        ),
    ] = None
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Skip images that cannot be read instead of stopping.")
    ] = False
    no_exif: Annotated[
        bool, typer.Option("--no-exif", help="Ignore the EXIF orientation of photographs.")
    ] = False
    grey: Annotated[bool, typer.Option("--grey", help="Make images of one channel of those of three.")] = (
        False
    )
    stream: Annotated[
        bool | None,
        typer.Option(
            "--stream/--in-memory",
            help="Decode each image when it is needed, or all of them at the start; by default the second "
            "if they fit in memory.",
        ),
    ] = None
    workers: Annotated[int | None, typer.Option(help="Processes that decode streamed images.", min=0)] = None

    def read(self, *, unlabelled: bool = False, test_alone: bool = False, quiet: bool = False) -> ImageData:
        """The data set, with a sign of life while it is read; its notes go to standard error."""
        console = Console(stderr=True, quiet=quiet or is_silenced())
        with console.status(f"reading {self.data}") as status:

            def downloading(done: int, whole: int | None) -> None:
                of = "" if whole is None else f" of {whole / 1e6:.0f}"
                status.update(f"downloading {self.data}: {done / 1e6:.0f}{of} MB")

            loaded = load_data(
                self.data,
                test_source=self.test_data,
                size=self.size,
                skip_bad=self.skip_bad,
                stream=self.stream,
                labelled=not unlabelled,
                exif=not self.no_exif,
                test_alone=test_alone,
                progress=downloading,
            )
        for text in loaded.notes:
            note(text)
        return greyed(loaded) if self.grey else loaded


@dataclass(frozen=True)
class BuildOptions:
    """The settings of a network that is built by name."""

    section: ClassVar[str] = "Network"

    sampling: Annotated[
        str | None,
        typer.Option(
            help="Positions that spatial bottlenecks compute: 1/4, 2/4, 3/4, cosets:K:a,b;a,b, "
            "random:RATE:SEED or uniform:RATE[:eq8]; 2/4 by default in rsbn and csbn networks."
        ),
    ] = None
    down: Annotated[
        str | None,
        typer.Option(help="Down-sampling at the start of a stage: stride (the default) or avgpool."),
    ] = None
    width: Annotated[int | None, typer.Option(help="Channels of the first stage; 16 by default.")] = None

    @property
    def settings(self) -> dict[str, Any]:
        """Those that were given."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class RecipeOptions:
    """What a recipe says and a person may say otherwise."""

    section: ClassVar[str] = "Training"

    epochs: Annotated[int | None, typer.Option(help="Passes over the training images.")] = None
    batch_size: Annotated[int | None, typer.Option(help="Images per training step.")] = None
    lr: Annotated[float | None, typer.Option(help="Initial learning rate.")] = None
    precision: Annotated[
        str | None,
        typer.Option(help="float32 (the default), or mixed precision with bfloat16 or float16."),
    ] = None
    compile: Annotated[
        bool | None,
        typer.Option(
            "--compile/--eager",
            help="Train through torch.compile, or as Python runs it (the default).",
        ),
    ] = None


@dataclass(frozen=True)
class FittingOptions:
    """Which layers are replaced, and what they are fitted on."""

    section: ClassVar[str] = "Fitting"

    layers: Annotated[
        str | None,
        typer.Option(help="Replace only layers with these names, separated by commas; * matches any text."),
    ] = None
    calibration: Annotated[
        int, typer.Option(help="Number of training images that layers are fitted on.", min=1)
    ] = 500

    @property
    def patterns(self) -> list[str]:
        return parse_patterns(self.layers)


@dataclass(frozen=True)
class FineTuningOptions:
    """Training after the layers were replaced."""

    section: ClassVar[str] = "Fine-tuning"

    finetune_epochs: Annotated[int, typer.Option(help="Epochs of fine-tuning; 0 skips it.", min=0)] = 0
    recipe: Annotated[
        str, typer.Option(help="Recipe used for fine-tuning; finetune is the ESPACE paper's.")
    ] = "recover"
    lr: Annotated[
        float | None,
        typer.Option(help="Learning rate of fine-tuning; recover finds it by short runs on training images."),
    ] = None
    precision: Annotated[
        str | None,
        typer.Option(help="float32 (the default), or mixed precision with bfloat16 or float16."),
    ] = None
    distill: Annotated[
        float | None,
        typer.Option(
            help="Share of the loss, in [0, 1], that compares the outputs with the original network's."
        ),
    ] = None
    distill_features: Annotated[
        float | None,
        typer.Option(
            help="Weight of the squared distance to the original network's last map of each resolution."
        ),
    ] = None
    first: Annotated[
        float | None,
        typer.Option(help="Share of the steps, at the beginning, in which only replaced layers train."),
    ] = None
    compile: Annotated[
        bool | None,
        typer.Option(
            "--compile/--eager",
            help="Fine-tune through torch.compile, or as Python runs it (the default).",
        ),
    ] = None

    def chosen(self, unlabelled: bool = False) -> recipes.Recipe | None:
        """The recipe for so many epochs; None for none.

        Raises:
            ValueError: labels that there are not have a share in the loss; what a recipe refuses.
        """
        distill = self.distill
        if unlabelled:
            if distill is not None and distill < 1:
                raise ValueError(
                    f"distill={distill:g}: without labels the original network is all there is: 1"
                )
            distill = 1.0
        if not self.finetune_epochs:
            return None
        return recipes.recipe_with(
            recipes.by_name(self.recipe),
            epochs=self.finetune_epochs,
            lr=self.lr,
            precision=self.precision,
            distill=distill,
            distill_features=self.distill_features,
            first=self.first,
            compile=self.compile,
            find_lr=None if self.lr is None else False,
        )


@dataclass(frozen=True)
class TimingOptions:
    """How networks and their layers are timed, and in which number format."""

    section: ClassVar[str] = "Timing"

    dtype: Annotated[
        str | None,
        typer.Option(
            help="Number format of inference: float32 (the default), bfloat16 or int8; times and the final "
            "accuracy are those in it. A format that is slower than float32 on this machine is not used. "
            "int8 takes its ranges from the images of --calibration, and the artifact holds it."
        ),
    ] = None
    batch: Annotated[int, typer.Option(help="Batch size of the timed inputs.", min=1)] = 8
    rounds: Annotated[int, typer.Option(help="Number of timing rounds for each layer.", min=3)] = 11


def format_named(name: str | None) -> torch.dtype | None:
    """A number format of inference; None for float32.

    Raises:
        ValueError: there is no such format.
    """
    known = {"float32": None, "bfloat16": torch.bfloat16, "int8": torch.int8}
    if name is None:
        return None
    if name not in known:
        raise ValueError(f"dtype={name!r}: expected one of {', '.join(known)}")
    return known[name]


class _GroupedCommand(TyperCommand):
    """A command whose help lists its options by group."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                argument = parameter.param_type_name == "argument"
                title = "Arguments" if argument else getattr(parameter, "rich_help_panel", None) or "Options"
                groups.setdefault(title, []).append(record)
        # what every verb has comes last
        last = {"Output": 1, "Options": 2}
        for title in sorted(groups, key=lambda title: last.get(title, 0)):
            with formatter.section(title):
                formatter.write_dl(groups[title])


def verb(name: str, *, epilog: str, short_help: str) -> Callable[[F], F]:
    """Registers a function as a verb; a parameter that is a dataclass becomes one option a field."""

    def register(function: F) -> F:
        app.command(name, cls=_GroupedCommand, epilog=epilog, short_help=short_help)(_flat(function))
        return function

    return register


def _flat(function: Callable[..., None]) -> Callable[..., None]:
    """The function that takes the fields of its dataclasses one by one."""
    groups: dict[str, Any] = {}
    parameters: list[inspect.Parameter] = []
    kinds = get_type_hints(function, include_extras=True)
    for parameter in inspect.signature(function).parameters.values():
        kind = kinds[parameter.name]
        if is_dataclass(kind):
            groups[parameter.name] = kind
            parameters += _options_in(kind)
        else:
            parameters.append(parameter.replace(annotation=kind, kind=inspect.Parameter.KEYWORD_ONLY))
    for parameter in parameters:
        for option in getattr(parameter.annotation, "__metadata__", ()):
            complete_values(parameter.name, option)
    for name, default, kind in (("quiet", False, Quiet), ("log", None, Log)):
        parameters.append(
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
        )

    def call(*, quiet: bool, log: Path | None, **given: Any) -> None:
        made = {
            name: kind(**{field.name: given.pop(field.name) for field in fields(kind)})
            for name, kind in groups.items()
        }
        # before the verb or behind it
        with silenced(quiet or is_silenced()), logging_to(log or _LOG_FILE.get()):
            function(**made, **given)

    call.__name__, call.__doc__ = function.__name__, function.__doc__
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return call


# the file that was named before the verb
_LOG_FILE: ContextVar[Path | None] = ContextVar("log file", default=None)


@contextmanager
def log_named(file: Path | None) -> Iterator[None]:
    """Within: a verb that names no file of its own is logged to this one."""
    before = _LOG_FILE.set(file)
    try:
        yield
    finally:
        _LOG_FILE.reset(before)


@contextmanager
def logging_to(file: Path | None) -> Iterator[None]:
    """Within: the command is logged to a file, from its own line to how it ended; to none if that is None."""
    if file is None:
        yield
        return
    with ExitStack() as stack:
        with bad_input():
            try:
                stack.enter_context(logged_to(file))
            except OSError as error:
                raise ValueError(f"log={str(file)!r}: cannot be written ({error.strerror})") from None
        LOG.info("%s", environment()["command"])
        LOG.info("%s", version_line())
        try:
            yield
        except typer.Exit as ended:
            LOG.info("ended with exit code %d", ended.exit_code)
            raise
        except BaseException:
            # a defect: whoever reads the log needs the place
            LOG.exception("ended by an error")
            raise
        LOG.info("ended with exit code 0")


def _options_in(kind: Any) -> Iterator[inspect.Parameter]:
    """The parameters that stand for a dataclass of options, with its section in the help."""
    kinds = get_type_hints(kind, include_extras=True)
    for field in fields(kind):
        annotation = kinds[field.name]
        [option] = annotation.__metadata__
        option.rich_help_panel = kind.section
        yield inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=annotation
        )


def example(*commands: str) -> str:
    """The end of a verb's help."""
    return "\n  ".join(["\b\nExample:", *commands])


@contextmanager
def bad_input() -> Iterator[None]:
    """Within: what the user passed is being checked; a refusal ends with one sentence and code 2."""
    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        complain(error)
        raise _exit(error, 2) from None
    except KeyboardInterrupt:
        complain("stopped")
        raise typer.Exit(1) from None


def _exit(error: Exception, code: int) -> typer.Exit:
    """The end of a process; a launcher kills all as soon as one fails, so the one that tells why fails."""
    return typer.Exit(code if to_be_told(error) else 0)


@contextmanager
def running() -> Iterator[None]:
    """Within: the work itself; a failure that is not a defect ends with one sentence and code 1."""
    try:
        yield
    except (RunFailed, OSError) as error:
        complain(error)
        raise _exit(error, 1) from None
    except RuntimeError as error:
        if "allocate memory" not in str(error):
            raise
        wanted = re.search(r"\d+ bytes", str(error))
        complain(f"not enough memory for {wanted[0] if wanted else 'this'}")
        raise typer.Exit(1) from None


def check_folder(folder: Path, file: Path | None = None) -> None:
    """Refuse, before long work, a folder that cannot be made or written, for itself or for a file in it.

    Raises:
        ValueError: it or a part of its path is a file, or may not be written.
    """
    whole, asked = folder.absolute(), str(file or folder)
    there = next(path for path in (whole, *whole.parents) if path.exists())
    if not there.is_dir():
        raise ValueError(f"out={asked!r}: {there} is not a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"out={asked!r}: {there} may not be written")


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


def parse_patterns(text: str | None) -> list[str]:
    return [] if text is None else [part.strip() for part in text.split(",")]


def parse_counts(name: str, text: str) -> list[int]:
    counts = [int(part) for part in text.split(",") if part.strip().isdigit()]
    if not counts or min(counts) < 1 or len(counts) != len(text.split(",")):
        raise ValueError(f"{name}={text!r}: expected numbers with commas, such as 1,2")
    return counts


def build_from(network: str, start: Path, settings: dict[str, Any]) -> nn.Module:
    """The network of an artifact, or of published weights in a file."""
    if start.is_dir():
        if settings:
            raise ValueError(f"start={str(start)!r}: the artifact says its own {', '.join(settings)}")
        return qx.load(artifact_in(start))
    return qx.networks.weights.load(network, start, **settings)


def artifact_in(folder: Path) -> Path:
    """The artifact of a run, where a run's folder was given."""
    return folder / ARTIFACT if (folder / ARTIFACT).is_dir() else folder


def with_training_normalisation(images: ImageData, start: Path | None) -> ImageData:
    """The images with the mean and deviation of those that an artifact was trained on, if it has any."""
    if start is None:
        return images
    if not start.is_dir():
        mean, std = qx.networks.weights.normalisation(start)
        return replace(images, mean=mean, std=std)
    trained_on = read_spec(artifact_in(start)).get("info", {}).get("data", {})
    # images without classes are compared with the network's own outputs
    if images.classes and trained_on.get("classes", list(images.classes)) != list(images.classes):
        raise ValueError(f"data={images.name!r}: its classes are not those that {start} was trained on")
    if "mean" not in trained_on:
        return images
    if (taken := len(trained_on["mean"])) != images.in_channels:
        raise ValueError(
            f"data={images.name!r}: images of {images.in_channels} channels, but the network takes "
            f"{taken}{grey_hint(taken, images)}"
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
