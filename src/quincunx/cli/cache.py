"""``quincunx cache``."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer

from quincunx.cli.options import Json, bad_input, example, running, verb
from quincunx.cli.printing import say, show
from quincunx.data.download import data_folder
from quincunx.networks.trained import cached
from quincunx.writing import cache_folder

__all__ = ["cache"]


@verb(
    "cache",
    epilog=example("quincunx cache --clear"),
    short_help="Show or remove what was measured on this machine.",
)
def cache(
    clear: Annotated[bool, typer.Option("--clear", help="Remove the measurements; downloads stay.")] = False,
    clear_results: Annotated[
        bool, typer.Option("--clear-results", help="Remove the trained results that were fetched.")
    ] = False,
    as_json: Json = False,
) -> None:
    """What quincunx keeps on this machine: measurements of which kernel is faster, tiles of GPUs, trained
    results, downloads.

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
        fetched = cached()
        if clear_results and folder is not None and (folder / "results").exists():
            shutil.rmtree(folder / "results")
    facts = {
        "folder": None if folder is None else str(folder),
        "measurements": [path.name for path in measured],
        "removed": clear,
        "results": [{"name": r.name, "version": r.version, "bytes": r.bytes} for r in fetched.values()],
        "results_removed": clear_results,
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
    if fetched:
        many = f"{len(fetched)} trained result{'s' * (len(fetched) != 1)}"
        size = f"{sum(result.bytes for result in fetched.values()) / 1e6:.1f} MB"
        place = folder / "results"
        end = "removed" if clear_results else f"in {place}; --clear-results removes them"
        say(f"{many} ({', '.join(fetched)}), {size}, {end}")
    say(f"downloads in {data_folder()}")


def _measurements(folder: Path) -> list[Path]:
    return [*folder.glob("decisions/*.json"), *folder.glob("tiles-*.json")]
