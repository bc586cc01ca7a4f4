r"""Convert images with classes in a table into the folders by class that the command line reads.

    python benchmarks/folders_by_class.py imagenet-nips17-500.tar.gz \
        --classes imagenet-sample-256.tar.gz --out nips17

The archive holds images and one labels.csv with their names ("file") and class numbers ("ilsvrc_index");
number n is the n-th class, by name, of the folders in --classes, so that both sets have the same classes.
"""

from __future__ import annotations

import argparse
import csv
import io
import tarfile
from pathlib import Path, PurePosixPath


def class_names(archive: Path) -> list[str]:
    with tarfile.open(archive) as tar:
        return sorted({PurePosixPath(m.name).parent.name for m in tar if m.isfile()})


def content_of(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    if file is None:
        raise ValueError(f"{member.name}: not a file")
    return file.read()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("images", type=Path)
    parser.add_argument("--classes", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    names = class_names(given.classes)
    with tarfile.open(given.images) as tar:
        files = {PurePosixPath(m.name).name: m for m in tar if m.isfile()}
        table = content_of(tar, files["labels.csv"]).decode()
        for row in csv.DictReader(io.StringIO(table)):
            folder = given.out / names[int(row["ilsvrc_index"])]
            folder.mkdir(parents=True, exist_ok=True)
            (folder / row["file"]).write_bytes(content_of(tar, files[row["file"]]))


if __name__ == "__main__":
    main()
