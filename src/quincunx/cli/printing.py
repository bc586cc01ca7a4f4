"""What the command line prints: sentences, tables, one JSON document."""

from __future__ import annotations

import io
import json
import logging
import math
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from rich import box
from rich.console import Console
from rich.table import Table

from quincunx.acceleration.candidates import pair_name
from quincunx.experiments.compare import Compared
from quincunx.experiments.printed import Error
from quincunx.experiments.reproduce import AgainstPaper, Planned
from quincunx.experiments.selftest import Finding
from quincunx.measure.cost import Cost
from quincunx.measure.tasks.scale import ERROR, Scale
from quincunx.progress import LOG, is_silenced
from quincunx.report.acceleration import acceleration_sentences, first_sentences, search_sentences
from quincunx.report.results import Line
from quincunx.train.processes import is_first, to_be_told

__all__ = [
    "complain",
    "note",
    "print_acceleration",
    "print_bench",
    "print_compared",
    "print_comparison",
    "print_cost",
    "print_facts",
    "print_findings",
    "print_lines",
    "print_plan",
    "print_points",
    "print_speeds",
    "say",
    "show",
    "warn",
    "warn_in_one_line",
]

# layers that are listed of those that stay for one reason; and the reason that the user knows
_NAMES, _LEFT_OUT = 6, "left out by where"


def complain(message: object) -> None:
    """One sentence on standard error."""
    # an operating system's error number says nothing to a person
    text = re.sub(r"\[Errno -?\d+\] ", "", str(message))
    LOG.error("%s", text)
    if not to_be_told(message):
        return
    Console(stderr=True, soft_wrap=True).print(f"error: {text}", markup=False, highlight=False)


def warn(message: object) -> None:
    """A doubt in one sentence on standard error."""
    LOG.warning("%s", message)
    if not is_first():
        return
    Console(stderr=True, soft_wrap=True).print(f"warning: {message}", markup=False, highlight=False)


def note(text: str) -> None:
    """What was done with the input, on standard error; ``--quiet`` leaves it out."""
    LOG.info("note: %s", text)
    Console(stderr=True, quiet=is_silenced()).print(f"note: {text}", markup=False, highlight=False)


