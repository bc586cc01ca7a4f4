"""The command line: verbs, each a library function. Exit code 2 for bad input, 1 for a failed run."""

from __future__ import annotations

import warnings
from typing import Annotated

import typer

# the verbs register themselves; help lists them in this order
# isort: off
from quincunx.cli import (
    demo,
    train,
    evaluate,
    accelerate,
    compare,
    export,
    fetch,
    publish,
    bench,
    cost,
    tune,
    reproduce,
    report,
    info,
    doctor,
    cache,
)

# isort: on
from quincunx.cli.options import Log, Quiet, app, log_named
from quincunx.cli.printing import say, warn_in_one_line
from quincunx.measure.version import version_line
from quincunx.progress import silenced
from quincunx.train.processes import is_first

__all__ = ["app", "main"]


def _version(asked: bool) -> None:
    if asked:
        say(version_line())
        raise typer.Exit


@app.callback()
def _every_verb(
    context: typer.Context,
    quiet: Quiet = False,
    log: Log = None,
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            help="Print version, commit and back ends, and stop.",
            callback=_version,
            is_eager=True,
        ),
    ] = False,
) -> None:
    # of several processes the first one speaks
    context.with_resource(silenced(quiet or not is_first()))
    context.with_resource(log_named(log))


def main() -> None:
    """The command line on this process's arguments."""
    warnings.showwarning = warn_in_one_line
    app(prog_name="quincunx")
