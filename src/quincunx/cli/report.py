"""``quincunx report``."""

from __future__ import annotations

import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from quincunx.cli.options import (
    Json,
    Threads,
    bad_input,
    check_folder,
    example,
    parse_counts,
    running,
    use_threads,
    verb,
)
from quincunx.cli.printing import (
    say,
    show,
    warn,
)
from quincunx.experiments.timings import time_runs
from quincunx.report.acceleration import write_acceleration_report
from quincunx.report.compared import write_comparison
from quincunx.report.figures import check_can_draw
from quincunx.report.training import write_report

__all__ = ["report_command"]


@verb(
    "report",
    epilog=example("quincunx report results/demo --open"),
    short_help="Draw a page from result files.",
)
def report_command(
    folders: Annotated[
        list[Path],
        typer.Argument(help="Folder with results (run.json, accelerate.json); several are compared."),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            help="The page; by default report.html in the folder, or comparison.html in the folder that "
            "holds all."
        ),
    ] = None,
    time: Annotated[
        str | None, typer.Option(help="Time the runs' networks first, at these batch sizes, such as 1,8.")
    ] = None,
    open_page: Annotated[
        bool, typer.Option("--open", help="Show the page in the web browser of this machine.")
    ] = False,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Draw one self-contained page: of training runs below a folder, of one acceleration, or of several.

    Training runs: networks are compared with the one that timings name as the baseline, else with the one of
    most MACs. Runs of one network that differ in the seed alone are averaged; several folders give one page.

    Accelerations: a folder with accelerate.json is drawn again; several are compared, with the front of speed
    and loss, layer by layer.
    """
    with bad_input():
        if out is not None:
            check_folder(out.parent, out)
        use_threads(threads)
        check_can_draw()
        accelerated = [(folder / "accelerate.json").is_file() for folder in folders]
        if any(accelerated) and not all(accelerated):
            one, other = folders[accelerated.index(True)], folders[accelerated.index(False)]
            raise ValueError(
                f"folders: {one} holds an acceleration (accelerate.json) and {other} does not; compare runs "
                "of one kind"
            )
        if time is not None:
            if len(folders) > 1 or any(accelerated):
                raise ValueError(f"time={time!r}: is for one folder of training runs")
            batches = parse_counts("time", time)
            with running():
                time_runs(folders[0], batches, progress=not as_json)
        if not any(accelerated):
            page = write_report(folders, out)
        elif len(folders) > 1:
            page = write_comparison(folders, out)
        else:
            page = write_acceleration_report(folders[0], out)
    if as_json:
        show({"report": str(page)})
    else:
        say(f"wrote {page}")
    if open_page and not _opened(page):
        warn(f"no web browser can be started here; open {page.absolute()} in one")


def _opened(page: Path) -> bool:
    try:
        return webbrowser.open(page.absolute().as_uri())
    except (webbrowser.Error, OSError):
        return False
