"""Enter a finished run in a folder of trained results, which a web server can serve."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

from quincunx.measure.tasks.scale import ERROR, scale_in
from quincunx.networks.spec import name_of, read_spec
from quincunx.networks.trained import (
    FILES,
    NAME,
    REGISTRY,
    TrainedFile,
    TrainedResult,
    read_entries,
    read_entry,
)
from quincunx.reading import Entry, naming, read_json, sha256_of
from quincunx.writing import fill_folder, only_one, write_json

__all__ = ["publish"]


def publish(run: str | Path, place: str | Path, *, name: str, licence: str) -> TrainedResult:
    """Copy the artifact of a run into a folder of trained results, as its next version, and enter it there.

    Args:
        run: folder of ``quincunx train`` or ``quincunx accelerate``, with its result file and its artifact.
        place: the folder with ``registry.json``; made if it does not exist.
        name: by which it will be fetched.
        licence: of the weights, an SPDX identifier such as "Apache-2.0"; mind that of the data.

    Returns:
        The new entry, or the newest one if that has the same files already.

    Raises:
        FileNotFoundError: no result file or no artifact.
        ValueError: a name or a licence that is none; a network with code of your own; a run whose commit is
            unknown or had changed files, which nobody else has.
        OSError: the folder cannot be written; what was there before is unchanged.
    """
    run, place = Path(run), Path(place)
    if not NAME.fullmatch(name):
        raise ValueError(f"name={name!r}: expected lower-case letters, digits, '.', '_' and '-'")
    if not licence.strip():
        raise ValueError(f"licence={licence!r}: expected an identifier such as Apache-2.0")
    network, facts = _facts(run)
    model = run / "model"
    files = tuple(TrainedFile(f, (model / f).stat().st_size, sha256_of(model / f)) for f in FILES)
    with naming(place):
        place.mkdir(parents=True, exist_ok=True)
    with only_one(place / REGISTRY):
        path = place / REGISTRY
        entries = read_entries(Entry(read_json(path), path)) if path.exists() else []
        versions = [entry for entry in entries if entry.name == name]
        last = max(versions, key=lambda entry: entry.version, default=None)
        if last is not None and last.files == files:
            return last
        version = 1 if last is None else last.version + 1
        made = TrainedResult(name, version, files, network, {**facts, "licence": licence.strip()})
        # what a registry's reader would refuse is refused here
        read_entry(Entry(made.to_dict(), run))

        def fill(fresh: Path) -> None:
            for file in files:
                shutil.copyfile(model / file.name, fresh / file.name)

        fill_folder(place / name / f"{version}", fill)
        content = [entry.to_dict() for entry in (*entries, made)]
        write_json(path, {"schema": 1, "kind": "trained-results", "results": content})
    return made


def _facts(run: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a run's network and what a registry says of it."""
    spec = read_spec(run / "model")["model"]
    if spec.get("kind") != "network":
        raise ValueError(
            f"{run}: a network with code of your own, {name_of(spec)}, cannot be built by others"
        )
    path = next((run / f for f in ("run.json", "accelerate.json") if (run / f).is_file()), run / "run.json")
    value = read_json(path)
    content = Entry(value, path)
    kind = content["kind"].text("train", "accelerate")
    last = content if kind == "train" else content["stages"].items()[-1]
    scale = scale_in(value)
    key = f"test_{scale.key}" if kind == "train" else scale.key
    commit = content["environment"]["commit"].value
    if not isinstance(commit, str) or not re.fullmatch(r"[0-9a-f]{7,40}", commit):
        raise ValueError(
            f"{path}: commit {commit!r}: the code of this run is not that of a commit; commit it and run anew"
        )
    score = last[key].number()
    recipe = content.get("recipe", {}).value or {}
    return spec, {
        "data": content["data"]["name"].text(),
        "score": {
            "name": f"test {ERROR.name}" if scale == ERROR else scale.name,
            "value": score,
            "shown": scale.shown(score),
            "images": content["data"]["test"].integer(0),
        },
        "recipe": recipe,
        "seed": content.get("seed", 0).integer(),
        "seconds": content["seconds"].number(0.0)
        if kind == "train"
        else content["fitting"]["seconds"].number(),
        "command": content["environment"]["command"].text(),
        "commit": commit,
        "date": content["environment"]["time"].text(),
        "processor": content["environment"]["cpu"].text(),
    }
