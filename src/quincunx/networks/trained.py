"""Trained results by name: a registry with checksums at an address that can be set, fetched into the cache.

Nothing is hosted by this project yet: ``QUINCUNX_RESULTS`` or ``address`` names a folder, a ``file://`` or an
``https://`` address that holds ``registry.json`` and the artifacts; docs/trained-results.md has the format.

What is fetched is an artifact, JSON and safetensors, so loading it executes nothing. Its checksums are those
of the registry: they find damage and later changes, and are as trustworthy as the address that serves it.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import re
import shutil
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from torch import nn

from quincunx.networks.artifact import load
from quincunx.networks.spec import name_of, read_spec
from quincunx.reading import Entry, one_line, read_json, sha256_of
from quincunx.writing import cache_folder, fill_folder, write_json

__all__ = [
    "TrainedFile",
    "TrainedResult",
    "build_trained",
    "cached",
    "fetch",
    "read_entries",
    "read_entry",
    "registry",
    "results_folder",
]

_VARIABLE = "QUINCUNX_RESULTS"
REGISTRY = "registry.json"
# an artifact's files; no other name is fetched, so none leads out of its folder
FILES = ("spec.json", "weights.safetensors")
NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,79}")
_SECONDS = 30.0
_CHUNK = 1 << 20
_LARGEST_REGISTRY = 16 << 20

# bytes so far and in all
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class TrainedFile:
    """One file of a result.

    Attributes:
        name: ``spec.json`` or ``weights.safetensors``.
        bytes: its size.
        sha256: its checksum, in hexadecimal digits.
    """

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class TrainedResult:
    """One entry of a registry.

    Attributes:
        name: by which it is fetched.
        version: 1, 2, ...; a published version never changes.
        files: of its artifact.
        network: the spec of the network, as an artifact has it.
        facts: recipe, data, score (name, value, shown, images), seconds of training, seed, commit, licence.
    """

    name: str
    version: int
    files: tuple[TrainedFile, ...]
    network: dict[str, Any]
    facts: dict[str, Any]

    @property
    def bytes(self) -> int:
        """The size of all files."""
        return sum(file.bytes for file in self.files)

    def to_dict(self) -> dict[str, Any]:
        """Return the entry as it stands in a registry."""
        return {
            "name": self.name,
            "version": self.version,
            "network": self.network,
            **self.facts,
            "files": [vars(file) for file in self.files],
        }

    def __str__(self) -> str:
        facts, score = self.facts, self.facts["score"]
        minutes = facts["seconds"] / 60
        return (
            f"{self.name} (version {self.version}): {name_of(self.network)} on {facts['data']}, "
            f"{score['name']} {score['shown']} on {score['images']:,} test images; "
            f"recipe {facts['recipe'].get('name', 'of its own')}, {minutes:.1f} minutes of training, commit "
            f"{facts['commit']}, licence {facts['licence']}, {self.bytes / 1e6:.2f} MB"
        )


def results_folder() -> Path:
    """Return the folder of fetched results, in the cache.

    Raises:
        ValueError: QUINCUNX_CACHE is set to nothing.
    """
    folder = cache_folder()
    if folder is None:
        raise ValueError("QUINCUNX_CACHE='': nothing is kept, so no trained result either; name a folder")
    return folder / "results"


def registry(address: str | Path | None = None) -> dict[str, TrainedResult]:
    """Return the newest version of every result that an address offers, by name.

    Args:
        address: folder, ``file://``, ``https://`` or ``http://`` address of the folder with
            ``registry.json``; by default what the environment variable QUINCUNX_RESULTS says.

    Raises:
        ValueError: no address is set, or one of another kind; a registry that is damaged or of a later
            format.
        ConnectionError: the address cannot be reached, or holds no registry.

    Example:
        >>> import os, tempfile
        >>> registry(tempfile.mkdtemp())
        Traceback (most recent call last):
        ...
        ConnectionError: .../registry.json: cannot be read (No such file or directory)...
    """
    place = f"{_base(address)}/{REGISTRY}"
    with _opened(place) as file:
        content = file.read(_LARGEST_REGISTRY + 1)
    if len(content) > _LARGEST_REGISTRY:
        raise ValueError(f"{place}: larger than {_LARGEST_REGISTRY >> 20} MiB, so it is no registry")
    try:
        value = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: not a JSON file ({one_line(error)})") from None
    return _newest(Entry(value, place))


def _newest(content: Entry) -> dict[str, TrainedResult]:
    found: dict[str, TrainedResult] = {}
    for result in read_entries(content):
        if result.name not in found or found[result.name].version < result.version:
            found[result.name] = result
    return dict(sorted(found.items()))


def read_entries(content: Entry) -> list[TrainedResult]:
    """Check the content of a registry and return its entries.

    Raises:
        ValueError: not a registry, or one of a later format.
    """
    content["kind"].text("trained-results")
    if content["schema"].integer() != 1:
        raise content["schema"].wrong("1; a newer quincunx may read it")
    return [read_entry(entry) for entry in content["results"].items()]


def read_entry(entry: Entry) -> TrainedResult:
    """Check one entry and return it.

    Raises:
        ValueError: incomplete or altered; the message says where.
    """
    name = entry["name"].text()
    if not NAME.fullmatch(name):
        raise entry["name"].wrong("lower-case letters, digits, '.', '_' and '-'")
    files = []
    for file in entry["files"].items(len(FILES)):
        digest = file["sha256"].text()
        if not re.fullmatch(r"[0-9a-f]{64}", digest):
            raise file["sha256"].wrong("64 hexadecimal digits")
        files.append(TrainedFile(file["name"].text(*FILES), file["bytes"].integer(1), digest))
    if {file.name for file in files} != set(FILES):
        raise entry["files"].wrong(" and ".join(FILES))
    network = entry["network"].object()
    entry["network"]["name"].text()
    score = entry["score"]
    for key in ("name", "shown"):
        score[key].text()
    score["value"].number()
    score["images"].integer(0)
    entry["recipe"].object()
    entry["seconds"].number(0.0)
    for key in ("data", "commit", "licence"):
        entry[key].text()
    facts = {k: v for k, v in entry.object().items() if k not in ("name", "version", "files", "network")}
    return TrainedResult(name, entry["version"].integer(1), tuple(files), network, facts)


def fetch(
    name: str,
    address: str | Path | None = None,
    *,
    newest: bool = True,
    progress: Progress | None = None,
) -> Path:
    """Return the folder of a trained result, an artifact for :func:`quincunx.load`; download what is missing.

    Args:
        name: in the registry.
        address: of the registry; see :func:`registry`.
        newest: ask the registry for the newest version; False takes a version that was fetched before
            without asking, so that it works without a network.
        progress: called with the bytes so far and in all.

    Raises:
        ValueError: no such name (the message lists those there are), a download that differs from its
            checksum, no address.
        ConnectionError: the address cannot be reached.
        OSError: the cache cannot be written, or the disk is too small.

    Example:
        >>> fetch("rsbn20", "ftp://example.org")
        Traceback (most recent call last):
        ...
        ValueError: address='ftp://example.org': expected a folder, or an address with https, http or file
    """
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ValueError(f"name={name!r}: expected lower-case letters, digits, '.', '_' and '-'")
    if newest:
        _base(address)
    folder = results_folder()
    if not newest and (kept := _kept(folder / name)) is not None:
        return kept
    base = _base(address)
    known = registry(address)
    if name not in known:
        listed = ", ".join(known) or "none"
        raise ValueError(f"name={name!r}: not among the trained results of {base}: {listed}")
    result = known[name]
    place = folder / name / f"{result.version}"
    if not _whole(place, result):
        _check_space(folder, result)
        fill_folder(place, lambda fresh: _download(base, result, fresh, progress))
    write_json(folder / name / "entry.json", result.to_dict())
    return place


def cached() -> dict[str, TrainedResult]:
    """Return the results in the cache, by name; without their checksums being compared."""
    folder = cache_folder()
    places = [] if folder is None else sorted((folder / "results").glob("*/entry.json"))
    found = {}
    for place in places:
        with suppress(ValueError, OSError):
            result = read_entry(Entry(read_json(place), place))
            found[result.name] = result
    return found


def _kept(folder: Path) -> Path | None:
    """Return the fetched version of a result, if it is there and whole."""
    entry = folder / "entry.json"
    if not entry.exists():
        return None
    result = read_entry(Entry(read_json(entry), entry))
    place = folder / f"{result.version}"
    return place if _whole(place, result) else None


def _whole(place: Path, result: TrainedResult) -> bool:
    return all((place / f.name).is_file() and sha256_of(place / f.name) == f.sha256 for f in result.files)


def _check_space(folder: Path, result: TrainedResult) -> None:
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if result.bytes > free:
        raise OSError(
            f"{folder}: {result.name} needs {result.bytes / 1e6:.1f} MB of disk, {free / 1e6:.1f} are free"
        )


def _download(base: str, result: TrainedResult, fresh: Path, progress: Progress | None) -> None:
    """Fill a new folder, which gets its name only if this returns."""
    done = 0
    for file in result.files:
        place = f"{base}/{result.name}/{result.version}/{file.name}"
        digest, size = hashlib.sha256(), 0
        with _opened(place) as source, (fresh / file.name).open("wb") as target:
            while chunk := _chunk(source, place):
                size += len(chunk)
                if size > file.bytes:
                    raise ValueError(
                        f"{place}: longer than the {file.bytes:,} bytes of the registry; it is not kept"
                    )
                digest.update(chunk)
                target.write(chunk)
                if progress is not None:
                    progress(done + size, result.bytes)
        if size < file.bytes:
            raise ConnectionError(f"{place}: ended after {size:,} of {file.bytes:,} bytes; fetch it again")
        if digest.hexdigest() != file.sha256:
            raise ValueError(
                f"{place}: has the checksum (SHA-256) {digest.hexdigest()}, the registry says {file.sha256}; "
                "it is damaged or altered, and not kept"
            )
        done += size
    described = {k: v for k, v in read_spec(fresh)["model"].items() if k in result.network}
    if described != result.network:
        raise ValueError(f"{base}: {result.name} is another network than its entry in the registry says")


def _chunk(source: IO[bytes], place: str) -> bytes:
    try:
        return source.read(_CHUNK)
    except (OSError, http.client.HTTPException) as error:
        raise ConnectionError(f"{place}: the connection broke ({one_line(error)}); fetch it again") from None


def _base(address: str | Path | None) -> str:
    """Return an address without a slash at its end, a folder as file://.

    Raises:
        ValueError: none is set, or it is of another kind.
    """
    text = str(address) if address is not None else os.environ.get(_VARIABLE, "")
    if not text:
        raise ValueError(
            f"{_VARIABLE}: no address of trained results is set, and none is built in as nothing is hosted "
            "yet; set it, or --address, to a folder or an https:// address with a registry.json"
        )
    scheme = urllib.parse.urlsplit(text).scheme if "://" in text else ""
    if scheme in ("http", "https", "file"):
        return text.rstrip("/")
    if scheme:
        raise ValueError(f"address={text!r}: expected a folder, or an address with https, http or file")
    return Path(text).expanduser().absolute().as_uri()


@contextmanager
def _opened(place: str) -> Iterator[IO[bytes]]:
    """Open an address for reading within the context.

    Raises:
        ConnectionError: it cannot be reached or does not exist.
    """
    try:
        answer = urllib.request.urlopen(place, timeout=_SECONDS)
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        told = getattr(reason, "strerror", None) or one_line(
            reason if isinstance(reason, Exception) else error
        )
        raise ConnectionError(f"{place}: cannot be read ({told})") from None
    with answer:
        yield answer


def build_trained(name: str, weights: str | Path, given: dict[str, Any]) -> nn.Module:
    """Return the network of a trained result; what :func:`quincunx.networks.build` was given must be its own.

    Args:
        name: of the network.
        weights: a name in the registry, or the folder of an artifact.
        given: ``num_classes``, ``in_channels`` and settings, None where not given.

    Raises:
        ValueError: the result is of another network; what :func:`fetch` and :func:`quincunx.load` refuse.
        TypeError: ``weights`` is neither a name nor a folder.
    """
    if not isinstance(weights, str | Path):
        raise TypeError(
            f"weights={weights!r}: expected the name of a trained result, or a Path to an artifact"
        )
    folder = weights if isinstance(weights, Path) else fetch(weights, newest=False)
    own = read_spec(folder)["model"]
    if own.get("kind") != "network" or own.get("name") != name:
        raise ValueError(f"weights={str(weights)!r}: of {name_of(own)}, not of {name!r}")
    has = {"num_classes": own["num_classes"], "in_channels": own["in_channels"], **own["settings"]}
    for key, value in given.items():
        if value is not None and has.get(key) != value:
            said = f"has {key} {has[key]!r}" if key in has else f"has its own {key}"
            raise ValueError(f"{key}={value!r}: the result {str(weights)!r} {said}")
    return load(folder)
