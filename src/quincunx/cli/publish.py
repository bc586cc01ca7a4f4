"""``quincunx publish``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quincunx.cli.options import Json, bad_input, check_folder, example, running, verb
from quincunx.cli.printing import say, show
from quincunx.experiments.publishing import publish

__all__ = ["publish_command"]


@verb(
    "publish",
    epilog=example(
        "quincunx publish runs/rsbn20 results-to-serve --name rsbn20-cifar10 --licence Apache-2.0"
    ),
    short_help="Enter a run in a folder of trained results.",
)
def publish_command(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run of train or accelerate.")],
    place: Annotated[
        Path, typer.Argument(help="Folder of trained results, with or without a registry.json.")
    ],
    name: Annotated[str, typer.Option(help="Name by which quincunx fetch will find it.")],
    licence: Annotated[str, typer.Option(help="Licence of the weights, such as Apache-2.0.")],
    as_json: Json = False,
) -> None:
    """Copy a run's artifact into a folder that a web server can serve, and enter it in its registry.

    A published version never changes: other files under the same name are the next version. Nothing is
    uploaded.
    """
    with bad_input():
        check_folder(place)
        with running():
            made = publish(run, place, name=name, licence=licence)
    if as_json:
        show(made.to_dict())
        return
    say(f"{made}")
    say(f"in {place}; try it: quincunx fetch {name} --address {place}")
