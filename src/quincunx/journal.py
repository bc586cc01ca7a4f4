"""Finished layers of an acceleration on disk, so that an interrupted run does not make them again."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from quincunx.artifact import difference, read_json, write_json
from quincunx.methods import build_module
from quincunx.streams import Layer
from quincunx.surgery import Replacement

__all__ = ["FolderJournal", "check_run"]


def check_run(folder: Path, identity: dict[str, Any], what: str) -> None:
    """Note in a folder which run its files are of, or refuse the folder of another run.

    Raises:
        ValueError: it has ``what`` of a run with another identity (the difference is listed).
    """
    ours = json.loads(json.dumps(identity))
    place = folder / "identity.json"
    if not place.exists():
        write_json(place, ours)
    elif (theirs := read_json(place)) != ours:
        raise ValueError(
            f"{folder}: {what} of another run: {difference(theirs, ours)}; another --out starts anew"
        )


class FolderJournal:
    """Keeps each replacement as two files: its spec and record, and its weights.

    Args:
        folder: made if it is not there.
        identity: JSON-ready; what a folder's layers must share with the run that recalls them.

    Raises:
        ValueError: the folder has layers of a run with another identity (the difference is listed).
    """

    def __init__(self, folder: str | Path, identity: dict[str, Any]) -> None:
        self.folder = Path(folder)
        self.recalled: list[str] = []
        check_run(self.folder, identity, "finished layers")

    def recall(self, layer: Layer) -> Replacement | None:
        """The replacement of a layer that was finished before."""
        place = self._place(layer)
        if not place.exists():
            return None
        content = read_json(place)
        module = build_module(content["spec"])
        try:
            state = load_file(str(place.with_suffix(".safetensors")))
            module.to(next(layer.module.parameters()).dtype).load_state_dict(state)
        except (SafetensorError, RuntimeError, OSError) as error:
            raise ValueError(f"{place}: its weights are not there or damaged ({error})") from error
        self.recalled.append(layer.name)
        return Replacement(module, content["spec"], content["record"])

    def keep(self, layer: Layer, replacement: Replacement) -> None:
        """Write a finished layer; the description comes last, so that it stands for a whole pair."""
        place = self._place(layer)
        state = {key: value.contiguous() for key, value in replacement.module.state_dict().items()}
        save_file(state, str(place.with_suffix(".safetensors")))
        write_json(place, {"layer": layer.name, "spec": replacement.spec, "record": replacement.record})

    def _place(self, layer: Layer) -> Path:
        # names that differ in what a file name cannot hold must not meet
        mark = hashlib.sha256(layer.name.encode()).hexdigest()[:8]
        return self.folder / f"{re.sub(r'[^A-Za-z0-9.]+', '-', layer.name)}-{mark}.json"