def warn_in_one_line(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """In place of ``warnings.showwarning``: the package's own warnings without the place in its code."""
    if issubclass(category, UserWarning) and Path(filename).is_relative_to(Path(__file__).parents[1]):
        warn(message)
    else:
        _show_warning(message, category, filename, lineno, file, line)


_show_warning = warnings.showwarning


def say(text: str) -> None:
    """A sentence on standard output, unwrapped."""
    LOG.info("%s", text)
    if not is_first():
        return
    _console().print(text, markup=False, highlight=False, soft_wrap=True)


def show(value: Any) -> None:
    """A JSON document on standard output; strict JSON has no NaN and no infinity, null stands for them."""
    text = json.dumps(_finite(value), indent=2, allow_nan=False)
    LOG.info("printed %d characters of JSON", len(text))
    if not is_first():
        return
    sys.stdout.write(text + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _console() -> Console:
    # a table that is piped into a file is not cut at 80 columns
    return Console(width=None if sys.stdout.isatty() else 140)


def _print(table: Table) -> None:
    """A table on standard output, and without colours in the log."""
    if LOG.isEnabledFor(logging.INFO):
        plain = Console(file=io.StringIO(), width=140, no_color=True, force_terminal=False)
        plain.print(table)
        LOG.info("\n%s", plain.file.getvalue().rstrip())  # type: ignore[attr-defined]
    _console().print(table)


def print_cost(network: str, shape: tuple[int, ...], found: Cost) -> None:
    """A row for each layer that multiplies, and the total."""
    table = Table(title=f"{network}, input {' x '.join(map(str, shape))}", title_justify="left")
    table.add_column("layer")
    table.add_column("kind")
    for column in ("output", "MACs", "share", "parameters"):
        table.add_column(column, justify="right")
    for row in found.rows:
        if row.macs:
            share = f"{row.macs / found.macs:.1%}"
            output = " x ".join(map(str, row.output))
            table.add_row(row.name, row.kind, output, f"{row.macs:,}", share, f"{row.params:,}")
    rest = sum(row.params for row in found.rows if not row.macs)
    table.add_row("(no MACs: normalisation)", "", "", "0", "", f"{rest:,}", end_section=True)
    for line in found.uncounted:
        name, _, operator = line.partition(": ")
        table.add_row(name, operator, "", "not counted", "", "")
    table.add_row("total", "", "", f"{found.macs:,}", "100%", f"{found.params:,}")
    _print(table)
    say(
        f"{found.macs / 1e6:.1f} M MACs (one multiply-add each; {2 * found.macs / 1e6:.1f} M FLOPs), "
        f"{found.params / 1e6:.3f} M parameters"
    )


def print_facts(facts: dict[str, Any]) -> None:
    """Names and values."""
    table = Table(show_header=False, box=box.SIMPLE)
    for key, value in facts.items():
        table.add_row(key, ", ".join(value) if isinstance(value, list) else str(value))
    _print(table)


def print_lines(rows: list[Line]) -> None:
    """The report's table, short."""
    # narrow enough for a terminal of 80 columns
    table = Table(box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    table.add_column("network")
    counted = [f"wrong\nof {rows[0].tested}"] if rows[0].wrong is not None else []
    for column in (f"test\n{rows[0].scale.name}", *counted, "MACs\n(M)", "MAC\nratio"):
        table.add_column(column, justify="right")
    settings = list(rows[0].times)
    for setting in settings:
        table.add_column(f"{setting}\nms", justify="right")
        table.add_column(f"{setting}\nspeed-up", justify="right")
    for row in rows:
        cells = [
            row.label,
            row.scale.shown(row.error),
            *([] if row.wrong is None else [f"{row.wrong:g}"]),
            f"{row.macs / 1e6:.2f}",
            f"{row.mac_ratio:.2f}",
        ]
        for setting in settings:
            cells += [f"{1e3 * row.times[setting][0]:.2f}", f"{row.speedups[setting][0]:.2f}x"]
        table.add_row(*cells)
    _print(table)


def print_bench(result: dict[str, Any]) -> None:
    """Means and worst cases of a benchmark."""
    table = Table(box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    for column in ("against", "candidate"):
        table.add_column(column)
    by = "dtype" if result["backend"] == "cuda" else "threads"
    for column in (by, "cases", "MAC\nratio", "speed-up\n(geo. mean)", "worst"):
        table.add_column(column, justify="right")
    table.add_column("worst case")
    for row in result["summary"]:
        table.add_row(
            row["kind"],
            row["candidate"],
            str(row[by]),
            str(row["cases"]),
            f"{row['mac_ratio']:.2f}",
            f"{row['mean']:.2f}x",
            f"{row['worst']:.2f}x",
            row["worst_case"],
        )
    _print(table)
    say("Speed-up over the fastest dense candidate of each case, unless the candidate says over what.")
    marked = [row["slow_rounds"] for row in result["rows"] if "slow_rounds" in row]
    if any(marked):
        say(
            f"The machine itself was slow in {sum(map(len, marked))} rounds of {sum(map(bool, marked))} "
            "cases (slow_rounds in the result)."
        )
    for row in result["rows"]:
        for name, why in row.get("failed", {}).items():
            say(f"{row['case']}, batch {row['batch']}, {row['dtype']}: {name} failed: {why}")
    if result.get("left_out"):
        say(f"No time was left for {len(result['left_out'])} cases: {'; '.join(result['left_out'])}.")


def print_findings(findings: Sequence[Finding]) -> None:
    """What a test of the installation found, a line each."""
    for finding in findings:
        say(f"{finding.state:5} {finding.name}: {finding.said}")


def _printed(mean: float | None, deviation: float | None) -> str:
    """A printed error, or a dash where the paper has none."""
    return "-" if mean is None else str(Error(mean, deviation))


def print_plan(rows: list[Planned]) -> None:
    """What an experiment would take, beside what the paper prints for it."""
    table = Table(box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    table.add_column("network")
    top5 = any(row.paper_top5 is not None for row in rows)
    for column in (
        *("MACs (M)\nhere", "\npaper", "paper's test\nerror (%)", *(["\ntop-5"] if top5 else [])),
        *("epochs", "runs", "done", "hours left\nhere, about"),
    ):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            row.label,
            f"{row.macs / 1e6:.1f}",
            "-" if row.paper_macs is None else f"{row.paper_macs:g}",
            _printed(row.paper_error, row.paper_deviation),
            *([_printed(row.paper_top5, None)] if top5 else []),
            str(row.epochs),
            str(row.seeds),
            str(row.done),
            "" if row.hours is None else f"{row.hours:.1f}",
        )
    _print(table)
    if all(row.hours is not None for row in rows):
        say(f"About {sum(row.hours or 0 for row in rows):.1f} hours in all, one run after the other.")


def print_comparison(rows: list[AgainstPaper]) -> None:
    """The paper's table with ours beside it."""
    table = Table(box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    table.add_column("network")
    for column in ("MACs (M)\nours", "\npaper", "test error (%)\nours", "\nruns", "\npaper", "p against"):
        table.add_column(column, justify="right")
    table.add_column("baseline")
    for row in rows:
        spread = "" if row.deviation is None else f" ± {row.deviation:.2f}"
        table.add_row(
            row.label,
            f"{row.macs:.1f}",
            "-" if row.paper_macs is None else f"{row.paper_macs:g}",
            f"{row.mean:.2f}{spread}",
            str(len(row.errors)),
            _printed(row.paper_error, row.paper_deviation),
            "" if row.baseline is None else "-" if row.p is None else f"{row.p:.3f}",
            row.baseline or "",
        )
    _print(table)
    say(
        "Mean and deviation over seeds; p of Student's t-test, two-sided; - where the paper prints nothing "
        "for such images."
    )


def print_points(planned: dict[str, Any]) -> None:
    """The settings of an experiment, beside what the paper prints for each."""
    table = Table(box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    table.add_column("setting")
    for column in ("paper:\nspeed-up", "\npoints"):
        table.add_column(column, justify="right")
    for row in planned["rows"]:
        printed = [row["paper"].get(key) for key in ("speedup", "drop")]
        table.add_row(row["point"], *("-" if value is None else f"{value:g}" for value in printed))
    _print(table)


def print_acceleration(result: dict[str, Any]) -> None:
    """The verdict; each replaced layer before and after; and the network's error at each stage."""
    first = first_sentences(result)
    for sentence in first:
        say(sentence)
    if not result["layers"] and result.get("put_back") is None:
        free = result.get("input") or result.get("format_gain")
        say("No layer was replaced." if free else "Nothing was replaced: the network is as it was.")
    table = Table(box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    table.add_column("layer")
    for column in ("rank", "rates", "response\nerror", "MAC\nratio", "ms\nbefore", "ms\nafter", "speed-up"):
        table.add_column(column, justify="right")
    for row in result["layers"]:
        rates, error = row.get("rates"), row.get("response_error")
        table.add_row(
            row["name"],
            str(row.get("rank", "")),
            "" if rates is None else ", ".join(f"{rate:.2g}" for rate in rates),
            "" if error is None else f"{100 * error:.2f}%",
            f"{row['macs_before'] / row['macs_after']:.2f}",
            f"{1e3 * row['seconds_before']:.3f}",
            f"{1e3 * row['seconds_after']:.3f}",
            f"{row['speedup']['median']:.2f}x",
        )
    if result["layers"]:
        _print(table)
    for line in _kept(result["skipped"]):
        say(line)
    for sentence in acceleration_sentences(result):
        if sentence not in first:
            say(sentence)


def _kept(skipped: dict[str, str]) -> list[str]:
    """A line for each reason for which layers stay, those that were left out by name last."""
    reasons: dict[str, list[str]] = {}
    for name, reason in skipped.items():
        reasons.setdefault(reason, []).append(name)
    lines = []
    for reason, names in sorted(reasons.items(), key=lambda entry: entry[0] == _LEFT_OUT):
        few = names if len(names) <= _NAMES + 1 else [*names[:_NAMES], f"{len(names) - _NAMES} more"]
        lines.append(f"kept {', '.join(few)}: {reason}")
    return lines


def print_search(record: dict[str, Any]) -> None:
    """What a search chose, layer by layer, with what each candidate costs and saves."""
    table = Table(box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    for column in ("layers", "method"):
        table.add_column(column)
    for column in ("loss", "us saved"):
        table.add_column(column, justify="right")
    scored = {(tuple(row["layers"]), row["label"]): row for row in record["candidates"]}
    for row in record["chosen"]:
        found = scored[tuple(row["layers"]), row["label"]]
        table.add_row(
            pair_name(row["layers"]),
            row["label"],
            f"{found['loss']:.2g}",
            f"{1e6 * found['seconds_saved'][1]:.0f}",
        )
    _print(table)
    for sentence in search_sentences(record, judged=False):
        say(sentence)


def print_compared(rows: list[Compared], scale: Scale = ERROR) -> None:
    """Every setting of every method; and of which trade-offs it is on the Pareto front."""
    table = Table(box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    for column in ("method", "setting"):
        table.add_column(column)
    tuned = any(row.untuned_drop is not None for row in rows)
    for column in (
        *(f"{scale.of_what()} lost\n({scale.unit})", *(["\nuntuned"] if tuned else []), "\np"),
        *("speed-up\nnetwork", "\nlayers", "MAC\nratio", "KB on\ndisk", "on the\nfront of"),
        *("paper:\nspeed-up", "\npoints"),
    ):
        table.add_column(column, justify="right")
    for row in rows:
        printed = [row.paper.get(key) for key in ("speedup", "drop")]
        table.add_row(
            row.series,
            f"{row.setting}, {row.draw}" if row.draw else row.setting,
            f"{row.drop:+.2f}",
            *([] if not tuned else [f"{row.untuned_drop or 0:+.2f}"]),
            f"{row.p:.2g}",
            f"{row.speedup:.2f}x",
            f"{row.layers_speedup:.2f}x",
            f"{row.mac_ratio:.2f}",
            f"{row.bytes / 1e3:.0f}",
            ", ".join(row.fronts),
            *("" if value is None else f"{value:g}" for value in printed),
        )
    _print(table)


def print_speeds(rows: list[dict[str, Any]]) -> None:
    """Measured speed-ups beside ratios of MACs and what the paper prints."""
    table = Table(box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    for column in ("method", "setting"):
        table.add_column(column)
    errors = any(row["response_error"] is not None for row in rows)
    more = ("response\nerror",) if errors else ()
    parts = [part for part in ("layers", "network") if part in rows[0]]
    for part in parts:
        peers = [f"\nover {name}" for name in rows[0][part]["peers"]]
        for column in (f"{part}:\nMAC ratio", "\nspeed-up", *peers):
            table.add_column(column, justify="right")
    for column in ("\npaper", *more):
        table.add_column(column, justify="right")
    for row in rows:
        cells = [
            f"{value:.2f}"
            for part in parts
            for value in (row[part]["mac_ratio"], row[part]["speedup"], *row[part]["peers"].values())
        ]
        paper = row["paper"].get("speedup")
        lost = [f"{100 * row['response_error']:.2f}%"] if errors else []
        table.add_row(row["series"], row["label"], *cells, "" if paper is None else f"{paper:g}", *lost)
    _print(table)
