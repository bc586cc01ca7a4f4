"""``quincunx doctor``."""

from __future__ import annotations

import typer

from quincunx.cli.options import Json, bad_input, example, running, verb
from quincunx.cli.printing import print_findings, say, show
from quincunx.experiments.selftest import Finding, examine, report_line

__all__ = ["doctor"]


@verb(
    "doctor",
    epilog=example("quincunx doctor"),
    short_help="Test this installation: right, fast, complete.",
)
def doctor(as_json: Json = False) -> None:
    """Test this installation in about ten seconds, and print the line to send with a report.

    Convolutions, gradients and a fused network are compared with torch's own; blocks at half of the positions
    are timed against dense ones; back ends, threads, the cache and optional packages are looked at. Exit
    code 1 if an answer is wrong.
    """
    with bad_input(), running():
        found: list[Finding] = []
        for finding in examine():
            found.append(finding)
            if not as_json:
                print_findings([finding])
        line = report_line(found)
    wrong = any(finding.state == "wrong" for finding in found)
    if as_json:
        show({"wrong": wrong, "findings": [finding.to_dict() for finding in found], "report": line})
    else:
        say("")
        say(
            "Something is wrong. Please report this line:"
            if wrong
            else "To report a problem, send this line:"
        )
        say(line)
    if wrong:
        raise typer.Exit(1)
