"""The options that say what a network is for, and data whose targets are no classes."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Annotated, Any, ClassVar

import typer

from quincunx.cli.options import DataOptions
from quincunx.cli.printing import note
from quincunx.data import ImageData, degraded, greyed, load_function, load_pairs
from quincunx.data.pairs import are_sides
from quincunx.measure.tasks import READY, Task, classification, named
from quincunx.networks.spec import check_factory

__all__ = ["TaskOptions", "imported", "is_function"]


@dataclass(frozen=True)
class TaskOptions:
    """What the network is for."""

    section: ClassVar[str] = "Task"

    task: Annotated[
        str | None,
        typer.Option(
            help=f"Loss and score: {', '.join(READY)}, or your own: a function that returns a qx.Task, as "
            "package.module:function. By default classification, or image-to-image with --noise or "
            "--downscale."
        ),
    ] = None
    pairs: Annotated[
        str | None,
        typer.Option(
            help="--data is a folder of pairs with images or masks as targets: input/NAME and "
            "target/NAME, or "
            "NAME_input and NAME_target; by default for image-to-image and for segmentation."
        ),
    ] = None
    noise: Annotated[
        float | None,
        typer.Option(
            help="The images are targets; inputs are they with Gaussian noise of this standard deviation, in "
            "levels of 255."
        ),
    ] = None
    downscale: Annotated[
        int | None,
        typer.Option(
            help="The images are targets; inputs are they scaled down by this factor and up again, bicubic."
        ),
    ] = None
    patch: Annotated[
        int | None, typer.Option(help="Side of the parts of images with targets that training sees.", min=1)
    ] = None
    classes: Annotated[
        int | None,
        typer.Option(help="Number of classes, where the data set of your function does not say.", min=1),
    ] = None

    def chosen(self) -> Task:
        """The task.

        Raises:
            ValueError: there is none of that name, or the user's function returns none.
        """
        if self.task is None:
            return named("image-to-image") if self.worsened else classification()
        if ":" not in self.task:
            return named(self.task)
        made = called(self.task, "task")
        if not isinstance(made, Task):
            raise ValueError(f"task={self.task!r}: returned a {type(made).__name__}, expected a qx.Task")
        return made

    def given(self) -> str:
        """The options that were given, as they are typed, with a space before."""
        given = {name: value for name, value in vars(self).items() if value is not None}
        return "".join(
            f" --{name} {value:g}" if name == "noise" else f" --{name} {value}"
            for name, value in given.items()
        )

    @property
    def worsened(self) -> bool:
        """Whether inputs are made of the images that are targets."""
        return self.noise is not None or self.downscale is not None

    def read(
        self,
        task: Task,
        images: DataOptions,
        *,
        seed: int = 0,
        unlabelled: bool = False,
        test_alone: bool = False,
        quiet: bool = False,
    ) -> ImageData:
        """The data with targets of the task.

        Raises:
            ValueError: options that do not go together, and what the loaders refuse.
        """
        if self.pairs not in (None, "images", "masks"):
            raise ValueError(f"pairs={self.pairs!r}: expected images or masks")
        kinds = {"image-to-image": "images", "segmentation": "masks"}
        function = is_function(images.data)
        pairs = self.pairs or (None if self.worsened or function else kinds.get(task.name))
        if unlabelled and not task.classifies:
            raise ValueError(
                f"unlabelled: task {task.name!r} takes none; --task agreement compares outputs with the "
                "original "
                "network's and needs no labels"
            )
        for name, given, needs in (
            ("patch", self.patch, pairs or self.worsened),
            ("classes", self.classes, function),
        ):
            if given is not None and not needs:
                kind = (
                    "--pairs, --noise or --downscale" if name == "patch" else "--data package.module:function"
                )
                raise ValueError(f"{name}={given}: is for {kind}")
        if (self.worsened and (pairs or function)) or (self.pairs and function):
            raise ValueError(
                "pairs, noise, downscale: --data says the targets by itself, or one of these does"
            )
        if function or pairs:
            _check_needless(images, function)
        if function:
            loaded = load_function(
                images.data,
                lambda: called(images.data, "data"),
                task.read,
                classes=self.classes,
                seed=seed,
            )
        elif pairs:
            loaded = load_pairs(
                images.data,
                masks=pairs == "masks",
                size=images.size,
                patch=self.patch,
                exif=not images.no_exif,
                seed=seed,
            )
            loaded = greyed(loaded) if images.grey else loaded
        else:
            bare = self.worsened or task.needs_original
            # named sets bring labels, which are not read then
            bare = bare and Path(images.data).exists()
            loaded = images.read(unlabelled=unlabelled or bare, test_alone=test_alone, quiet=quiet)
            if are_sides(loaded.classes):
                raise ValueError(
                    f"data={images.data!r}: its folders {', '.join(loaded.classes)} look like pairs and not "
                    "like classes; --pairs images or --pairs masks reads them so"
                )
            if self.worsened:
                return degraded(
                    loaded,
                    noise=self.noise or 0.0,
                    downscale=self.downscale or 1,
                    patch=self.patch,
                    seed=seed,
                )
            return loaded
        for text in loaded.notes:
            note(text)
        return loaded


def _check_needless(images: DataOptions, function: bool) -> None:
    """Refuse options of images by class, where pairs or a user's data set are read.

    Raises:
        ValueError: such an option was given.
    """
    for name in ("test_data", "skip_bad", "stream", *(("size", "no_exif", "grey") if function else ())):
        if getattr(images, name):
            kind = "a data set of your function" if function else "pairs"
            raise ValueError(f"{name}: {kind} cannot be read so; leave it out")


def is_function(text: str) -> bool:
    """Whether a text names a function, as package.module:function, and no file."""
    try:
        check_factory(text)
    except ValueError:
        return False
    return not Path(text).exists()


def called(text: str, what: str) -> Any:
    """What the user's function returns.

    Raises:
        ValueError: it cannot be imported or called.
    """
    function = imported(text, what)
    try:
        return function()
    except (Exception, SystemExit) as error:
        raise ValueError(
            f"{what}={text!r}: calling it without arguments raised {error_words(error)}"
        ) from error


def imported(text: str, what: str) -> Callable[[], Any]:
    """The function that a text names, as package.module:function.

    Raises:
        ValueError: another form, or it cannot be imported; ``what`` is the option's name.
    """
    check_factory(text, what)
    name, _, path = text.partition(":")
    # as python -m does: what lies in the current folder can be named, also by a later import
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(name)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and error.name and f"{name}.".startswith(f"{error.name}."):
            file = name.removesuffix(".py").replace("/", ".")
            hint = f"; a file is named without its ending: {file}:{path}" if name.endswith(".py") else ""
            raise ValueError(
                f"{what}={text!r}: no module {error.name!r} here or among what is installed{hint}"
            ) from error
        raise ValueError(f"{what}={text!r}: importing {name} raised {error_words(error)}") from error
    try:
        function: Any = reduce(getattr, path.split("."), module)
    except AttributeError as error:
        raise ValueError(f"{what}={text!r}: {name} has no {path}") from error
    if not callable(function):
        raise ValueError(f"{what}={text!r}: is of type {type(function).__name__}, expected a function")
    return function  # type: ignore[no-any-return]


def error_words(error: BaseException) -> str:
    """An error's kind and the first line of what it says."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return ": ".join([type(error).__name__, *lines[:1]])
