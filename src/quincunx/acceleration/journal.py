"""Store finished layers of an acceleration on disk, so that an interrupted run does not fit them again."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from quincunx.layers.build import build_module
from quincunx.networks.artifact import build_measured, storable_state, take_dtypes
from quincunx.networks.weights import fill_parameters
from quincunx.reading import (
    differing_fields,
    one_line,
    read_json,
    read_sealed,
    read_tensors,
    sealed,
    sha256_of,
)
from quincunx.surgery.calibration import Layer
from quincunx.surgery.method import Replacement
from quincunx.writing import write_atomically, write_json, write_tensors

__all__ = ["FolderJournal", "check_run"]


def check_run(folder: Path, identity: dict[str, Any], what: str) -> None:
    """Record in a folder which run its files belong to, or refuse the folder of another run.

    Raises:
        ValueError: it has ``what`` of a run with another identity (the message lists the difference).
    """
    ours = json.loads(json.dumps(identity))
    place = folder / "identity.json"
    if not place.exists():
        write_json(place, ours)
    elif (theirs := read_json(place)) != ours:
        raise ValueError(
            f"{folder}: {what} of another run: {differing_fields(theirs, ours)}; another --out starts anew"
        )


class FolderJournal:
    """Stores each replacement as two files: its spec and record, and its weights.

    Args:
        folder: created if it does not exist.
        identity: JSON-ready; must equal the identity of the run that wrote the folder's layers.

    Raises:
        ValueError: the folder has layers of a run with another identity (the message lists the difference).
    """

    def __init__(self, folder: str | Path, identity: dict[str, Any]) -> None:
        self.folder, self.identity = Path(folder), identity
        self.recalled: list[str] = []
        check_run(self.folder, identity, "finished layers")

    def within(self, name: str) -> FolderJournal:
        """Return a part of the journal with its own layers, in a folder of this name; what it recalls is
        listed here too."""
        part = FolderJournal(self.folder / name, self.identity)
        part.recalled = self.recalled
        return part

    def recall(self, layer: Layer) -> Replacement | None:
        """Return the stored replacement of a layer, or None."""
        place = self._place(layer)
        if not place.exists():
            return None
        content, weights = read_sealed(place), place.with_suffix(".safetensors")
        spec, record = content["spec"].object(), content["record"].object()
        what = f"{weights}: the weights of layer {layer.name!r} are not there or damaged"
        try:
            if sha256_of(weights) != content["weights"].text():
                raise ValueError(f"{what}: their SHA-256 is not the one in {place.name}")
            state = read_tensors(weights, what=what)
        except OSError as error:
            raise ValueError(f"{what} ({error.strerror})") from error
        try:
            # compare sizes before allocating memory
            measured = build_measured(lambda: build_module(spec), state)
            sizes = {name: value.shape for name, value in measured.state_dict().items()}
            if any(sizes.get(name) != value.shape for name, value in state.items()):
                raise ValueError("other sizes than the weights have")
            module = build_module(spec)
        except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError, RuntimeError) as error:
            raise ValueError(f"{place}: describes no layer of these weights ({one_line(error)})") from error
        module.to(next(layer.module.parameters()).dtype)
        take_dtypes(module, state)
        try:
            fill_parameters(module, state, what)
        except ValueError as error:
            raise ValueError(one_line(error)) from error
        self.recalled.append(layer.name)
        return Replacement(module, spec, record)

    def keep(self, layer: Layer, replacement: Replacement) -> None:
        """Write a finished layer; the description is written last, so that it vouches for a whole pair.

        Raises:
            OSError: it cannot be written; layers finished before are unchanged.
        """
        place = self._place(layer)
        weights = place.with_suffix(".safetensors")
        state = storable_state(replacement.module)
        write_atomically(weights, lambda temporary: write_tensors(temporary, state))
        content = {"layer": layer.name, "spec": replacement.spec, "record": replacement.record}
        write_json(place, sealed({**content, "weights": sha256_of(weights)}))

    def _place(self, layer: Layer) -> Path:
        # names that differ only in characters that a file name cannot hold must not collide
        mark = hashlib.sha256(layer.name.encode()).hexdigest()[:8]
        return self.folder / f"{re.sub(r'[^A-Za-z0-9.]+', '-', layer.name)}-{mark}.json"
