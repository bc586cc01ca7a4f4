"""``quincunx cache``."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer

from quincunx.cli.options import Json, bad_input, example, running, verb
from quincunx.cli.printing import say, show
from quincunx.data.download import data_folder
from quincunx.writing import cache_folder

__all__ = ["cache"]


@verb(
    "cache",
    epilog=example("quincunx cache --clear"),
    short_help="Show or remove what was measured on this machine.",
)
def cache(
    clear: Annotated[bool, typer.Option("--clear", help="Remove the measurements; downloads stay.")] = False,
    as_json: Json = False,
) -> None:
    """What quincunx keeps on this machine: measurements of which kernel is faster, tiles of GPUs, downloads.

    Measurements are made again where they are missing. QUINCUNX_CACHE names another folder; set to nothing
    (QUINCUNX_CACHE=) it keeps none.
    """
    with bad_input(), running():
        folder = cache_folder()
        measured = [] if folder is None else sorted(_measurements(folder))
        if clear:
            for path in measured:
                path.unlink(missing_ok=True)
            if folder is not None:
                shutil.rmtree(folder / "decisions", ignore_errors=True)
    facts = {
        "folder": None if folder is None else str(folder),
        "measurements": [path.name for path in measured],
        "removed": clear,
        "downloads": str(data_folder()),
    }
    if as_json:
        show(facts)
        return
    if folder is None:
        say("QUINCUNX_CACHE is set to nothing: nothing is kept.")
        return
    what = f"{len(measured)} file{'s' * (len(measured) != 1)} of measurements"
    say(f"removed {what} from {folder}" if clear else f"{what} in {folder}; --clear removes them")
    say(f"downloads in {data_folder()}")


def _measurements(folder: Path) -> list[Path]:
    return [*folder.glob("decisions/*.json"), *folder.glob("tiles-*.json")]
