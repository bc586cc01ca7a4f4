"""Labels of images in a table, ``labels.csv``, if folders do not name them."""

from __future__ import annotations

import csv
import io
import os
import posixpath
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from quincunx.data.archives import TooLarge, members, plain
from quincunx.data.images import ImageEntry, printable
from quincunx.reading import naming

__all__ = ["Table", "find_table", "label_entries", "numbered_classes"]

NAME = "labels.csv"
_LARGEST = 1 << 27
_FILES = ("file", "filename", "file_name", "image", "image_id", "img", "path", "name", "id")
_LABELS = ("label", "class", "category", "target", "ilsvrc_index", "label_index", "class_id", "index", "y")
_PARTS = ("part", "split", "set", "subset")
_TEST = {"test", "val", "valid", "validation", "eval"}
# number of classes of the challenge whose indices a column may hold
_ILSVRC = 1000
# larger class numbers are treated as names
_MOST = 1 << 20


@dataclass(frozen=True)
class Table:
    """Labels by file.

    Attributes:
        where: the table's own name, for messages.
        root: of the images: a folder or an archive.
        rows: path, as in the table, to label and part.
        column: the name of the labels' column.
    """

    where: str
    root: Path
    rows: Mapping[str, tuple[str, str | None]]
    column: str


def find_table(root: Path) -> Table | None:
    """Return the ``labels.csv`` of a folder or an archive, the one nearest to its root; None without one.

    Raises:
        ValueError: a table without columns of files and labels, or too large for a table.
    """
    if root.is_dir():
        path = root / NAME
        if not path.is_file():
            return None
        with naming(path), path.open("rb") as file:
            return _table(str(path), root, "", file.read(_LARGEST + 1))
    for member in members(root):
        if posixpath.basename(member.name) == NAME and member.target is None:
            if member.size > _LARGEST:
                raise ValueError(
                    f"{root}:{printable(member.name)}: {member.size:,} bytes, more than any table has"
                )
            within = posixpath.dirname(plain(member.name))
            where = f"{root}:{printable(member.name)}"
            try:
                return _table(where, root, within, member.content())
            except TooLarge as error:
                raise ValueError(f"{where}: {error}") from error
    return None


def _table(where: str, root: Path, within: str, content: bytes) -> Table:
    if len(content) > _LARGEST:
        raise ValueError(f"{where}: more than {_LARGEST:,} bytes, more than any table has")
    try:
        lines = csv.reader(io.StringIO(content.decode("utf-8-sig")))
        head = [cell.strip().lower() for cell in next(lines, [])]
        file, label, part = (_column(head, names) for names in (_FILES, _LABELS, _PARTS))
        if file is None or label is None:
            found = ", ".join(head[:10])[:200] or "none"
            raise ValueError(f"expected columns file and label, found {found}")
        rows: dict[str, tuple[str, str | None]] = {}
        for line in lines:
            if len(line) > max(file, label):
                named = line[part].strip().lower() if part is not None and len(line) > part else ""
                name = plain(posixpath.join(within, line[file].strip().replace("\\", "/")))
                rows[name] = (line[label].strip(), "test" if named in _TEST else "train" if named else None)
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{where}: no table of labels ({' '.join(str(error).split())[:300]})") from error
    return Table(where, root, rows, head[label])


def _column(head: list[str], names: Iterable[str]) -> int | None:
    return next((head.index(name) for name in names if name in head), None)


def label_entries(
    entries: Iterable[ImageEntry], table: Table, part: str | None, unnamed: list[str]
) -> Iterator[ImageEntry]:
    """Yield images with their labels from a table; images that it does not name are skipped and counted.

    Args:
        entries: the images.
        table: the table.
        part: the part of all images, if not None.
        unnamed: gets the names of skipped images.
    """
    # a table may omit folders or suffixes if this is unambiguous
    short: dict[str, str | None] = {}
    for row in table.rows:
        base = posixpath.basename(row)
        for other in {base, posixpath.splitext(base)[0]}:
            short[other] = row if other not in short else None
    taken: dict[str, str] = {}
    for entry in entries:
        path = entry.name.removeprefix(f"{table.root}:")
        if isinstance(entry.content, str):
            path = os.path.relpath(entry.content, table.root).replace(os.sep, "/")
        path = plain(path)
        base = posixpath.basename(path)
        options = (path, posixpath.splitext(path)[0], short.get(base), short.get(posixpath.splitext(base)[0]))
        name = next((option for option in options if option in table.rows), None)
        if name is None or not table.rows[name][0]:
            unnamed.append(printable(entry.name))
            continue
        if name in taken:
            raise ValueError(
                f"{table.where}: the row {printable(name)!r} is meant for {printable(taken[name])} or for "
                f"{printable(path)}; say their folders"
            )
        taken[name] = path
        label, named = table.rows[name]
        yield entry._replace(label=label, part=part or named or entry.part)


def numbered_classes(tables: Iterable[Table], labels: Iterable[str]) -> tuple[str, ...]:
    """Return names of classes whose labels are their numbers, from 0.

    Raises:
        ValueError: a number beyond the classes.
    """
    columns, where = {table.column for table in tables}, ", ".join(table.where for table in tables)
    largest = max(min(int(label[:20]), 10**9) for label in labels)
    if largest >= _MOST:
        raise ValueError(f"{where}: the class {largest}, expected numbers below {_MOST}")
    count = max(largest + 1, _ILSVRC if any("ilsvrc" in column for column in columns) else 0)
    return tuple(map(str, range(count)))
