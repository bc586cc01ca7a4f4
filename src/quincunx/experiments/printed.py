"""The papers' printed figures, in one place. Nothing here was measured by this library.

Spatial bottlenecks: Peng et al., arXiv:1809.02601, errors in percent, mean and deviation over five runs
(table 4: over the last ten epochs). ESPACE and its baselines: Lin et al., AAAI 2017.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["ESPACE", "ESPACE_ORIGINALS", "MACS", "Error", "Gain", "Original", "error_of", "top5_of"]


@dataclass(frozen=True)
class Error:
    """A test error in percent; the deviation is None if not printed."""

    mean: float
    deviation: float | None = None

    def __str__(self) -> str:
        spread = "" if self.deviation is None else f" ± {self.deviation:.2f}"
        return f"{self.mean:.2f}{spread}"


# ---------------------------------------------------------------- spatial bottlenecks

# network -> multiply-adds per image in millions, at the sampling 2/4
MACS = {
    **{"rrn20": 40.5, "rrn44": 97.2, "rrn62": 139.6, "rrn86": 193.6, "rrn110": 252.9},
    **{"rsbn20": 24.0, "rsbn44": 52.3, "rsbn62": 73.6, "rsbn86": 101.9, "rsbn110": 130.0},
    **{"crn29": 34.5, "crn47": 57.1, "crn65": 79.6, "crn83": 102.3},
    **{"csbn29": 27.5, "csbn47": 42.9, "csbn65": 58.4, "csbn83": 73.8},
    **{"pyramidnet110-a84": 1150.0, "pyramidnet110-a270": 4960.0},
    **{"pyramidnet164-a84": 750.0, "pyramidnet164-a270": 2920.0},
    **{"sb-pyramidnet110-a84": 600.0, "sb-pyramidnet110-a270": 2600.0},
    **{"sb-pyramidnet164-a84": 560.0, "sb-pyramidnet164-a270": 2160.0},
    **{"resnet18": 1600.0, "resnet34": 3500.0, "resnet50": 3700.0, "resnet101": 7400.0},
    **{"sb-resnet18": 1000.0, "sb-resnet34": 2000.0, "sb-resnet50": 2900.0, "sb-resnet101": 5700.0},
}

# network -> error on CIFAR-10, on CIFAR-100
_TABLE1 = {
    "rrn20": (Error(6.99, 0.18), Error(30.10, 0.57)),
    "rsbn20": (Error(7.15, 0.22), Error(30.57, 0.23)),
    "rrn44": (Error(5.86, 0.28), Error(27.28, 0.33)),
    "rsbn44": (Error(5.80, 0.10), Error(27.35, 0.07)),
    "rrn62": (Error(5.70, 0.11), Error(26.28, 0.32)),
    "rsbn62": (Error(5.50, 0.13), Error(26.27, 0.28)),
    "rrn86": (Error(5.32, 0.11), Error(25.48, 0.28)),
    "rsbn86": (Error(5.31, 0.17), Error(25.25, 0.31)),
    "rrn110": (Error(5.13, 0.18), Error(25.01, 0.32)),
    "rsbn110": (Error(5.12, 0.14), Error(25.13, 0.01)),
    "crn29": (Error(6.42, 0.11), Error(27.04, 0.17)),
    "csbn29": (Error(6.27, 0.11), Error(26.35, 0.12)),
    "crn47": (Error(5.56, 0.26), Error(24.68, 0.20)),
    "csbn47": (Error(5.51, 0.09), Error(24.67, 0.21)),
    "crn65": (Error(5.15, 0.10), Error(24.04, 0.18)),
    "csbn65": (Error(5.09, 0.07), Error(23.98, 0.12)),
    "crn83": (Error(4.84, 0.11), Error(23.17, 0.28)),
    "csbn83": (Error(4.96, 0.04), Error(23.26, 0.16)),
}
# depth -> error on CIFAR-100 of regular blocks at 1/4, 2/4 and 3/4, and of the dense network
_TABLE2 = {
    20: (Error(31.06, 0.42), Error(30.57, 0.23), Error(30.51, 0.33), Error(30.10, 0.39)),
    44: (Error(28.39, 0.20), Error(27.35, 0.07), Error(27.65, 0.19), Error(27.28, 0.33)),
    62: (Error(27.50, 0.21), Error(26.27, 0.28), Error(26.44, 0.28), Error(26.28, 0.32)),
    86: (Error(26.49, 0.34), Error(25.25, 0.31), Error(25.85, 0.13), Error(25.48, 0.28)),
    110: (Error(25.82, 0.35), Error(25.13, 0.01), Error(25.24, 0.30), Error(25.01, 0.32)),
}
# network -> error on CIFAR-10, on CIFAR-100
_TABLE3 = {
    "pyramidnet110-a84": (Error(4.27), Error(20.21)),
    "sb-pyramidnet110-a84": (Error(4.25), Error(20.64)),
    "pyramidnet110-a270": (Error(3.73), Error(18.25)),
    "sb-pyramidnet110-a270": (Error(3.53), Error(18.36)),
    "pyramidnet164-a84": (Error(3.96), Error(18.32)),
    "sb-pyramidnet164-a84": (Error(3.80), Error(18.50)),
    "pyramidnet164-a270": (Error(3.48), Error(17.01)),
    "sb-pyramidnet164-a270": (Error(3.67), Error(17.20)),
}
# network -> top-1 and top-5 error on ImageNet
_TABLE4 = {
    "resnet18": (Error(30.70, 0.07), Error(10.86, 0.05)),
    "sb-resnet18": (Error(30.20, 0.06), Error(10.78, 0.04)),
    "resnet34": (Error(26.82, 0.06), Error(8.81, 0.04)),
    "sb-resnet34": (Error(26.48, 0.03), Error(8.65, 0.02)),
    "resnet50": (Error(24.52, 0.07), Error(7.35, 0.05)),
    "sb-resnet50": (Error(23.96, 0.04), Error(7.23, 0.03)),
    "resnet101": (Error(23.16, 0.19), Error(6.77, 0.10)),
    "sb-resnet101": (Error(22.69, 0.05), Error(6.52, 0.03)),
}

# (network, sampling, down) of a network and its settings; "" for the network's default
_Row = tuple[str, str, str]


def _row(network: str, settings: Sequence[tuple[str, str]]) -> _Row | None:
    """Return the row of a network; None for settings that no table of the paper has."""
    found = dict(settings)
    sampling, down = found.pop("sampling", ""), found.pop("down", "")
    if found:
        return None
    return network, "" if sampling == "2/4" else sampling, "" if down == "stride" else down


def _errors() -> dict[str, dict[tuple[_Row, str], Error]]:
    """Return each table by row and data set."""
    plain = {"table1": _TABLE1, "table3": _TABLE3}
    found = {
        table: {
            ((network, "", ""), data): error
            for network, errors in rows.items()
            for data, error in zip(("cifar10", "cifar100"), errors, strict=True)
        }
        for table, rows in plain.items()
    }
    found["table2"] = {
        (row, "cifar100"): error
        for depth, errors in _TABLE2.items()
        for row, error in zip(
            (*((f"rsbn{depth}", sampling, "") for sampling in ("1/4", "", "3/4")), (f"rrn{depth}", "", "")),
            errors,
            strict=True,
        )
    }
    found["table4"] = {((name, "", ""), "imagenet"): first for name, (first, _) in _TABLE4.items()}
    found["downsampling"] = {
        (("rsbn110", "1/4", ""), "cifar100"): Error(25.82, 0.35),
        (("rsbn110", "", ""), "cifar100"): Error(25.13, 0.01),
        (("rsbn110", "1/4", "avgpool"), "cifar100"): Error(26.28, 0.38),
        (("rsbn110", "", "avgpool"), "cifar100"): Error(25.82, 0.35),
    }
    return found


_ERRORS = _errors()


def error_of(network: str, settings: Sequence[tuple[str, str]], data: str, table: str = "") -> Error | None:
    """Return the printed test error of a network on a data set, from ``table`` or else the first that has it.

    Tables 1 and 2 print different deviations for rrn20 on CIFAR-100.

    Example:
        >>> str(error_of("rsbn110", [("sampling", "1/4"), ("down", "avgpool")], "cifar100"))
        '26.28 ± 0.38'
    """
    row = _row(network, settings)
    if row is None:
        return None
    for rows in ([_ERRORS[table]] if table in _ERRORS else []) + list(_ERRORS.values()):
        if (row, data) in rows:
            return rows[row, data]
    return None


def top5_of(network: str, settings: Sequence[tuple[str, str]], data: str) -> Error | None:
    """Return the printed top-5 error."""
    found = _TABLE4.get(network)
    return None if found is None or settings or data != "imagenet" else found[1]


# ---------------------------------------------------------------- ESPACE


@dataclass(frozen=True)
class Gain:
    """A printed figure of the ESPACE paper for a setting of a method.

    Attributes:
        method: as the figures and tables here name it.
        setting: as the figures and tables here name it; empty if the paper does not state one.
        speedup: measured on the paper's processor, of the replaced convolutions.
        drop: points of top-5 error gained; None if not printed.
    """

    method: str
    setting: str
    speedup: float
    drop: float | None = None

    @property
    def fields(self) -> tuple[tuple[str, float], ...]:
        """Return its speed-up and, if printed, its drop, by name."""
        return (("speedup", self.speedup), *([] if self.drop is None else [("drop", self.drop)]))

    def __str__(self) -> str:
        return f"{self.speedup:g}x{'' if self.drop is None else f' for {self.drop:.2f} points'}"


@dataclass(frozen=True)
class Original:
    """A dense network of the ESPACE paper: batch, seconds on its two processors, errors in percent."""

    batch: int
    cpu_seconds: float
    gpu_seconds: float
    error: float
    top5_error: float


ESPACE_ORIGINALS = {
    "alexnet": Original(50, 1.445, 0.074, 42.27, 19.11),
    "googlenet": Original(50, 3.697, 0.263, 31.07, 10.86),
}
_RATES = ("2/3", "1/2", "1/4", "1/5", "1/8")
_CODEBOOKS = ("4 per codeword, 64", "6 per codeword, 64", "6 per codeword, 128", "8 per codeword, 128")

_Pairs = Sequence[tuple[float, float]]


def _table(
    lrd: _Pairs, cpd: _Pairs, binary: tuple[float, float], qcnn: _Pairs, espace: _Pairs
) -> tuple[Gain, ...]:
    """Return table 2 or 3; the paper does not state the ranks of low rank and CP there."""
    return (
        *(Gain("LRD", "", *pair) for pair in lrd),
        *(Gain("CPD", "", *pair) for pair in cpd),
        Gain("BinaryConnect", "1 bit", *binary),
        *(Gain("Q-CNN", setting, *pair) for setting, pair in zip(_CODEBOOKS, qcnn, strict=True)),
        *(Gain("impact masks", f"rate {rate}", *pair) for rate, pair in zip(_RATES, espace, strict=True)),
    )


# figure or table -> its printed figures
ESPACE = {
    "espace-figure3": (
        Gain("impact masks", "", 4.72, 0.0),
        Gain("impact masks", "", 6.11, 0.1),
        Gain("Q-CNN", "", 6.06, 0.33),
        Gain("BinaryConnect", "1 bit", 12.02),
    ),
    "espace-figure4": (
        Gain("uniform masks, eq. 8", "", 3.11, 0.15),
        Gain("LRD", "rank 1", 1.93),
        Gain("CPD", "rank 1", 1.78),
    ),
    "espace-table2": _table(
        lrd=[(1.33, 0.00), (2.39, 0.00), (3.13, 0.57), (4.15, 1.37), (4.67, 2.41)],
        cpd=[(1.67, 0.00), (2.87, 0.31), (3.87, 1.12), (4.83, 3.73), (5.44, 7.12)],
        binary=(11.23, 10.23),
        qcnn=[(3.32, 0.94), (4.32, 1.90), (3.71, 0.36), (4.27, 0.60)],
        espace=[(1.89, 0.00), (2.27, 0.00), (4.15, 0.01), (5.48, 0.97), (8.12, 8.89)],
    ),
    "espace-table3": _table(
        lrd=[(1.21, 0.00), (2.31, 0.00), (2.89, 0.51), (3.57, 1.03), (4.02, 5.16)],
        cpd=[(1.34, 0.00), (2.42, 0.14), (3.25, 1.37), (3.97, 3.43), (4.68, 5.57)],
        binary=(8.35, 13.59),
        qcnn=[(3.43, 0.63), (3.96, 1.38), (4.23, 1.97), (4.56, 1.76)],
        espace=[(2.05, 0.00), (2.78, 0.00), (3.76, 0.04), (4.12, 0.68), (4.63, 2.89)],
    ),
}
