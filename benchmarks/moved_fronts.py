"""The front of a comparison beside that of an earlier one: accuracy lost against measured speed-up.

    python benchmarks/moved_fronts.py results/compared-x/earlier.json results/compared-x/comparison.json
    python benchmarks/moved_fronts.py ... --lost top5_drop

Only settings on the front are drawn: no other setting of the same comparison loses less at the same speed or
more, and they are faster than the network unchanged. Writes moved-front.svg beside the second one, and prints
what each front loses at most at some speeds. Both are ratios to the same network unchanged, each measured on
its own machine.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from quincunx.report.figures import Mark, draw_tradeoff

SPEEDS = (1.1, 1.2, 1.3, 1.5, 1.75, 2.0)


def front(file: Path, lost: str) -> list[dict[str, Any]]:
    """Return the rows of a comparison that are on its front of accuracy and speed, the slowest first."""
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    faster = [row for row in rows if row["speedup"] > 1]
    best = [row for row in faster if row is least(faster, row["speedup"], lost)]
    return sorted(best, key=lambda row: row["speedup"])


def least(rows: list[dict[str, Any]], speedup: float, lost: str) -> dict[str, Any] | None:
    """Return the row that loses least among those that are at least this fast."""
    return min((row for row in rows if row["speedup"] >= speedup), key=lambda row: row[lost], default=None)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("earlier", type=Path)
    parser.add_argument("now", type=Path)
    parser.add_argument("--lost", choices=("drop", "top5_drop"), default="drop", help="accuracy that is lost")
    given = parser.parse_args()
    fronts = {"earlier": front(given.earlier, given.lost), "now": front(given.now, given.lost)}
    marks = [
        Mark(name, f"{row['series']}, {row['label']}", row["speedup"], row[given.lost])
        for name, rows in fronts.items()
        for row in rows
    ]
    picture = draw_tradeoff(marks, [], "measured speed-up of the whole network")
    given.now.with_name("moved-front.svg").write_bytes(picture.content)
    for speedup in SPEEDS:
        found = {name: least(rows, speedup, given.lost) for name, rows in fronts.items()}
        print(f"{speedup:.2f}x", *(f"{n} {_told(row, given.lost)}" for n, row in found.items()), sep="; ")


def _told(row: dict[str, Any] | None, lost: str) -> str:
    return "none" if row is None else f"{row[lost]:+.2f} ({row['series']}, {row['label']})"


if __name__ == "__main__":
    main()
