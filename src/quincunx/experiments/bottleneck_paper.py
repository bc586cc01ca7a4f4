"""The rows of the spatial bottleneck paper's tables: networks, data sets, recipes and printed figures.

Peng et al., arXiv:1809.02601. None marks what the paper does not print. Its figure 4 is drawn from the runs
of table 1; its figure 3 shows the samplings that table 2 compares.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from quincunx.experiments.printed import (
    MACS,
    Error,
    error_of,
    top5_of,
)

__all__ = ["EXPERIMENTS", "Experiment", "TableEntry", "by_name"]

_REGULAR = (20, 44, 62, 86, 110)
_BOTTLENECK = (29, 47, 65, 83, 101)


@dataclass(frozen=True)
class TableEntry:
    """A row of a table.

    Attributes:
        network: its name.
        settings: of the network, as for :func:`quincunx.networks.build`.
        depth: number of layers; rows can be selected by it.
        versus: index of the row that it is tested against, None for a baseline.
        table: the table of the row, whose printed figures take precedence.
    """

    network: str
    settings: tuple[tuple[str, str], ...] = ()
    depth: int = 0
    versus: int | None = None
    table: str = ""

    @property
    def paper_macs(self) -> float | None:
        """Return the printed multiply-adds in millions; the table's are those of the 2/4 sampling."""
        return MACS.get(self.network) if not self.settings else None

    def printed(self, data: str) -> Error | None:
        """Return the printed top-1 error on a data set, with its deviation if printed."""
        return error_of(self.network, self.settings, data, self.table)

    def printed_top5(self, data: str) -> Error | None:
        """Return the printed top-5 error."""
        return top5_of(self.network, self.settings, data)

    def paper_error(self, data: str) -> float | None:
        """Return the printed top-1 error in percent on a data set."""
        found = self.printed(data)
        return None if found is None else found.mean


@dataclass(frozen=True)
class Experiment:
    """A table of the paper.

    Attributes:
        name: the table's name.
        title: what it shows.
        data: the default data set, "cifar10", "cifar100" or "imagenet".
        recipe: the name of the paper's recipe.
        entries: its rows.
        figure: the figure drawn from it, and its x axis: "macs" or "epochs".
        note: remarks of the paper besides its figures.
    """

    name: str
    title: str
    data: str
    recipe: str
    entries: tuple[TableEntry, ...]
    figure: tuple[str, str]
    note: str = ""

    def at_depths(self, depths: Iterable[int] | None) -> Experiment:
        """Return a copy with only the rows of these depths.

        Raises:
            ValueError: a depth that the table does not have.
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


def _against(table: str, groups: Iterable[_Group]) -> tuple[TableEntry, ...]:
    """Return rows by depth; in each group the others are tested against the first."""
    entries: list[TableEntry] = []
    for depth, group in groups:
        first = len(entries)
        for i, (name, settings) in enumerate(group):
            entries.append(TableEntry(name, tuple(settings.items()), depth, first if i else None, table))
    return tuple(entries)


def _sampled(sampling: str) -> dict[str, str]:
    """Return the setting of a sampling; none for the default, so that tables share their runs."""
    return {} if sampling == "2/4" else {"sampling": sampling}


def table1() -> Experiment:
    """Return residual networks of regular and of channel-bottleneck blocks, with spatial bottlenecks."""
    regular: list[_Group] = [(d, [(f"rrn{d}", {}), (f"rsbn{d}", {})]) for d in _REGULAR]
    bottleneck: list[_Group] = [(d, [(f"crn{d}", {}), (f"csbn{d}", {})]) for d in _BOTTLENECK]
    return Experiment(
        name="table1",
        title="residual networks and spatial bottleneck networks",
        data="cifar10",
        recipe="cifar",
        entries=_against("table1", [*regular, *bottleneck]),
        figure=("figure4", "macs"),
        note="In the paper no single network differs significantly from its dense form (p >= 0.05). Its text "
        "speaks of 101 layers; its table ends at 83.",
    )


def table2() -> Experiment:
    """Return the samplings 1/4, 2/4 and 3/4."""
    groups: list[_Group] = [
        (d, [(f"rrn{d}", {}), *((f"rsbn{d}", _sampled(s)) for s in ("1/4", "2/4", "3/4"))]) for d in _REGULAR
    ]
    return Experiment(
        name="table2",
        title="how many positions are computed (section 4.3)",
        data="cifar100",
        recipe="cifar",
        entries=_against("table2", groups),
        figure=("table2", "macs"),
    )


def table3() -> Experiment:
    """Return PyramidNets."""
    groups: list[_Group] = [
        (d, [(f"pyramidnet{d}-a{a}", {}), (f"sb-pyramidnet{d}-a{a}", {})])
        for d in (110, 164)
        for a in (84, 270)
    ]
    return Experiment(
        name="table3",
        title="PyramidNets (section 4.5)",
        data="cifar10",
        recipe="pyramidnet",
        entries=_against("table3", groups),
        figure=("table3", "macs"),
        note="The paper's multiply-adds of these networks do not follow from its alphas, but for 164 layers "
        "and alpha 84.",
    )


def table4() -> Experiment:
    """Return ImageNet ResNets."""
    groups: list[_Group] = [(d, [(f"resnet{d}", {}), (f"sb-resnet{d}", {})]) for d in (18, 34, 50, 101)]
    return Experiment(
        name="table4",
        title="ImageNet ResNets (section 5)",
        data="imagenet",
        recipe="imagenet",
        entries=_against("table4", groups),
        figure=("figure5", "epochs"),
        note="The paper's errors are means of the last ten epochs; ours are of the last one.",
    )


def downsampling() -> Experiment:
    """Return strides against average pooling."""
    groups: list[_Group] = [
        (d, [(f"rsbn{d}", _sampled(s)), (f"rsbn{d}", {**_sampled(s), "down": "avgpool"})])
        for d in _REGULAR
        for s in ("1/4", "2/4")
    ]
    return Experiment(
        name="downsampling",
        title="sampling down by stride and by average pooling (section 4.4)",
        data="cifar100",
        recipe="cifar",
        entries=_against("downsampling", groups),
        figure=("downsampling", "macs"),
        note="In the paper average pooling is worse than strides (CIFAR-100, 110 layers, the only depth it "
        "prints). Our short runs of 20 layers on CIFAR-10 found it better: docs/measured/training.md.",
    )


EXPERIMENTS: dict[str, Callable[[], Experiment]] = {
    "table1": table1,
    "table2": table2,
    "table3": table3,
    "table4": table4,
    "downsampling": downsampling,
    # the samplings that table 2 compares
    "figure3": table2,
    "figure4": table1,
    "figure5": table4,
}


def by_name(name: str) -> Experiment:
    """Return a table by its name or by the name of the paper's figure that belongs to it.

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
