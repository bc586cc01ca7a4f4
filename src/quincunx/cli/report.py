"""``quincunx report``."""

from __future__ import annotations

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
)
from quincunx.experiments.timings import time_runs
from quincunx.report.figures import check_can_draw
from quincunx.report.training import write_report

__all__ = ["report_command"]


@verb(
    "report",
    epilog=example("quincunx report results/demo"),
    short_help="Draw a page from result files.",
)
def report_command(
    folder: Annotated[Path, typer.Argument(help="Folder with results (run.json, ...).")],
    out: Annotated[Path | None, typer.Option(help="The page; FOLDER/report.html by default.")] = None,
    time: Annotated[
        str | None, typer.Option(help="Time the runs' networks first, at these batch sizes, such as 1,8.")
    ] = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Draw one self-contained page from the result files below a folder.

    Networks are compared with the one that timings name as the baseline, else with the one of most MACs.
    Runs of one network that differ in the seed alone are averaged.
    """
    with bad_input():
        if out is not None:
            check_folder(out.parent)
        use_threads(threads)
        if time is not None:
            check_can_draw()
            batches = parse_counts("time", time)
            with running():
                time_runs(folder, batches, progress=not as_json)
        page = write_report(folder, out)
    if as_json:
        show({"report": str(page)})
        return
    say(f"wrote {page}")
