"""Make the badges of README.md from real runs: python docs/badges.py types | coverage FILE.

``types`` runs mypy in strict mode on the package; ``coverage`` reads what ``coverage json`` wrote after the
whole suite (make coverage). Each writes its part of results/badges/badges.json, with command, commit and
versions, and an SVG beside it; docs/tables.py shows those that are there.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from quincunx.measure.environment import environment
from quincunx.writing import write_json, write_text

ROOT = Path(__file__).resolve().parent.parent
BADGES = ROOT / "results" / "badges"
# from so many percent of lines on
_GOOD, _FAIR = 95.0, 85.0
_GREEN, _YELLOW, _RED = "#2e7d32", "#8a6d00", "#b3261e"


def types() -> dict[str, Any]:
    """Run mypy and return what it found.

    Raises:
        RuntimeError: mypy did not end with a summary.
    """
    run = subprocess.run([sys.executable, "-m", "mypy"], cwd=ROOT, capture_output=True, text=True)
    clean = re.search(r"no issues found in (\d+) source files", run.stdout)
    found = re.search(r"Found (\d+) errors? in \d+ files? \(checked (\d+) source files\)", run.stdout)
    if clean:
        errors, files = 0, int(clean[1])
    elif found:
        errors, files = int(found[1]), int(found[2])
    else:
        raise RuntimeError(f"mypy ended without a summary: {run.stdout[-300:]}{run.stderr[-300:]}")
    return {"text": "mypy strict" if not errors else f"{errors} errors", "errors": errors, "files": files}


def covered(file: Path) -> dict[str, Any]:
    """Return the share of lines in a file of ``coverage json``.

    Raises:
        ValueError: not such a file.
    """
    try:
        totals = json.loads(file.read_text(encoding="utf-8"))["totals"]
        lines, run = int(totals["num_statements"]), int(totals["covered_lines"])
        percent = 100 * run / lines
    except (ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        raise ValueError(f"{file}: not what coverage json writes ({error!r:.80})") from None
    # rounded down, so that 95% is never what falls short of it
    return {"text": f"{int(10 * percent) / 10:.1f}%", "percent": percent, "lines": lines, "covered": run}


def colour(name: str, found: dict[str, Any]) -> str:
    """Return a badge's colour."""
    if name == "types":
        return _RED if found["errors"] else _GREEN
    return _GREEN if found["percent"] >= _GOOD else _YELLOW if found["percent"] >= _FAIR else _RED


def badge(name: str, text: str, fill: str) -> str:
    """Return an SVG of a name on grey and a text on a colour."""
    left, right = (10 + 7 * len(part) for part in (name, text))
    font = 'font-family="Verdana, DejaVu Sans, sans-serif" font-size="11" fill="#fff" text-anchor="middle"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + right}" height="20" role="img" '
        f'aria-label="{name}: {text}"><title>{name}: {text}</title>'
        f'<rect width="{left + right}" height="20" rx="3" fill="#555"/>'
        f'<path d="M{left} 0h{right - 3}a3 3 0 0 1 3 3v14a3 3 0 0 1-3 3h-{right - 3}z" fill="{fill}"/>'
        f'<g {font}><text x="{left / 2:g}" y="14">{name}</text>'
        f'<text x="{left + right / 2:g}" y="14">{text}</text></g>'
        "</svg>\n"
    )


def write(name: str, found: dict[str, Any], folder: Path = BADGES) -> None:
    """Write a badge, and what it says with where that comes from."""
    place = folder / "badges.json"
    content = (
        json.loads(place.read_text(encoding="utf-8")) if place.is_file() else {"schema": 1, "kind": "badges"}
    )
    content[name] = {**found, "environment": environment()}
    write_text(folder / f"{name}.svg", badge(name, found["text"], colour(name, found)))
    write_json(place, content)


def main(arguments: list[str]) -> int:
    if arguments == ["types"]:
        write("types", types())
    elif len(arguments) == 2 and arguments[0] == "coverage":
        write("coverage", covered(Path(arguments[1])))
    else:
        print(__doc__)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
