"""``quincunx fetch``."""

from __future__ import annotations

from typing import Annotated

import typer

from quincunx.cli.options import Json, bad_input, example, running, verb
from quincunx.cli.printing import say, show
from quincunx.networks.trained import cached, fetch, registry
from quincunx.progress import progress_bar

__all__ = ["fetch_command"]


@verb(
    "fetch",
    epilog=example("quincunx fetch rsbn20-cifar10 --address https://example.org/results"),
    short_help="Fetch a trained result, or list what there is.",
)
def fetch_command(
    name: Annotated[
        str | None, typer.Argument(help="Name in the registry; without one, all are listed.")
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(
            help="Folder, https:// or file:// address with registry.json; by default QUINCUNX_RESULTS."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Fetch a trained network with its recipe, commit, accuracy, time of training and licence.

    It goes to the cache folder (QUINCUNX_CACHE), after its size and checksum were compared with those of the
    registry. What is fetched is an artifact: all verbs take its folder, and nothing in it is executed.
    """
    with bad_input(), running():
        if name is None:
            known = registry(address)
            if as_json:
                show({"results": [result.to_dict() for result in known.values()]})
                return
            for result in known.values():
                say(str(result))
            if not known:
                say("no trained results there yet")
            return
        with progress_bar(not as_json) as bar:
            # nothing to see while the request may still be refused
            task = bar.add_task(f"fetching {name}", total=None, state="", visible=False)
            place = fetch(
                name,
                address,
                progress=lambda done, whole: bar.update(
                    task, completed=done, total=whole, state=f"{whole / 1e6:.1f} MB", visible=True
                ),
            )
        result = cached()[name]
    if as_json:
        show({"folder": str(place), **result.to_dict()})
        return
    say(f"{result}")
    say(f"in {place}; to use it:")
    say("  import quincunx as qx")
    say(f"  model = qx.networks.build({result.network['name']!r}, weights={name!r})")
    say(f"or quincunx evaluate {place} --data {result.facts['data']}")
