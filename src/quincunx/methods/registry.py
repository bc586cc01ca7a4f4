"""The published methods, listed once: what the command line, a search and a comparison know of them.

A method brings its name, settings and refusals, and besides what :class:`Published` asks for. Nothing else
names a method; a new one is a file and a line in ``METHODS``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar, Protocol

from quincunx.methods.binaryconnect import BinaryConnect
from quincunx.methods.cp import CP
from quincunx.methods.espace import Espace
from quincunx.methods.lowrank import LowRank
from quincunx.methods.perforate import Perforate
from quincunx.methods.points import Point
from quincunx.methods.qcnn import QCNN
from quincunx.methods.spatialblock import SpatialBlock
from quincunx.methods.spatialbottleneck import SpatialBottleneck
from quincunx.surgery.method import Method

__all__ = ["ALIASES", "METHODS", "Published", "candidates_named", "method_named", "with_candidates"]


class Published(Method, Protocol):
    """A method that can be named, searched for and compared."""

    # for files: a network of half the bytes is worth having even where it is no faster
    saves_bytes: ClassVar[bool]

    @classmethod
    def candidates(cls) -> Sequence[Method]:
        """What a search tries in each layer; empty for a method that takes part in none."""

    @classmethod
    def sweep(cls) -> list[Point]:
        """The settings that draw its curve of accuracy against speed."""

    def label(self, pair: bool = False) -> str:
        """Its settings in a few words."""


METHODS: dict[str, type[Published]] = {
    str(method.name): method
    for method in (SpatialBottleneck, SpatialBlock, Perforate, Espace, LowRank, CP, BinaryConnect, QCNN)
}
# names that the command line had before
ALIASES = {"lrd": "lowrank", "cpd": "cp", "sb": "spatialbottleneck"}


def method_named(name: str) -> type[Published]:
    """A method's class by its name or an older one.

    Raises:
        ValueError: there is no such method.

    Example:
        >>> method_named("lowrank") is method_named("lrd")
        True
    """
    known = ALIASES.get(name, name)
    if known not in METHODS:
        raise ValueError(f"method={name!r}: expected one of {', '.join(METHODS)}")
    return METHODS[known]


def with_candidates() -> dict[str, tuple[Method, ...]]:
    """What a search tries in each layer, by the names of the methods."""
    found = {name: tuple(method.candidates()) for name, method in METHODS.items()}
    return {name: methods for name, methods in found.items() if methods}


def candidates_named(names: str | Iterable[str]) -> tuple[Method, ...]:
    """The candidates of some methods; of all of them for "auto".

    Raises:
        ValueError: a method without candidates.

    Example:
        >>> len(candidates_named("spatialbottleneck"))
        3
    """
    wanted, known = [names] if isinstance(names, str) else list(names), with_candidates()
    for name in wanted:
        if ALIASES.get(name, name) not in known and name != "auto":
            raise ValueError(f"method={name!r}: expected auto or some of {', '.join(known)}")
    chosen = list(known) if "auto" in wanted else [ALIASES.get(name, name) for name in wanted]
    return tuple(method for name in chosen for method in known[name])
