"""What the spatial bottleneck paper's tables hold: networks, recipes and its printed figures.

Peng et al., arXiv:1809.02601. Printed figures that were not at hand are None. Figures 3 to 5 are drawn
from the runs of tables 1, 2 and 4.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

__all__ = ["EXPERIMENTS", "Entry", "Experiment", "by_name"]

_REGULAR = (20, 44, 62, 86, 110)
_BOTTLENECK = (29, 47, 65, 83, 101)
_MACS = {
    **dict(zip((f"rrn{d}" for d in _REGULAR), (40.5, 97.2, 139.6, 193.6, 252.9), strict=True)),
    **dict(zip((f"rsbn{d}" for d in _REGULAR), (24.0, 52.3, 73.6, 101.9, 130.0), strict=True)),
    **dict(zip((f"crn{d}" for d in _BOTTLENECK), (34.5, 57.1, 79.6, 102.3), strict=False)),
    "resnet34": 3500.0,
    "sb-resnet34": 2000.0,
    "resnet50": 3700.0,
    "sb-resnet50": 2900.0,
    "pyramidnet164-a84": 750.0,
    "sb-pyramidnet164-a84": 560.0,
}
_ERRORS = {
    ("rrn110", "cifar100"): 25.01,
    ("rsbn110", "cifar100"): 25.13,
    ("resnet34", "imagenet"): 26.82,
    ("sb-resnet34", "imagenet"): 26.48,
    ("resnet50", "imagenet"): 24.52,
    ("sb-resnet50", "imagenet"): 23.96,
}


@dataclass(frozen=True)
class Entry:
    """A row of a table.

    Attributes:
        network: its name.
        settings: of the network, as :func:`quincunx.networks.build` takes them.
        depth: number of layers, by which rows are chosen.
        versus: the number of the row it is tested against, None for a baseline.
    """

    network: str
    settings: tuple[tuple[str, str], ...] = ()
    depth: int = 0
    versus: int | None = None

    @property
    def paper_macs(self) -> float | None:
        """Printed multiply-adds in millions; the table's are those of the 2/4 sampling."""
        return _MACS.get(self.network) if not self.settings else None

    def paper_error(self, data: str) -> float | None:
        """Printed top-1 error in percent on a data set of that name."""
        return _ERRORS.get((self.network, data)) if not self.settings else None


@dataclass(frozen=True)
class Experiment:
    """A table of the paper.

    Attributes:
        name, title: what it is called, and what it shows.
        data: the data set by default, "cifar10" or "imagenet".
        recipe: the name of the paper's recipe.
        entries: its rows.
        figure: the figure that is drawn from it, and what it shows: "macs" or "epochs" across.
    """

    name: str
    title: str
    data: str
    recipe: str
    entries: tuple[Entry, ...]
    figure: tuple[str, str]

    def at_depths(self, depths: Iterable[int] | None) -> Experiment:
        """Only the rows of these depths.

        Raises:
            ValueError: a depth that the table has not.
        """
        if depths is None:
            return self
        wanted, known = list(depths), sorted({entry.depth for entry in self.entries})
        for depth in wanted:
            if depth not in known:
                raise ValueError(f"depths={depth}: {self.name} has {', '.join(map(str, known))}")
        kept = [i for i, entry in enumerate(self.entries) if entry.depth in wanted]
        renumbered = {old: new for new, old in enumerate(kept)}
        return replace(
            self,
            entries=tuple(
                replace(entry, versus=None if entry.versus is None else renumbered[entry.versus])
                for entry in (self.entries[i] for i in kept)
            ),
        )


# a depth, and networks with their settings
_Group = tuple[int, list[tuple[str, dict[str, str]]]]


def _against(groups: Iterable[_Group]) -> tuple[Entry, ...]:
    """Rows by depth; in each group the first is the one that the others are tested against."""
    entries: list[Entry] = []
    for depth, group in groups:
        first = len(entries)
        for i, (name, settings) in enumerate(group):
            entries.append(Entry(name, tuple(settings.items()), depth, first if i else None))
    return tuple(entries)


def _sampled(sampling: str) -> dict[str, str]:
    """The setting of a sampling; none for the default, so that tables share their runs."""
    return {} if sampling == "2/4" else {"sampling": sampling}


def table1() -> Experiment:
    """Residual networks of regular and of channel-bottleneck blocks, and their spatial bottleneck forms."""
    regular: list[_Group] = [(d, [(f"rrn{d}", {}), (f"rsbn{d}", {})]) for d in _REGULAR]
    bottleneck: list[_Group] = [(d, [(f"crn{d}", {}), (f"csbn{d}", {})]) for d in _BOTTLENECK]
    title = "residual networks and spatial bottleneck networks (section 4.1)"
    entries = _against([*regular, *bottleneck])
    return Experiment("table1", title, "cifar10", "cifar", entries, ("figure3", "macs"))


def table2() -> Experiment:
    """Samplings 1/4, 2/4 and 3/4."""
    groups: list[_Group] = [
        (d, [(f"rrn{d}", {}), *((f"rsbn{d}", _sampled(s)) for s in ("1/4", "2/4", "3/4"))]) for d in _REGULAR
    ]
    title = "how many positions are computed (section 4.1)"
    return Experiment("table2", title, "cifar10", "cifar", _against(groups), ("figure4", "macs"))


def table3() -> Experiment:
    """PyramidNets."""
    groups: list[_Group] = [
        (d, [(f"pyramidnet{d}-a{a}", {}), (f"sb-pyramidnet{d}-a{a}", {})])
        for d in (110, 164)
        for a in (84, 270)
    ]
    title = "PyramidNets (section 4.2)"
    return Experiment("table3", title, "cifar10", "pyramidnet", _against(groups), ("table3", "macs"))


def table4() -> Experiment:
    """ImageNet ResNets."""
    groups: list[_Group] = [(d, [(f"resnet{d}", {}), (f"sb-resnet{d}", {})]) for d in (18, 34, 50, 101)]
    title = "ImageNet ResNets (section 4.3)"
    return Experiment("table4", title, "imagenet", "imagenet", _against(groups), ("figure5", "epochs"))


def downsampling() -> Experiment:
    """Strides against average pooling."""
    groups: list[_Group] = [
        (d, [(f"rsbn{d}", _sampled(s)), (f"rsbn{d}", {**_sampled(s), "down": "avgpool"})])
        for d in _REGULAR
        for s in ("1/4", "2/4")
    ]
    title = "sampling down by stride and by average pooling (section 4.4)"
    return Experiment("downsampling", title, "cifar10", "cifar", _against(groups), ("downsampling", "macs"))


EXPERIMENTS: dict[str, Callable[[], Experiment]] = {
    "table1": table1,
    "table2": table2,
    "table3": table3,
    "table4": table4,
    "downsampling": downsampling,
    "figure3": table1,
    "figure4": table2,
    "figure5": table4,
}


def by_name(name: str) -> Experiment:
    """A table by its name or that of the figure drawn from it.

    Raises:
        ValueError: an unknown name; the nearest one is listed first.

    Example:
        >>> len(by_name("table1").at_depths([20, 29]).entries)
        4
    """
    if name not in EXPERIMENTS:
        nearest = difflib.get_close_matches(name, EXPERIMENTS, n=1, cutoff=0.0)
        listed = [*nearest, *(n for n in EXPERIMENTS if n not in nearest)]
        raise ValueError(f"experiment={name!r}: unknown; nearest first: {', '.join(listed)}")
    return EXPERIMENTS[name]()
