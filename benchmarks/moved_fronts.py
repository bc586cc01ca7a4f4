"""The front of a comparison beside that of an earlier one: accuracy lost against measured speed-up.

    python benchmarks/moved_fronts.py results/compared-x/earlier.json results/compared-x/comparison.json

Only settings on the front are drawn: no other setting of the same comparison loses less at the same speed or
more. Writes moved-front.svg beside the second one, and prints what each front loses at most at some speeds.
Both are ratios to the same network unchanged, each measured on its own machine.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from quincunx.report.figures import Mark, draw_tradeoff

SPEEDS = (1.1, 1.2, 1.3, 1.5, 1.75, 2.0)


def front(file: Path) -> list[dict[str, Any]]:
    """Return the rows of a comparison that are on its front of accuracy and speed, the slowest first."""
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    return sorted((row for row in rows if "speed" in row["fronts"]), key=lambda row: row["speedup"])


def least(rows: list[dict[str, Any]], speedup: float) -> dict[str, Any] | None:
    """Return the row that loses least among those that are at least this fast."""
    return min((row for row in rows if row["speedup"] >= speedup), key=lambda row: row["drop"], default=None)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("earlier", type=Path)
    parser.add_argument("now", type=Path)
    given = parser.parse_args()
    fronts = {"earlier": front(given.earlier), "now": front(given.now)}
    marks = [
        Mark(name, f"{row['series']}, {row['label']}", row["speedup"], row["drop"])
        for name, rows in fronts.items()
        for row in rows
    ]
    picture = draw_tradeoff(marks, [], "measured speed-up of the whole network")
    given.now.with_name("moved-front.svg").write_bytes(picture.content)
    for speedup in SPEEDS:
        found = {name: least(rows, speedup) for name, rows in fronts.items()}
        print(f"{speedup:.2f}x", *(f"{name} {_told(row)}" for name, row in found.items()), sep="; ")


def _told(row: dict[str, Any] | None) -> str:
    return "none" if row is None else f"{row['drop']:+.2f} ({row['series']}, {row['label']})"


if __name__ == "__main__":
    main()
